package statuspage_test

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/internal/statuspage"
	"fairlead.io/fairlead/sync"
)

// fixture returns a page of a node with Services in every state, changes, events and counters.
func fixture(t *testing.T) *statuspage.Page {
	t.Helper()
	recorder := history.New()
	var services []statuspage.Service
	failing := map[dataplane.Key]error{}
	now := time.Now()
	commit := func(reason sync.Reason, latency time.Duration, changes ...dataplane.Change) {
		recorder.OnCommit(sync.Commit{
			Op: sync.OpApply, Reason: reason, Changes: changes, OldestUpdate: now, Start: now.Add(latency / 3), End: now.Add(latency),
		})
	}
	add := func(namespace, name string, last byte, endpoints int, ports ...string) *statuspage.Service {
		service := statuspage.Service{Namespace: namespace, Name: name}
		for i, port := range ports {
			service.Ports = append(service.Ports, newService(t, namespace, name, port, last, uint16(80+i), dataplane.ClusterIP, endpoints))
		}
		services = append(services, service)
		return &services[len(services)-1]
	}
	commit(sync.ReasonStart, 41*time.Millisecond)
	add("default", "kubernetes", 1, 3, "https")
	add("kube-system", "kube-dns", 10, 2, "dns", "dns-tcp", "metrics")
	add("ingress", "gateway-nginx-external", 21, 4, "http", "https")
	gateway := &services[len(services)-1]
	gateway.Ports = append(gateway.Ports,
		newService(t, "ingress", "gateway-nginx-external", "http", 0, 30080, dataplane.NodePort, 4),
		newService(t, "ingress", "gateway-nginx-external", "http", 99, 80, dataplane.LoadBalancer, 4))
	add("shop", "cart", 31, 6, "")
	add("shop", "checkout", 32, 0, "grpc")
	add("shop", "catalog-search-with-a-very-long-name-of-a-service", 33, 12, "http")
	web := add("shop", "web", 34, 3, "http")
	web.Problems = []statuspage.Problem{{Field: "spec.externalIPs[0]", Message: `"192.0.2.300" is not an IP address: use an address such as 192.0.2.30`}}
	legacy := add("warehouse", "legacy-inventory", 41, 2, "sql")
	failing[legacy.Ports[0].Key] = errors.New("scheduler lblcr is not supported in the mode nft: use the mode ipvs, or remove the annotation")
	for i := range 60 {
		add("team-"+string(rune('a'+i%20)), fmt.Sprintf("api-%02d", i), byte(100+i), 1+i%7, "http")
	}
	recorder.OnCommit(sync.Commit{Op: sync.OpReplace, Reason: sync.ReasonDrift, Start: now, End: now.Add(18 * time.Millisecond)})
	recorder.RecordEvent(history.OtherProxy, true, "rules of another Service proxy: kube-proxy (iptables): chains KUBE-SERVICES and KUBE-NODEPORTS")
	recorder.OnCommit(sync.Commit{
		Op: sync.OpReplace, Reason: sync.ReasonRetry, Start: now, End: now.Add(22 * time.Millisecond), Failed: failing,
	})
	for i := range 5 {
		old := newService(t, "shop", "cart", "", 31, 80, dataplane.ClusterIP, 3+i)
		commit(sync.ReasonChange, time.Duration(310+40*i)*time.Microsecond, dataplane.Change{Old: old, New: newService(t, "shop", "cart", "", 31, 80, dataplane.ClusterIP, 4+i)})
	}
	commit(sync.ReasonChange, 280*time.Microsecond, dataplane.Change{New: newService(t, "shop", "web", "http", 34, 80, dataplane.ClusterIP, 3)})
	commit(sync.ReasonChange, 1900*time.Microsecond, dataplane.Change{Old: newService(t, "shop", "banner", "http", 36, 80, dataplane.ClusterIP, 1)})
	recorder.RecordTrigger("shop", "checkout", time.Now().Add(time.Hour))
	commit(sync.ReasonChange, 410*time.Microsecond, dataplane.Change{
		Old: newService(t, "shop", "checkout", "grpc", 32, 80, dataplane.ClusterIP, 1), New: newService(t, "shop", "checkout", "grpc", 32, 80, dataplane.ClusterIP, 0),
	})
	return statuspage.New(statuspage.Options{
		Node: "worker-3.example.com", Mode: "nft", Version: "v0.17.0", Source: "API server https://10.0.0.1:6443",
		State: func() statuspage.State {
			return statuspage.State{
				Healthy: true, LastSuccess: time.Now(), APIServer: &statuspage.APIServer{Connected: true, LastResponse: time.Now()},
				OtherProxies: []statuspage.OtherProxy{{
					Mode: "iptables", Rules: "kube-proxy in mode iptables (chains KUBE-SERVICES, KUBE-NODEPORTS)",
					Effect: "Fairlead's rules go first; the other rules only cost time",
				}},
			}
		},
		Services:        func() []statuspage.Service { return services },
		ServicesVersion: func() uint64 { return 1 },
		Failing:         func() map[dataplane.Key]error { return failing },
		RefusedPackets: func() ([]statuspage.RefusedPackets, error) {
			return []statuspage.RefusedPackets{
				{Family: dataplane.IPv4, Verdict: "reject", Reason: "no-endpoints", Packets: 18412}, {Family: dataplane.IPv6, Verdict: "reject", Reason: "no-endpoints", Packets: 37},
				{Family: dataplane.IPv4, Verdict: "drop", Reason: "source-ranges", Packets: 964}, {Family: dataplane.IPv4, Verdict: "drop", Reason: "invalid", Packets: 5},
				{Family: dataplane.IPv4, Verdict: "drop", Reason: "no-service"}, {Family: dataplane.IPv4, Verdict: "drop", Reason: "loopback"},
				{Family: dataplane.IPv4, Verdict: "reject", Reason: "undeclared-port"},
			}, nil
		},
		History: recorder,
	})
}

// newService returns a Service with one frontend and the given number of endpoints.
func newService(t *testing.T, namespace, name, port string, last byte, number uint16, kind dataplane.Kind, endpoints int) *dataplane.Service {
	t.Helper()
	addr := netip.AddrFrom4([4]byte{10, 96, 0, last})
	switch kind {
	case dataplane.NodePort:
		addr = netip.IPv4Unspecified()
	case dataplane.LoadBalancer:
		addr = netip.AddrFrom4([4]byte{203, 0, 113, last})
	}
	var list []dataplane.Endpoint
	for i := range endpoints {
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, byte(i % 4), byte(10 + i)}), 8080), Local: i%4 == 3})
	}
	protocol := dataplane.TCP
	if port == "dns" {
		protocol = dataplane.UDP
	}
	service, err := dataplane.NewService(
		dataplane.Key{Namespace: namespace, Name: name, Port: port, Family: dataplane.IPv4, Kind: kind},
		[]dataplane.Frontend{{Protocol: protocol, Addr: netip.AddrPortFrom(addr, number)}}, dataplane.ServiceSpec{Endpoints: list})
	if err != nil {
		t.Fatal(err)
	}
	return service
}

// TestLayout renders the page on a desktop and a phone, in a light and a dark color scheme.
// FAIRLEAD_SCREENSHOTS names a directory to keep the pictures in.
func TestLayout(t *testing.T) {
	server := httptest.NewServer(fixture(t).Handler())
	t.Cleanup(func() {
		server.CloseClientConnections() // streams do not end by themselves
		server.Close()
	})
	b := newBrowser(t)
	for _, test := range []struct {
		name          string
		width, height int64
		dark          bool
	}{
		{name: "desktop-light", width: 1280, height: 1600},
		{name: "desktop-dark", width: 1280, height: 1600, dark: true},
		{name: "tablet-light", width: 768, height: 1400},
		{name: "phone-dark", width: 390, height: 1500, dark: true},
		{name: "phone-light", width: 390, height: 1500},
	} {
		t.Run(test.name, func(t *testing.T) {
			b.t = t
			b.emulate(test.width, test.height, test.dark)
			b.run(chromedp.Navigate(server.URL), chromedp.WaitVisible(`.services-table`), chromedp.WaitVisible(`.connection[data-state=on]`))
			var overflow []string
			b.run(chromedp.Evaluate(`[...document.querySelectorAll("body *")].filter((e) =>
				!e.closest(".hidden") && !e.closest("thead") && (e.getBoundingClientRect().right > innerWidth + 0.5 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 &&
				getComputedStyle(e).display !== "inline")).map((e) => e.outerHTML.slice(0, 100))`, &overflow))
			if len(overflow) > 0 {
				t.Errorf("elements are wider than their space:\n%s", strings.Join(overflow, "\n"))
			}
			var background string
			b.run(chromedp.Evaluate(`getComputedStyle(document.body).backgroundColor`, &background))
			if dark := background == "rgb(13, 17, 24)"; dark != test.dark {
				t.Errorf("background %s, dark %v; want %v", background, dark, test.dark)
			}
			var picture []byte
			b.run(chromedp.CaptureScreenshot(&picture))
			if folder := os.Getenv("FAIRLEAD_SCREENSHOTS"); folder != "" {
				if err := os.WriteFile(filepath.Join(folder, test.name+".png"), picture, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
