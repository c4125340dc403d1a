package kube

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// intNSource is the source of a history's random decisions: a random generator or the bytes of a
// fuzzer.
type intNSource interface{ IntN(n int) int }

// bytesIntN uses one byte for each decision, and 0 after the last byte.
type bytesIntN struct{ data []byte }

func (b *bytesIntN) IntN(n int) int {
	if len(b.data) == 0 {
		return 0
	}
	c := b.data[0]
	b.data = b.data[1:]
	return int(c) % n
}

func pick[T any](c intNSource, from ...T) T { return from[c.IntN(len(from))] }

// clusterModel contains the objects of a source.
type clusterModel struct {
	opts         Options
	services     map[types.NamespacedName]*corev1.Service
	slices       map[types.NamespacedName]*discoveryv1.EndpointSlice
	node         *corev1.Node // the last Node, even if it was deleted
	nodeReported bool
	nodeDeleted  bool
	serviceCIDRs map[string][]string
	localAddrs   []netip.Addr
}

// There are few names, addresses and ports, so that conflicts are frequent.
func randomService(c intNSource) *corev1.Service {
	ips := pick(c, "10.96.0.1", "10.96.0.2", "10.96.0.1 fd00::1", "fd00::1 10.96.0.2", "None", "", "10.96.0.010 fd00::2", "x fd00::1")
	svc := newService(pick(c, "a", "b", "c", "d"), ips, age(time.Duration(c.IntN(3))*time.Hour))
	svc.Spec.Ports = nil
	for range 1 + c.IntN(3) {
		p := port(pick(c, "", "p", "q"), pick(c, corev1.ProtocolTCP, corev1.ProtocolUDP, "", "", "bad"), pick[int32](c, 80, 81, 80, 81, 82, 70000))
		p.NodePort = pick[int32](c, 0, 30080, 30081, 80, 70000)
		svc.Spec.Ports = append(svc.Spec.Ports, p)
	}
	switch c.IntN(12) {
	case 0:
		svc.Labels = map[string]string{LabelServiceProxyName: "x"}
	case 1:
		svc.Spec.Type = corev1.ServiceTypeExternalName
	case 2, 3:
		svc.Spec.Type = corev1.ServiceTypeNodePort
	case 4, 5, 6, 7:
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		for range c.IntN(3) {
			svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{
				IP:     pick(c, "192.0.2.1", "192.0.2.2", "10.96.0.1", "2001:db8::1", "bad", "", "::ffff:192.0.2.2"),
				IPMode: pick(c, nil, nil, new(corev1.LoadBalancerIPModeVIP), new(corev1.LoadBalancerIPModeProxy)),
			})
		}
		svc.Spec.HealthCheckNodePort = pick[int32](c, 0, 32000, 32001)
		svc.Spec.LoadBalancerSourceRanges = pick(c, nil, []string{"10.0.0.0/8"}, []string{" 10.1.2.3/8", "fd00::/8"}, []string{"0.0.0.0/0", "x"}, []string{"x"})
	case 8:
		svc.Namespace = "shop"
	}
	for range max(0, c.IntN(5)-2) {
		svc.Spec.ExternalIPs = append(svc.Spec.ExternalIPs, pick(c, "192.0.2.1", "192.0.2.3", "10.96.0.2", "2001:db8::1", "127.0.0.1"))
	}
	svc.Spec.InternalTrafficPolicy = pick(c, nil, new(corev1.ServiceInternalTrafficPolicyCluster), new(corev1.ServiceInternalTrafficPolicyLocal))
	svc.Spec.ExternalTrafficPolicy = pick(c, "", corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	if c.IntN(4) == 0 {
		timeout(pick[int32](c, 60, 0))(svc)
	}
	if c.IntN(4) == 0 {
		scheduler(pick(c, "lc", "sh", "none", ""))(svc)
	}
	return svc
}

func randomSlice(c intNSource) *discoveryv1.EndpointSlice {
	slice := newSlice(pick(c, "s1", "s2", "s3", "s4", "s5", "s6", "s7"), pick(c, "a", "b", "c", "d", "a", "b", "c", "d", "nobody", ""), nil)
	ips := []string{"10.0.0.1", "10.0.0.2", "10.0.0.03", "10.0.0.4", "127.0.0.1"}
	if c.IntN(4) == 0 {
		slice.AddressType = discoveryv1.AddressTypeIPv6
		ips = []string{"fd01::1", "fd01:0::2", "::ffff:10.0.0.1"}
	}
	hinted, draining := c.IntN(2) == 0, c.IntN(4) == 0
	for range c.IntN(6) {
		ep := eps(pick(c, ips...))[0]
		if draining {
			ep.Conditions.Ready = new(false)
			ep.Conditions.Terminating = new(true)
		} else if c.IntN(5) == 0 {
			ep.Conditions.Ready = new(c.IntN(2) == 0)
			ep.Conditions.Serving = new(c.IntN(2) == 0)
			ep.Conditions.Terminating = new(c.IntN(2) == 0)
		}
		if c.IntN(2) == 0 {
			ep.NodeName = new(pick(c, "here", "there"))
		}
		if hinted && c.IntN(12) != 0 {
			hints(&ep).ForZones = zones(pick(c, []string{"a"}, []string{"b"}, []string{"a", "b"}))
			if c.IntN(3) == 0 {
				hints(&ep).ForNodes = nodes(pick(c, []string{"here"}, []string{"there"}))
			}
		}
		slice.Endpoints = append(slice.Endpoints, ep)
	}
	slice.Ports = nil
	for range c.IntN(6) {
		slice.Ports = append(slice.Ports,
			slicePort(pick(c, "", "p", "q"), pick(c, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP), pick[int32](c, 8080, 8081, 0)))
	}
	if c.IntN(10) == 0 {
		slice.Labels[corev1.IsHeadlessService] = ""
	}
	if c.IntN(10) == 0 {
		slice.Namespace = "shop"
	}
	return slice
}

func randomNode(c intNSource) *corev1.Node {
	node := newNode(pick(c, "", "198.51.100.1", "198.51.100.2 2001:db8:1::1", "127.0.0.1"))
	node.Labels = map[string]string{corev1.LabelTopologyZone: pick(c, "", "a", "b")}
	node.Spec.PodCIDRs = pick(c, nil, []string{"10.1.0.0/24"}, []string{"10.2.0.0/24", "fd02::/64"})
	if c.IntN(6) == 0 {
		node.Spec.Taints = []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler"}}
	}
	if c.IntN(6) == 0 {
		node.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	}
	return node
}

// randomDelta returns a random Delta and applies it to the model.
func (m *clusterModel) randomDelta(c intNSource) Delta {
	var d Delta
	for range 1 + c.IntN(3) {
		switch c.IntN(8) {
		case 0, 1:
			d.Services = append(d.Services, randomService(c))
		case 2, 3:
			d.EndpointSlices = append(d.EndpointSlices, randomSlice(c))
		case 4:
			d.DeletedServices = append(d.DeletedServices, named(pick(c, "a", "b", "c", "d")))
			d.DeletedEndpointSlices = append(d.DeletedEndpointSlices, named(pick(c, "s1", "s2", "s3", "s4", "s5", "s6", "s7")))
		case 5:
			if d.NodeDeleted = c.IntN(5) == 0; !d.NodeDeleted {
				d.Node = randomNode(c)
			}
		case 6:
			name := pick(c, "x", "y")
			if c.IntN(3) == 0 {
				d.DeletedServiceCIDRs = append(d.DeletedServiceCIDRs, name)
			} else {
				d.ServiceCIDRs = append(d.ServiceCIDRs, newServiceCIDR(name, pick(c, "10.96.0.0/16", "10.96.0.0/24", "fd00::/108")))
			}
		case 7:
			d.LocalAddrs = addrs(pick(c, "127.0.0.1 198.51.100.1", "198.51.100.2 203.0.113.1 2001:db8:1::1 fe80::1 ::1", ""))
		}
	}
	m.apply(d)
	return d
}

// apply applies a Delta to the model.
func (m *clusterModel) apply(d Delta) {
	for _, name := range d.DeletedServices {
		delete(m.services, name)
	}
	for _, name := range d.DeletedEndpointSlices {
		delete(m.slices, name)
	}
	for _, svc := range d.Services {
		m.services[types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}] = svc
	}
	for _, slice := range d.EndpointSlices {
		m.slices[types.NamespacedName{Namespace: slice.Namespace, Name: slice.Name}] = slice
	}
	if d.NodeDeleted {
		m.nodeReported, m.nodeDeleted = true, true
	}
	if d.Node != nil {
		m.node, m.nodeReported, m.nodeDeleted = d.Node, true, false
	}
	for _, name := range d.DeletedServiceCIDRs {
		delete(m.serviceCIDRs, name)
	}
	for _, s := range d.ServiceCIDRs {
		m.serviceCIDRs[s.Name] = s.Spec.CIDRs
	}
	if d.LocalAddrs != nil {
		m.localAddrs = d.LocalAddrs
	}
}

// initialDeltas returns the Deltas of a source that starts now. If the Node was deleted there are
// two, because the properties of a deleted Node remain in use.
func (m *clusterModel) initialDeltas() []Delta {
	d := Delta{
		Services:       slices.Collect(maps.Values(m.services)),
		EndpointSlices: slices.Collect(maps.Values(m.slices)),
		Node:           m.node,
		LocalAddrs:     m.localAddrs,
	}
	for name, list := range m.serviceCIDRs {
		d.ServiceCIDRs = append(d.ServiceCIDRs, newServiceCIDR(name, list...))
	}
	if m.nodeDeleted {
		return []Delta{d, {NodeDeleted: true}}
	}
	return []Delta{d}
}

// modelFrontend is a frontend and the Service port that claims it.
type modelFrontend struct {
	svc      *corev1.Service
	port     int
	kind     dataplane.Kind
	frontend dataplane.Frontend
}

func (n modelFrontend) key() dataplane.Key {
	return dataplane.Key{
		Namespace: n.svc.Namespace, Name: n.svc.Name, Port: n.svc.Spec.Ports[n.port].Name,
		Family: dataplane.FamilyOf(n.frontend.Addr.Addr()), Kind: n.kind,
	}
}

// modelFrontends returns the frontends that a Service claims.
func modelFrontends(svc *corev1.Service) (claimed []modelFrontend) {
	if svc.Spec.Type == corev1.ServiceTypeExternalName || svc.Spec.ClusterIP == "None" || svc.Labels[LabelServiceProxyName] != "" {
		return nil
	}
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		ofFamily := func(texts ...string) (list []netip.Addr) {
			for _, text := range texts {
				if a, err := parseAddr(text); err == nil && !a.IsLoopback() && dataplane.FamilyOf(a) == family {
					list = append(list, a)
				}
			}
			return list
		}
		cluster := ofFamily(svc.Spec.ClusterIPs...)
		if len(cluster) == 0 {
			continue
		}
		var balancer []netip.Addr
		for _, i := range svc.Status.LoadBalancer.Ingress {
			if i.IPMode == nil || *i.IPMode == "VIP" {
				balancer = append(balancer, ofFamily(i.IP)...)
			}
		}
		external := slices.DeleteFunc(ofFamily(svc.Spec.ExternalIPs...), func(a netip.Addr) bool { return slices.Contains(balancer, a) })
		seen := map[string]bool{}
		for i, p := range svc.Spec.Ports {
			protocol := map[corev1.Protocol]dataplane.Protocol{"": dataplane.TCP, "TCP": dataplane.TCP, "UDP": dataplane.UDP}[p.Protocol]
			valid := protocol != 0 && p.Port <= 65535
			if first := !seen[p.Name]; !valid || !first {
				seen[p.Name] = true
				continue
			}
			seen[p.Name] = true
			add := func(kind dataplane.Kind, number int32, list ...netip.Addr) {
				for _, a := range list {
					claimed = append(claimed, modelFrontend{svc, i, kind, dataplane.Frontend{Protocol: protocol, Addr: addrPort(a, number)}})
				}
			}
			add(dataplane.ClusterIP, p.Port, cluster[0])
			if t := svc.Spec.Type; p.NodePort > 0 && p.NodePort <= 65535 && (t == "NodePort" || t == "LoadBalancer") {
				add(dataplane.NodePort, p.NodePort, map[dataplane.Family]netip.Addr{
					dataplane.IPv4: netip.MustParseAddr("0.0.0.0"), dataplane.IPv6: netip.MustParseAddr("::"),
				}[family])
			}
			add(dataplane.ExternalIP, p.Port, external...)
			add(dataplane.LoadBalancer, p.Port, balancer...)
		}
	}
	return claimed
}

// expectedServices computes the expected Services from scratch.
func (m *clusterModel) expectedServices() map[dataplane.Key]*dataplane.Service {
	var claimed []modelFrontend
	for _, svc := range m.services {
		claimed = append(claimed, modelFrontends(svc)...)
	}
	slices.SortFunc(claimed, func(a, b modelFrontend) int {
		isCluster := func(n modelFrontend) int { return min(int(n.kind), 1) }
		return cmp.Or(
			cmp.Compare(isCluster(a), isCluster(b)),
			a.svc.CreationTimestamp.Compare(b.svc.CreationTimestamp.Time),
			strings.Compare(a.svc.Namespace, b.svc.Namespace),
			strings.Compare(a.svc.Name, b.svc.Name),
			cmp.Compare(a.port, b.port),
		)
	})
	taken := map[dataplane.Frontend]bool{}
	owned := map[dataplane.Key][]modelFrontend{}
	for _, want := range claimed {
		if !taken[want.frontend] {
			taken[want.frontend] = true
			owned[want.key()] = append(owned[want.key()], want)
		}
	}
	out := map[dataplane.Key]*dataplane.Service{}
	for key, claimed := range owned {
		var frontends []dataplane.Frontend
		for _, want := range claimed {
			frontends = append(frontends, want.frontend)
		}
		s, err := dataplane.NewService(key, frontends, m.expectedSpec(claimed[0]))
		if err == nil {
			s, err = s.WithServing(m.expectedServing(claimed[0], s.ServiceSpec))
		}
		if err != nil {
			panic(err)
		}
		out[key] = s
	}
	return out
}

// slicesOf returns the slices of a Service.
func (m *clusterModel) slicesOf(svc *corev1.Service) (mine []*discoveryv1.EndpointSlice) {
	for _, slice := range m.slices {
		if _, headless := slice.Labels[corev1.IsHeadlessService]; !headless &&
			slice.Namespace == svc.Namespace && slice.Labels[discoveryv1.LabelServiceName] == svc.Name {
			mine = append(mine, slice)
		}
	}
	return mine
}

func (m *clusterModel) expectedSpec(want modelFrontend) dataplane.ServiceSpec {
	spec := want.svc.Spec
	endpoints := m.expectedEndpoints(want)
	zone := ""
	if m.node != nil {
		zone = m.node.Labels[corev1.LabelTopologyZone]
	}
	cluster := modelClusterEndpoints(endpoints, zone)
	local := modelUsableEndpoints(endpoints, func(e modelEndpoint) bool { return e.onThisNode })
	all := func(list []modelEndpoint) (out []dataplane.Endpoint) {
		for _, e := range list {
			out = append(out, dataplane.Endpoint{Addr: e.addr, Local: e.maybeLocal})
		}
		return out
	}
	var t dataplane.ServiceSpec
	external := want.kind != dataplane.ClusterIP
	externalLocal := external && spec.ExternalTrafficPolicy == "Local" &&
		(spec.Type == "NodePort" || spec.Type == "LoadBalancer" || len(spec.ExternalIPs) > 0)
	internalLocal := !external && spec.InternalTrafficPolicy != nil && *spec.InternalTrafficPolicy == "Local"
	t.Endpoints = all(cluster)
	if internalLocal {
		t.Endpoints = all(local)
	}
	if externalLocal {
		t.ExternalTrafficPolicyLocal, t.LocalEndpoints, t.Masquerade = true, all(local), dataplane.MasqueradeFromNode
	} else if external {
		t.Masquerade = dataplane.MasqueradeAlways
	}
	if (internalLocal || externalLocal) && len(local) == 0 && len(modelUsableEndpoints(endpoints, func(modelEndpoint) bool { return true })) > 0 {
		t.NoEndpointsVerdict = dataplane.Drop
	}
	if spec.SessionAffinity == "ClientIP" {
		t.Affinity = map[int32]time.Duration{60: time.Minute, 0: 3 * time.Hour}[*spec.SessionAffinityConfig.ClientIP.TimeoutSeconds]
	}
	if s := want.svc.Annotations[AnnotationIPVSScheduler]; s == "lc" || s == "sh" {
		t.Scheduler = s
	}
	if want.kind == dataplane.LoadBalancer {
		four := want.key().Family == dataplane.IPv4
		switch strings.Join(spec.LoadBalancerSourceRanges, ",") {
		case "10.0.0.0/8":
			if four {
				t.SourceRanges = cidrs("10.0.0.0/8")
			}
		case " 10.1.2.3/8,fd00::/8":
			t.SourceRanges = cidrs(map[bool]string{true: "10.0.0.0/8", false: "fd00::/8"}[four])
		case "0.0.0.0/0,x":
			if !four {
				t.SourceRanges = cidrs("::/128")
			}
		case "x":
			t.SourceRanges = cidrs(map[bool]string{true: "0.0.0.0/32", false: "::/128"}[four])
		}
	}
	return t
}

// expectedServing returns the endpoints that serve UDP and are not in the ServiceSpec.
func (m *clusterModel) expectedServing(want modelFrontend, t dataplane.ServiceSpec) (list []netip.AddrPort) {
	for _, e := range m.expectedEndpoints(want) {
		named := slices.ContainsFunc(append(slices.Clone(t.Endpoints), t.LocalEndpoints...),
			func(other dataplane.Endpoint) bool { return other.Addr == e.addr })
		if want.frontend.Protocol == dataplane.UDP && (e.ready || e.serving) && !named {
			list = append(list, e.addr)
		}
	}
	return list
}

// modelEndpoint is an endpoint of the model.
type modelEndpoint struct {
	addr                        netip.AddrPort
	ready, serving, terminating bool
	maybeLocal, onThisNode      bool
	zones, nodes                []string
}

// modelClusterEndpoints returns the endpoints of the policy Cluster.
func modelClusterEndpoints(endpoints []modelEndpoint, zone string) []modelEndpoint {
	var ready []modelEndpoint
	for _, e := range endpoints {
		if e.ready {
			ready = append(ready, e)
		}
	}
	every := func(has func(modelEndpoint) bool) bool {
		return !slices.ContainsFunc(ready, func(e modelEndpoint) bool { return !has(e) })
	}
	only := func(has func(modelEndpoint) bool) []modelEndpoint {
		return slices.DeleteFunc(slices.Clone(ready), func(e modelEndpoint) bool { return !has(e) })
	}
	if forHere := only(func(e modelEndpoint) bool { return slices.Contains(e.nodes, "here") }); len(forHere) > 0 &&
		every(func(e modelEndpoint) bool { return len(e.nodes) > 0 }) {
		return forHere
	}
	if inZone := only(func(e modelEndpoint) bool { return slices.Contains(e.zones, zone) }); len(inZone) > 0 &&
		every(func(e modelEndpoint) bool { return len(e.zones) > 0 }) {
		return inZone
	}
	return modelUsableEndpoints(endpoints, func(modelEndpoint) bool { return true })
}

// modelUsableEndpoints returns the matching ready endpoints, or else the serving terminating
// ones.
func modelUsableEndpoints(endpoints []modelEndpoint, of func(modelEndpoint) bool) (list []modelEndpoint) {
	for _, e := range endpoints {
		if e.ready && of(e) {
			list = append(list, e)
		}
	}
	if len(list) > 0 {
		return list
	}
	for _, e := range endpoints {
		if e.serving && e.terminating && of(e) {
			list = append(list, e)
		}
	}
	return list
}

// expectedEndpoints selects one of several entries with the same address, using another algorithm
// than the Tracker: it keeps the entries that satisfy each condition in turn, unless no entry
// does.
func (m *clusterModel) expectedEndpoints(want modelFrontend) (list []modelEndpoint) {
	key := want.key()
	zone := ""
	if m.node != nil {
		zone = m.node.Labels[corev1.LabelTopologyZone]
	}
	entries := map[netip.AddrPort][]modelEndpoint{}
	for _, slice := range m.slicesOf(want.svc) {
		if string(slice.AddressType) != key.Family.String() {
			continue
		}
		for _, p := range slice.Ports {
			if *p.Name != key.Port || string(*p.Protocol) != want.frontend.Protocol.String() || *p.Port == 0 {
				continue
			}
			for _, ep := range slice.Endpoints {
				addr, err := parseAddr(ep.Addresses[0])
				if err != nil || addr.IsLoopback() || dataplane.FamilyOf(addr) != key.Family {
					continue
				}
				e := modelEndpoint{
					addr:        addrPort(addr, *p.Port),
					ready:       ep.Conditions.Ready == nil || *ep.Conditions.Ready,
					serving:     ep.Conditions.Serving == nil || *ep.Conditions.Serving,
					terminating: ep.Conditions.Terminating != nil && *ep.Conditions.Terminating,
					maybeLocal:  ep.NodeName == nil || *ep.NodeName == "here",
					onThisNode:  ep.NodeName != nil && *ep.NodeName == "here",
				}
				if ep.Hints != nil {
					for _, z := range ep.Hints.ForZones {
						e.zones = append(e.zones, z.Name)
					}
					for _, n := range ep.Hints.ForNodes {
						e.nodes = append(e.nodes, n.Name)
					}
				}
				entries[e.addr] = append(entries[e.addr], e)
			}
		}
	}
	local := map[netip.Addr]bool{}
	for addr, all := range entries {
		for _, satisfies := range []func(modelEndpoint) bool{
			func(e modelEndpoint) bool { return !e.terminating },
			func(e modelEndpoint) bool { return e.ready },
			func(e modelEndpoint) bool { return e.serving },
			func(e modelEndpoint) bool { return e.maybeLocal },
			func(e modelEndpoint) bool { return e.onThisNode },
			func(e modelEndpoint) bool { return len(e.nodes) > 0 },
			func(e modelEndpoint) bool { return slices.Contains(e.nodes, "here") },
			func(e modelEndpoint) bool { return len(e.zones) > 0 },
			func(e modelEndpoint) bool { return slices.Contains(e.zones, zone) },
		} {
			if some := slices.DeleteFunc(slices.Clone(all), func(e modelEndpoint) bool { return !satisfies(e) }); len(some) > 0 {
				all = some
			}
		}
		list = append(list, all[0])
		local[addr.Addr()] = local[addr.Addr()] || all[0].maybeLocal
	}
	for i := range list {
		list[i].maybeLocal = local[list[i].addr.Addr()]
	}
	return list
}

// expectedHealthChecks computes the expected health-check node ports from scratch.
func (m *clusterModel) expectedHealthChecks() map[types.NamespacedName]HealthCheck {
	out := map[types.NamespacedName]HealthCheck{}
	for name, svc := range m.services {
		claimed := modelFrontends(svc)
		if svc.Spec.Type != "LoadBalancer" || svc.Spec.ExternalTrafficPolicy != "Local" || svc.Spec.HealthCheckNodePort == 0 || len(claimed) == 0 {
			continue
		}
		count := map[dataplane.Family]map[netip.Addr]bool{dataplane.IPv4: {}, dataplane.IPv6: {}}
		for _, want := range claimed {
			for _, e := range m.expectedEndpoints(want) {
				if e.ready && e.onThisNode {
					count[want.key().Family][e.addr.Addr()] = true
				}
			}
		}
		out[name] = HealthCheck{
			Port:           uint16(svc.Spec.HealthCheckNodePort),
			LocalEndpoints: max(len(count[dataplane.IPv4]), len(count[dataplane.IPv6])),
		}
	}
	return out
}

// expectedNode computes the expected dataplane.Node from scratch. TestNodePortAddrs covers the
// details of node port addresses.
func (m *clusterModel) expectedNode() dataplane.Node {
	n := dataplane.Node{MasqueradeAll: m.opts.MasqueradeAll}
	if m.node != nil {
		n.LocalPodCIDRs = cidrs(strings.Join(m.node.Spec.PodCIDRs, " "))
		for _, a := range m.node.Status.Addresses {
			addr := netip.MustParseAddr(a.Address)
			if !addr.IsLoopback() && (m.localAddrs == nil || slices.Contains(m.localAddrs, addr)) {
				n.PrimaryAddrs = append(n.PrimaryAddrs, addr)
			}
		}
	}
	slices.SortFunc(n.PrimaryAddrs, netip.Addr.Compare)
	n.NodePortAddrs = slices.Clone(n.PrimaryAddrs)
	if m.opts.NodePortAddresses.All {
		n.NodePortAddrs = nil
		for _, a := range m.localAddrs {
			if !a.IsLoopback() && !a.IsLinkLocalUnicast() {
				n.NodePortAddrs = append(n.NodePortAddrs, a)
			}
		}
	}
	slices.SortFunc(n.NodePortAddrs, netip.Addr.Compare)
	if m.opts.DetectLocal.Mode == DetectByNodeCIDR {
		n.PodCIDRs = n.LocalPodCIDRs
	}
	var all []string
	for _, list := range m.serviceCIDRs {
		all = append(all, list...)
	}
	if slices.Contains(all, "10.96.0.0/16") {
		all = slices.DeleteFunc(all, func(s string) bool { return s == "10.96.0.0/24" })
	}
	slices.Sort(all)
	n.ServiceCIDRs = cidrs(strings.Join(slices.Compact(all), " "))
	return n
}

// converted returns a Delta with the same objects in converted form.
func converted(d Delta, services *ServiceConverter, node string) Delta {
	for _, svc := range d.Services {
		d.ConvertedServices = append(d.ConvertedServices, services.Convert(svc))
	}
	for _, slice := range d.EndpointSlices {
		d.ConvertedSlices = append(d.ConvertedSlices, ConvertSlice(slice, node))
	}
	d.Services, d.EndpointSlices = nil, nil
	return d
}

// runHistory applies random Deltas, every second one in converted form. After every step it compares
// the accumulated Results with the model, and the Tracker with a new Tracker that starts with all
// objects.
func runHistory(t *testing.T, c intNSource, steps int) {
	t.Helper()
	m := &clusterModel{
		opts:         Options{NodeName: "here", Schedulers: []string{"lc", "sh"}},
		services:     map[types.NamespacedName]*corev1.Service{},
		slices:       map[types.NamespacedName]*discoveryv1.EndpointSlice{},
		serviceCIDRs: map[string][]string{},
	}
	tracker, services := NewTracker(m.opts), NewServiceConverter()
	got := map[dataplane.Key]*dataplane.Service{}
	gotChecks := map[types.NamespacedName]HealthCheck{}
	var gotNode *dataplane.Node
	var gotHealth *NodeHealth
	applyResult := func(step int, result Result) {
		for key, svc := range result.Changes {
			if svc.Equal(got[key]) {
				t.Fatalf("step %d: %s is reported as changed, but is equal: %s", step, key, serviceText(svc))
			}
			if svc == nil {
				delete(got, key)
			} else {
				got[key] = svc
			}
		}
		for name, check := range result.HealthChecks {
			old, had := gotChecks[name]
			if check == nil && !had || check != nil && had && *check == old {
				t.Fatalf("step %d: the health check of %s is reported as changed, but is equal: %v", step, name, check)
			}
			if check == nil {
				delete(gotChecks, name)
			} else {
				gotChecks[name] = *check
			}
		}
		if result.Node != nil {
			if gotNode != nil && gotNode.Equal(*result.Node) {
				t.Fatalf("step %d: the node is reported as changed, but is equal: %+v", step, result.Node)
			}
			gotNode = result.Node
		}
		if result.NodeHealth != nil {
			if gotHealth != nil && *gotHealth == *result.NodeHealth {
				t.Fatalf("step %d: the node's health is reported as changed, but is equal: %+v", step, result.NodeHealth)
			}
			gotHealth = result.NodeHealth
		}
	}
	for step := range steps {
		if c.IntN(10) == 0 {
			m.opts.MasqueradeAll = c.IntN(2) == 0
			m.opts.NodePortAddresses.All = c.IntN(2) == 0
			m.opts.DetectLocal.Mode = pick(c, DetectByClusterCIDR, DetectByNodeCIDR)
			applyResult(step, tracker.Configure(m.opts))
		}
		delta := m.randomDelta(c)
		if step%2 == 1 {
			delta = converted(delta, services, m.opts.NodeName)
		}
		applyResult(step, tracker.Apply(delta))
		if diff := gocmp.Diff(serviceTexts(m.expectedServices()), serviceTexts(got)); diff != "" {
			t.Fatalf("step %d: Services (-model +tracker):\n%s", step, diff)
		}
		if diff := gocmp.Diff(m.expectedHealthChecks(), gotChecks); diff != "" {
			t.Fatalf("step %d: health checks (-model +tracker):\n%s", step, diff)
		}
		if diff := gocmp.Diff(fmt.Sprintf("%+v", m.expectedNode()), fmt.Sprintf("%+v", *gotNode)); diff != "" {
			t.Fatalf("step %d: node (-model +tracker):\n%s", step, diff)
		}
		if m.nodeReported {
			want := NodeHealth{Exists: !m.nodeDeleted}
			if !m.nodeDeleted {
				want.ToBeDeleted = m.node.DeletionTimestamp != nil || len(m.node.Spec.Taints) > 0
			}
			if gotHealth == nil || *gotHealth != want {
				t.Fatalf("step %d: node health %v, want %v", step, gotHealth, want)
			}
		}
		fresh := NewTracker(m.opts)
		for _, d := range m.initialDeltas() {
			fresh.Apply(d)
		}
		if diff := gocmp.Diff(dumpTracker(fresh), dumpTracker(tracker)); diff != "" {
			t.Fatalf("step %d: Tracker state (-new +incremental):\n%s", step, diff)
		}
	}
}

// dumpTracker returns the problems, claims and names in a Tracker. It reveals any state of
// deleted objects that remains.
func dumpTracker(t *Tracker) map[string][]string {
	out := map[string][]string{}
	for name, s := range t.services {
		out["service"] = append(out["service"], fmt.Sprint(name, s.createdUnix, s.healthCheck, len(s.portClaims)))
		for _, p := range s.problems {
			// Whether an unmatched port is a problem depends on the history.
			if !strings.Contains(p.Message, "so connections are rejected") {
				out["problem"] = append(out["problem"], p.String())
			}
		}
		for _, svc := range s.programmed {
			if svc != nil {
				out["programmed"] = append(out["programmed"], svc.Key.String()+" "+serviceText(svc))
			}
		}
	}
	for name, owner := range t.sliceOwners {
		out["slice"] = append(out["slice"], name.String()+" of "+owner.name.String())
	}
	for s := range t.zoneDependent {
		out["zoned"] = append(out["zoned"], s.name.String())
	}
	for f, owner := range t.claims.owners {
		for _, c := range append([]claim{owner}, t.claims.waiting[f]...) {
			key := "claims of " + f.String()
			out[key] = append(out[key], fmt.Sprint(c.service.name, c.port, c.kind))
		}
	}
	for f := range t.claims.waiting {
		out["waiting"] = append(out["waiting"], f.String())
	}
	for _, name := range []string{"service", "problem", "programmed", "slice", "zoned", "waiting"} {
		slices.Sort(out[name])
	}
	return out
}

func TestRandomHistories(t *testing.T) {
	t.Parallel()
	histories := 600
	if testing.Short() {
		histories = 150
	}
	for seed := range histories {
		runHistory(t, rand.New(rand.NewPCG(uint64(seed), 1)), 40)
	}
}

func FuzzTracker(f *testing.F) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 2))
		data := make([]byte, 400)
		for i := range data {
			data[i] = byte(r.IntN(256))
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 2000 {
			return
		}
		c := &bytesIntN{data: data}
		runHistory(t, c, 1+len(data)/20)
	})
}
