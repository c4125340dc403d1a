package preflight

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/scratchns"
)

// programExample programs example Services with the backend in a new network namespace, and reads
// them back.
func programExample(ctx context.Context, b backend.Backend, o backend.Options) error {
	namespace, err := scratchns.New()
	if err != nil {
		return err
	}
	defer namespace.Close() //nolint:errcheck // nothing was written to it
	services, err := exampleServices()
	if err != nil {
		return err
	}
	o.NetNS = int(namespace.Fd())
	d, err := b.Open(o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, exampleTimeout)
	defer cancel()
	err = d.Replace(ctx, dataplane.Node{ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}}, slices.Values(services), nil)
	if err == nil {
		var state dataplane.State
		if state, err = d.Read(ctx); err == nil && len(state) != len(services) {
			err = fmt.Errorf("%d of %d example Services were read back", len(state), len(services))
		}
	}
	return errors.Join(err, d.Close())
}

// exampleTimeout limits the time to program the example.
const exampleTimeout = 30 * time.Second

// exampleServices returns Services of both IP families that use all features of tables.
func exampleServices() ([]*dataplane.Service, error) {
	var services []*dataplane.Service
	families := [2]dataplane.Family{dataplane.IPv4, dataplane.IPv6}
	for i, addrs := range [2][3]string{{"10.96.0.10:80", "10.244.0.1:8080", "192.0.2.0/24"}, {"[fd00:96::a]:80", "[fd00:244::1]:8080", "2001:db8::/32"}} {
		for _, protocol := range []dataplane.Protocol{dataplane.TCP, dataplane.UDP} {
			s, err := dataplane.NewService(
				dataplane.Key{Namespace: "default", Name: "example", Port: strings.ToLower(protocol.String()), Family: families[i]},
				[]dataplane.Frontend{{Protocol: protocol, Addr: netip.MustParseAddrPort(addrs[0])}},
				dataplane.ServiceSpec{
					Endpoints: []dataplane.Endpoint{{Addr: netip.MustParseAddrPort(addrs[1]), Local: true}},
					Affinity:  time.Hour, SourceRanges: []netip.Prefix{netip.MustParsePrefix(addrs[2])}, Masquerade: dataplane.MasqueradeOffCluster,
				})
			if err != nil {
				return nil, fmt.Errorf("example Service: %w", err)
			}
			services = append(services, s)
		}
	}
	return services, nil
}
