package system_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/internal/nettest"
)

// TestUnavailable checks that missing programs are reported as an UnavailableError.
func TestUnavailable(t *testing.T) {
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	env := system.Environment{Namespace: ns, Dir: t.TempDir()}
	for name, test := range map[string]struct {
		binary, mode, path string
		want               string
	}{
		"no kube-proxy": {"/does/not/exist", "nftables", "", "make kube-proxy"},
		"no nft":        {"/bin/true", "nftables", "/nowhere", "needs the program nft"},
		"no iptables":   {"/bin/true", "iptables", "/nowhere", "needs the program iptables"},
	} {
		t.Run(name, func(t *testing.T) {
			if test.path != "" {
				t.Setenv("PATH", test.path)
			}
			_, err := system.KubeProxy{Binary: test.binary, Mode: test.mode}.Start(t.Context(), env)
			if e, ok := errors.AsType[*system.UnavailableError](err); !ok || !strings.Contains(e.Reason, test.want) {
				t.Errorf("error %v, want an UnavailableError with %q", err, test.want)
			}
		})
	}
}

// TestCommands checks that additional arguments come last, so that they take precedence.
func TestCommands(t *testing.T) {
	env := system.Environment{Kubeconfig: "/k", NodeName: "n"}
	for _, command := range [][]string{
		system.KubeProxy{Binary: "b", Mode: "nftables", Args: []string{"--last"}}.Command(env),
		system.Fairlead{Binary: "b", Mode: "nft", Args: []string{"--last"}}.Command(env),
	} {
		if command[0] != "b" || command[len(command)-1] != "--last" || !slices.Contains(command, "--kubeconfig=/k") || !slices.Contains(command, "--hostname-override=n") {
			t.Errorf("the command is %q", command)
		}
	}
}
