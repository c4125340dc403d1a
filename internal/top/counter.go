package top

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/inspect"
)

// Sample is the result of one interval. Services are sorted by name.
type Sample struct {
	Time time.Time `json:"time"`
	// Seconds is the length of the interval.
	Seconds float64 `json:"seconds"`
	// Lost is the number of events in the interval that arrived faster than they were read. If it is
	// not 0, the other numbers are lower bounds.
	Lost     uint64    `json:"lost"`
	Services []Service `json:"services"`
}

// Service is a port of a Service that had a connection since the start.
type Service struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Port      string `json:"port,omitempty"`
	Protocol  string `json:"protocol"`
	Numbers
	Endpoints []Endpoint `json:"endpoints"`
}

// FullName returns namespace/name and, for a named port, :port.
func (s *Service) FullName() string {
	if s.Port == "" {
		return s.Namespace + "/" + s.Name
	}
	return s.Namespace + "/" + s.Name + ":" + s.Port
}

// Endpoint is an endpoint that received a connection since the start.
type Endpoint struct {
	Address string `json:"address"`
	Numbers
}

// Numbers are the numbers of connections of a Service or an endpoint.
type Numbers struct {
	// PerSecond is the rate of new connections in the interval.
	PerSecond float64 `json:"connectionsPerSecond"`
	// Total is the number of new connections since the start.
	Total uint64 `json:"connections"`
	// Active is the number of connections that have not ended, nil if they are not counted.
	Active *int `json:"active,omitempty"`
}

// maxUnresolved limits the connections to unknown frontends that are kept until the names are read
// again.
const maxUnresolved = 10_000

// counter counts connections. It must not be used concurrently.
type counter struct {
	names      names
	services   map[serviceKey]map[netip.AddrPort]*count
	unresolved map[conntrack.Connection]uint64
}

type serviceKey struct {
	namespace, name, port string
	protocol              dataplane.Protocol
}

// count counts the connections to an endpoint. sampled is the total of the last sample.
type count struct{ total, sampled uint64 }

// names contains the Services by frontend.
type names struct {
	services map[dataplane.Frontend]serviceKey
	kernel   *inspect.Kernel
}

func newNames(k *inspect.Kernel) names {
	n := names{services: make(map[dataplane.Frontend]serviceKey, len(k.Frontends)), kernel: k}
	for i := range k.Frontends {
		f := &k.Frontends[i]
		namespace, name, port := f.Service()
		n.services[f.Frontend] = serviceKey{namespace, name, port, f.Frontend.Protocol}
	}
	return n
}

// find returns the Service that a client connects to. A frontend with an address takes precedence
// over a node port.
func (n *names) find(c conntrack.Connection) (serviceKey, bool) {
	f := dataplane.Frontend{Protocol: c.Protocol, Addr: c.Destination}
	if key, ok := n.services[f]; ok {
		return key, true
	}
	addr := c.Destination.Addr()
	for _, r := range n.kernel.NodePortRanges {
		if !r.Contains(addr) {
			continue
		}
		unspecified := netip.IPv4Unspecified()
		if addr.Is6() {
			unspecified = netip.IPv6Unspecified()
		}
		f.Addr = netip.AddrPortFrom(unspecified, c.Destination.Port())
		key, ok := n.services[f]
		return key, ok
	}
	return serviceKey{}, false
}

func newCounter(k *inspect.Kernel) *counter {
	return &counter{names: newNames(k), services: map[serviceKey]map[netip.AddrPort]*count{}, unresolved: map[conntrack.Connection]uint64{}}
}

// add counts a connection.
func (c *counter) add(conn conntrack.Connection) {
	if key, ok := c.names.find(conn); ok {
		c.endpoint(key, conn.Endpoint).total++
		return
	}
	if _, ok := c.unresolved[conn]; ok || len(c.unresolved) < maxUnresolved {
		c.unresolved[conn]++
	}
}

func (c *counter) endpoint(key serviceKey, addr netip.AddrPort) *count {
	endpoints := c.services[key]
	if endpoints == nil {
		endpoints = map[netip.AddrPort]*count{}
		c.services[key] = endpoints
	}
	n := endpoints[addr]
	if n == nil {
		n = &count{}
		endpoints[addr] = n
	}
	return n
}

// setKernel replaces the names. It counts the connections whose frontend was unknown before, and
// discards the ones of other programs. It forgets Services that no longer exist.
func (c *counter) setKernel(k *inspect.Kernel) {
	c.names = newNames(k)
	for conn, n := range c.unresolved {
		if key, ok := c.names.find(conn); ok {
			c.endpoint(key, conn.Endpoint).total += n
		}
	}
	clear(c.unresolved)
	exists := make(map[serviceKey]bool, len(c.names.services))
	for _, key := range c.names.services {
		exists[key] = true
	}
	for key := range c.services {
		if !exists[key] {
			delete(c.services, key)
		}
	}
}

// sample returns the numbers of an interval and starts the next one.
func (c *counter) sample(now time.Time, interval time.Duration, lost uint64) Sample {
	s := Sample{Time: now, Seconds: interval.Seconds(), Lost: lost, Services: []Service{}}
	active := c.names.active()
	for key, endpoints := range c.services {
		service := Service{
			Namespace: key.namespace, Name: key.name, Port: key.port, Protocol: key.protocol.String(), Endpoints: make([]Endpoint, 0, len(endpoints)),
		}
		if active != nil {
			service.Active = new(int)
		}
		for addr, n := range endpoints {
			e := Endpoint{Address: addr.String(), Numbers: Numbers{Total: n.total, PerSecond: float64(n.total-n.sampled) / s.Seconds}}
			n.sampled = n.total
			if active != nil {
				connections := active[key][addr]
				e.Active = &connections
				*service.Active += connections
			}
			service.Total += e.Total
			service.PerSecond += e.PerSecond
			service.Endpoints = append(service.Endpoints, e)
		}
		slices.SortFunc(service.Endpoints, func(a, b Endpoint) int { return strings.Compare(a.Address, b.Address) })
		s.Services = append(s.Services, service)
	}
	slices.SortFunc(s.Services, func(a, b Service) int {
		return cmp.Or(strings.Compare(a.FullName(), b.FullName()), strings.Compare(a.Protocol, b.Protocol))
	})
	return s
}

// active returns the numbers of connections that have not ended, nil if they were not counted.
func (n *names) active() map[serviceKey]map[netip.AddrPort]int {
	if !n.kernel.ConnectionsCounted {
		return nil
	}
	all := map[serviceKey]map[netip.AddrPort]int{}
	for i := range n.kernel.Frontends {
		f := &n.kernel.Frontends[i]
		key := n.services[f.Frontend]
		if all[key] == nil {
			all[key] = map[netip.AddrPort]int{}
		}
		for _, e := range f.Endpoints {
			all[key][e.Addr] += e.Connections
		}
	}
	return all
}
