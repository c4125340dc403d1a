package top

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// testNode is a node that serves `default/web:http` at a cluster IP, a node port and an IPv6 cluster
// IP, and `default/dns` over UDP.
type testNode struct {
	*nettest.Network
	dp  *nft.Dataplane
	pod *nettest.Host
}

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	n := &testNode{Network: nettest.NewT(t, nettest.Options{UniquePorts: true})}
	n.pod = n.PodT(t, "pod")
	n.pod.ServeT(t, nettest.TCP, 8080)
	n.pod.ServeT(t, nettest.UDP, 53)
	var err error
	if n.dp, err = nft.Open(nft.Options{NetNS: n.Node.Fd()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.dp.Close() })
	node := dataplane.Node{NodePortAddrs: n.Node.Addrs()}
	if err := n.dp.Replace(t.Context(), node, slices.Values([]*dataplane.Service{
		n.service(t, "web", "http", dataplane.ClusterIP, dataplane.TCP, "10.96.0.10:80", 8080),
		n.service(t, "web", "http", dataplane.NodePort, dataplane.TCP, "0.0.0.0:30080", 8080),
		n.service(t, "web", "http", dataplane.ClusterIP, dataplane.TCP, "[fd00:96::10]:80", 8080),
		n.service(t, "dns", "", dataplane.ClusterIP, dataplane.UDP, "10.96.0.53:53", 53),
	}), nil); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *testNode) service(t *testing.T, name, port string, kind dataplane.Kind, protocol dataplane.Protocol, frontend string, endpointPort uint16) *dataplane.Service {
	t.Helper()
	addr := netip.MustParseAddrPort(frontend)
	endpoint := n.pod.IPv4
	if addr.Addr().Is6() {
		endpoint = n.pod.IPv6
	}
	s, err := dataplane.NewService(
		dataplane.Key{Namespace: "default", Name: name, Port: port, Family: dataplane.FamilyOf(addr.Addr()), Kind: kind},
		[]dataplane.Frontend{{Protocol: protocol, Addr: addr}},
		dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(endpoint, endpointPort), Local: true}}},
	)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (n *testNode) connect(t *testing.T, network, addr string, times int) {
	t.Helper()
	for range times {
		if _, err := n.Outside.Connect(t.Context(), network, netip.MustParseAddrPort(addr)); err != nil {
			t.Fatalf("connect to %s: %v", addr, err)
		}
	}
}

// TestMonitor counts real connections. A Service that is added after the start is counted as well.
func TestMonitor(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	m, err := Open(t.Context(), Options{NetNS: n.Node.Fd(), Interval: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	m.CountActive(true)
	if err := n.dp.Apply(t.Context(), []dataplane.Change{{New: n.service(t, "new", "", dataplane.ClusterIP, dataplane.TCP, "10.96.0.11:80", 8080)}}); err != nil {
		t.Fatal(err)
	}
	n.connect(t, nettest.TCP, "10.96.0.10:80", 3)
	n.connect(t, nettest.TCP, "192.0.2.1:30080", 2)
	n.connect(t, nettest.TCP, "[fd00:96::10]:80", 4)
	n.connect(t, nettest.UDP, "10.96.0.53:53", 5)
	n.connect(t, nettest.TCP, "10.96.0.11:80", 1)
	n.connect(t, nettest.TCP, netip.AddrPortFrom(n.pod.IPv4, 8080).String(), 1) // to no Service
	want := []Service{
		{Namespace: "default", Name: "dns", Protocol: "UDP", Numbers: Numbers{Total: 5}, Endpoints: []Endpoint{{"10.244.0.1:53", Numbers{Total: 5}}}},
		{Namespace: "default", Name: "new", Protocol: "TCP", Numbers: Numbers{Total: 1}, Endpoints: []Endpoint{{"10.244.0.1:8080", Numbers{Total: 1}}}},
		{Namespace: "default", Name: "web", Port: "http", Protocol: "TCP", Numbers: Numbers{Total: 9}, Endpoints: []Endpoint{
			{"10.244.0.1:8080", Numbers{Total: 5}}, {"[fd00:10:244::1]:8080", Numbers{Total: 4}},
		}},
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var diff string
	rates := 0.0
	udpActive := -1
	err = m.Run(ctx, func(s Sample) bool {
		for _, service := range s.Services {
			rates += service.PerSecond * s.Seconds
			if service.Name == "dns" && service.Active != nil {
				udpActive = *service.Active
			}
		}
		diff = cmp.Diff(want, s.Services, cmpopts.IgnoreFields(Numbers{}, "PerSecond", "Active"))
		return diff != ""
	})
	if err != nil {
		t.Fatalf("%v; the last sample differs (-want +got):\n%s", err, diff)
	}
	if rates < 14.99 || rates > 15.01 {
		t.Errorf("the rates of all intervals amount to %f connections, want 15", rates)
	}
	if udpActive != 5 {
		t.Errorf("%d active UDP flows, want 5", udpActive)
	}
}

func testSample() Sample {
	active := 2
	return Sample{Seconds: 1, Services: []Service{
		{Namespace: "default", Name: "quiet", Protocol: "TCP", Numbers: Numbers{PerSecond: 1, Total: 50, Active: &active}, Endpoints: []Endpoint{
			{"10.244.0.1:80", Numbers{PerSecond: 1, Total: 50, Active: &active}},
		}},
		{Namespace: "default", Name: "web", Port: "http", Protocol: "TCP", Numbers: Numbers{PerSecond: 12.5, Total: 20, Active: &active}, Endpoints: []Endpoint{
			{"10.244.0.2:80", Numbers{PerSecond: 2.5, Total: 5, Active: &active}}, {"10.244.0.3:80", Numbers{PerSecond: 10, Total: 15, Active: &active}},
		}},
	}}
}

func TestWriteTable(t *testing.T) {
	t.Parallel()
	s := testSample()
	s.Sort(ByRate)
	s.Lost = 7
	var text strings.Builder
	if err := s.WriteTable(&text, true); err != nil {
		t.Fatal(err)
	}
	const want = `SERVICE            PROTOCOL   ENDPOINT        CONN/S   CONNECTIONS   ACTIVE
default/web:http   TCP        (2)             ≥12.5    20            2
default/web:http   TCP        10.244.0.3:80   ≥10.0    15            2
default/web:http   TCP        10.244.0.2:80   ≥2.5     5             2
default/quiet      TCP        (1)             ≥1.0     50            2
default/quiet      TCP        10.244.0.1:80   ≥1.0     50            2
7 connections came too fast to be counted by Service: the numbers are lower bounds
`
	if diff := cmp.Diff(want, text.String()); diff != "" {
		t.Errorf("table differs (-want +got):\n%s", diff)
	}
	text.Reset()
	if err := s.WriteJSON(&text); err != nil {
		t.Fatal(err)
	}
	var decoded Sample
	if err := json.Unmarshal([]byte(text.String()), &decoded); err != nil || strings.Count(text.String(), "\n") != 1 {
		t.Errorf("JSON %q: %v", text.String(), err)
	}
	if diff := cmp.Diff(s, decoded); diff != "" {
		t.Errorf("JSON differs (-want +got):\n%s", diff)
	}
}

// TestScreen presses keys and checks the lines of the terminal.
func TestScreen(t *testing.T) {
	t.Parallel()
	counting := false
	s := newScreen(ScreenOptions{Order: ByRate}, func(active bool) { counting = active })
	s.Update(tea.WindowSizeMsg{Width: 90, Height: 8})
	s.Update(testSample())
	press := func(keys ...string) {
		for _, key := range keys {
			msg := tea.KeyPressMsg{Code: []rune(key)[0], Text: key}
			switch key {
			case "enter":
				msg = tea.KeyPressMsg{Code: tea.KeyEnter}
			case "esc":
				msg = tea.KeyPressMsg{Code: tea.KeyEscape}
			}
			s.Update(msg)
		}
	}
	check := func(step string, contains []string, lacks ...string) {
		t.Helper()
		content := s.View().Content
		if n := strings.Count(content, "\n") + 1; n != 8 {
			t.Errorf("%s: %d lines, want 8:\n%s", step, n, content)
		}
		rest := content
		for _, part := range contains {
			_, after, ok := strings.Cut(rest, part)
			if !ok {
				t.Errorf("%s: no %q in order in\n%s", step, part, content)
			}
			rest = after
		}
		for _, part := range lacks {
			if strings.Contains(content, part) {
				t.Errorf("%s: %q in\n%s", step, part, content)
			}
		}
	}
	check("start", []string{"connections per second: 13.5, Services: 2, sorted by rate", "SERVICE", "\x1b[7mdefault/web:http", "default/quiet", "q quit"}, "10.244.0.3:80")
	press("enter")
	check("the endpoints of the first Service", []string{"default/web:http", "10.244.0.3:80", "10.244.0.2:80", "default/quiet"})
	press("s")
	check("sorted by total", []string{"sorted by total", "default/quiet", "default/web:http"})
	press("/", "w", "e", "b", "enter")
	check("filtered", []string{"filter: web", "default/web:http"}, "default/quiet")
	press("/", "esc", "e", "e")
	check("the filter is removed", []string{"default/quiet", "default/web:http"}, "10.244.0.1:80")
	press("a")
	if !counting {
		t.Error("the key a does not count active connections")
	}
	press("p")
	s.Update(Sample{Seconds: 1})
	check("paused", []string{"paused", "default/quiet"})
	press("p")
	s.Update(Sample{Seconds: 1, Lost: 3})
	check("no Services", []string{"3 connections came too fast", "no connections to Services so far"})
	if _, cmd := s.Update(tea.KeyPressMsg{Code: 'q', Text: "q"}); cmd == nil {
		t.Error("the key q does not quit")
	}
}
