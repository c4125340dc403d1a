package nft

import (
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/go-cmp/cmp"
)

// otherTables resembles the tables of other programs on a node: kube-proxy, a firewall and a
// CNI plugin.
const otherTables = `
table ip kube-proxy {
	comment "rules for kube-proxy"
	set cluster-ips { type ipv4_addr; comment "Active ClusterIPs"; elements = { 10.96.0.1 } }
	map service-ips {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 10.96.0.1 . tcp . 443 : goto service-ULMVA6XW-default/kubernetes/tcp/https }
	}
	chain service-ULMVA6XW-default/kubernetes/tcp/https {
		numgen random mod 1 vmap { 0 : goto endpoint-HFWMIEKH }
	}
	chain endpoint-HFWMIEKH { meta l4proto tcp dnat to 192.0.2.9:6443; }
	chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain nat-output { type nat hook output priority dstnat; jump services; }
	chain filter-forward { type filter hook forward priority -110; ct state new ip daddr @cluster-ips reject; }
}
table ip6 kube-proxy {
	set cluster-ips { type ipv6_addr; elements = { fd00:96::1 } }
	chain nat-postrouting { type nat hook postrouting priority srcnat; meta mark & 0x4000 != 0 masquerade fully-random; }
}
table inet firewalld {
	chain filter_INPUT { type filter hook input priority filter + 10; ct state { established, related } accept; ct state invalid drop; }
	chain filter_FORWARD { type filter hook forward priority filter + 10; jump zones; }
	chain zones { iifname "eth0" counter accept; meta l4proto { icmp, ipv6-icmp } accept; }
}
table inet cni {
	set pods { type ipv4_addr; flags interval, timeout; elements = { 10.1.0.0/24 } }
	counter masqueraded { }
	chain postrouting { type nat hook postrouting priority srcnat - 5; ip saddr @pods ip daddr != @pods counter name masqueraded masquerade; }
}
table arp filter {
	chain input { type filter hook input priority filter; }
}
table bridge nat {
	chain PREROUTING { type filter hook prerouting priority dstnat; }
}
table netdev cilium {
	set none { type mark; }
}
table ip fairlead-of-others {
	set services { type mark; elements = { 0x1 }; }
}
`

// TestOtherTablesUnchanged compares nft's listing of all other tables before and after our
// changes. The listing includes handles, so recreated objects differ.
func TestOtherTablesUnchanged(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.1.3"]
	d, ns := newDataplane(t)
	runNFT(t, ns, binary, otherTables)
	others := func() string {
		var all strings.Builder
		err := ns.Do(func() error {
			tables, err := exec.Command(binary, "list", "tables").Output()
			for table := range strings.Lines(string(tables)) {
				args := strings.Fields(table)[1:]
				if args[1] == TableName || err != nil {
					continue
				}
				var out []byte
				out, err = exec.Command(binary, append([]string{"--handle", "list", "table"}, args...)...).Output()
				all.Write(out)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return all.String()
	}
	before := others()
	if strings.Count(before, "\ntable ")+1 != 8 {
		t.Fatalf("unexpected other tables:\n%s", before)
	}
	services := sampleServices(t)
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"initial Replace", func() { mustReplace(t, d, nodeWithAllSettings(), services...) }},
		{"Apply", func() {
			gone := dataplane.Change{Old: services[0]}
			mustApply(t, d, gone)
			mustApply(t, d, dataplane.Change{New: services[0]})
			var changes []dataplane.Change
			for i := range 300 {
				changes = append(changes, dataplane.Change{
					New: service(t, fmt.Sprintf("s-%d", i), []dataplane.Frontend{frontend(1000 + i)}, endpoints(i, i+1, i%7)),
				})
			}
			mustApply(t, d, changes...)
		}},
		{"warm restart", func() { d = openInNamespace(t, ns); mustReplace(t, d, nodeWithAllSettings(), services...) }},
		{"another Node", func() { mustReplace(t, d, dataplane.Node{}, services...) }},
		{"repair", func() {
			runNFT(t, ns, binary, "flush chain ip fairlead nat-prerouting\nadd element ip fairlead classes { * : drop }\ndelete table ip6 fairlead")
			<-d.Drift()
			mustReplace(t, d, nodeWithAllSettings(), services...)
		}},
		{"no Services", func() { mustReplace(t, d, dataplane.Node{}) }},
		{"Cleanup", func() {
			if err := Cleanup(Options{NetNS: ns.Fd()}); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		step.do()
		if diff := cmp.Diff(before, others()); diff != "" {
			t.Fatalf("%s changed other tables (-before +after):\n%s", step.name, diff)
		}
	}
}

// TestOtherMarksPreserved sets packet and connection marks in another table before our
// chains. Counters behind our chains check that all packets still have the marks.
func TestOtherMarksPreserved(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	pod, client := network.PodT(t, "pod"), network.PodT(t, "client")
	pod.ServeT(t, nettest.TCP, 8080)
	binary := nftBinaries(t)["1.1.3"]
	d := openInNamespace(t, network.Node.Namespace)
	var services []*dataplane.Service
	for i, prefix := range []string{"10.96.0.", "fd00:96::"} {
		for n, spec := range []dataplane.ServiceSpec{
			{},
			{Masquerade: dataplane.MasqueradeAlways},
			{Affinity: time.Hour},
			{ExternalTrafficPolicyLocal: true, Masquerade: dataplane.MasqueradeFromNode},
		} {
			spec.Endpoints = []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.Addrs()[i], 8080), Local: true}}
			if spec.ExternalTrafficPolicyLocal {
				spec.LocalEndpoints = slices.Clone(spec.Endpoints)
			}
			addr := netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("%s%d", prefix, n)), 80)
			s := service(t, fmt.Sprintf("s-%d", n), []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: addr}}, nil)
			s.ServiceSpec = spec
			services = append(services, s)
		}
	}
	mustReplace(t, d, dataplane.Node{PodCIDRs: network.PodCIDRs, PingServiceIPs: true, PrimaryAddrs: network.Node.Addrs()}, services...)
	runNFT(t, network.Node.Namespace, binary, `table inet others {
		counter kept-forward { }
		counter kept-postrouting { }
		counter kept-answers { }
		counter kept-rejected { }
		counter lost { }
		chain marks { meta mark set 0xa5a5a5a5 ct mark set 0x5a5a5a5a; }
		chain prerouting {
			type filter hook prerouting priority mangle
			ct direction original goto marks
		}
		chain output {
			type route hook output priority mangle
			ct direction original goto marks
		}
		chain kept { meta mark 0xa5a5a5a5 ct mark 0x5a5a5a5a return; counter name lost; }
		chain forward-before {
			type filter hook forward priority filter - 1
			tcp dport 81 jump kept
			tcp dport 81 counter name kept-rejected
		}
		chain forward {
			type filter hook forward priority filter + 1
			tcp dport 8080 jump kept
			tcp dport 8080 counter name kept-forward
			tcp sport 8080 ct mark 0x5a5a5a5a counter name kept-answers
			tcp sport 8080 ct mark != 0x5a5a5a5a counter name lost
		}
		chain postrouting {
			type filter hook postrouting priority srcnat + 10
			tcp dport 8080 jump kept
			tcp dport 8080 counter name kept-postrouting
		}
	}
	`)
	for _, s := range services {
		to := s.Frontends[0].Addr
		for _, from := range []*nettest.Host{client, pod, network.Outside, network.Node} {
			if _, err := from.Connect(t.Context(), nettest.TCP, to); err != nil {
				t.Error(err)
			}
		}
		if s.Key.Kind == dataplane.ClusterIP {
			if _, err := client.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(to.Addr(), 81)); err == nil {
				t.Errorf("port 81 of %s was not rejected", to.Addr())
			}
		}
	}
	listing := runNFT(t, network.Node.Namespace, binary, "list counters table inet others")
	if strings.Count(listing, "packets 0 ") != 1 || !strings.Contains(listing, "counter lost {\n\t\tpackets 0 ") {
		t.Errorf("want packets in all counters except lost:\n%s", listing)
	}
}

// TestNodeCounters checks the counters for rejected connections to localhost node ports and
// for invalid packets from endpoints.
func TestNodeCounters(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	pod, client := network.PodT(t, "pod"), network.PodT(t, "client")
	pod.ServeT(t, nettest.TCP, 8080)
	d := openInNamespace(t, network.Node.Namespace)
	binary := nftBinaries(t)["1.1.3"]
	var services []*dataplane.Service
	for i, addr := range []string{"10.96.0.1", "fd00:96::1"} {
		endpoint := []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.Addrs()[i], 8080)}}
		f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(netip.MustParseAddr(addr), 80)}
		services = append(services, service(t, "s", []dataplane.Frontend{f}, endpoint))
		for _, p := range protocols() {
			node := dataplane.Frontend{Protocol: p, Addr: netip.AddrPortFrom(netip.IPv4Unspecified(), 30080)}
			if i == 1 {
				node.Addr = netip.AddrPortFrom(netip.IPv6Unspecified(), 30080)
			}
			key := dataplane.Key{Namespace: "default", Name: p.String(), Family: dataplane.FamilyOf(node.Addr.Addr()), Kind: dataplane.NodePort}
			s, err := dataplane.NewService(key, []dataplane.Frontend{node}, dataplane.ServiceSpec{Endpoints: endpoint})
			if err != nil {
				t.Fatal(err)
			}
			services = append(services, s)
		}
	}
	node := nodeWithPodCIDRs()
	node.PodCIDRs = network.PodCIDRs
	mustReplace(t, d, node, services...)
	for i, family := range []string{"ip", "ip6"} {
		want := map[counter]int{}
		check := func() {
			t.Helper()
			got := map[counter]int{}
			for _, c := range allCounters() {
				listing := runNFT(t, network.Node.Namespace, binary, fmt.Sprintf("list counter %s fairlead %s", family, c))
				if packets := counterPackets(t, listing); packets > 0 {
					got[c] = packets
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("counters (-want +got):\n%s", diff)
			}
		}
		loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}[i]
		for _, p := range protocols() {
			if _, err := network.Node.Connect(t.Context(), strings.ToLower(p.String()), netip.AddrPortFrom(loopback, 30080)); err == nil {
				t.Errorf("%s: unexpected answer", p)
			}
			want[rejectedLocalhostCounter(p)] = 1
			check()
		}
		segments := pod.SegmentConnT(t, pod.Addrs()[i])
		conn, err := client.Open(t.Context(), nettest.TCP, services[4*i].Frontends[0].Addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Ask(t.Context()); err != nil {
			t.Fatal(err)
		}
		var last nettest.Segment
		for last.Len == 0 {
			for _, s := range segments.Received() {
				if s.Len > 0 {
					last = s
				}
			}
		}
		for _, flags := range []nettest.TCPFlags{nettest.ACK, nettest.ACK | nettest.PSH, nettest.ACK | nettest.RST} {
			err := segments.Send(nettest.Segment{
				Source: last.Destination, Destination: last.Source, Seq: last.Ack + 1<<30, Ack: last.Seq + uint32(last.Len), //nolint:gosec // short
				Flags: flags, Len: 1,
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		want[droppedInvalid] = 2 // resets are not dropped
		check()
		if _, err := conn.Ask(t.Context()); err != nil {
			t.Error(err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}
