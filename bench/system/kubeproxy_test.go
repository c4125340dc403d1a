package system_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/internal/nettest"
)

// What is not there is told apart from what goes wrong.
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
				t.Errorf("error %v, want that it is unavailable, with %q", err, test.want)
			}
		})
	}
}

// Arguments that are given come last, so that they prevail.
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
