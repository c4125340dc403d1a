package main

import (
	"log/slog"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// unserved tells of node ports that no address of this node serves, which may be
// meant, and more often is not.
type unserved struct {
	wanted map[dataplane.Key]struct{}
	logged map[dataplane.Family]bool
}

// take takes over which node ports there are.
func (u *unserved) take(changes map[dataplane.Key]*dataplane.Service) {
	for key, svc := range changes {
		switch {
		case key.Kind != dataplane.NodePort:
		case svc == nil:
			delete(u.wanted, key)
		default:
			if u.wanted == nil {
				u.wanted = map[dataplane.Key]struct{}{}
			}
			u.wanted[key] = struct{}{}
		}
	}
}

// check logs once for each family, until it is served again. served are the
// families of the addresses on which node ports are served.
func (u *unserved) check(log *slog.Logger, served []dataplane.Family) {
	for _, f := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		switch {
		case slices.Contains(served, f):
			delete(u.logged, f)
		case !u.logged[f]:
			for key := range u.wanted {
				if key.Family != f {
					continue
				}
				if u.logged == nil {
					u.logged = map[dataplane.Family]bool{}
				}
				u.logged[f] = true
				log.Warn("node ports are not served, as no address of this node is one for them: check --nodeport-addresses "+
					"(nodePortAddresses in the file of --config), and the addresses of the Node, which count only if an interface "+
					"has them, and none that lies in a ServiceCIDR unless it is the Node's", "ip_family", f.String(), "service", key.String())
				break
			}
		}
	}
}
