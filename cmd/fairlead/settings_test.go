package main

import (
	"maps"
	"testing"

	"fairlead.io/fairlead/internal/config"
)

// TestRunFlags checks which command lines of running processes are agents, and their flags.
func TestRunFlags(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, cmdline string
		want          config.Flags
	}{
		{"no flags", "/fairlead\x00run\x00", config.Flags{}},
		{"flags in both forms", "/fairlead\x00run\x00--config=/etc/c\x00--hostname_override\x00node-1\x00", config.Flags{"config": "/etc/c", "hostname-override": "node-1"}},
		{"an empty argument", "fairlead\x00run\x00\x00--mode=ipvs\x00", config.Flags{"mode": "ipvs"}},
		{"repeated lists", "fairlead\x00run\x00--service-cidr=10.96.0.0/16\x00--service-cidr=fd00::/112\x00", config.Flags{"service-cidr": "10.96.0.0/16,fd00::/112"}},
		{"started as kube-proxy", "/usr/local/bin/kube-proxy\x00--config=/c\x00", config.Flags{"kube-proxy-defaults": "true", "config": "/c"}},
		{"another command", "/fairlead\x00cleanup\x00", nil},
		{"no arguments", "/fairlead\x00", nil},
		{"a kernel thread", "", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, err := runFlags(splitCommandLine([]byte(test.cmdline)))
			if (err != nil) != (test.want == nil) {
				t.Fatalf("error %v, want flags %v", err, test.want)
			}
			if !maps.Equal(got, test.want) {
				t.Errorf("flags %v, want %v", got, test.want)
			}
		})
	}
}

// TestProcessPaths checks how paths of an agent in the same and in another mount namespace are opened.
func TestProcessPaths(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ root, path, want string }{
		{"", "", ""},
		{"", "/etc/kubeconfig", "/etc/kubeconfig"},
		{"", "services", "/srv/services"},
		{"/proc/7/root", "/etc/kubeconfig", "/proc/7/root/etc/kubeconfig"},
		{"/proc/7/root", "services", "/proc/7/root/srv/services"},
		{"/proc/7/root", "", ""},
	} {
		if got := (processFiles{root: test.root, cwd: "/srv"}).path(test.path); got != test.want {
			t.Errorf("path(%q) with root %q is %q, want %q", test.path, test.root, got, test.want)
		}
	}
}
