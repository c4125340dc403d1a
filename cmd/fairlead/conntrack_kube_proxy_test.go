package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// Settings of connection tracking that belong to the host. The tests mount a file over each, because
// only the initial network namespace can change them.
const (
	conntrackMaxPath  = "/proc/sys/net/netfilter/nf_conntrack_max"
	conntrackHashPath = "/sys/module/nf_conntrack/parameters/hashsize"
	onlineCPUsPath    = "/sys/devices/system/cpu/online"
)

// hostFiles are the names of the files that stand in for the host's settings.
var hostFiles = map[string]string{conntrackMaxPath: "max", conntrackHashPath: "hashsize", onlineCPUsPath: "online"}

// kernelConntrackSettings returns the sysctls and files of a host with two CPUs after boot.
func kernelConntrackSettings() map[string]string {
	return map[string]string{
		"tcp_timeout_established": "432000", "tcp_timeout_close_wait": "60", "tcp_be_liberal": "0", "udp_timeout": "30", "udp_timeout_stream": "120",
		"max": "65536", "hashsize": "16384", "online": "0-1",
	}
}

// isHostFile reports whether a setting of kernelConntrackSettings is a file.
func isHostFile(name string) bool {
	return slices.Contains(slices.Collect(maps.Values(hostFiles)), name)
}

// setConntrackSysctls sets the sysctls of the node's namespace.
func (n *testNode) setConntrackSysctls(values map[string]string) {
	n.t.Helper()
	if err := n.Node.Do(func() error {
		for name, value := range values {
			if isHostFile(name) {
				continue
			}
			if err := os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_"+name, []byte(value), 0); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		n.t.Fatal(err)
	}
}

// applyConntrackSettings runs a program with the settings, and returns the settings after it has
// exited, its exit code and its output.
func (n *testNode) applyConntrackSettings(before map[string]string, program string, args ...string) (after map[string]string, code int, output string) {
	n.t.Helper()
	n.setConntrackSysctls(before)
	dir := n.t.TempDir()
	var script strings.Builder
	for path, name := range hostFiles {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(before[name]+"\n"), 0o600); err != nil {
			n.t.Fatal(err)
		}
		fmt.Fprintf(&script, "mount --bind '%s' %s && ", filepath.Join(dir, name), path)
	}
	script.WriteString(`exec "$@"`)
	code, output = n.commandWithExitCode("unshare", append([]string{"--mount", "--propagation=private", "sh", "-c", script.String(), "sh", program}, args...)...)
	after = n.conntrackSysctls()
	for _, name := range hostFiles {
		after[name] = strings.TrimSpace(readFile(n.t, filepath.Join(dir, name)))
	}
	return after, code, output
}

// commandWithExitCode runs a program on the node and returns its exit code and output.
func (n *testNode) commandWithExitCode(name string, args ...string) (code int, output string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 4*waitTimeout)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), runProgramEnv+"=1", "GORACE=atexit_sleep_ms=0")
	cmd.Stdout, cmd.Stderr = &out, &out
	// The program exits when this end of the pipe closes, see TestMain.
	if _, err := cmd.StdinPipe(); err != nil {
		n.t.Fatal(err)
	}
	if err := n.Node.Do(cmd.Start); err != nil {
		n.t.Fatal(err)
	}
	_ = cmd.Wait() // callers check the exit code
	return cmd.ProcessState.ExitCode(), out.String()
}

// serveNode serves an API with the Node "node", and returns a kubeconfig.
func (n *testNode) serveNode() string {
	n.t.Helper()
	const (
		node     = `{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node", "resourceVersion": "1"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}`
		bookmark = `{"apiVersion": "v1", "kind": "Node", "metadata": {"resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"}}}`
	)
	var listener net.Listener
	if err := n.Node.Do(func() (err error) {
		listener, err = (&net.ListenConfig{}).Listen(n.t.Context(), "tcp", "127.0.0.1:0")
		return err
	}); err != nil {
		n.t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path != "/api/v1/nodes":
			http.NotFound(w, r)
		case r.URL.Query().Get("watch") == "":
			_, _ = fmt.Fprintf(w, `{"apiVersion": "v1", "kind": "NodeList", "metadata": {"resourceVersion": "1"}, "items": [%s]}`, node)
		default:
			if r.URL.Query().Get("sendInitialEvents") == "true" {
				_, _ = fmt.Fprintf(w, `{"type": "ADDED", "object": %s}{"type": "BOOKMARK", "object": %s}`, node, bookmark)
			}
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(listener)
	}()
	n.t.Cleanup(func() {
		_ = server.Close()
		<-ended
	})
	path := filepath.Join(n.t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c}}], `+
		`clusters: [{name: c, cluster: {server: "http://%s"}}]}`, listener.Addr())
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	return path
}

// kubeProxyPath returns the path of the real kube-proxy, or skips the test.
func kubeProxyPath(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs(builtKubeProxy)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Skip("run make kube-proxy first")
	}
	return path
}

// TestConntrackSettingsAsKubeProxy runs the real kube-proxy and the program one after the other with
// the same configuration, and compares the settings of the kernel afterwards.
func TestConntrackSettingsAsKubeProxy(t *testing.T) {
	t.Parallel()
	kubeProxy := kubeProxyPath(t)
	n := newTestNode(t)
	kubeconfig := n.serveNode()
	fairlead, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name      string
		conntrack string            // the fields of conntrack, or empty to use args
		args      []string          // of both programs
		before    map[string]string // besides kernelConntrackSettings
		// want are the changes by kube-proxy. different are the settings that Fairlead
		// sets in another way.
		want, different map[string]string
		fails           bool
	}{
		{
			name: "defaults", conntrack: "{}",
			want: map[string]string{"max": "131072", "hashsize": "32768", "tcp_timeout_established": "86400", "tcp_timeout_close_wait": "3600"},
		},
		{
			name: "flags", args: []string{
				"--conntrack-max-per-core=100000", "--conntrack-min=1", "--conntrack-tcp-timeout-established=2h", "--conntrack-tcp-timeout-close-wait=0",
				"--conntrack-tcp-be-liberal", "--conntrack-udp-timeout=45s", "--conntrack-udp-timeout-stream=200s",
			},
			want: map[string]string{
				"max": "200000", "hashsize": "50000", "tcp_timeout_established": "7200", "tcp_be_liberal": "1",
				"udp_timeout": "45", "udp_timeout_stream": "200",
			},
		},
		{
			name: "flags not set", args: []string{"--conntrack-udp-timeout=1m"},
			want: map[string]string{
				"max": "131072", "hashsize": "32768", "tcp_timeout_established": "86400", "tcp_timeout_close_wait": "3600", "udp_timeout": "60",
			},
		},
		{
			name: "null", conntrack: "{maxPerCore: null, min: null, tcpEstablishedTimeout: null, tcpCloseWaitTimeout: null, tcpBeLiberal: null}",
			want: map[string]string{"max": "131072", "hashsize": "32768", "tcp_timeout_established": "86400", "tcp_timeout_close_wait": "3600"},
		},
		{name: "udpTimeout is null", conntrack: "{udpTimeout: null}", fails: true},
		{name: "udpStreamTimeout is null", conntrack: "{udpStreamTimeout: null}", fails: true},
		{
			name: "conntrack is null", conntrack: "null",
			want: map[string]string{"max": "131072", "hashsize": "32768", "tcp_timeout_established": "86400", "tcp_timeout_close_wait": "3600"},
		},
		{
			name: "0", conntrack: "{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s, udpTimeout: 0s, udpStreamTimeout: 0s}",
		},
		{
			name: "maxPerCore 0 disables min", conntrack: "{maxPerCore: 0, min: 500000, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}",
		},
		{
			name: "min 0", conntrack: "{maxPerCore: 40000, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}",
			want: map[string]string{"max": "80000", "hashsize": "20000"},
		},
		{
			name: "raised by CPUs", conntrack: "{tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}",
			before: map[string]string{"online": "0-3,8-11"},
			want:   map[string]string{"max": "262144", "hashsize": "65536"},
		},
		{
			name: "limit", conntrack: "{min: 3000000, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}",
			before: map[string]string{"online": "0-63"},
			want:   map[string]string{"max": "1048576", "hashsize": "262144"},
		},
		{
			name: "min above the limit", conntrack: "{min: 3000000, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}",
			want: map[string]string{"max": "3000000", "hashsize": "750000"},
		},
		{
			name: "never lowered", conntrack: "{tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}",
			before: map[string]string{"max": "300000", "hashsize": "100000"},
		},
		{
			name: "only the hash table is raised", conntrack: "{tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}",
			before: map[string]string{"max": "300000"},
			want:   map[string]string{"hashsize": "32768"},
		},
		{
			name: "timeouts are lowered", conntrack: "{maxPerCore: 0, tcpEstablishedTimeout: 10m, tcpCloseWaitTimeout: 30s, udpTimeout: 10s, udpStreamTimeout: 20s}",
			want: map[string]string{"tcp_timeout_established": "600", "tcp_timeout_close_wait": "30", "udp_timeout": "10", "udp_timeout_stream": "20"},
		},
		{
			name: "tcpBeLiberal", conntrack: "{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s, tcpBeLiberal: true}",
			want: map[string]string{"tcp_be_liberal": "1"},
		},
		{
			name: "tcpBeLiberal false does not disable", conntrack: "{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s, tcpBeLiberal: false}",
			before: map[string]string{"tcp_be_liberal": "1"},
		},
		{
			name: "fractions", conntrack: "{maxPerCore: 0, tcpEstablishedTimeout: 1h0m0.9s, tcpCloseWaitTimeout: 1999ms, udpTimeout: 1.5s, udpStreamTimeout: 500ms}",
			want: map[string]string{"tcp_timeout_established": "3600", "tcp_timeout_close_wait": "1", "udp_timeout": "1", "udp_timeout_stream": "0"},
			// With 0, flows would expire with each packet.
			different: map[string]string{"udp_timeout_stream": "1"},
		},
		{
			name: "too long for the kernel", conntrack: "{maxPerCore: 0, tcpEstablishedTimeout: 1000000h, udpTimeout: 45s}", fails: true,
			// kube-proxy stops at the first error.
			different: map[string]string{"tcp_timeout_close_wait": "3600", "udp_timeout": "45"},
		},
		{name: "negative timeout", conntrack: "{maxPerCore: 0, udpTimeout: -1s}", fails: true},
		{name: "negative maximum", conntrack: "{maxPerCore: -1}", fails: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := *n
			n.t = t
			args := append([]string{"--init-only", "--hostname-override=node"}, test.args...)
			kubeProxyArgs, fairleadArgs := []string{"--kubeconfig=" + kubeconfig, "--proxy-mode=nftables"}, []string{"--mode=nft"}
			if test.conntrack != "" {
				text := configHeader + "mode: nftables\nclientConnection: {kubeconfig: " + kubeconfig + "}\nconntrack: " + test.conntrack + "\n"
				kubeProxyArgs = []string{"--config=" + writeConfigFile(t, text)}
				fairleadArgs = kubeProxyArgs
			}
			before := kernelConntrackSettings()
			maps.Copy(before, test.before)
			want := maps.Clone(before)
			maps.Copy(want, test.want)
			check := func(name string, want, got map[string]string, code int, output string) {
				t.Helper()
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s: settings (-want +got):\n%s\n%s", name, diff, output)
				}
				if fails := code != 0; fails != test.fails {
					t.Errorf("%s: exit code %d:\n%s", name, code, output)
				}
			}
			got, code, output := n.applyConntrackSettings(before, kubeProxy, slices.Concat(kubeProxyArgs, args)...)
			check("kube-proxy", want, got, code, output)
			maps.Copy(got, test.different)
			ours, code, output := n.applyConntrackSettings(before, fairlead, slices.Concat([]string{"run", "--manifests=" + n.folder}, fairleadArgs, args)...)
			check("fairlead", got, ours, code, output)
		})
	}
}

// TestConntrackMaxAsKubeProxy checks that both programs try to set the same maximum in a network
// namespace that cannot set it, and fail.
func TestConntrackMaxAsKubeProxy(t *testing.T) {
	t.Parallel()
	kubeProxy := kubeProxyPath(t)
	n := newTestNode(t)
	current, err := strconv.Atoi(strings.TrimSpace(readFile(t, conntrackMaxPath)))
	if err != nil {
		t.Fatal(err)
	}
	config := writeConfigFile(t, fmt.Sprintf("%smode: nftables\nclientConnection: {kubeconfig: %s}\nconntrack: {maxPerCore: 1, min: %d}\n",
		configHeader, n.serveNode(), current+4))
	args := []string{"--config=" + config, "--hostname-override=node", "--init-only"}
	code, log := n.commandWithExitCode(kubeProxy, args...)
	set := regexp.MustCompile(`entry="net/netfilter/nf_conntrack_max" value=(\d+)`).FindStringSubmatch(log)
	if code != 1 || set == nil {
		t.Fatalf("kube-proxy: exit code %d, log:\n%s", code, log)
	}
	code, stderr := n.runOnce(nil, append([]string{"run", "--manifests=" + n.folder}, args...)...)
	if want := fmt.Sprintf("cannot set net.netfilter.nf_conntrack_max=%s (is %d): ", set[1], current); code != 1 || !strings.Contains(stderr, want) {
		t.Errorf("exit code %d, want 1 and %q in the output:\n%s", code, want, stderr)
	}
	if got := agenttest.Command(t, n.Node, "cat", conntrackMaxPath); strings.TrimSpace(got) != strconv.Itoa(current) {
		t.Errorf("the maximum is %s, want %d", got, current)
	}
}
