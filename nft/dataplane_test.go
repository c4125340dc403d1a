package nft

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "update the golden rulesets in testdata")

// newDataplane opens a Dataplane in an empty network namespace, optionally with a Translator.
func newDataplane(t *testing.T, translator ...Translator) (*Dataplane, *nettest.Namespace) {
	t.Helper()
	ns := nettest.NamespaceT(t)
	return openInNamespace(t, ns, translator...), ns
}

func openInNamespace(t *testing.T, ns *nettest.Namespace, translator ...Translator) *Dataplane {
	t.Helper()
	var opts Options
	if len(translator) > 0 {
		opts.Translator = translator[0]
	}
	return openWithOptions(t, ns, opts)
}

func openWithOptions(t *testing.T, ns *nettest.Namespace, opts Options) *Dataplane {
	t.Helper()
	opts.NetNS = ns.Fd()
	d, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	d.minSharedFrontends = 2 // low, so that many tests have Services with and without a shared list
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// nftBinaries returns the paths of the nft binaries to test listings with, by version. They
// are the versions of the supported Debian releases.
func nftBinaries(t *testing.T) map[string]string {
	t.Helper()
	versions := map[string]string{}
	for _, v := range []string{"1.0.6", "1.1.3"} {
		path, err := filepath.Abs(filepath.Join("..", ".cache", "nftables", v, "nft"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("nft %s is missing: run `make nftables` (%v)", v, err)
		}
		versions[v] = path
	}
	return versions
}

// runNFT runs an nft binary with a script in the namespace and returns its output.
func runNFT(t *testing.T, ns *nettest.Namespace, binary, script string) string {
	t.Helper()
	var out []byte
	err := ns.Do(func() error {
		cmd := exec.Command(binary, "-f", "-")
		cmd.Stdin = strings.NewReader(script)
		var err error
		if out, err = cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s -f - <<< %q: %w\n%s", binary, script, err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func mustReplace(t *testing.T, d *Dataplane, node dataplane.Node, services ...*dataplane.Service) {
	t.Helper()
	if err := d.Replace(t.Context(), node, slices.Values(services), nil); err != nil {
		t.Fatal(err)
	}
}

func mustApply(t *testing.T, d *Dataplane, changes ...dataplane.Change) {
	t.Helper()
	if err := d.Apply(t.Context(), changes); err != nil {
		t.Fatal(err)
	}
}

// wantState fails the test unless the kernel holds exactly these Services.
func wantState(t *testing.T, d *Dataplane, services ...*dataplane.Service) {
	t.Helper()
	if translatorOf(d) != nil {
		wantVirtualBindings(t, d, services...)
		return
	}
	got, err := d.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := dataplane.StateOf(slices.Values(services)).Diff(got); diff != "" {
		t.Errorf("unexpected state in the kernel:\n%s", diff)
	}
}

func generation(t *testing.T, d *Dataplane) uint32 {
	t.Helper()
	g, err := d.conn.GetGen()
	if err != nil {
		t.Fatal(err)
	}
	return g.ID
}

func nodeWithPodCIDRs() dataplane.Node {
	return dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/64")}}
}

// nodeWithAllSettings returns a Node that extends nodeWithPodCIDRs with every other setting.
func nodeWithAllSettings() dataplane.Node {
	node := nodeWithPodCIDRs()
	node.LocalPodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.7.0.0/24"), netip.MustParsePrefix("fd00:7::/64")}
	node.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/108")}
	node.PrimaryAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	// Loopback addresses have no effect.
	node.NodePortAddrs = append(slices.Clone(node.PrimaryAddrs), netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback())
	node.NodePortNetworks = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/25"), netip.MustParsePrefix("2001:db8:51::/64")}
	node.PingServiceIPs, node.ProtectLoopback, node.AheadOfOthers = true, true, true
	return node
}

// sampleServices returns Services that together use every set and map of the tables.
func sampleServices(t *testing.T) []*dataplane.Service {
	t.Helper()
	var services []*dataplane.Service
	add := func(kind dataplane.Kind, name string, protocol dataplane.Protocol, frontend string, spec dataplane.ServiceSpec) {
		f := dataplane.Frontend{Protocol: protocol, Addr: netip.MustParseAddrPort(frontend)}
		key := dataplane.Key{Namespace: "default", Name: name, Family: dataplane.FamilyOf(f.Addr.Addr()), Kind: kind}
		s, err := dataplane.NewService(key, []dataplane.Frontend{f}, spec)
		if err != nil {
			t.Fatal(err)
		}
		services = append(services, s)
	}
	at := func(addr string, local bool) []dataplane.Endpoint {
		return []dataplane.Endpoint{{Addr: netip.MustParseAddrPort(addr), Local: local}}
	}
	full := func(local, remote string, ranges ...string) dataplane.ServiceSpec {
		spec := dataplane.ServiceSpec{
			Endpoints: append(at(local, true), at(remote, false)...), ExternalTrafficPolicyLocal: true, LocalEndpoints: at(local, true),
			Masquerade: dataplane.MasqueradeFromNode, NoEndpointsVerdict: dataplane.Drop, Affinity: 3 * time.Hour,
		}
		for _, r := range ranges {
			spec.SourceRanges = append(spec.SourceRanges, netip.MustParsePrefix(r))
		}
		return spec
	}
	add(dataplane.ClusterIP, "web", dataplane.TCP, "10.96.0.1:80", dataplane.ServiceSpec{Endpoints: at("10.1.0.1:8080", true)})
	add(dataplane.ClusterIP, "empty", dataplane.UDP, "10.96.0.2:53", dataplane.ServiceSpec{})
	add(dataplane.ClusterIP, "web", dataplane.TCP, "[fd00:96::1]:80", dataplane.ServiceSpec{Endpoints: at("[fd00:1::1]:8080", true)})
	add(dataplane.ClusterIP, "empty", dataplane.SCTP, "[fd00:96::2]:9", dataplane.ServiceSpec{})
	add(dataplane.NodePort, "web", dataplane.TCP, "0.0.0.0:30080",
		dataplane.ServiceSpec{Endpoints: at("10.1.0.1:8080", true), Masquerade: dataplane.MasqueradeAlways})
	add(dataplane.LoadBalancer, "full", dataplane.TCP, "203.0.113.3:443",
		full("10.1.0.1:8443", "10.2.0.1:8443", "192.0.2.0/24", "198.51.100.0/24", "198.51.100.0/31"))
	add(dataplane.NodePort, "full", dataplane.TCP, "[::]:30443", full("[fd00:1::1]:8443", "[fd00:2::1]:8443"))
	many := full("10.1.0.1:8443", "10.2.0.1:8443", "192.0.2.0/24")
	many.Affinity = 0
	return append(services, serviceWithFrontends(t, "many", dataplane.LoadBalancer, netip.MustParseAddr("203.0.113.16"), minSharedFrontends, many))
}

// serviceWithFrontends returns a Service with n frontends at consecutive addresses, the first
// at addr.
func serviceWithFrontends(t testing.TB, name string, kind dataplane.Kind, addr netip.Addr, n int, spec dataplane.ServiceSpec) *dataplane.Service {
	t.Helper()
	var frontends []dataplane.Frontend
	for range n {
		frontends = append(frontends, dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(addr, 443)})
		addr = addr.Next()
	}
	key := dataplane.Key{Namespace: "default", Name: name, Family: dataplane.FamilyOf(addr), Kind: kind}
	s, err := dataplane.NewService(key, frontends, spec)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// randomServices returns up to n Services of both families. Their frontends and endpoints
// come from a small pool, so that different results overlap.
func randomServices(t testing.TB, random *rand.Rand, n int) []*dataplane.Service {
	t.Helper()
	protocols := []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP}
	var services []*dataplane.Service
	for i := range n {
		if random.IntN(4) == 0 {
			continue
		}
		v6 := i%2 == 1
		address := func(first, n int) netip.Addr {
			if v6 {
				return netip.AddrFrom16([16]byte{0xfd, byte(first), 14: byte(n >> 8), 15: byte(n)})
			}
			return netip.AddrFrom4([4]byte{10, byte(first), byte(n >> 8), byte(n)})
		}
		var frontends []dataplane.Frontend
		for port := range 1 + random.IntN(3) {
			frontends = append(frontends, dataplane.Frontend{
				Protocol: protocols[random.IntN(3)],
				Addr:     netip.AddrPortFrom(address(96, i), uint16(80+port)),
			})
		}
		var list []dataplane.Endpoint
		for range random.IntN(12) {
			a := netip.AddrPortFrom(address(1, random.IntN(40)), uint16(8080+random.IntN(2)))
			list = append(list, dataplane.Endpoint{Addr: a, Local: random.IntN(3) == 0})
		}
		name := fmt.Sprintf("service-%d", i)
		if random.IntN(8) == 0 {
			name = "renamed-" + name
		}
		key := dataplane.Key{
			Namespace: "default", Name: name, Family: dataplane.FamilyOf(address(0, 0)),
			Kind: []dataplane.Kind{dataplane.ClusterIP, dataplane.ExternalIP, dataplane.LoadBalancer, dataplane.NodePort}[i/2%4],
		}
		if key.Kind == dataplane.NodePort {
			for n, f := range frontends {
				unspecified := netip.IPv4Unspecified()
				if v6 {
					unspecified = netip.IPv6Unspecified()
				}
				frontends[n].Addr = netip.AddrPortFrom(unspecified, uint16(30_000+10*i)+f.Addr.Port())
			}
		}
		s, err := dataplane.NewService(key, frontends, randomSpec(random, list, address))
		if err != nil {
			t.Fatal(err)
		}
		services = append(services, s)
	}
	return services
}

// randomSpec returns a ServiceSpec with these endpoints. Over many calls it uses every field.
func randomSpec(random *rand.Rand, list []dataplane.Endpoint, address func(first, n int) netip.Addr) dataplane.ServiceSpec {
	spec := dataplane.ServiceSpec{
		Endpoints: list, Masquerade: dataplane.Masquerade(random.IntN(3)), NoEndpointsVerdict: dataplane.Verdict(random.IntN(2)),
	}
	if spec.ExternalTrafficPolicyLocal = random.IntN(3) == 0; spec.ExternalTrafficPolicyLocal {
		spec.LocalEndpoints = slices.Clone(list[:random.IntN(len(list)+1)])
	}
	if random.IntN(3) == 0 {
		spec.Affinity = time.Duration(1+random.IntN(3)) * 28_800 * time.Second
	}
	if random.IntN(4) == 0 {
		for range 1 + random.IntN(5) {
			a := address(1+random.IntN(3), random.IntN(4))
			spec.SourceRanges = append(spec.SourceRanges, netip.PrefixFrom(a, random.IntN(a.BitLen()+1)).Masked())
		}
	}
	switch n := random.IntN(300); {
	case n == 0: // rarely, because such a Service has many elements
		spec.Scheduler = dataplane.SourceHash
	case n < 90:
		spec.Scheduler = dataplane.RoundRobin
	}
	return spec
}

// randomNode returns a Node with a random choice of settings.
func randomNode(random *rand.Rand) dataplane.Node {
	node := nodeWithPodCIDRs()
	node.LocalPodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("10.7.0.0/16"), netip.MustParsePrefix("fd00:7::/64")}
	node.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd60::/108")}
	switch random.IntN(4) {
	case 0:
		node = dataplane.Node{PodInterface: "cbr0"}
	case 1:
		node = dataplane.Node{PodInterfacePrefix: "veth", MasqueradeAll: true}
	}
	node.PingServiceIPs, node.LocalhostNodePorts, node.ProtectLoopback = random.IntN(2) == 0, random.IntN(2) == 0, random.IntN(2) == 0
	for range random.IntN(3) {
		n := byte(random.IntN(3))
		node.NodePortAddrs = append(node.NodePortAddrs, netip.AddrFrom4([4]byte{10, 1, 0, n}), netip.AddrFrom16([16]byte{0: 0xfd, 15: n}))
	}
	if random.IntN(2) == 0 {
		n := byte(random.IntN(3))
		node.NodePortNetworks = []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, 0, n}), 30+int(n)).Masked(), netip.MustParsePrefix("fd00:8::/64"),
		}
	}
	if random.IntN(2) == 0 { // sometimes within the source ranges
		n := byte(random.IntN(3))
		node.PrimaryAddrs = []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, n}), netip.AddrFrom16([16]byte{0: 0xfd, 15: n})}
	}
	return node
}

// TestGoldenRuleset compares nft's listing of the tables with golden files.
func TestGoldenRuleset(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		translator Translator
		services   []*dataplane.Service
		// selectParts returns the part of the listing to compare, if it is not nil.
		selectParts func(listing string) string
	}{
		"ruleset":            {nil, sampleServices(t), nil},
		"ruleset-translator": {virtualServers{}, sampleServices(t), nil},
		"balancing":          {nil, balancedServices(t), selectingChains},
	} {
		for version, binary := range nftBinaries(t) {
			t.Run(name+"-"+version, func(t *testing.T) {
				t.Parallel()
				d, ns := newDataplane(t, test.translator)
				mustReplace(t, d, nodeWithAllSettings(), test.services...)
				got := runNFT(t, ns, binary, "list ruleset")
				if test.selectParts != nil {
					got = test.selectParts(got)
				}
				golden := filepath.Join("testdata", name+"-"+version+".nft")
				if *update {
					if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(string(want), got); diff != "" {
					t.Errorf("listing (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestDuplicatesInNode checks that a Node with duplicates in its lists causes no write if an
// equivalent Node is programmed.
func TestDuplicatesInNode(t *testing.T) {
	t.Parallel()
	d, _ := newDataplane(t)
	node := nodeWithAllSettings()
	for _, list := range []*[]netip.Prefix{&node.PodCIDRs, &node.LocalPodCIDRs, &node.ServiceCIDRs} {
		*list = append(*list, *list...)
	}
	node.PrimaryAddrs = append(node.PrimaryAddrs, node.PrimaryAddrs...)
	node.NodePortAddrs = append(node.NodePortAddrs, node.NodePortAddrs...)
	mustReplace(t, d, node, sampleServices(t)...)
	before := generation(t, d)
	mustReplace(t, d, node, sampleServices(t)...)
	mustReplace(t, d, nodeWithAllSettings(), sampleServices(t)...)
	if generation(t, d) != before {
		t.Error("an equal Replace changed the ruleset")
	}
}

// TestNodeChangeLeavesNoGarbage changes from a Node with all settings to a Node with few. The
// tables must then equal newly created tables. In particular, they must have no rules for
// pings.
func TestNodeChangeLeavesNoGarbage(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.1.3"]
	d, ns := newDataplane(t)
	fresh, other := newDataplane(t)
	bare := dataplane.Node{PrimaryAddrs: nodeWithAllSettings().PrimaryAddrs} // the sets for source ranges depend on these
	mustReplace(t, fresh, bare, sampleServices(t)...)
	want := runNFT(t, other, binary, "list ruleset")
	if strings.Contains(want, "echo-request") || strings.Contains(want, "goto ping") {
		t.Errorf("pings are off, but the tables have rules for them:\n%s", want)
	}
	mustReplace(t, d, nodeWithAllSettings(), sampleServices(t)...)
	mustReplace(t, d, bare, sampleServices(t)...)
	if diff := cmp.Diff(sortedLines(want), sortedLines(runNFT(t, ns, binary, "list ruleset"))); diff != "" {
		t.Errorf("the tables differ (-new +changed):\n%s", diff)
	}
	node := nodeWithAllSettings()
	mustReplace(t, d, node, sampleServices(t)...)
	node.LocalhostNodePorts = true
	before := runNFT(t, ns, binary, "list chain ip fairlead localhost")
	mustReplace(t, d, node, sampleServices(t)...)
	if after := runNFT(t, ns, binary, "list chain ip fairlead localhost"); strings.Count(before, "\n")-strings.Count(after, "\n") != 1 {
		t.Errorf("want one rule less with a TCP listener:\n%s\n%s", before, after)
	}
}

// TestEndpointPorts checks that endpoint-ports contains a port for as long as an endpoint in
// any list has it.
func TestEndpointPorts(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	at := func(ports ...uint16) []dataplane.Endpoint {
		var list []dataplane.Endpoint
		for _, port := range ports {
			list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.MustParseAddr("10.1.0.1"), port)})
		}
		return list
	}
	plain := func(ports ...uint16) *dataplane.Service {
		return service(t, "plain", []dataplane.Frontend{frontend(1), frontend(2)}, at(ports...))
	}
	sticky := func(all []uint16, local ...uint16) *dataplane.Service {
		s := service(t, "sticky", []dataplane.Frontend{frontend(3)}, at(all...))
		s.Affinity, s.ExternalTrafficPolicyLocal, s.LocalEndpoints = time.Hour, true, at(local...)
		return s
	}
	want := func(ports ...string) {
		t.Helper()
		listing := runNFT(t, ns, nftBinaries(t)["1.0.6"], "list set ip fairlead endpoint-ports")
		_, found, _ := strings.Cut(listing, "elements = { ")
		found, _, _ = strings.Cut(found, " }")
		if got := strings.Fields(strings.ReplaceAll(found, ",", " ")); !slices.Equal(slices.Sorted(slices.Values(got)), ports) {
			t.Errorf("got %v, want %v", got, ports)
		}
	}
	services := []*dataplane.Service{plain(80, 81), sticky([]uint16{81}, 82)}
	mustReplace(t, d, nodeWithPodCIDRs(), services...)
	want("80", "81", "82")
	change := func(i int, next *dataplane.Service) {
		t.Helper()
		mustApply(t, d, dataplane.Change{Old: services[i], New: next})
		services[i] = next
	}
	change(0, plain(80))
	want("80", "81", "82")
	change(1, sticky([]uint16{80}, 80))
	want("80")
	change(0, plain(90))
	want("80", "90")
	d = openInNamespace(t, ns) // rebuilds the counts from the kernel
	mustReplace(t, d, nodeWithPodCIDRs(), services...)
	change(1, sticky(nil))
	want("90")
	runNFT(t, ns, nftBinaries(t)["1.0.6"], "flush set ip fairlead endpoint-ports\nadd element ip fairlead endpoint-ports { 7 }")
	mustReplace(t, d, nodeWithPodCIDRs(), services...)
	want("90")
	mustApply(t, d, dataplane.Change{Old: services[0]})
	want()
}

// TestAffinityListing connects to Services with affinity and checks that nft lists the
// elements that the packets added.
func TestAffinityListing(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	pod := network.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, 8080)
	d := openInNamespace(t, network.Node.Namespace)
	var services []*dataplane.Service
	for addr, vip := range map[netip.Addr]string{pod.IPv4: "10.96.0.1:80", pod.IPv6: "[fd00:96::1]:80"} {
		f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort(vip)}
		s := service(t, "sticky", []dataplane.Frontend{f}, []dataplane.Endpoint{{Addr: netip.AddrPortFrom(addr, 8080)}})
		s.Affinity = 3 * time.Hour
		services = append(services, s)
	}
	mustReplace(t, d, nodeWithPodCIDRs(), services...)
	for _, s := range services {
		if _, err := network.Outside.Connect(t.Context(), nettest.TCP, s.Frontends[0].Addr); err != nil {
			t.Fatal(err)
		}
	}
	for version, binary := range nftBinaries(t) {
		listing := runNFT(t, network.Node.Namespace, binary, "list ruleset")
		for _, want := range []string{
			"192.0.2.2 . 10.96.0.1 . tcp . 80 timeout 3h expires 2h59m", "2001:db8::2 . fd00:96::1 . tcp . 80 timeout 3h expires 2h59m",
		} {
			if !strings.Contains(listing, want) {
				t.Errorf("nft %s: listing lacks %q:\n%s", version, want, listing)
			}
		}
		if id := ":fafa"; strings.Count(listing, id) < 4 {
			t.Errorf("nft %s: listing lacks endpoint IDs, want %q in slots and affinity maps:\n%s", version, id, listing)
		}
	}
	wantState(t, d, services...)
}

// TestCounters checks that each refused packet is counted once, by the counter for its
// reason.
func TestCounters(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	d := openInNamespace(t, network.Node.Namespace)
	node := nodeWithPodCIDRs()
	node.PodCIDRs = network.PodCIDRs
	node.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/108")}
	pod := network.PodT(t, "pod")
	vip := func(v6 bool, n int) netip.Addr {
		if v6 {
			return netip.MustParseAddr(fmt.Sprintf("fd00:96::%d", n))
		}
		return netip.MustParseAddr(fmt.Sprintf("10.96.0.%d", n))
	}
	reasons := []counter{
		rejectedNoEndpoints, droppedNoEndpoints, droppedNoLocalEndpoints, droppedSourceRanges, rejectedUndeclaredPort, droppedNoService,
	}
	var services []*dataplane.Service
	for i, v6 := range []bool{false, true} {
		endpoint := []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.Addrs()[i], 8080)}}
		elsewhere := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:113::/48")}[i : i+1]
		for n, spec := range []dataplane.ServiceSpec{
			{},
			{NoEndpointsVerdict: dataplane.Drop},
			{Endpoints: endpoint, ExternalTrafficPolicyLocal: true, NoEndpointsVerdict: dataplane.Drop},
			{Endpoints: endpoint, SourceRanges: elsewhere},
			{Endpoints: endpoint},
		} {
			f := dataplane.Frontend{Protocol: dataplane.UDP, Addr: netip.AddrPortFrom(vip(v6, n), 80)}
			s := service(t, fmt.Sprintf("s-%d", n), []dataplane.Frontend{f}, nil)
			s.ServiceSpec = spec
			services = append(services, s)
		}
	}
	mustReplace(t, d, node, services...)
	for _, v6 := range []bool{false, true} {
		table, want := "ip fairlead", map[counter]int{}
		if v6 {
			table = "ip6 fairlead"
		}
		for n, reason := range reasons {
			port := uint16(80)
			if reason == rejectedUndeclaredPort {
				port = 81
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			if answer, err := network.Outside.Connect(ctx, nettest.UDP, netip.AddrPortFrom(vip(v6, n), port)); err == nil {
				t.Errorf("%s: unexpected answer %+v", reason, answer)
			}
			cancel()
			want[reason]++
			got := map[counter]int{}
			for _, c := range allCounters() {
				listing := runNFT(t, network.Node.Namespace, nftBinaries(t)["1.1.3"], fmt.Sprintf("list counter %s %s", table, c))
				if packets := counterPackets(t, listing); packets > 0 {
					got[c] = packets
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("%s: counters after %s (-want +got):\n%s", table, reason, diff)
			}
		}
	}
	before := generation(t, d)
	mustReplace(t, openInNamespace(t, network.Node.Namespace), node, services...)
	if generation(t, d) != before {
		t.Error("an equal Replace wrote nonzero counters")
	}
}

// TestPacketPriorityRestored checks, behind each of our chains, that no packet of a Service
// connection still has a class, slot or ID as its priority.
func TestPacketPriorityRestored(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	pod := network.PodT(t, "pod")
	client := network.PodT(t, "client")
	pod.ServeT(t, nettest.TCP, 8080)
	d := openInNamespace(t, network.Node.Namespace)
	node := dataplane.Node{PodCIDRs: network.PodCIDRs, NodePortAddrs: network.Node.Addrs()}
	var services []*dataplane.Service
	for i, prefix := range []string{"10.96.0.", "fd00:96::"} {
		for n, spec := range []dataplane.ServiceSpec{
			{},
			{Masquerade: dataplane.MasqueradeAlways},
			{Affinity: time.Hour},
			{Affinity: time.Hour, ExternalTrafficPolicyLocal: true, Masquerade: dataplane.MasqueradeFromNode},
			{ExternalTrafficPolicyLocal: true},
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
	mustReplace(t, d, node, services...)
	binary := nftBinaries(t)["1.1.3"]
	runNFT(t, network.Node.Namespace, binary, `table inet spy {
		counter touched { }
		counter seen { }
		chain prerouting {
			type filter hook prerouting priority -80
			tcp dport 8080 counter name seen meta priority != none counter name touched
		}
		chain output {
			type filter hook output priority -80
			tcp dport 8080 counter name seen meta priority != none counter name touched
		}
		chain postrouting {
			type filter hook postrouting priority 110
			tcp dport 8080 counter name seen meta priority != none counter name touched
		}
	}
	`)
	for _, s := range services {
		for _, from := range []*nettest.Host{client, pod, network.Node, network.Outside} {
			if _, err := from.Connect(t.Context(), nettest.TCP, s.Frontends[0].Addr); err != nil {
				t.Fatal(err)
			}
		}
	}
	listing := runNFT(t, network.Node.Namespace, binary, "list counters table inet spy")
	if strings.Count(listing, "packets 0") != 1 || !strings.Contains(listing, "counter touched {\n\t\tpackets 0") {
		t.Errorf("packets left our chains with a modified priority:\n%s", listing)
	}
}

// TestSlotRemovedDuringLookup freezes the state between two commits, as a packet can see it:
// the packet has read the class for three endpoints, and a commit has then removed two of
// them. Each packet that selects one of the removed slots must reach the remaining endpoint.
func TestSlotRemovedDuringLookup(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	d := openInNamespace(t, network.Node.Namespace)
	pod := network.PodT(t, "pod")
	pod.ServeT(t, nettest.UDP, 8080)
	var services []*dataplane.Service
	var edits strings.Builder
	for i, test := range []struct{ family, vip, local string }{
		{"ip", "10.96.0.1", "10.96.0.2"}, {"ip6", "fd00:96::1", "fd00:96::2"},
	} {
		for _, addr := range []string{test.vip, test.local} {
			for port, timeout := range map[uint16]time.Duration{80: 0, 81: time.Second} {
				// Sorted by address, which is the order of the slots.
				list := []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.Addrs()[i], 8080)}}
				for more := range uint16(2) {
					list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(pod.Addrs()[i], 8081+more)})
				}
				f := dataplane.Frontend{Protocol: dataplane.UDP, Addr: netip.AddrPortFrom(netip.MustParseAddr(addr), port)}
				s := service(t, fmt.Sprintf("%s-%d", addr, port), []dataplane.Frontend{f}, list)
				slot := "fa1d"
				if s.Affinity = timeout; addr == test.local {
					s.ExternalTrafficPolicyLocal, s.LocalEndpoints, slot = true, slices.Clone(list), "fa1c"
				}
				services = append(services, s)
				set := fmt.Sprintf("endpoints-%s", addr[len(addr)-1:])
				if timeout != 0 {
					set = "slots-" + addr[len(addr)-1:]
				}
				for n := range 2 {
					fmt.Fprintf(&edits, "delete element %s fairlead %s { %s . udp . %d . %s:%d }\n", test.family, set, addr, port, slot, n+1)
				}
			}
		}
	}
	mustReplace(t, d, dataplane.Node{}, services...)
	runNFT(t, network.Node.Namespace, nftBinaries(t)["1.1.3"], edits.String())
	for _, s := range services {
		for range 30 {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			answer, err := network.Outside.Connect(ctx, nettest.UDP, s.Frontends[0].Addr)
			cancel()
			if err != nil || answer.Endpoint.Port() != 8080 {
				t.Fatalf("%s: answer %+v, error %v, want an answer from the endpoint in slot 0", s.Frontends[0], answer, err)
			}
		}
	}
}

// counterPackets returns the packet count in a listing with a single counter.
func counterPackets(t *testing.T, listing string) int {
	t.Helper()
	_, count, _ := strings.Cut(listing, "packets ")
	var packets int
	if _, err := fmt.Sscan(count, &packets); err != nil {
		t.Fatalf("no packet count in %s: %v", listing, err)
	}
	return packets
}

// TestEndpointIDRemovedDuringLookup freezes the state in which a packet has read the ID of
// one of two endpoints, and a commit has then removed that endpoint. The packet selects a
// slot once more. The second selection fails for a quarter of the clients, which retransmit
// their first packet.
func TestEndpointIDRemovedDuringLookup(t *testing.T) {
	t.Parallel()
	const clients = 200
	network := nettest.NewT(t, nettest.Options{})
	d := openInNamespace(t, network.Node.Namespace)
	pod := network.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, 8080)
	sources := netip.MustParsePrefix("100.64.0.0/16")
	if err := network.Outside.AddNetwork(sources); err != nil {
		t.Fatal(err)
	}
	here, gone := netip.AddrPortFrom(pod.IPv4, 8080), netip.AddrPortFrom(pod.IPv4, 8081)
	s := service(t, "s", []dataplane.Frontend{frontend(1)}, []dataplane.Endpoint{{Addr: here}, {Addr: gone}})
	s.Affinity = time.Hour
	mustReplace(t, d, nodeWithPodCIDRs(), s)
	ip := d.tables[0] // not with nft, which cannot write the marked padding of an ID
	key := ip.encodeStickyKey(s.Frontends[0], preferredEndpointID(clusterEndpoints, gone))
	if err := d.conn.SetDeleteElements(ip.stickyEndpoints[shardOf(s.Frontends[0])], []element{{Key: key}}); err != nil {
		t.Fatal(err)
	}
	if err := d.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	binary := nftBinaries(t)["1.1.3"]
	runNFT(t, network.Node.Namespace, binary, "insert rule ip fairlead class-2-sticky counter")
	var all sync.WaitGroup
	next := sources.Addr()
	for range clients {
		next = next.Next()
		source := next
		all.Go(func() {
			answer, err := network.Outside.ConnectFrom(t.Context(), source, s.Frontends[0].Addr)
			// Kernels before 6.5 double the delay before each retransmission, so that a
			// connection attempt has time for only three or four.
			for range 5 {
				if !errors.Is(err, nettest.ErrTimeout) {
					break
				}
				answer, err = network.Outside.ConnectFrom(t.Context(), source, s.Frontends[0].Addr)
			}
			if err != nil || answer.Endpoint != here {
				t.Errorf("%s: answer %+v, error %v", source, answer, err)
			}
		})
	}
	all.Wait()
	listing := runNFT(t, network.Node.Namespace, binary, "list chain ip fairlead class-2-sticky")
	// Three of four first packets succeed, so the expected number is 4/3 per client, sigma
	// 9. If a packet selected only once, it would be 2.
	if packets := counterPackets(t, listing); packets <= clients || packets > clients*5/3 {
		t.Errorf("%d clients sent %d first packets, want about 4/3 per client", clients, packets)
	}
}

// TestListManyServices checks that nft lists a large random state completely, without
// aborting and without values that it cannot interpret.
func TestListManyServices(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	random := rand.New(rand.NewPCG(1, 2))
	services := randomServices(t, random, 300)
	node := randomNode(random)
	mustReplace(t, d, node, services...)
	for version, binary := range nftBinaries(t) {
		listing := runNFT(t, ns, binary, "list ruleset")
		if strings.Contains(listing, "invalid type") || strings.Contains(listing, "unknown") {
			t.Errorf("nft %s cannot interpret a value:\n%s", version, listing)
		}
		for _, s := range services {
			if !strings.Contains(listing, fmt.Sprintf("comment %q", serviceComment(s.Key))) {
				t.Errorf("nft %s does not list %s", version, s.Key)
			}
		}
	}
}

// TestRandomStates moves between random states with Apply and Replace, and reads each state
// back.
func TestRandomStates(t *testing.T) {
	t.Parallel()
	for name, translator := range testTranslators() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testRandomStates(t, translator)
		})
	}
}

func testRandomStates(t *testing.T, translator Translator) {
	t.Helper()
	d, ns := newDataplane(t, translator)
	node := nodeWithPodCIDRs()
	var have []*dataplane.Service
	mustReplace(t, d, node, have...)
	for seed := range uint64(60) {
		random := rand.New(rand.NewPCG(seed, 7))
		want := randomServices(t, random, 40)
		newInstance := random.IntN(5) == 0
		if newInstance {
			d = openInNamespace(t, ns, translator)
			node = randomNode(random)
		}
		d.minSharedFrontends = []int{2, 3, minSharedFrontends}[random.IntN(3)]
		if newInstance {
			mustReplace(t, d, node, want...)
		} else {
			mustApply(t, d, changesBetween(have, want)...)
		}
		have = want
		wantState(t, d, have...)
		before := generation(t, d)
		again := openInNamespace(t, ns, translator)
		again.now = func() time.Time { return time.Time{} } // keeps unused classes
		again.minSharedFrontends = d.minSharedFrontends
		mustReplace(t, again, node, have...)
		if after := generation(t, d); after != before && !newInstance {
			t.Fatalf("seed %d: an equal Replace changed the ruleset", seed)
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	mustApply(t, d, changesBetween(have, nil)...)
	wantState(t, d)
}

func changesBetween(have, want []*dataplane.Service) []dataplane.Change {
	changes := map[dataplane.Key]dataplane.Change{}
	for _, s := range have {
		changes[s.Key] = dataplane.Change{Old: s}
	}
	for _, s := range want {
		c := changes[s.Key]
		c.New = s
		changes[s.Key] = c
	}
	var list []dataplane.Change
	for _, c := range changes {
		if !c.Old.Equal(c.New) {
			list = append(list, c)
		}
	}
	return list
}

// TestDrift edits the tables as an operator might. The edit must be reported as drift, and
// one Replace must restore everything.
func TestDrift(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"the table is deleted":                       "delete table ip fairlead",
		"the whole ruleset is flushed":               "flush ruleset",
		"a Service is deleted":                       "delete element ip fairlead services { 10.96.0.1 . tcp . 80 }",
		"a Service has another class":                "add chain ip fairlead class-9; delete element ip fairlead services { 10.96.0.1 . tcp . 80 }; add element ip fairlead services { 10.96.0.1 . tcp . 80 : 0:9 }",
		"a Service is added":                         "add element ip fairlead services { 10.96.7.7 . tcp . 80 : 0:1 }",
		"an endpoint is deleted":                     "delete element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . fa1d:0 }",
		"an endpoint is changed":                     "delete element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . fa1d:0 }; add element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . fa1d:0 : 10.1.0.9 . 9 }",
		"an endpoint is added":                       "add element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . fa1d:7 : 10.1.0.9 . 9 }",
		"an endpoint is in another list":             "add element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . fa1c:0 : 10.1.0.9 . 9 }",
		"an endpoint is in the wrong shard":          "add element ip fairlead endpoints-2 { 10.96.0.1 . tcp . 80 . fa1d:0 : 10.1.0.9 . 9 }",
		"an invalid slot is added":                   "add element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . 1:7 : 10.1.0.9 . 9 }",
		"an empty Service is deleted":                "delete element ip fairlead services { 10.96.0.2 . udp . 53 }",
		"a Service with endpoints is rejected":       "delete element ip fairlead services { 10.96.0.1 . tcp . 80 }; add element ip fairlead services { 10.96.0.1 . tcp . 80 : 0:0 }",
		"a counter is deleted":                       "flush chain ip fairlead new-or-invalid; flush chain ip fairlead new-or-invalid-output; flush chain ip fairlead pinged; delete counter ip fairlead dropped-no-service",
		"services has a catch-all":                   "add element ip fairlead services { * : 0:1 }",
		"endpoints has a catch-all":                  "add element ip fairlead endpoints-1 { * : 10.1.0.9 . 9 }",
		"cluster-ips has a catch-all":                "add element ip fairlead cluster-ips { * }",
		"a cluster IP is added":                      "add element ip fairlead cluster-ips { 10.96.7.7 }",
		"a cluster IP is deleted":                    "delete element ip fairlead cluster-ips { 10.96.0.1 }",
		"an address to ping is added":                "add element ip fairlead ping-internal { 10.96.0.2 }",
		"an address to ping is deleted":              "delete element ip fairlead ping-external { 10.96.0.1 }",
		"an unused address to ping is added":         "add element ip fairlead ping-external { 10.96.7.7 }",
		"pings are translated to another address":    "flush chain ip fairlead answer-ping; add rule ip fairlead answer-ping dnat to 192.0.2.9",
		"an endpoint's port is deleted":              "delete element ip fairlead endpoint-ports { 8080 }",
		"an unused endpoint port is added":           "add element ip fairlead endpoint-ports { 7 }",
		"endpoint-ports has a catch-all":             "add element ip fairlead endpoint-ports { * }",
		"localhost node ports are accepted":          "flush chain ip fairlead localhost",
		"hairpin has a catch-all":                    "add element ip fairlead hairpin { * }",
		"classes has a catch-all":                    "add element ip fairlead classes { * : drop }",
		"hairpin is flushed":                         "flush set ip fairlead hairpin",
		"an invalid hairpin element is added":        "add element ip fairlead hairpin { 10.1.0.1 . 10.1.0.2 . 10.96.0.1 . tcp . 80 }",
		"the pod networks are changed":               "flush set ip fairlead pod-cidrs; add element ip fairlead pod-cidrs { 192.168.0.0/16 }",
		"a local endpoint is deleted":                "flush map ip fairlead slots-3",
		"the local endpoints are deleted":            "flush map ip fairlead external",
		"a timeout is deleted":                       "flush map ip fairlead timeouts",
		"a timeout is changed":                       "flush map ip fairlead timeouts; add element ip fairlead timeouts { 203.0.113.3 . tcp . 443 : 8000:1 }",
		"an invalid timeout is added":                "add element ip fairlead timeouts { 10.96.0.1 . tcp . 80 : 0:1 }",
		"an endpoint with an ID is deleted":          "flush map ip fairlead sticky-endpoints-3",
		"an endpoint with an invalid ID is added":    "add element ip fairlead sticky-endpoints-3 { 203.0.113.3 . tcp . 443 . 7 : 10.1.0.9 . 9 }",
		"a slot with an invalid ID is added":         "add element ip fairlead slots-3 { 203.0.113.3 . tcp . 443 . fa1d:9 : 0:7 }",
		"a slot is in the map of other frontends":    "add element ip fairlead slots-4 { 203.0.113.3 . tcp . 443 . fa1d:0 : 48a6:fafa }",
		"source ranges are deleted":                  "flush set ip fairlead source-ranges-24",
		"a source range is added":                    "add element ip fairlead source-ranges-24 { 203.0.113.3 . tcp . 443 . 10.0.0.0 }",
		"a source range of another Service is added": "add element ip fairlead source-ranges-24 { 10.96.0.1 . tcp . 80 . 10.0.0.0 }",
		"an invalid source range is added":           "add element ip fairlead source-ranges-24 { 203.0.113.3 . tcp . 443 . 10.0.0.1 }",
		"source ranges for the node are added":       "add element ip fairlead source-ranges-31 { 203.0.113.3 . tcp . 443 . 10.0.0.0 comment \"this node\" }",
		"the rules for source ranges are deleted":    "flush chain ip fairlead source-ranges",
		"a set for source ranges is deleted":         "flush chain ip fairlead source-ranges; flush chain ip fairlead source-ranges-node-port; delete set ip fairlead source-ranges-24",
		"an invalid set for source ranges is added":  "add set ip fairlead source-ranges-77 { type mark; }",
		"node ports are on another address":          "add element ip fairlead node-port-addrs { 192.0.2.9 }",
		"node ports are on no address":               "flush set ip fairlead node-port-addrs",
		"the Service networks are changed":           "add element ip fairlead service-cidrs { 10.200.0.0/16 }",
		"the local pod networks are deleted":         "flush set ip fairlead local-pods",
		"no client is masqueraded":                   "flush map ip fairlead masquerades",
		"other clients are masqueraded":              "delete element ip fairlead masquerades { 0:1 }; add element ip fairlead masquerades { 0:1 : goto masquerade-always }",
		"no slot is selected":                        "flush map ip fairlead draws",
		"affinity is removed":                        "flush map ip fairlead affinities; flush map ip fairlead local-affinities",
		"an affinity map has another type":           "flush chain ip fairlead affinity-10800s; flush chain ip fairlead affinity-10800s-local; delete map ip fairlead affinity-1; add map ip fairlead affinity-1 { type mark : mark; }",
		"the classes are flushed":                    "flush map ip fairlead classes",
		"a class has another verdict":                "delete element ip fairlead classes { 0:1 }; add element ip fairlead classes { 0:1 : drop }",
		"a class's chain is flushed":                 "flush chain ip fairlead class-1",
		"a rule is added":                            "insert rule ip fairlead nat-prerouting counter accept",
		"all rules are deleted":                      "flush table ip fairlead",
		"a chain is added":                           "add chain ip fairlead extra { type filter hook forward priority 0; policy drop; }",
		"a chain is added and used":                  "add chain ip fairlead extra; add rule ip fairlead nat-prerouting jump extra",
		"a set is added and used":                    "add set ip fairlead extra { type mark; }; add rule ip fairlead nat-prerouting meta mark @extra drop",
		"a set is replaced by another type":          "flush chain ip fairlead new-or-invalid; flush chain ip fairlead new-or-invalid-output; flush chain ip fairlead pinged; delete set ip fairlead cluster-ips; add set ip fairlead cluster-ips { type mark; }",
		"a chain drops by default":                   "add chain ip fairlead nat-prerouting { policy drop; }",
		"the table is dormant":                       "add table ip fairlead { flags dormant; }",
		"the IPv6 table is deleted":                  "delete table ip6 fairlead",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testDrift(t, script)
		})
	}
}

func testDrift(t *testing.T, script string, translator ...Translator) {
	t.Helper()
	binary := nftBinaries(t)["1.0.6"]
	d, ns := newDataplane(t, translator...)
	services := sampleServices(t)
	mustReplace(t, d, nodeWithAllSettings(), services...)
	wantNoDrift(t, d)
	before := sortedLines(runNFT(t, ns, binary, "list ruleset"))
	runNFT(t, ns, binary, strings.ReplaceAll(script, "; ", "\n"))
	if slices.Equal(before, sortedLines(runNFT(t, ns, binary, "list ruleset"))) {
		t.Fatal("the edit does not change the ruleset")
	}
	select {
	case <-d.Drift():
	case <-time.After(5 * time.Second):
		t.Fatal("the change was not reported as drift")
	}
	drainNotifications(t, d)
	if dryRun := mustDryRun(t, ns, nodeWithAllSettings(), services, translator...); len(dryRun.Writes) == 0 {
		t.Error("a dry run would write nothing")
	}
	mustReplace(t, d, nodeWithAllSettings(), services...)
	if diff := cmp.Diff(before, sortedLines(runNFT(t, ns, binary, "list ruleset"))); diff != "" {
		t.Errorf("after the repair (-before +after):\n%s", diff)
	}
	wantState(t, d, services...)
	mustReplace(t, d, nodeWithAllSettings(), services...)
	wantNoDrift(t, d)
	wantEmptyDryRun(t, ns, nodeWithAllSettings(), services, translator...)
}

// drainNotifications waits until the kernel has sent all notifications of a change, and then
// discards the pending drift signal. The kernel uses several buffers for a large change, and
// each may signal drift. Notifications of a later commit to an unrelated table come after all
// of them. drainNotifications gives up after 3 seconds, for a watch that receives nothing.
func drainNotifications(t *testing.T, d *Dataplane) {
	t.Helper()
	conn, err := nftables.New(nftables.WithNetNSFd(int(d.watch.netns.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); {
		conn.DelTable(conn.AddTable(&nftables.Table{Name: "unrelated", Family: nftables.TableFamilyARP}))
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		g, err := conn.GetGen()
		if err != nil {
			t.Fatal(err)
		}
		if d.watch.waitForGeneration(g.ID) {
			break
		}
	}
	select {
	case <-d.Drift():
	default:
	}
}

// wantNoDrift fails the test if our own commits, all acknowledged by the kernel, were
// reported as drift.
func wantNoDrift(t *testing.T, d *Dataplane) {
	t.Helper()
	select {
	case <-d.Drift():
		t.Error("our own change was reported as drift")
	case <-time.After(20 * time.Millisecond):
	}
}

func sortedLines(s string) []string {
	lines := strings.Split(s, "\n")
	slices.Sort(lines)
	return lines
}

func TestOtherTablesCauseNoDrift(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	mustReplace(t, d, nodeWithPodCIDRs(), sampleServices(t)...)
	runNFT(t, ns, nftBinaries(t)["1.0.6"], `add table ip fairlead2
		add set ip fairlead2 services { type mark; }
		add element ip fairlead2 services { 1 }
		add table inet fairlead
		delete table ip fairlead2`)
	wantNoDrift(t, d)
}

func TestCleanup(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.0.6"]
	d, ns := newDataplane(t)
	const others = "add table ip other\nadd table inet fairlead\nadd chain ip other c { type filter hook input priority 0; }\n"
	runNFT(t, ns, binary, others)
	before := runNFT(t, ns, binary, "list ruleset")
	mustReplace(t, d, nodeWithPodCIDRs(), sampleServices(t)...)
	for range 2 { // the second call has nothing to remove
		if err := Cleanup(Options{NetNS: ns.Fd()}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, runNFT(t, ns, binary, "list ruleset")); diff != "" {
			t.Errorf("ruleset after cleanup (-want +got):\n%s", diff)
		}
	}
}

// TestCleanupSplitsCommits checks that Cleanup removes large tables completely, in several
// commits.
func TestCleanupSplitsCommits(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	var services []*dataplane.Service
	var numbers []int
	for i := range 2 * transactionSize / verdictElementWeight { // one class each, more than fit into one commit
		numbers = append(numbers, i)
		services = append(services, service(t, fmt.Sprintf("s-%d", i), []dataplane.Frontend{frontend(i)}, endpoints(numbers...)))
	}
	mustReplace(t, d, nodeWithPodCIDRs(), services...)
	before := generation(t, d)
	if err := Cleanup(Options{NetNS: ns.Fd()}); err != nil {
		t.Fatal(err)
	}
	if commits := generation(t, d) - before; commits < 2*uint32(len(d.tables[0].sets())) {
		t.Errorf("both tables were removed in only %d commits", commits)
	}
	if listing := runNFT(t, ns, nftBinaries(t)["1.0.6"], "list ruleset"); listing != "" {
		t.Errorf("left behind:\n%s", listing)
	}
}

// TestClassChainLifecycle checks that each class in use has a chain, and that the chain of an
// unused class is removed after a delay.
func TestClassChainLifecycle(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	now := time.Now()
	d.now = func() time.Time { return now }
	chains := func() int {
		return strings.Count(runNFT(t, ns, nftBinaries(t)["1.0.6"], "list table ip fairlead"), "chain class-")
	}
	var have *dataplane.Service
	mustReplace(t, d, dataplane.Node{})
	for _, n := range []int{0, 3, 3, 7, 1, 0, 1000, 2} {
		list := make([]dataplane.Endpoint, n)
		for i := range list {
			list[i] = endpoint(i)
		}
		next := service(t, "s", []dataplane.Frontend{frontend(1)}, list)
		before := chains()
		mustApply(t, d, dataplane.Change{Old: have, New: next})
		wantState(t, d, next)
		if got := chains(); got < before {
			t.Errorf("with %d endpoints: a class chain was removed without delay", n)
		}
		now = now.Add(unusedClassDelay)
		other := service(t, "other", []dataplane.Frontend{frontend(2)}, slices.Clone(list))
		mustApply(t, d, dataplane.Change{New: other})
		mustApply(t, d, dataplane.Change{Old: other})
		if got := chains(); got != 1 {
			t.Errorf("with %d endpoints: %d class chains, want 1", n, got)
		}
		have = next
	}
}

// rejectedService returns an invalid Service that the kernel rejects. NewService would not
// create it.
func rejectedService(name string, f dataplane.Frontend) *dataplane.Service {
	return &dataplane.Service{
		Key:         dataplane.Key{Namespace: "default", Name: name, Family: dataplane.IPv4},
		Frontends:   []dataplane.Frontend{f},
		ServiceSpec: dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.MustParseAddrPort("[fd00::1]:80")}}},
	}
}

// TestReplaceIsolatesRejectedServices replaces many valid Services and some that the kernel
// rejects.
func TestReplaceIsolatesRejectedServices(t *testing.T) {
	t.Parallel()
	d, _ := newDataplane(t)
	var good, all []*dataplane.Service
	for i := range 3000 {
		s := service(t, fmt.Sprintf("good-%d", i), []dataplane.Frontend{frontend(i)}, endpoints(i, i+1, i+2))
		good = append(good, s)
		all = append(all, s)
		if i%1000 == 500 {
			all = append(all, rejectedService(fmt.Sprintf("bad-%d", i), frontend(10000+i)))
		}
	}
	err := d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values(all), nil)
	var failure *dataplane.Error
	if !errors.As(err, &failure) || len(failure.Failed) != 3 {
		t.Fatalf("got error %v, want an error for each of the three rejected Services", err)
	}
	for key, err := range failure.Failed {
		if !strings.HasPrefix(key.Name, "bad-") || !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v", key, err)
		}
	}
	wantState(t, d, good...)
}

// TestReplaceKeepsLastGoodVersion checks that a Service keeps its previous version when the
// kernel rejects the next one.
func TestReplaceKeepsLastGoodVersion(t *testing.T) {
	t.Parallel()
	d, _ := newDataplane(t)
	old := service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1, 2, 3))
	other := service(t, "other", []dataplane.Frontend{frontend(2)}, endpoints(1))
	mustReplace(t, d, nodeWithPodCIDRs(), old, other)
	err := d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values([]*dataplane.Service{rejectedService("s", frontend(1))}), nil)
	if failure := (*dataplane.Error)(nil); !errors.As(err, &failure) || failure.Failed[old.Key] == nil {
		t.Fatalf("got error %v, want an error for %s", err, old.Key)
	}
	wantState(t, d, old)
}

// TestApplyRejected checks that Apply reports a Service that the kernel rejects, programs the
// other Services, and that the next Replace programs all.
func TestApplyRejected(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	first := service(t, "first", []dataplane.Frontend{frontend(1)}, endpoints(1, 2))
	mustReplace(t, d, nodeWithPodCIDRs(), first)
	// Another process adds an element for the frontend of the next call.
	runNFT(t, ns, nftBinaries(t)["1.0.6"], "add element ip fairlead services { 10.96.0.2 . tcp . 80 : 0:77 }")
	second := service(t, "second", []dataplane.Frontend{frontend(2)}, endpoints(3, 4, 5))
	third := service(t, "third", []dataplane.Frontend{frontend(3)}, endpoints(6))
	fourth := service(t, "fourth", []dataplane.Frontend{frontend(4)}, endpoints(7, 8))
	err := d.Apply(t.Context(), []dataplane.Change{{New: second}, {New: third}, {New: fourth}, {Old: first}})
	var failure *dataplane.Error
	if !errors.As(err, &failure) || len(failure.Failed) != 1 || failure.Failed[second.Key] == nil {
		t.Fatalf("got error %v, want an error for %s only", err, second.Key)
	}
	state, err := d.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	delete(state, second.Frontends[0])
	if diff := dataplane.StateOf(slices.Values([]*dataplane.Service{third, fourth})).Diff(state); diff != "" {
		t.Errorf("unexpected state of the other Services in the kernel:\n%s", diff)
	}
	mustReplace(t, d, nodeWithPodCIDRs(), second, third, fourth)
	wantState(t, d, second, third, fourth)
}

// TestApplyRejectedFrontendMove moves a frontend to a Service that the kernel rejects. The
// previous owner of the frontend must be reported as failed too.
func TestApplyRejectedFrontendMove(t *testing.T) {
	t.Parallel()
	d, _ := newDataplane(t)
	giver := service(t, "giver", []dataplane.Frontend{frontend(1), frontend(2)}, endpoints(1, 2))
	other := service(t, "other", []dataplane.Frontend{frontend(3)}, endpoints(1))
	mustReplace(t, d, nodeWithPodCIDRs(), giver, other)
	left := service(t, "giver", []dataplane.Frontend{frontend(2)}, endpoints(1, 2))
	taker := rejectedService("taker", frontend(1))
	err := d.Apply(t.Context(), []dataplane.Change{{New: taker}, {Old: giver, New: left}, {Old: other}})
	var failure *dataplane.Error
	if !errors.As(err, &failure) || len(failure.Failed) != 2 || failure.Failed[giver.Key] == nil || failure.Failed[taker.Key] == nil {
		t.Fatalf("got error %v, want errors for %s and %s", err, giver.Key, taker.Key)
	}
	mustReplace(t, d, nodeWithPodCIDRs(), left)
	wantState(t, d, left)
}

// TestMissingClassChainRecreated deletes a class and makes the Service in the class fail, so
// that the Service keeps the missing class. A later Service of the same class must still get
// the chain.
func TestMissingClassChainRecreated(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.0.6"]
	d, ns := newDataplane(t)
	mustReplace(t, d, nodeWithPodCIDRs(), service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1, 2, 3)))
	runNFT(t, ns, binary, "flush map ip fairlead classes")
	if err := d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values([]*dataplane.Service{rejectedService("s", frontend(1))}), nil); err == nil {
		t.Fatal("Replace succeeded with a Service that the kernel should reject")
	}
	mustApply(t, d, dataplane.Change{New: service(t, "later", []dataplane.Frontend{frontend(2)}, endpoints(1, 2, 3))})
	if listing := runNFT(t, ns, binary, "list table ip fairlead"); !strings.Contains(listing, "chain class-3") {
		t.Errorf("the class of the later Service has no chain:\n%s", listing)
	}
}

// TestApplyManyServices applies more changes than fit into one commit. It then moves every
// frontend to another Service in one call.
func TestApplyManyServices(t *testing.T) {
	t.Parallel()
	const n = 2500
	d, _ := newDataplane(t)
	mustReplace(t, d, nodeWithPodCIDRs())
	makeService := func(name string, i, frontendOf int) *dataplane.Service {
		return service(t, fmt.Sprintf("%s-%d", name, i), []dataplane.Frontend{frontend(frontendOf)},
			endpoints(i, i+1, i+2, i+3, i+4, i+5))
	}
	var changes []dataplane.Change
	var first, second []*dataplane.Service
	for i := range n {
		first = append(first, makeService("s", i, i))
		second = append(second, makeService("s", i, (i+1)%n))
		changes = append(changes, dataplane.Change{New: first[i]})
	}
	before := generation(t, d)
	mustApply(t, d, changes...)
	const elements = (6 + 1 + 1) * n                                 // endpoints, frontend, cluster IP
	want := uint32((elements+transactionSize-1)/transactionSize + 1) // plus one for the class
	if commits := generation(t, d) - before; commits != want {
		t.Errorf("%d elements took %d commits, want %d", elements, commits, want)
	}
	wantState(t, d, first...)
	for i := range changes {
		changes[i] = dataplane.Change{Old: first[i], New: second[i]}
	}
	mustApply(t, d, changes...)
	wantState(t, d, second...)

	// A rejected Service affects only itself and the previous owner of its frontend.
	for i := range changes {
		changes[i] = dataplane.Change{Old: second[i], New: first[i]}
	}
	bad := 1300
	changes[bad].New = rejectedService(first[bad].Key.Name, frontend(bad))
	err := d.Apply(t.Context(), changes)
	var failure *dataplane.Error
	if !errors.As(err, &failure) || failure.Failed[first[bad].Key] == nil {
		t.Fatalf("got error %v, want an error for %s", err, first[bad].Key)
	}
	if got := len(failure.Failed); got != 2 {
		t.Errorf("%d of %d Services failed, want 2", got, n)
	}
	state, err := d.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range first {
		if failure.Failed[s.Key] == nil && !slices.Equal(state[s.Frontends[0]].Endpoints, s.Endpoints) {
			t.Fatalf("%s of Service %d was reported as programmed but holds %v", s.Frontends[0], i, state[s.Frontends[0]])
		}
	}
	mustReplace(t, d, nodeWithPodCIDRs(), first...)
	wantState(t, d, first...)
}

// TestUnsupported checks Services that this backend does not support. Such a Service is
// reported, has no elements in the kernel, and does not affect other Services.
func TestUnsupported(t *testing.T) {
	t.Parallel()
	for name, spec := range map[string]dataplane.ServiceSpec{
		"affinity with more endpoints than IDs": {Affinity: time.Hour, Endpoints: make([]dataplane.Endpoint, maxEndpointIDs+1)},
		"a scheduler of IPVS":                   {Scheduler: "lc"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bad := service(t, "bad", []dataplane.Frontend{frontend(1)}, nil)
			bad.ServiceSpec = spec
			testUnsupported(t, bad)
		})
	}
}

func testUnsupported(t *testing.T, bad *dataplane.Service) {
	t.Helper()
	good := service(t, "good", []dataplane.Frontend{frontend(2)}, endpoints(1))
	old := []*dataplane.Service{service(t, "bad", []dataplane.Frontend{frontend(1)}, endpoints(1))}
	change := dataplane.Change{Old: old[0], New: bad}
	if bad.Key != old[0].Key {
		old, change.Old = nil, nil // the key of a new Service
	}
	for name, call := range map[string]func(d *Dataplane) error{
		"replace": func(d *Dataplane) error {
			return d.Replace(context.Background(), nodeWithPodCIDRs(), slices.Values([]*dataplane.Service{bad, good}), nil)
		},
		"apply": func(d *Dataplane) error {
			return d.Apply(context.Background(), []dataplane.Change{change, {New: good}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, _ := newDataplane(t)
			mustReplace(t, d, nodeWithPodCIDRs(), old...)
			err := call(d)
			var failure *dataplane.Error
			if !errors.As(err, &failure) || len(failure.Failed) != 1 || !errors.Is(failure.Failed[bad.Key], dataplane.ErrUnsupported) {
				t.Fatalf("got error %v, want ErrUnsupported for %s only", err, bad.Key)
			}
			wantState(t, d, good)
		})
	}
}

// TestMasqueradePodCIDRs checks that a change of the pod CIDRs is programmed, and that
// without pod CIDRs no client is masqueraded.
func TestMasqueradePodCIDRs(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.1.3"]
	d, ns := newDataplane(t)
	for _, test := range []struct {
		cidrs []string
		want  []string
		not   []string
	}{
		{[]string{"10.1.0.0/16"}, []string{"10.1.0.0/16", "@pod-cidrs"}, nil},
		{[]string{"10.9.0.0/16"}, []string{"10.9.0.0/16", "@pod-cidrs"}, []string{"10.1.0.0/16"}},
		{nil, nil, []string{"@pod-cidrs", "10.9.0.0/16"}},
	} {
		var node dataplane.Node
		for _, c := range test.cidrs {
			node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(c))
		}
		mustReplace(t, d, node, sampleServices(t)...)
		listing := runNFT(t, ns, binary, "list table ip fairlead")
		for _, w := range test.want {
			if !strings.Contains(listing, w) {
				t.Errorf("with %v the listing lacks %q:\n%s", test.cidrs, w, listing)
			}
		}
		for _, w := range test.not {
			if strings.Contains(listing, w) {
				t.Errorf("with %v the listing has %q:\n%s", test.cidrs, w, listing)
			}
		}
	}
}

// TestMalformedUserData checks that malformed element user data, which any administrator can
// create, is parsed without panic.
func TestMalformedUserData(t *testing.T) {
	t.Parallel()
	for _, b := range [][]byte{{}, {0}, {0, 200}, {0, 0}, {9, 1, 1, 0, 3, 'a', 'b'}, bytes.Repeat([]byte{0}, 256)} {
		if got := parseComment(b); strings.Trim(got, "ab") != "" {
			t.Errorf("comment in %x is %q", b, got)
		}
	}
	if got, want := parseComment([]byte{9, 1, 1, 0, 3, 'a', 'b', 0}), "ab"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestEndpointIDsSurviveNewFrontend adds a frontend to a Service while no instance runs. The
// frontend is new, or belonged to another Service. Two of the Service's endpoints prefer the
// same ID. They must keep the IDs by which clients of the other frontend are remembered.
func TestEndpointIDsSurviveNewFrontend(t *testing.T) {
	t.Parallel()
	seen := map[endpointID]netip.AddrPort{}
	var a, b netip.AddrPort
	for i := 0; !b.IsValid(); i++ {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 8080)
		n := preferredEndpointID(clusterEndpoints, addr)
		if other, ok := seen[n]; ok {
			a, b = other, addr
		}
		seen[n] = addr
	}
	sticky := func(name string, frontends []dataplane.Frontend, addrs ...netip.AddrPort) *dataplane.Service {
		var list []dataplane.Endpoint
		for _, addr := range addrs {
			list = append(list, dataplane.Endpoint{Addr: addr})
		}
		s := service(t, name, frontends, list)
		s.Affinity = time.Hour
		return s
	}
	for name, others := range map[string][]*dataplane.Service{
		"new":   nil,
		"moved": {sticky("other", []dataplane.Frontend{frontend(1)}, a)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, ns := newDataplane(t)
			late := sticky("s", []dataplane.Frontend{frontend(2)}, b)
			both := sticky("s", []dataplane.Frontend{frontend(2)}, a, b)
			mustReplace(t, d, nodeWithPodCIDRs(), append(others, late)...)
			mustApply(t, d, dataplane.Change{Old: late, New: both}) // endpoint b gets its preferred ID first
			ids := func() map[endpointID]netip.AddrPort {
				c, err := d.readSets(t.Context(), d.tables[0])
				if err != nil {
					t.Fatal(err)
				}
				return c.frontends[frontend(2)].byID
			}
			before := ids()
			more := sticky("s", []dataplane.Frontend{frontend(1), frontend(2)}, a, b)
			mustReplace(t, openInNamespace(t, ns), nodeWithPodCIDRs(), more)
			wantState(t, d, more)
			if diff := cmp.Diff(fmt.Sprint(before), fmt.Sprint(ids())); diff != "" {
				t.Errorf("the IDs changed (-before +after):\n%s", diff)
			}
		})
	}
}
