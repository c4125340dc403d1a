package kube

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// allKinds are the kinds of frontends, in the order of the wants of a port.
type allKinds [4]dataplane.Kind

func kinds() allKinds {
	return allKinds{dataplane.ClusterIP, dataplane.NodePort, dataplane.ExternalIP, dataplane.LoadBalancer}
}

// addresses are a Service's, of all its ports.
type addresses struct {
	// clusterIPs has at most one a family. Without one of a family the Service is
	// not served in that family.
	clusterIPs []netip.Addr
	// unusableClusterIPs are those of cluster to which no connection is translated, as
	// something else has them.
	unusableClusterIPs []netip.Addr
	// externalIPs and balancer are of families with a cluster IP. No address is
	// in both.
	externalIPs, loadBalancerIPs addrSet
}

// portFamily is a usable port of a Service in one family.
type portFamily struct {
	// index is that in spec.ports.
	index    int
	port     *corev1.ServicePort
	protocol dataplane.Protocol
	family   dataplane.Family
	// cluster is the Service's cluster IP of the family.
	cluster netip.Addr

	// candidates are what the slices have for it, in the end those believed, and
	// chosen what connections go to. matched says that a slice knows the port.
	candidates []candidate
	matched    bool
	chosen     choice
	// beyondLimit says that the Service has more candidates than are read.
	beyondLimit bool
}

func (c *conversion) addresses() addresses {
	a := addresses{clusterIPs: c.clusterIPs()}
	if len(a.clusterIPs) == 0 {
		return a
	}
	a.unusableClusterIPs = c.unusableClusterIPs(a.clusterIPs)
	a.loadBalancerIPs = c.loadBalancerIPs(a.clusterIPs)
	a.externalIPs = c.externalIPs(a)
	return a
}

// hasFamilyOf reports whether one of addrs has the family of addr.
func hasFamilyOf(addrs []netip.Addr, addr netip.Addr) bool {
	return slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() })
}

// clusterIPs returns the Service's cluster IPs, at most one a family, in the
// order of the Service.
func (c *conversion) clusterIPs() []netip.Addr {
	spec := &c.service.Spec
	if len(spec.ClusterIPs) == 0 {
		// From before dual stack, or has not got an address yet.
		if spec.ClusterIP == "" {
			return nil
		}
		if addr, ok := c.clusterIP("spec.clusterIP", 0, spec.ClusterIP, nil); ok {
			return []netip.Addr{addr}
		}
		return nil
	}
	addrs := make([]netip.Addr, 0, len(spec.ClusterIPs))
	for i, text := range spec.ClusterIPs {
		if text == "" {
			continue
		}
		if addr, ok := c.clusterIP("", i, text, addrs); ok {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// unusableClusterIPs returns those of the cluster IPs that belong to the node, or
// that no packet to a Service can have. If one of these were programmed, the node
// would lose its own connections to it, on every port.
func (c *conversion) unusableClusterIPs(cluster []netip.Addr) (unserved []netip.Addr) {
	for _, addr := range cluster {
		err := validateAddr(addr)
		if _, ok := c.location.ownAddrs[addr]; err == nil && ok {
			err = errNodeAddr
		}
		if err == nil {
			continue
		}
		unserved = append(unserved, addr)
		c.addProblem(c.clusterIPField(addr), "%s %v, so it is not served: create the Service anew with another cluster IP, "+
			"and see to it that no ServiceCIDR (--service-cluster-ip-range) overlaps the nodes' networks", addr, err)
	}
	return unserved
}

// clusterIPField returns the field that a cluster IP is from.
func (c *conversion) clusterIPField(addr netip.Addr) string {
	for i, text := range c.service.Spec.ClusterIPs {
		if a, err := parseAddr(text); err == nil && a == addr {
			return elementPath("spec.clusterIPs", i, "")
		}
	}
	return "spec.clusterIP"
}

// clusterIP reads the i-th cluster IP, which is that of clusterIPs if field is
// empty.
func (c *conversion) clusterIP(field string, i int, text string, earlier []netip.Addr) (netip.Addr, bool) {
	path := func() string {
		if field != "" {
			return field
		}
		return elementPath("spec.clusterIPs", i, "")
	}
	families := c.service.Spec.IPFamilies
	addr, err := parseAddr(text)
	switch {
	case err != nil:
		c.addProblem(path(), "%q %v: give the Service another cluster IP", text, err)
	case len(families) > 0 && i >= len(families):
		c.addProblem(path(), "%s has no family in spec.ipFamilies: name one family for each cluster IP", addr)
	case len(families) > 0 && string(families[i]) != dataplane.FamilyOf(addr).String():
		c.addProblem(path(), "%s is not of the family %s that spec.ipFamilies[%d] names: make them match", addr, families[i], i)
	case hasFamilyOf(earlier, addr):
		c.addProblem(path(), "%s is a second address of one family: a Service has one cluster IP per family", addr)
	default:
		return addr, true
	}
	return netip.Addr{}, false
}

// loadBalancerIPs returns the addresses of load balancers that deliver packets as
// they came in, addressed to the load balancer. Those of load balancers that
// connect by themselves (ipMode Proxy), or have only a name, are not for nodes
// to answer.
func (c *conversion) loadBalancerIPs(cluster []netip.Addr) addrSet {
	var addrs addrSet
	for i := range c.service.Status.LoadBalancer.Ingress {
		ingress := &c.service.Status.LoadBalancer.Ingress[i]
		if ingress.IP == "" || (ingress.IPMode != nil && *ingress.IPMode != corev1.LoadBalancerIPModeVIP) {
			continue
		}
		addr, err := parseAddr(ingress.IP)
		if err == nil && addr.IsLoopback() {
			err = errLoopback
		}
		if err == nil && addr.IsMulticast() {
			err = errMulticast
		}
		if err != nil {
			c.addProblem(elementPath("status.loadBalancer.ingress", i, ".ip"),
				"%q %v: the controller of the load balancer must write an address that clients can connect to", ingress.IP, err)
			continue
		}
		// An address of another family is that of a load balancer that
		// translates, so it is no mistake.
		if hasFamilyOf(cluster, addr) {
			addrs.add(addr)
		}
	}
	return addrs
}

// externalIPs returns spec.externalIPs, but for those that the Service has from
// its load balancer too: these are treated as the load balancer's, so that
// loadBalancerSourceRanges can't be passed by.
func (c *conversion) externalIPs(a addresses) addrSet {
	var addrs addrSet
	for i, text := range c.service.Spec.ExternalIPs {
		if text == "" {
			continue // the API server lets it pass, kube-proxy too
		}
		addr, err := parseAddr(text)
		if err == nil {
			err = validateAddr(addr)
		}
		switch {
		case err != nil:
			c.addProblem(elementPath("spec.externalIPs", i, ""), "%q %v: name an address that clients can connect to", text, err)
		case !hasFamilyOf(a.clusterIPs, addr):
			c.addProblem(elementPath("spec.externalIPs", i, ""),
				"%s is not served, as the Service has no cluster IP of the family %s: add the family to spec.ipFamilies, or remove the address",
				addr, dataplane.FamilyOf(addr))
		case !a.loadBalancerIPs.has(addr):
			addrs.add(addr)
		}
	}
	return addrs
}

// ports returns the usable ports, each in every family that has a cluster IP.
func (c *conversion) ports(addrs addresses) []portFamily {
	list := c.service.Spec.Ports
	ports := make([]portFamily, 0, len(list)*len(addrs.clusterIPs))
	var names map[string]struct{}
	if len(list) > linearSearchMax {
		names = make(map[string]struct{}, len(list))
	}
	taken := func(i int) bool {
		if names != nil {
			_, ok := names[list[i].Name]
			return ok
		}
		return slices.ContainsFunc(list[:i], func(p corev1.ServicePort) bool { return p.Name == list[i].Name })
	}
	for i := range list {
		port := &list[i]
		again := taken(i)
		if names != nil {
			names[port.Name] = struct{}{}
		}
		protocol, ok := protocolOf(port.Protocol)
		if !ok {
			c.addProblem(elementPath("spec.ports", i, ".protocol"), "%q is not a protocol: use TCP, UDP or SCTP", port.Protocol)
			continue
		}
		if port.Port < 1 || port.Port > 65535 {
			c.addProblem(elementPath("spec.ports", i, ".port"), "%d is not a port: use 1 to 65535", port.Port)
			continue
		}
		if again {
			c.addProblem(elementPath("spec.ports", i, ".name"),
				"%q is the name of an earlier port: give each port a name of its own", port.Name)
			continue
		}
		if port.NodePort < 0 || port.NodePort > 65535 {
			c.addProblem(elementPath("spec.ports", i, ".nodePort"), "%d is not a port: use 1 to 65535, or leave it out", port.NodePort)
		}
		for _, addr := range addrs.clusterIPs {
			ports = append(ports, portFamily{
				index: i, port: port, protocol: protocol, family: dataplane.FamilyOf(addr), cluster: addr,
			})
		}
	}
	return ports
}

// desiredServices makes the wants: one for each port, family and kind with a frontend.
func (c *conversion) desiredServices(ports []portFamily, addrs addresses, policy policy) []desiredService {
	perPort := 1 + len(addrs.externalIPs.list) + len(addrs.loadBalancerIPs.list)
	if hasNodePorts(c.service.Spec.Type) {
		perPort++
	}
	frontends := make([]dataplane.Frontend, 0, min(len(ports)*perPort, maxElements))
	wants := make([]desiredService, 0, len(ports)*min(perPort, len(allKinds{})))
	ranges := c.sourceRanges()
	limit := c.limit(ports, addrs, policy, ranges)
	for i := range ports {
		p := &ports[i]
		others := len(wants)
		for _, kind := range kinds() {
			if !limit.allows(i, kind) {
				continue
			}
			first := len(frontends)
			frontends = c.appendFrontends(frontends, p, kind, addrs)
			if len(frontends) == first {
				continue
			}
			mine := frontends[first:len(frontends):len(frontends)]
			if cap(frontends) > linearSearchMax*len(allKinds{}) {
				// Whoever keeps a few must not keep all.
				mine = slices.Clone(mine)
			}
			slices.SortFunc(mine, dataplane.Frontend.Compare)
			treatment := policy.treatment(kind, p.chosen)
			if kind == dataplane.LoadBalancer {
				treatment.SourceRanges = ranges.forFamily(p.family)
			}
			wants = append(wants, desiredService{
				key: dataplane.Key{
					Namespace: c.name.Namespace, Name: c.name.Name, Port: p.port.Name, Family: p.family, Kind: kind,
				},
				port:      p.index,
				frontends: mine,
				treatment: treatment,
				serving:   p.serving(&treatment, wants[others:]),
			})
		}
	}
	return wants
}

// serving returns Service.Serving for a treatment: a list that one of the port's
// other wants has already, if it is equal.
func (p *portFamily) serving(t *dataplane.ServiceSpec, others []desiredService) []netip.AddrPort {
	var list []netip.AddrPort
	switch p.protocol {
	case dataplane.TCP:
		return nil
	case dataplane.UDP:
		list = servingExcluded(p.candidates, t, traits.serving)
	case dataplane.SCTP:
		list = servingExcluded(p.candidates, t, traits.keepsAssociations)
	}
	for i := range others {
		if slices.Equal(others[i].serving, list) {
			return others[i].serving
		}
	}
	return list
}

// appendFrontends appends the frontends of one kind that a port has.
func (c *conversion) appendFrontends(
	frontends []dataplane.Frontend, p *portFamily, kind dataplane.Kind, addrs addresses,
) []dataplane.Frontend {
	add := func(addr netip.Addr, port int32) {
		frontends = append(frontends, dataplane.Frontend{
			Protocol: p.protocol,
			Addr:     netip.AddrPortFrom(addr, uint16(port)), //nolint:gosec // the callers have checked the range
		})
	}
	all := func(list []netip.Addr) {
		for _, addr := range list {
			if addr.Is4() == p.cluster.Is4() {
				add(addr, p.port.Port)
			}
		}
	}
	switch kind {
	case dataplane.ClusterIP:
		if !slices.Contains(addrs.unusableClusterIPs, p.cluster) {
			add(p.cluster, p.port.Port)
		}
	case dataplane.NodePort:
		if number := p.port.NodePort; number > 0 && number <= 65535 && hasNodePorts(c.service.Spec.Type) {
			add(unspecifiedAddr(p.family), number)
		}
	case dataplane.ExternalIP:
		all(addrs.externalIPs.list)
	case dataplane.LoadBalancer:
		all(addrs.loadBalancerIPs.list)
	}
	return frontends
}

func hasNodePorts(t corev1.ServiceType) bool {
	return t == corev1.ServiceTypeNodePort || t == corev1.ServiceTypeLoadBalancer
}

func protocolOf(p corev1.Protocol) (dataplane.Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return dataplane.TCP, true
	case corev1.ProtocolUDP:
		return dataplane.UDP, true
	case corev1.ProtocolSCTP:
		return dataplane.SCTP, true
	default:
		return 0, false
	}
}
