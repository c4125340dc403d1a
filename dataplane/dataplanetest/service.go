package dataplanetest

import (
	"net/netip"
	"strings"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// NewService returns a Service of the namespace default. Frontends are written as in "tcp 10.96.0.10:80".
func NewService(t testing.TB, name string, kind dataplane.Kind, spec dataplane.ServiceSpec, frontends ...string) *dataplane.Service {
	t.Helper()
	var all []dataplane.Frontend
	for _, text := range frontends {
		network, addr, _ := strings.Cut(text, " ")
		f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort(addr)}
		if network == nettest.UDP {
			f.Protocol = dataplane.UDP
		}
		all = append(all, f)
	}
	s, err := dataplane.NewService(dataplane.Key{
		Namespace: "default", Name: name, Family: dataplane.FamilyOf(all[0].Addr.Addr()), Kind: kind,
	}, all, spec)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
