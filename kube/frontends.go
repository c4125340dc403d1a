package kube

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// allKinds lists the kinds of frontends, in the order of a port's desired Services.
type allKinds [4]dataplane.Kind

func kinds() allKinds {
	return allKinds{dataplane.ClusterIP, dataplane.NodePort, dataplane.ExternalIP, dataplane.LoadBalancer}
}

// addresses contains the addresses of a Service, which apply to all ports.
type addresses struct {
	// clusterIPs contains at most one address per family. The Service is not served in a family
	// without a cluster IP.
	clusterIPs []netip.Addr
	// unusableClusterIPs are cluster IPs that are not programmed, because they belong to the node
	// or are not valid for a Service.
	unusableClusterIPs []netip.Addr
	// externalIPs and loadBalancerIPs are addresses of families with a cluster IP. No address is
	// in both.
	externalIPs, loadBalancerIPs addrSet
}

// portFamily is a valid port of a Service in one family.
type portFamily struct {
	// index is the port's index in spec.ports.
	index    int
	port     *corev1.ServicePort
	protocol dataplane.Protocol
	family   dataplane.Family
	// cluster is the Service's cluster IP of the family.
	cluster netip.Addr

	// candidates contains all entries of the port in slices, and later only the preferred ones.
	// matched is set if a slice has the port. chosen contains the selected endpoints.
	candidates []candidate
	matched    bool
	chosen     choice
	// beyondLimit is set if the port's candidates were skipped because the Service has too
	// many.
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

// hasFamilyOf reports whether one of addrs has the same family as addr.
func hasFamilyOf(addrs []netip.Addr, addr netip.Addr) bool {
	return slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() })
}

// clusterIPs returns the Service's cluster IPs, at most one per family, in the order of the
// Service.
func (c *conversion) clusterIPs() []netip.Addr {
	spec := &c.service.Spec
	if len(spec.ClusterIPs) == 0 {
		// The object was created before dual stack, or has no address yet.
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

// unusableClusterIPs returns the cluster IPs that belong to the node or that cannot be the
// destination of Service traffic. Programming an address of the node would break the node's own
// connections to it, on every port.
func (c *conversion) unusableClusterIPs(cluster []netip.Addr) (unusable []netip.Addr) {
	for _, addr := range cluster {
		err := validateAddr(addr)
		if _, ok := c.location.ownAddrs[addr]; err == nil && ok {
			err = errNodeAddr
		}
		if err == nil {
			continue
		}
		unusable = append(unusable, addr)
		c.addProblem(c.clusterIPField(addr), "%s %v, so it is not served: recreate the Service with another cluster IP, "+
			"and make sure that no ServiceCIDR (--service-cluster-ip-range) overlaps the nodes' networks", addr, err)
	}
	return unusable
}

// clusterIPField returns the path of a cluster IP's field.
func (c *conversion) clusterIPField(addr netip.Addr) string {
	for i, text := range c.service.Spec.ClusterIPs {
		if a, err := parseAddr(text); err == nil && a == addr {
			return elementPath("spec.clusterIPs", i, "")
		}
	}
	return "spec.clusterIP"
}

// clusterIP parses the i-th cluster IP. An empty field means spec.clusterIPs[i].
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

// loadBalancerIPs returns the addresses of load balancers that deliver packets with the load
// balancer's address as destination. It skips load balancers that proxy connections (ipMode
// Proxy) and load balancers without an IP address, because nodes do not serve their addresses.
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
				"%q %v: the load balancer's controller must set an address that clients can connect to", ingress.IP, err)
			continue
		}
		// An address of another family belongs to a load balancer that translates between
		// families, so it is not a problem.
		if hasFamilyOf(cluster, addr) {
			addrs.add(addr)
		}
	}
	return addrs
}

// externalIPs returns spec.externalIPs without the addresses that are also load balancer IPs.
// These are served as load balancer IPs only, so that a client cannot bypass
// loadBalancerSourceRanges.
func (c *conversion) externalIPs(a addresses) addrSet {
	var addrs addrSet
	for i, text := range c.service.Spec.ExternalIPs {
		if text == "" {
			continue // the API server and kube-proxy accept it
		}
		addr, err := parseAddr(text)
		if err == nil {
			err = validateAddr(addr)
		}
		switch {
		case err != nil:
			c.addProblem(elementPath("spec.externalIPs", i, ""), "%q %v: use an address that clients can connect to", text, err)
		case !hasFamilyOf(a.clusterIPs, addr):
			c.addProblem(elementPath("spec.externalIPs", i, ""),
				"%s is not served, because the Service has no cluster IP of the family %s: add the family to spec.ipFamilies, or remove the address",
				addr, dataplane.FamilyOf(addr))
		case !a.loadBalancerIPs.has(addr):
			addrs.add(addr)
		}
	}
	return addrs
}

// ports returns the valid ports, one portFamily for each family that has a cluster IP.
func (c *conversion) ports(addrs addresses) []portFamily {
	list := c.service.Spec.Ports
	ports := make([]portFamily, 0, len(list)*len(addrs.clusterIPs))
	var names map[string]struct{}
	if len(list) > linearSearchMax {
		names = make(map[string]struct{}, len(list))
	}
	nameUsed := func(i int) bool {
		if names != nil {
			_, ok := names[list[i].Name]
			return ok
		}
		return slices.ContainsFunc(list[:i], func(p corev1.ServicePort) bool { return p.Name == list[i].Name })
	}
	for i := range list {
		port := &list[i]
		duplicate := nameUsed(i)
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
		if duplicate {
			c.addProblem(elementPath("spec.ports", i, ".name"),
				"%q is the name of an earlier port: give each port a unique name", port.Name)
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

// desiredServices returns one desiredService for each port, family and kind that has a frontend.
func (c *conversion) desiredServices(ports []portFamily, addrs addresses, policy policy) []desiredService {
	perPort := 1 + len(addrs.externalIPs.list) + len(addrs.loadBalancerIPs.list)
	if hasNodePorts(c.service.Spec.Type) {
		perPort++
	}
	frontends := make([]dataplane.Frontend, 0, min(len(ports)*perPort, maxElements))
	services := make([]desiredService, 0, len(ports)*min(perPort, len(allKinds{})))
	ranges := c.sourceRanges()
	limit := c.limit(ports, addrs, policy, ranges)
	for i := range ports {
		p := &ports[i]
		firstOfPort := len(services)
		for _, kind := range kinds() {
			if !limit.allows(i, kind) {
				continue
			}
			first := len(frontends)
			frontends = c.appendFrontends(frontends, p, kind, addrs)
			if len(frontends) == first {
				continue
			}
			portFrontends := frontends[first:len(frontends):len(frontends)]
			if cap(frontends) > linearSearchMax*len(allKinds{}) {
				// Copy, so that a few retained frontends do not keep the whole array in memory.
				portFrontends = slices.Clone(portFrontends)
			}
			slices.SortFunc(portFrontends, dataplane.Frontend.Compare)
			spec := policy.spec(kind, p.chosen)
			if kind == dataplane.LoadBalancer {
				spec.SourceRanges = ranges.forFamily(p.family)
			}
			services = append(services, desiredService{
				key: dataplane.Key{
					Namespace: c.name.Namespace, Name: c.name.Name, Port: p.port.Name, Family: p.family, Kind: kind,
				},
				port:      p.index,
				frontends: portFrontends,
				spec:      spec,
				serving:   p.serving(&spec, services[firstOfPort:]),
			})
		}
	}
	return services
}

// serving returns Service.Serving for a ServiceSpec. It returns the list of one of the port's
// other desired Services if it is equal.
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

// appendFrontends appends the port's frontends of one kind.
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
