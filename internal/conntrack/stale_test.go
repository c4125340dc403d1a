package conntrack

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
)

func parseAddrPorts(text string) (list []netip.AddrPort) {
	for field := range strings.FieldsSeq(text) {
		list = append(list, netip.MustParseAddrPort(field))
	}
	return list
}

// service reads a Service: its name, its frontends, and its endpoints, those of
// them in parentheses that only serve on:
//
//	dns 10.96.0.10:53 -> 10.0.0.1:53 (10.0.0.2:53)
//
// An empty text is none.
func service(text string) *dataplane.Service { return serviceWithProtocol(dataplane.UDP, text) }

func serviceWithProtocol(protocol dataplane.Protocol, text string) *dataplane.Service {
	if text == "" {
		return nil
	}
	what, to, _ := strings.Cut(text, "->")
	name, at, _ := strings.Cut(what, " ")
	to, on, _ := strings.Cut(to, "(")
	var frontends []dataplane.Frontend
	for _, addr := range parseAddrPorts(at) {
		frontends = append(frontends, dataplane.Frontend{Protocol: protocol, Addr: addr})
	}
	key := dataplane.Key{Namespace: "default", Name: name, Family: dataplane.FamilyOf(frontends[0].Addr.Addr())}
	if frontends[0].Addr.Addr().IsUnspecified() {
		key.Kind = dataplane.NodePort
	}
	var treatment dataplane.ServiceSpec
	for _, addr := range parseAddrPorts(to) {
		treatment.Endpoints = append(treatment.Endpoints, dataplane.Endpoint{Addr: addr})
	}
	s, err := dataplane.NewService(key, frontends, treatment)
	if err == nil {
		s, err = s.WithServing(parseAddrPorts(strings.TrimSuffix(on, ")")))
	}
	if err != nil {
		panic(fmt.Sprintf("%q: %v", text, err))
	}
	return s
}

// parseChanges turns pairs of before and after into changes.
func parseChanges(pairs ...string) (changes []dataplane.Change) {
	for pair := range slices.Chunk(pairs, 2) {
		changes = append(changes, dataplane.Change{Old: service(pair[0]), New: service(pair[1])})
	}
	return changes
}

// staleFlows returns which of the flows, each "destination endpoint", are stale after
// a commit of the changes. The node has node ports on 192.0.2.1 and 2001:db8::1.
func staleFlows(all bool, changes []dataplane.Change, flows []string) (stale []string) {
	p, before, after := newServiceIndex(), map[dataplane.Key]*dataplane.Service{}, map[dataplane.Key]*dataplane.Service{}
	p.setNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}})
	s := candidates{all: all}
	for _, c := range changes {
		before[c.Key()] = c.Old
		after[c.Key()] = c.New
		s.addChange(c)
	}
	p.update(before)
	p.update(after)
	for _, text := range flows {
		f := parseAddrPorts(text)
		if p.isStale(flow{protocol: dataplane.UDP, destination: f[0], endpoint: f[1]}, &s) {
			stale = append(stale, text)
		}
	}
	return stale
}

// TestStale says which flows go after a change.
func TestStale(t *testing.T) {
	t.Parallel()
	const (
		dns   = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53"
		dns6  = "dns [fd00:96::10]:53 -> [fd01::1]:53 [fd01::2]:53"
		node  = "node 0.0.0.0:30053 -> 10.0.0.1:53 10.0.0.2:53"
		node6 = "node [::]:30053 -> [fd01::1]:53 [fd01::2]:53"
	)
	for _, tt := range []struct {
		name    string
		changes []string // before, after
		stale   []string
		kept    []string
		replace bool
	}{
		{
			name:    "an endpoint leaves: flows to it go",
			changes: []string{dns, "dns 10.96.0.10:53 -> 10.0.0.1:53"},
			stale:   []string{"10.96.0.10:53 10.0.0.2:53"},
			kept: []string{
				"10.96.0.10:53 10.0.0.1:53",
				// Not by this frontend.
				"10.96.0.11:53 10.0.0.2:53", "10.96.0.10:54 10.0.0.2:53", "10.0.0.2:53 10.0.0.2:53",
				// Nobody knows who made these.
				"10.96.0.10:53 10.0.0.9:53", "10.96.0.10:53 10.96.0.10:53",
			},
		},
		{
			name:    "the last endpoint leaves",
			changes: []string{"dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 ->"},
			stale:   []string{"10.96.0.10:53 10.0.0.1:53"},
		},
		{
			name:    "an endpoint takes nothing new and still serves: flows to it stay",
			changes: []string{dns, "dns 10.96.0.10:53 -> 10.0.0.1:53 (10.0.0.2:53)"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53"},
		},
		{
			name:    "it serves no longer",
			changes: []string{"dns 10.96.0.10:53 -> 10.0.0.1:53 (10.0.0.2:53)", "dns 10.96.0.10:53 -> 10.0.0.1:53"},
			stale:   []string{"10.96.0.10:53 10.0.0.2:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53"},
		},
		{
			name:    "another port of the same pod",
			changes: []string{"dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:5353"},
			stale:   []string{"10.96.0.10:53 10.0.0.1:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:5353"},
		},
		{
			name:    "one more endpoint: nothing goes",
			changes: []string{"dns 10.96.0.10:53 -> 10.0.0.1:53", dns},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53", "10.96.0.10:53 10.96.0.10:53"},
		},
		{
			name:    "the first endpoint: flows that were not translated go",
			changes: []string{"dns 10.96.0.10:53 ->", "dns 10.96.0.10:53 -> 10.0.0.1:53"},
			stale:   []string{"10.96.0.10:53 10.96.0.10:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.11:53 10.96.0.11:53", "10.0.0.1:53 10.0.0.1:53"},
		},
		{
			name:    "a new Service: flows that were not translated go",
			changes: []string{"", dns},
			stale:   []string{"10.96.0.10:53 10.96.0.10:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.11:53 10.96.0.11:53"},
		},
		{
			name:    "a deleted Service: translated flows go, all others are none of ours",
			changes: []string{dns, ""},
			stale:   []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53"},
			kept:    []string{"10.96.0.10:53 10.96.0.10:53", "10.96.0.11:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.9:53"},
		},
		{
			name:    "a deleted Service whose endpoints only served on",
			changes: []string{"dns 10.96.0.10:53 -> (10.0.0.2:53)", ""},
			stale:   []string{"10.96.0.10:53 10.0.0.2:53"},
		},
		{
			name:    "a frontend goes, another comes, and one stays",
			changes: []string{"dns 10.96.0.10:53 198.51.100.1:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 198.51.100.2:53 -> 10.0.0.1:53"},
			stale:   []string{"198.51.100.1:53 10.0.0.1:53", "198.51.100.2:53 198.51.100.2:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "198.51.100.1:53 198.51.100.1:53", "198.51.100.2:53 10.0.0.1:53"},
		},
		{
			name: "a frontend goes from one Service to another",
			changes: []string{
				"a 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "",
				"b 10.96.0.11:53 -> 10.0.0.2:53 10.0.0.3:53", "b 10.96.0.10:53 10.96.0.11:53 -> 10.0.0.2:53 10.0.0.3:53",
			},
			stale: []string{"10.96.0.10:53 10.0.0.1:53"},
			kept:  []string{"10.96.0.10:53 10.0.0.2:53", "10.96.0.10:53 10.0.0.3:53", "10.96.0.11:53 10.0.0.3:53"},
		},
		{
			name: "the same, listed the other way round",
			changes: []string{
				"b 10.96.0.11:53 -> 10.0.0.2:53", "b 10.96.0.10:53 10.96.0.11:53 -> 10.0.0.2:53",
				"a 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "",
			},
			stale: []string{"10.96.0.10:53 10.0.0.1:53"},
			kept:  []string{"10.96.0.10:53 10.0.0.2:53"},
		},
		{
			name:    "IPv6",
			changes: []string{dns6, "dns [fd00:96::10]:53 -> [fd01::1]:53"},
			stale:   []string{"[fd00:96::10]:53 [fd01::2]:53"},
			kept:    []string{"[fd00:96::10]:53 [fd01::1]:53", "[fd00:96::11]:53 [fd01::2]:53"},
		},
		{
			name:    "a node port, on the node's addresses",
			changes: []string{node, "node 0.0.0.0:30053 -> 10.0.0.1:53"},
			stale:   []string{"192.0.2.1:30053 10.0.0.2:53"},
			kept:    []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.2:30053 10.0.0.2:53", "192.0.2.1:30054 10.0.0.2:53"},
		},
		{
			name:    "a node port goes",
			changes: []string{node, ""},
			stale:   []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.1:30053 10.0.0.2:53"},
			kept:    []string{"192.0.2.1:30053 192.0.2.1:30053", "192.0.2.2:30053 10.0.0.1:53"},
		},
		{
			name:    "another node port",
			changes: []string{node, "node 0.0.0.0:30054 -> 10.0.0.1:53 10.0.0.2:53"},
			stale:   []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.1:30054 192.0.2.1:30054"},
			kept:    []string{"192.0.2.1:30053 192.0.2.1:30053", "192.0.2.1:30054 10.0.0.1:53"},
		},
		{
			name:    "a new node port: flows to who listened there before go",
			changes: []string{"", node},
			stale:   []string{"192.0.2.1:30053 192.0.2.1:30053"},
			kept:    []string{"192.0.2.2:30053 192.0.2.2:30053", "192.0.2.1:30053 10.0.0.1:53"},
		},
		{
			name:    "a node port of IPv6",
			changes: []string{node6, "node [::]:30053 -> [fd01::1]:53"},
			stale:   []string{"[2001:db8::1]:30053 [fd01::2]:53"},
			kept:    []string{"[2001:db8::1]:30053 [fd01::1]:53", "[2001:db8::2]:30053 [fd01::2]:53"},
		},
		{
			name: "a frontend with an address of the node goes before a node port",
			changes: []string{
				node, "node 0.0.0.0:30053 -> 10.0.0.1:53",
				"", "ext 192.0.2.1:30053 -> 10.0.0.2:53",
			},
			stale: []string{"192.0.2.1:30053 192.0.2.1:30053"},
			kept:  []string{"192.0.2.1:30053 10.0.0.2:53"},
		},
		{
			name:    "an endpoint at the frontend's own address leaves, in the network of the node",
			changes: []string{"ext 192.0.2.9:53 -> 192.0.2.9:53 10.0.0.1:53", "ext 192.0.2.9:53 -> 10.0.0.1:53"},
			stale:   []string{"192.0.2.9:53 192.0.2.9:53"},
		},
		{
			name:    "a Replace: whatever does not serve goes",
			changes: []string{dns, dns, node, node, "none 10.96.0.12:53 ->", "none 10.96.0.12:53 ->"},
			replace: true,
			stale: []string{
				"10.96.0.10:53 10.0.0.9:53", "10.96.0.10:53 10.96.0.10:53", "10.96.0.12:53 10.0.0.1:53",
				"192.0.2.1:30053 10.0.0.9:53", "192.0.2.1:30053 192.0.2.1:30053",
			},
			kept: []string{
				"10.96.0.10:53 10.0.0.1:53", "10.96.0.11:53 10.0.0.9:53", "192.0.2.1:30053 10.0.0.1:53",
				"192.0.2.2:30053 10.0.0.9:53", "192.0.2.1:30054 10.0.0.9:53", "8.8.8.8:53 8.8.8.8:53",
			},
		},
		{
			name:    "a Replace that removes a Service",
			changes: []string{dns, ""},
			replace: true,
			stale:   []string{"10.96.0.10:53 10.0.0.1:53"},
			kept:    []string{"10.96.0.10:53 10.96.0.10:53", "10.96.0.10:53 10.0.0.9:53"},
		},
	} {
		got := staleFlows(tt.replace, parseChanges(tt.changes...), slices.Concat(tt.stale, tt.kept))
		if diff := cmp.Diff(tt.stale, got); diff != "" {
			t.Errorf("%s: stale (-want +got)\n%s", tt.name, diff)
		}
	}
}

// TestFormerNodePortAddresses says that the flows of node ports go whose address has
// no node ports any more, until it has again.
func TestFormerNodePortAddresses(t *testing.T) {
	t.Parallel()
	// Of an address that has node ports, as in TestStale.
	unserved := []string{"192.0.2.2:30053 192.0.2.2:30053", "192.0.2.2:30053 10.0.0.9:53"}
	for name, tt := range map[string]struct {
		nodes []string // the addresses and networks for node ports, one after the other
		stale []string
	}{
		"before":              {[]string{"192.0.2.1 192.0.2.2"}, unserved},
		"one leaves":          {[]string{"192.0.2.1 192.0.2.2", "192.0.2.1"}, []string{"192.0.2.2:30053 10.0.0.1:53"}},
		"and nothing happens": {[]string{"192.0.2.1 192.0.2.2", "192.0.2.1", "192.0.2.1"}, []string{"192.0.2.2:30053 10.0.0.1:53"}},
		"and comes back":      {[]string{"192.0.2.1 192.0.2.2", "192.0.2.1", "192.0.2.1 192.0.2.2"}, unserved},
		"a network leaves":    {[]string{"192.0.2.1 192.0.2.2/31", "192.0.2.1"}, []string{"192.0.2.2:30053 10.0.0.1:53", "192.0.2.3:30053 10.0.0.1:53"}},
		"the network returns": {[]string{"192.0.2.1 192.0.2.2/31", "192.0.2.1", "192.0.2.1 192.0.2.2/31"}, unserved},
		"all leave":           {[]string{"192.0.2.1 192.0.2.2", ""}, []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.2:30053 10.0.0.1:53"}},
	} {
		p := newServiceIndex()
		node, ext := service("node 0.0.0.0:30053 -> 10.0.0.1:53"), service("ext 192.0.2.2:30054 -> 10.0.0.1:53")
		p.update(map[dataplane.Key]*dataplane.Service{node.Key: node, ext.Key: ext})
		for _, addrs := range tt.nodes {
			var n dataplane.Node
			for field := range strings.FieldsSeq(addrs) {
				if network, err := netip.ParsePrefix(field); err == nil {
					n.NodePortNetworks = append(n.NodePortNetworks, network)
					continue
				}
				n.NodePortAddrs = append(n.NodePortAddrs, netip.MustParseAddr(field))
			}
			p.setNode(n)
		}
		var got []string
		for _, text := range []string{
			"192.0.2.1:30053 10.0.0.1:53", "192.0.2.2:30053 10.0.0.1:53",
			// Not the node ports' doing, where the address has none.
			"192.0.2.2:30053 192.0.2.2:30053", "192.0.2.2:30053 10.0.0.9:53", "192.0.2.2:30055 10.0.0.1:53",
			"192.0.2.2:30054 10.0.0.1:53", "192.0.2.3:30053 10.0.0.1:53",
		} {
			f := parseAddrPorts(text)
			if p.isStale(flow{protocol: dataplane.UDP, destination: f[0], endpoint: f[1]}, &candidates{all: true}) {
				got = append(got, text)
			}
		}
		if diff := cmp.Diff(tt.stale, got); diff != "" {
			t.Errorf("%s: stale (-want +got)\n%s", name, diff)
		}
	}
}

// TestLocalEndpoints says that flows of clients from outside stay with this
// node's endpoints.
func TestLocalEndpoints(t *testing.T) {
	t.Parallel()
	with := func(cluster, local string) *dataplane.Service {
		s := service("a 198.51.100.1:53 -> " + cluster)
		s.ExternalTrafficPolicyLocal = true
		for _, addr := range parseAddrPorts(local) {
			s.LocalEndpoints = append(s.LocalEndpoints, dataplane.Endpoint{Addr: addr})
		}
		return s
	}
	changes := []dataplane.Change{{Old: with("10.0.0.1:53 10.0.0.2:53", "10.0.0.3:53 10.0.0.4:53"), New: with("10.0.0.1:53", "10.0.0.3:53")}}
	got := staleFlows(false, changes, []string{
		"198.51.100.1:53 10.0.0.1:53", "198.51.100.1:53 10.0.0.2:53", "198.51.100.1:53 10.0.0.3:53", "198.51.100.1:53 10.0.0.4:53",
	})
	if diff := cmp.Diff([]string{"198.51.100.1:53 10.0.0.2:53", "198.51.100.1:53 10.0.0.4:53"}, got); diff != "" {
		t.Errorf("stale (-want +got)\n%s", diff)
	}
}

// TestTCPIgnored says that Services of TCP are not remembered.
func TestTCPIgnored(t *testing.T) {
	t.Parallel()
	p := newServiceIndex()
	var s candidates
	old := serviceWithProtocol(dataplane.TCP, "a 10.96.0.10:53 -> 10.0.0.1:53")
	s.addChange(dataplane.Change{Old: old})
	s.addChange(dataplane.Change{New: old})
	p.update(map[dataplane.Key]*dataplane.Service{old.Key: old})
	if !s.empty() || len(p.services)+len(p.owners) > 0 {
		t.Errorf("suspects %v, %d Services remembered", s, len(p.services))
	}
}

// TestStaleSCTP says which entries of SCTP go after a change, by whether there was
// a reply.
func TestStaleSCTP(t *testing.T) {
	t.Parallel()
	const vip = "a 10.96.0.10:7777 ->"
	for _, tt := range []struct {
		name            string
		before, after   string
		handshake, open bool // whether those to 10.0.0.1 go
		replace         bool
	}{
		{name: "the endpoint has left", before: vip + " 10.0.0.1:77", after: vip + " 10.0.0.2:77", handshake: true, open: true},
		{
			name:   "the endpoint takes nothing new: associations stay, unanswered handshakes go elsewhere",
			before: vip + " 10.0.0.1:77", after: vip + " 10.0.0.2:77 (10.0.0.1:77)", handshake: true,
		},
		{name: "it leaves then", before: vip + " 10.0.0.2:77 (10.0.0.1:77)", after: vip + " 10.0.0.2:77", handshake: true, open: true},
		{name: "another endpoint comes", before: vip + " 10.0.0.1:77", after: vip + " 10.0.0.1:77 10.0.0.2:77"},
		{name: "the Service is deleted", before: vip + " 10.0.0.1:77", handshake: true, open: true},
		{name: "at the start, one that takes nothing new", after: vip + " 10.0.0.2:77 (10.0.0.1:77)", handshake: true, replace: true},
		{name: "at the start, one that is not there", after: vip + " 10.0.0.2:77", handshake: true, open: true, replace: true},
	} {
		c := dataplane.Change{Old: serviceWithProtocol(dataplane.SCTP, tt.before), New: serviceWithProtocol(dataplane.SCTP, tt.after)}
		p, s := newServiceIndex(), candidates{all: tt.replace}
		s.addChange(c)
		p.update(map[dataplane.Key]*dataplane.Service{c.Key(): c.New})
		for _, replied := range []bool{false, true} {
			want := tt.handshake
			if replied {
				want = tt.open
			}
			f := flow{
				protocol: dataplane.SCTP, replied: replied,
				destination: netip.MustParseAddrPort("10.96.0.10:7777"), endpoint: netip.MustParseAddrPort("10.0.0.1:77"),
			}
			if got := p.isStale(f, &s); got != want {
				t.Errorf("%s: with a reply %t: stale %t", tt.name, replied, got)
			}
			f.protocol = dataplane.UDP
			if p.isStale(f, &s) {
				t.Errorf("%s: a flow of UDP goes, too", tt.name)
			}
		}
	}
}

// TestQueries says what is asked of the kernel for suspects.
func TestQueries(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		suspect  string
		all      bool
		services []string
		want     []string
	}{
		{name: "nothing"},
		{name: "a frontend", suspect: "10.96.0.10:53", want: []string{"IPv4 10.96.0.10 53"}},
		{name: "frontends of one port share a dump", suspect: "10.96.0.10:53 198.51.100.1:53", want: []string{"IPv4 any 53"}},
		{name: "a node port is one of any address", suspect: "10.96.0.10:53 0.0.0.0:30053", want: []string{"IPv4 any 30053", "IPv4 10.96.0.10 53"}},
		{name: "IPv6 is asked for by port only", suspect: "[fd00:96::10]:53", want: []string{"IPv6 any 53"}},
		{
			name: "the families for themselves", suspect: "[fd00:96::10]:53 10.96.0.10:53",
			want: []string{"IPv4 10.96.0.10 53", "IPv6 any 53"},
		},
		{
			name: "many in one", suspect: "10.96.0.10:53 10.96.0.11:54 10.96.0.12:55 10.96.0.13:56 [fd00:96::10]:53",
			want: []string{"IPv4 any 0", "IPv6 any 53"},
		},
		{name: "all of nothing", all: true},
		{
			name: "all", all: true, suspect: "10.96.0.20:99", services: []string{"a 10.96.0.10:53 ->", "b 10.96.0.11:53 ->"},
			want: []string{"IPv4 any 53", "IPv4 10.96.0.20 99"},
		},
	} {
		p := newServiceIndex()
		services := map[dataplane.Key]*dataplane.Service{}
		for _, text := range tt.services {
			s := service(text)
			services[s.Key] = s
		}
		p.update(services)
		s := candidates{all: tt.all}
		for _, f := range parseAddrPorts(tt.suspect) {
			s.add(dataplane.Frontend{Protocol: dataplane.UDP, Addr: f}, criteria{untranslated: true})
		}
		var got []string
		queries := p.queries(&s)
		for _, family := range sortedFamilies(queries) {
			for _, q := range queries[family] {
				addr := "any"
				if q.addr.IsValid() {
					addr = q.addr.String()
				}
				got = append(got, fmt.Sprint(q.family, " ", addr, " ", q.port))
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
	}
}
