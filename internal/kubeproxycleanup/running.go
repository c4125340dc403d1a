package kubeproxycleanup

import (
	"debug/buildinfo"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// kubeProxyPackage is the path of kube-proxy's main package.
const kubeProxyPackage = "k8s.io/kubernetes/cmd/kube-proxy"

// RunningKubeProxy returns the process ID of a kube-proxy in the network namespace of the calling
// thread, or 0 if none runs. It reads the programs of processes with the name kube-proxy,
// because Fairlead can have this name, too. It cannot see processes of other PID namespaces, nor
// a kube-proxy that is part of another program, as in k3s.
func RunningKubeProxy() int {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return 0
	}
	processes, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well formed
	for _, process := range processes {
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil || strings.TrimSpace(string(name)) != "kube-proxy" {
			continue
		}
		if netns, err := os.Readlink(filepath.Join(process, "ns/net")); err != nil || netns != own {
			continue
		}
		info, err := buildinfo.ReadFile(filepath.Join(process, "exe"))
		if err != nil || info.Path != kubeProxyPackage {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(process)); err == nil {
			return pid
		}
	}
	return 0
}
