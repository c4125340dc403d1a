package kube

import (
	"net/netip"

	"fairlead.io/fairlead/dataplane"
)

// NodePortsWithoutAddress reports that no address of this node serves the node ports of a family.
// This is rarely intended.
type NodePortsWithoutAddress struct {
	Family dataplane.Family
	// Example is one of the Services with a node port of the family.
	Example dataplane.Key
}

// nodePortCheck detects node ports that no address serves.
type nodePortCheck struct {
	// ports contains the node ports by family.
	ports map[dataplane.Family]map[dataplane.Key]struct{}
	// servedFamilies contains the families of the addresses and networks that serve node ports,
	// including loopback addresses.
	servedFamilies map[dataplane.Family]bool
	// reported contains the families that were reported since they were last served.
	reported map[dataplane.Family]bool
}

// setNode updates the addresses that serve node ports.
func (c *nodePortCheck) setNode(node dataplane.Node, loopback []netip.Addr) {
	c.servedFamilies = map[dataplane.Family]bool{}
	for _, addrs := range [...][]netip.Addr{node.NodePortAddrs, loopback} {
		for _, a := range addrs {
			c.servedFamilies[dataplane.FamilyOf(a)] = true
		}
	}
	for _, network := range node.NodePortNetworks {
		c.servedFamilies[dataplane.FamilyOf(network.Addr())] = true
	}
}

// updateServices updates the node ports from changes.
func (c *nodePortCheck) updateServices(changes map[dataplane.Key]*dataplane.Service) {
	for key, svc := range changes {
		switch {
		case key.Kind != dataplane.NodePort:
		case svc == nil:
			delete(c.ports[key.Family], key)
		default:
			if c.ports == nil {
				c.ports = map[dataplane.Family]map[dataplane.Key]struct{}{dataplane.IPv4: {}, dataplane.IPv6: {}}
			}
			c.ports[key.Family][key] = struct{}{}
		}
	}
}

// newlyWithoutAddress returns a report for each family that has node ports but no address, unless
// it was reported since it was last served.
func (c *nodePortCheck) newlyWithoutAddress() []NodePortsWithoutAddress {
	var reports []NodePortsWithoutAddress
	for _, f := range [...]dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		if c.servedFamilies[f] {
			delete(c.reported, f)
			continue
		}
		if c.reported[f] {
			continue
		}
		for key := range c.ports[f] {
			if c.reported == nil {
				c.reported = map[dataplane.Family]bool{}
			}
			c.reported[f] = true
			reports = append(reports, NodePortsWithoutAddress{Family: f, Example: key})
			break
		}
	}
	return reports
}
