//go:build ipvs

package reloadtest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/kmod"
	"fairlead.io/fairlead/internal/nettest"
	backend "fairlead.io/fairlead/ipvs"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"
)

// TestModuleReload checks that the backend resolves the number of the IPVS family again after a
// reload of the module. github.com/moby/ipvs resolves it once per process, so all its later calls
// fail. If that changes, package ipvs may use more of it.
func TestModuleReload(t *testing.T) {
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	path := fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	opts := backend.Options{NetNS: ns.Fd()}
	if err := backend.SetUp(opts); err != nil {
		t.Fatal(err)
	}
	d, err := backend.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	key := dataplane.Key{Namespace: "default", Name: "web", Port: "http", Family: dataplane.IPv4}
	s, err := dataplane.NewService(key, []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort("10.96.0.1:80")}},
		dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.MustParseAddrPort("10.244.0.1:8080")}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Replace(t.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{}), nil); err != nil {
		t.Fatal(err)
	}
	moby, err := ipvs.New(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := moby.GetServices(); err != nil {
		t.Fatal(err)
	}
	moby.Close()

	reloadModules(t)

	if err := backend.SetUp(opts); err != nil { // a new module has the kernel's default settings
		t.Fatal(err)
	}
	if err := d.Replace(t.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{s}), nil); err != nil {
		t.Fatal(err)
	}
	state, err := d.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := dataplane.StateOf(slices.Values([]*dataplane.Service{s})); !want.Equal(state) {
		t.Errorf("after the reload:\n%s", want.Diff(state))
	}
	if moby, err = ipvs.New(path); err == nil {
		_, err = moby.GetServices()
		moby.Close()
	}
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("github.com/moby/ipvs: error %v, want ENOENT", err)
	}
}

// reloadModules unloads IPVS and its schedulers and loads IPVS again.
func reloadModules(t *testing.T) {
	t.Helper()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		b, err := os.ReadFile("/proc/modules")
		if err != nil {
			t.Fatal(err)
		}
		var loaded []string
		for line := range strings.Lines(string(b)) {
			if name, _, _ := strings.Cut(line, " "); strings.HasPrefix(name, "ip_vs") {
				loaded = append(loaded, name)
			}
		}
		if len(loaded) == 0 {
			break
		}
		slices.Sort(loaded)
		slices.Reverse(loaded) // ip_vs itself must be last
		for _, name := range loaded {
			if err = unix.DeleteModule(name, 0); err != nil {
				break
			}
		}
		if err != nil && time.Now().After(limit) {
			t.Fatalf("unload %v: %v", loaded, err)
		}
	}
	if err := kmod.Load("ip_vs", "ip_vs_rr"); err != nil {
		t.Fatal(err)
	}
}
