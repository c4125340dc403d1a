//go:build ipvs

package ipvs

import (
	"errors"
	"fmt"
	"testing"

	"github.com/moby/ipvs"
)

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
