//go:build ipvs

package ipvs

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/kmod"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"
)

// TestModuleReload checks that the backend resolves the number of the IPVS family again after
// a reload of the module. github.com/moby/ipvs resolves it once per process, so its old
// handles stop working. If that changes, this package may use more of it.
func TestModuleReload(t *testing.T) {
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	path := fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	moby, err := ipvs.New(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := moby.GetServices(); err != nil {
		t.Fatal(err)
	}
	moby.Close()
	k, err := dialIPVS(ns.Fd())
	if err != nil {
		t.Fatal(err)
	}
	defer k.close() //nolint:errcheck // not used any more
	before := k.family
	reloadModules(t)
	if _, err := k.dumpServers(); err != nil {
		t.Error(err)
	}
	if k.family == before {
		t.Errorf("the family's number is still %d", before)
	}
	s := serverKey{dataplane.TCP, benchServers(1)[0].addr}
	answers, err := k.run([]request{{command: newService, serverKey: s, settings: settings{scheduler: "rr"}}, {command: delService, serverKey: s}})
	if err := errors.Join(append(answers, err)...); err != nil {
		t.Error(err)
	}
	if moby, err = ipvs.New(path); err == nil {
		_, err = moby.GetServices()
		moby.Close()
	}
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("github.com/moby/ipvs: error %v, want ENOENT", err)
	}
}

// reloadModules unloads IPVS and its schedulers and loads IPVS again. It retries the unload,
// because the kernel deletes the namespaces of earlier tests with a delay.
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
	if err := kmod.Load("ip_vs"); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkRead compares this package with github.com/moby/ipvs: both read all virtual servers
// and their destinations.
func BenchmarkRead(b *testing.B) {
	const n = 1000
	ns, h := benchHost(b)
	k, err := dialIPVS(ns.Fd())
	if err != nil {
		b.Fatal(err)
	}
	var requests []request
	for i, s := range benchServers(n) {
		requests = append(requests, request{command: newService, serverKey: s, settings: settings{scheduler: "rr"}})
		for j := range benchDestinations {
			requests = append(requests, request{command: newDest, serverKey: s, dest: benchDestination(i, j), weight: 1})
		}
	}
	answers, err := k.run(requests)
	if err := errors.Join(append(answers, err)...); err != nil {
		b.Fatal(err)
	}
	b.Run(fmt.Sprintf("by=fairlead/servers=%d", n), func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			found, err := k.dumpServers()
			if err != nil || len(found) != n {
				b.Fatalf("%d virtual servers, %v", len(found), err)
			}
			for s := range found {
				destinations, err := k.dumpDestinations(s)
				if err != nil || len(destinations) != benchDestinations {
					b.Fatalf("%s: %d destinations, %v", s, len(destinations), err)
				}
			}
		}
	})
	b.Run(fmt.Sprintf("by=moby/servers=%d", n), func(b *testing.B) {
		moby, err := ipvs.New(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()))
		if err != nil {
			b.Fatal(err)
		}
		defer moby.Close()
		b.ReportAllocs()
		for b.Loop() {
			found, err := moby.GetServices()
			if err != nil || len(found) != n {
				b.Fatalf("%d virtual servers, %v", len(found), err)
			}
			for _, s := range found {
				destinations, err := moby.GetDestinations(s)
				if err != nil || len(destinations) != benchDestinations {
					b.Fatalf("%v: %d destinations, %v", s, len(destinations), err)
				}
			}
		}
	})
	if err := errors.Join(k.close(), h.close(), ns.Close()); err != nil {
		b.Fatal(err)
	}
}
