package conntrack

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
)

func parseAddrPorts(text string) (list []netip.AddrPort) {
	for field := range strings.FieldsSeq(text) {
		list = append(list, netip.MustParseAddrPort(field))
	}
	return list
}

// service parses a Service: its name, its frontends and its endpoints. Endpoints in
// parentheses are in Service.Serving only:
//
//	dns 10.96.0.10:53 -> 10.0.0.1:53 (10.0.0.2:53)
//
// It returns nil for an empty text.
func service(text string) *dataplane.Service { return serviceWithProtocol(dataplane.UDP, text) }

func serviceWithProtocol(protocol dataplane.Protocol, text string) *dataplane.Service {
	if text == "" {
		return nil
	}
	head, to, _ := strings.Cut(text, "->")
	name, at, _ := strings.Cut(head, " ")
	to, serving, _ := strings.Cut(to, "(")
	var frontends []dataplane.Frontend
	for _, addr := range parseAddrPorts(at) {
		frontends = append(frontends, dataplane.Frontend{Protocol: protocol, Addr: addr})
	}
	key := dataplane.Key{Namespace: "default", Name: name, Family: dataplane.FamilyOf(frontends[0].Addr.Addr())}
	if frontends[0].Addr.Addr().IsUnspecified() {
		key.Kind = dataplane.NodePort
	}
	var spec dataplane.ServiceSpec
	for _, addr := range parseAddrPorts(to) {
		spec.Endpoints = append(spec.Endpoints, dataplane.Endpoint{Addr: addr})
	}
	s, err := dataplane.NewService(key, frontends, spec)
	if err == nil {
		s, err = s.WithServing(parseAddrPorts(strings.TrimSuffix(serving, ")")))
	}
	if err != nil {
		panic(fmt.Sprintf("%q: %v", text, err))
	}
	return s
}

// parseChanges parses pairs of old and new Services.
func parseChanges(pairs ...string) (changes []dataplane.Change) {
	for pair := range slices.Chunk(pairs, 2) {
		changes = append(changes, dataplane.Change{Old: service(pair[0]), New: service(pair[1])})
	}
	return changes
}

// staleFlows returns the flows, written "destination endpoint", that are stale after a commit
// of the changes. Node ports are on 192.0.2.1 and 2001:db8::1.
func staleFlows(all bool, changes []dataplane.Change, flows []string) (stale []string) {
	index, before, after := newServiceIndex(), map[dataplane.Key]*dataplane.Service{}, map[dataplane.Key]*dataplane.Service{}
	index.setNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}})
	s := candidates{all: all}
	for _, c := range changes {
		before[c.Key()] = c.Old
		after[c.Key()] = c.New
		s.addChange(c)
	}
	index.update(before)
	index.update(after)
	for _, text := range flows {
		f := parseAddrPorts(text)
		if index.isStale(flow{protocol: dataplane.UDP, destination: f[0], endpoint: f[1]}, &s) {
			stale = append(stale, text)
		}
	}
	return stale
}

// TestStale checks which flows are stale after a change.
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
			name:    "endpoint removed",
			changes: []string{dns, "dns 10.96.0.10:53 -> 10.0.0.1:53"},
			stale:   []string{"10.96.0.10:53 10.0.0.2:53"},
			kept: []string{
				"10.96.0.10:53 10.0.0.1:53",
				// Other frontends.
				"10.96.0.11:53 10.0.0.2:53", "10.96.0.10:54 10.0.0.2:53", "10.0.0.2:53 10.0.0.2:53",
				// Flows of unknown origin.
				"10.96.0.10:53 10.0.0.9:53", "10.96.0.10:53 10.96.0.10:53",
			},
		},
		{
			name:    "last endpoint removed",
			changes: []string{"dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 ->"},
			stale:   []string{"10.96.0.10:53 10.0.0.1:53"},
		},
		{
			name:    "endpoint stops accepting and still serves",
			changes: []string{dns, "dns 10.96.0.10:53 -> 10.0.0.1:53 (10.0.0.2:53)"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53"},
		},
		{
			name:    "endpoint stops serving",
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
			name:    "endpoint added",
			changes: []string{"dns 10.96.0.10:53 -> 10.0.0.1:53", dns},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53", "10.96.0.10:53 10.96.0.10:53"},
		},
		{
			name:    "first endpoint added: untranslated flows are stale",
			changes: []string{"dns 10.96.0.10:53 ->", "dns 10.96.0.10:53 -> 10.0.0.1:53"},
			stale:   []string{"10.96.0.10:53 10.96.0.10:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.11:53 10.96.0.11:53", "10.0.0.1:53 10.0.0.1:53"},
		},
		{
			name:    "Service added: untranslated flows are stale",
			changes: []string{"", dns},
			stale:   []string{"10.96.0.10:53 10.96.0.10:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.11:53 10.96.0.11:53"},
		},
		{
			name:    "Service deleted: only translated flows are stale",
			changes: []string{dns, ""},
			stale:   []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53"},
			kept:    []string{"10.96.0.10:53 10.96.0.10:53", "10.96.0.11:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.9:53"},
		},
		{
			name:    "Service deleted whose endpoints only served",
			changes: []string{"dns 10.96.0.10:53 -> (10.0.0.2:53)", ""},
			stale:   []string{"10.96.0.10:53 10.0.0.2:53"},
		},
		{
			name:    "one frontend removed, one added, one unchanged",
			changes: []string{"dns 10.96.0.10:53 198.51.100.1:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 198.51.100.2:53 -> 10.0.0.1:53"},
			stale:   []string{"198.51.100.1:53 10.0.0.1:53", "198.51.100.2:53 198.51.100.2:53"},
			kept:    []string{"10.96.0.10:53 10.0.0.1:53", "198.51.100.1:53 198.51.100.1:53", "198.51.100.2:53 10.0.0.1:53"},
		},
		{
			name: "frontend moved to another Service",
			changes: []string{
				"a 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "",
				"b 10.96.0.11:53 -> 10.0.0.2:53 10.0.0.3:53", "b 10.96.0.10:53 10.96.0.11:53 -> 10.0.0.2:53 10.0.0.3:53",
			},
			stale: []string{"10.96.0.10:53 10.0.0.1:53"},
			kept:  []string{"10.96.0.10:53 10.0.0.2:53", "10.96.0.10:53 10.0.0.3:53", "10.96.0.11:53 10.0.0.3:53"},
		},
		{
			name: "frontend moved to another Service, in reverse order",
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
			name:    "node port at the node's addresses",
			changes: []string{node, "node 0.0.0.0:30053 -> 10.0.0.1:53"},
			stale:   []string{"192.0.2.1:30053 10.0.0.2:53"},
			kept:    []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.2:30053 10.0.0.2:53", "192.0.2.1:30054 10.0.0.2:53"},
		},
		{
			name:    "node port deleted",
			changes: []string{node, ""},
			stale:   []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.1:30053 10.0.0.2:53"},
			kept:    []string{"192.0.2.1:30053 192.0.2.1:30053", "192.0.2.2:30053 10.0.0.1:53"},
		},
		{
			name:    "node port changed",
			changes: []string{node, "node 0.0.0.0:30054 -> 10.0.0.1:53 10.0.0.2:53"},
			stale:   []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.1:30054 192.0.2.1:30054"},
			kept:    []string{"192.0.2.1:30053 192.0.2.1:30053", "192.0.2.1:30054 10.0.0.1:53"},
		},
		{
			name:    "node port added: flows to a former listener are stale",
			changes: []string{"", node},
			stale:   []string{"192.0.2.1:30053 192.0.2.1:30053"},
			kept:    []string{"192.0.2.2:30053 192.0.2.2:30053", "192.0.2.1:30053 10.0.0.1:53"},
		},
		{
			name:    "IPv6 node port",
			changes: []string{node6, "node [::]:30053 -> [fd01::1]:53"},
			stale:   []string{"[2001:db8::1]:30053 [fd01::2]:53"},
			kept:    []string{"[2001:db8::1]:30053 [fd01::1]:53", "[2001:db8::2]:30053 [fd01::2]:53"},
		},
		{
			name: "frontend at an address of the node precedes a node port",
			changes: []string{
				node, "node 0.0.0.0:30053 -> 10.0.0.1:53",
				"", "ext 192.0.2.1:30053 -> 10.0.0.2:53",
			},
			stale: []string{"192.0.2.1:30053 192.0.2.1:30053"},
			kept:  []string{"192.0.2.1:30053 10.0.0.2:53"},
		},
		{
			name:    "endpoint removed that has the frontend's own address (host network)",
			changes: []string{"ext 192.0.2.9:53 -> 192.0.2.9:53 10.0.0.1:53", "ext 192.0.2.9:53 -> 10.0.0.1:53"},
			stale:   []string{"192.0.2.9:53 192.0.2.9:53"},
		},
		{
			name:    "Replace: all flows that are not served are stale",
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
			name:    "Replace that deletes a Service",
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

// TestFormerNodePortAddresses checks that translated flows to node ports are stale at
// addresses that no longer serve node ports, until they do again.
func TestFormerNodePortAddresses(t *testing.T) {
	t.Parallel()
	// Stale at an address that serves node ports, as in TestStale.
	staleAtNodePort := []string{"192.0.2.2:30053 192.0.2.2:30053", "192.0.2.2:30053 10.0.0.9:53"}
	for name, tt := range map[string]struct {
		nodes []string // successive addresses and networks of node ports
		stale []string
	}{
		"before":                             {[]string{"192.0.2.1 192.0.2.2"}, staleAtNodePort},
		"address removed":                    {[]string{"192.0.2.1 192.0.2.2", "192.0.2.1"}, []string{"192.0.2.2:30053 10.0.0.1:53"}},
		"address removed, no further change": {[]string{"192.0.2.1 192.0.2.2", "192.0.2.1", "192.0.2.1"}, []string{"192.0.2.2:30053 10.0.0.1:53"}},
		"address added again":                {[]string{"192.0.2.1 192.0.2.2", "192.0.2.1", "192.0.2.1 192.0.2.2"}, staleAtNodePort},
		"network removed":                    {[]string{"192.0.2.1 192.0.2.2/31", "192.0.2.1"}, []string{"192.0.2.2:30053 10.0.0.1:53", "192.0.2.3:30053 10.0.0.1:53"}},
		"network added again":                {[]string{"192.0.2.1 192.0.2.2/31", "192.0.2.1", "192.0.2.1 192.0.2.2/31"}, staleAtNodePort},
		"all removed":                        {[]string{"192.0.2.1 192.0.2.2", ""}, []string{"192.0.2.1:30053 10.0.0.1:53", "192.0.2.2:30053 10.0.0.1:53"}},
	} {
		index := newServiceIndex()
		node, ext := service("node 0.0.0.0:30053 -> 10.0.0.1:53"), service("ext 192.0.2.2:30054 -> 10.0.0.1:53")
		index.update(map[dataplane.Key]*dataplane.Service{node.Key: node, ext.Key: ext})
		for _, addrs := range tt.nodes {
			var n dataplane.Node
			for field := range strings.FieldsSeq(addrs) {
				if network, err := netip.ParsePrefix(field); err == nil {
					n.NodePortNetworks = append(n.NodePortNetworks, network)
					continue
				}
				n.NodePortAddrs = append(n.NodePortAddrs, netip.MustParseAddr(field))
			}
			index.setNode(n)
		}
		var got []string
		for _, text := range []string{
			"192.0.2.1:30053 10.0.0.1:53", "192.0.2.2:30053 10.0.0.1:53",
			// Not translated by node ports, or at other frontends.
			"192.0.2.2:30053 192.0.2.2:30053", "192.0.2.2:30053 10.0.0.9:53", "192.0.2.2:30055 10.0.0.1:53",
			"192.0.2.2:30054 10.0.0.1:53", "192.0.2.3:30053 10.0.0.1:53",
		} {
			f := parseAddrPorts(text)
			if index.isStale(flow{protocol: dataplane.UDP, destination: f[0], endpoint: f[1]}, &candidates{all: true}) {
				got = append(got, text)
			}
		}
		if diff := cmp.Diff(tt.stale, got); diff != "" {
			t.Errorf("%s: stale (-want +got)\n%s", name, diff)
		}
	}
}

// TestLocalEndpoints checks that LocalEndpoints keep their flows.
func TestLocalEndpoints(t *testing.T) {
	t.Parallel()
	newService := func(cluster, local string) *dataplane.Service {
		s := service("a 198.51.100.1:53 -> " + cluster)
		s.ExternalTrafficPolicyLocal = true
		for _, addr := range parseAddrPorts(local) {
			s.LocalEndpoints = append(s.LocalEndpoints, dataplane.Endpoint{Addr: addr})
		}
		return s
	}
	changes := []dataplane.Change{{Old: newService("10.0.0.1:53 10.0.0.2:53", "10.0.0.3:53 10.0.0.4:53"), New: newService("10.0.0.1:53", "10.0.0.3:53")}}
	got := staleFlows(false, changes, []string{
		"198.51.100.1:53 10.0.0.1:53", "198.51.100.1:53 10.0.0.2:53", "198.51.100.1:53 10.0.0.3:53", "198.51.100.1:53 10.0.0.4:53",
	})
	if diff := cmp.Diff([]string{"198.51.100.1:53 10.0.0.2:53", "198.51.100.1:53 10.0.0.4:53"}, got); diff != "" {
		t.Errorf("stale (-want +got)\n%s", diff)
	}
}

// TestTCPIgnored checks that the index and the candidates omit TCP Services.
func TestTCPIgnored(t *testing.T) {
	t.Parallel()
	index := newServiceIndex()
	var s candidates
	old := serviceWithProtocol(dataplane.TCP, "a 10.96.0.10:53 -> 10.0.0.1:53")
	s.addChange(dataplane.Change{Old: old})
	s.addChange(dataplane.Change{New: old})
	index.update(map[dataplane.Key]*dataplane.Service{old.Key: old})
	if !s.empty() || len(index.services)+len(index.owners) > 0 {
		t.Errorf("candidates %v, %d Services in the index", s, len(index.services))
	}
}

// TestStaleSCTP checks which SCTP entries are stale after a change, with and without a reply.
func TestStaleSCTP(t *testing.T) {
	t.Parallel()
	const vip = "a 10.96.0.10:7777 ->"
	for _, tt := range []struct {
		name            string
		before, after   string
		handshake, open bool // whether entries to 10.0.0.1 are stale, without and with a reply
		replace         bool
	}{
		{name: "endpoint removed", before: vip + " 10.0.0.1:77", after: vip + " 10.0.0.2:77", handshake: true, open: true},
		{
			name:   "endpoint stops accepting: associations are kept, unanswered handshakes are stale",
			before: vip + " 10.0.0.1:77", after: vip + " 10.0.0.2:77 (10.0.0.1:77)", handshake: true,
		},
		{name: "endpoint stops serving", before: vip + " 10.0.0.2:77 (10.0.0.1:77)", after: vip + " 10.0.0.2:77", handshake: true, open: true},
		{name: "endpoint added", before: vip + " 10.0.0.1:77", after: vip + " 10.0.0.1:77 10.0.0.2:77"},
		{name: "Service deleted", before: vip + " 10.0.0.1:77", handshake: true, open: true},
		{name: "start, endpoint only serves", after: vip + " 10.0.0.2:77 (10.0.0.1:77)", handshake: true, replace: true},
		{name: "start, unknown endpoint", after: vip + " 10.0.0.2:77", handshake: true, open: true, replace: true},
	} {
		c := dataplane.Change{Old: serviceWithProtocol(dataplane.SCTP, tt.before), New: serviceWithProtocol(dataplane.SCTP, tt.after)}
		index, s := newServiceIndex(), candidates{all: tt.replace}
		s.addChange(c)
		index.update(map[dataplane.Key]*dataplane.Service{c.Key(): c.New})
		for _, replied := range []bool{false, true} {
			want := tt.handshake
			if replied {
				want = tt.open
			}
			f := flow{
				protocol: dataplane.SCTP, replied: replied,
				destination: netip.MustParseAddrPort("10.96.0.10:7777"), endpoint: netip.MustParseAddrPort("10.0.0.1:77"),
			}
			if got := index.isStale(f, &s); got != want {
				t.Errorf("%s: replied %t: stale %t", tt.name, replied, got)
			}
			f.protocol = dataplane.UDP
			if index.isStale(f, &s) {
				t.Errorf("%s: a UDP flow is stale too", tt.name)
			}
		}
	}
}

// TestChangeNeedsScan checks which changes can leave stale entries and therefore start a scan.
func TestChangeNeedsScan(t *testing.T) {
	t.Parallel()
	const vip = "a 10.96.0.10:53 ->"
	withSpec := func(s *dataplane.Service, edit func(*dataplane.ServiceSpec)) *dataplane.Service {
		n := *s
		edit(&n.ServiceSpec)
		return &n
	}
	for _, tt := range []struct {
		name          string
		before, after string
		edit          func(*dataplane.ServiceSpec) // of the Service after the change
		udp, sctp     bool
	}{
		{name: "Service added", after: vip + " 10.0.0.1:53", udp: true, sctp: true},
		{name: "Service without endpoints added: its flows must be refused", after: vip, udp: true, sctp: true},
		{name: "first endpoint added", before: vip, after: vip + " 10.0.0.1:53", udp: true, sctp: true},
		{name: "frontend added", before: vip + " 10.0.0.1:53", after: "a 10.96.0.10:53 10.96.0.11:53 -> 10.0.0.1:53", udp: true, sctp: true},
		{name: "endpoint removed", before: vip + " 10.0.0.1:53 10.0.0.2:53", after: vip + " 10.0.0.1:53", udp: true, sctp: true},
		{name: "last endpoint removed", before: vip + " 10.0.0.1:53", after: vip, udp: true, sctp: true},
		{name: "frontend removed", before: "a 10.96.0.10:53 10.96.0.11:53 -> 10.0.0.1:53", after: vip + " 10.0.0.1:53", udp: true, sctp: true},
		{name: "Service deleted", before: vip + " 10.0.0.1:53", udp: true, sctp: true},
		{name: "Service deleted whose endpoint only served", before: vip + " (10.0.0.1:53)", udp: true, sctp: true},
		{
			name: "endpoint stops accepting and still serves: an SCTP handshake may wait for it", sctp: true,
			before: vip + " 10.0.0.1:53 10.0.0.2:53", after: vip + " 10.0.0.1:53 (10.0.0.2:53)",
		},
		{name: "endpoint stops serving", before: vip + " 10.0.0.1:53 (10.0.0.2:53)", after: vip + " 10.0.0.1:53", udp: true, sctp: true},

		{name: "second endpoint added", before: vip + " 10.0.0.1:53", after: vip + " 10.0.0.1:53 10.0.0.2:53"},
		{name: "endpoint added while another only serves", before: vip + " 10.0.0.1:53 (10.0.0.2:53)", after: vip + " 10.0.0.1:53 10.0.0.3:53 (10.0.0.2:53)"},
		{name: "endpoint accepts again", before: vip + " 10.0.0.1:53 (10.0.0.2:53)", after: vip + " 10.0.0.1:53 10.0.0.2:53"},
		{name: "only a serving endpoint added", before: vip + " 10.0.0.1:53", after: vip + " 10.0.0.1:53 (10.0.0.2:53)"},
		{name: "other order of endpoints", before: vip + " 10.0.0.1:53 10.0.0.2:53", after: vip + " 10.0.0.2:53 10.0.0.1:53"},
		{name: "nothing changed", before: vip + " 10.0.0.1:53", after: vip + " 10.0.0.1:53"},
		{
			name: "session affinity", before: vip + " 10.0.0.1:53", after: vip + " 10.0.0.1:53",
			edit: func(s *dataplane.ServiceSpec) { s.Affinity = time.Hour },
		},
		{
			name: "masquerading", before: vip + " 10.0.0.1:53", after: vip + " 10.0.0.1:53",
			edit: func(s *dataplane.ServiceSpec) { s.Masquerade = dataplane.MasqueradeAlways },
		},
		{
			name: "endpoint is local", before: vip + " 10.0.0.1:53", after: vip + " 10.0.0.1:53",
			edit: func(s *dataplane.ServiceSpec) {
				s.Endpoints = []dataplane.Endpoint{{Addr: s.Endpoints[0].Addr, Local: true}}
			},
		},
		{name: "Service without endpoints deleted", before: vip},
	} {
		for protocol, want := range map[dataplane.Protocol]bool{dataplane.UDP: tt.udp, dataplane.SCTP: tt.sctp, dataplane.TCP: false} {
			if protocol == dataplane.TCP && strings.Contains(tt.before+tt.after, "(") {
				continue
			}
			c := dataplane.Change{Old: serviceWithProtocol(protocol, tt.before), New: serviceWithProtocol(protocol, tt.after)}
			if tt.edit != nil {
				c.New = withSpec(c.New, tt.edit)
			}
			var s candidates
			s.addChange(c)
			if s.empty() == want {
				t.Errorf("%s, %s: scan %t, want %t", tt.name, protocol, !s.empty(), want)
			}
		}
	}
}

// TestQueries checks the queries for candidates.
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
		{name: "one frontend", suspect: "10.96.0.10:53", want: []string{"IPv4 10.96.0.10 53"}},
		{name: "several frontends on one port", suspect: "10.96.0.10:53 198.51.100.1:53", want: []string{"IPv4 any 53"}},
		{name: "node port", suspect: "10.96.0.10:53 0.0.0.0:30053", want: []string{"IPv4 any 30053", "IPv4 10.96.0.10 53"}},
		{name: "IPv6", suspect: "[fd00:96::10]:53", want: []string{"IPv6 any 53"}},
		{
			name: "both families", suspect: "[fd00:96::10]:53 10.96.0.10:53",
			want: []string{"IPv4 10.96.0.10 53", "IPv6 any 53"},
		},
		{
			name: "many ports", suspect: "10.96.0.10:53 10.96.0.11:54 10.96.0.12:55 10.96.0.13:56 [fd00:96::10]:53",
			want: []string{"IPv4 any 0", "IPv6 any 53"},
		},
		{name: "all, without frontends", all: true},
		{
			name: "all", all: true, suspect: "10.96.0.20:99", services: []string{"a 10.96.0.10:53 ->", "b 10.96.0.11:53 ->"},
			want: []string{"IPv4 any 53", "IPv4 10.96.0.20 99"},
		},
	} {
		index := newServiceIndex()
		services := map[dataplane.Key]*dataplane.Service{}
		for _, text := range tt.services {
			s := service(text)
			services[s.Key] = s
		}
		index.update(services)
		s := candidates{all: tt.all}
		for _, f := range parseAddrPorts(tt.suspect) {
			s.add(dataplane.Frontend{Protocol: dataplane.UDP, Addr: f}, criteria{untranslated: true})
		}
		var got []string
		queries := index.queries(&s)
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
