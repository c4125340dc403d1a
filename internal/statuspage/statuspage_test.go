package statuspage_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/internal/statuspage"
)

// node is a node with Services whose page is tested.
type node struct {
	services []statuspage.Service
	failing  map[dataplane.Key]error
	version  uint64
	reads    int
}

func (n *node) page() *statuspage.Page {
	return statuspage.New(statuspage.Options{
		Node: "node", Mode: "nft", Version: "v1", Source: "folder", History: history.New(),
		State:           func() statuspage.State { return statuspage.State{Healthy: true, LastSuccess: time.Now()} },
		Services:        func() []statuspage.Service { n.reads++; return slices.Clone(n.services) },
		ServicesVersion: func() uint64 { return n.version },
		Failing:         func() map[dataplane.Key]error { return n.failing },
		RefusedPackets: func() ([]statuspage.RefusedPackets, error) {
			return []statuspage.RefusedPackets{{Family: dataplane.IPv4, Verdict: "drop", Reason: "source-ranges", Packets: 3}}, nil
		},
	})
}

func (n *node) add(t testing.TB, namespace, name string, number, endpoints int) *statuspage.Service {
	t.Helper()
	var list []dataplane.Endpoint
	for i := range endpoints {
		addr := netip.AddrFrom4([4]byte{10, byte(number >> 16), byte(number >> 8), byte(number)})
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, uint16(8000+i))})
	}
	s, err := dataplane.NewService(dataplane.Key{Namespace: namespace, Name: name, Port: "http", Family: dataplane.IPv4}, []dataplane.Frontend{{
		Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(number >> 8), byte(number)}), 80),
	}}, dataplane.ServiceSpec{Endpoints: list})
	if err != nil {
		t.Fatal(err)
	}
	n.services = append(n.services, statuspage.Service{Namespace: namespace, Name: name, Ports: []*dataplane.Service{s}})
	return &n.services[len(n.services)-1]
}

// request sends a request to the handler.
func request(t testing.TB, page *statuspage.Page, method, target string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, target, nil)
	w := httptest.NewRecorder()
	page.Handler().ServeHTTP(w, r)
	return w
}

// TestRequests checks which requests are answered, and the headers that protect the page.
func TestRequests(t *testing.T) {
	t.Parallel()
	page := (&node{}).page()
	for _, test := range []struct {
		method, url string
		want        int
	}{
		{http.MethodGet, "http://127.0.0.1:10265/", http.StatusOK},
		{http.MethodHead, "http://[::1]:10265/", http.StatusOK},
		{http.MethodGet, "http://[::1]/", http.StatusOK},
		{http.MethodGet, "http://localhost:8080/api/status", http.StatusOK},
		{http.MethodGet, "http://192.0.2.1:10265/page.js", http.StatusOK},
		{http.MethodGet, "http://127.0.0.1:10265/other", http.StatusNotFound},
		{http.MethodGet, "http://attacker.example:10265/", http.StatusMisdirectedRequest},
		{http.MethodGet, "http://127.0.0.1.attacker.example/api/services", http.StatusMisdirectedRequest},
		{http.MethodPost, "http://127.0.0.1:10265/", http.StatusMethodNotAllowed},
		{http.MethodDelete, "http://127.0.0.1:10265/api/services", http.StatusMethodNotAllowed},
		{http.MethodOptions, "http://127.0.0.1:10265/", http.StatusMethodNotAllowed},
	} {
		w := request(t, page, test.method, test.url)
		if w.Code != test.want {
			t.Errorf("%s %s: status %d, want %d", test.method, test.url, w.Code, test.want)
		}
		if policy := w.Header().Get("Content-Security-Policy"); !strings.HasPrefix(policy, "default-src 'none'; script-src 'self';") || strings.Contains(policy, "unsafe") {
			t.Errorf("%s %s: Content-Security-Policy %q", test.method, test.url, policy)
		}
	}
	body := request(t, page, http.MethodGet, "http://127.0.0.1/").Body.String()
	for _, forbidden := range []string{"<style", " style=", "onclick", "http://", "https://"} {
		if strings.Contains(body, forbidden) {
			t.Errorf("the page contains %q", forbidden)
		}
	}
}

// TestText checks that names and errors cannot add elements to the page.
func TestText(t *testing.T) {
	t.Parallel()
	n := &node{}
	n.add(t, "default", "web", 1, 1).Problems = []statuspage.Problem{{Field: "spec", Message: `<script>alert("&")</script>`}}
	w := request(t, n.page(), http.MethodGet, "http://127.0.0.1/?q="+`%22%3E%3Cscript%3E`)
	if strings.Contains(w.Body.String(), "<script>") {
		t.Error("the query is part of the page's elements")
	}
	body := request(t, n.page(), http.MethodGet, "http://127.0.0.1/").Body.String()
	if strings.Contains(body, "<script>alert") || !strings.Contains(body, "&lt;script&gt;alert") {
		t.Error("the message is not shown as text")
	}
}

// list is the JSON of /api/services.
type list struct {
	Matching, Page, Pages int
	Services              []struct {
		Namespace, Name, State string
		Ports                  []struct {
			Frontends, Endpoints []string
			Error                string
		}
	}
}

func (l list) names() string {
	var names []string
	for _, s := range l.Services {
		names = append(names, s.Name+"="+s.State)
	}
	return strings.Join(names, " ")
}

func services(t testing.TB, page *statuspage.Page, query string) list {
	t.Helper()
	w := request(t, page, http.MethodGet, "http://127.0.0.1/api/services"+query)
	var l list
	if err := json.Unmarshal(w.Body.Bytes(), &l); err != nil {
		t.Fatalf("%v in:\n%s", err, w.Body)
	}
	return l
}

// TestSelection checks which Services a query selects, and their order.
func TestSelection(t *testing.T) {
	t.Parallel()
	n := &node{failing: map[dataplane.Key]error{}}
	n.add(t, "shop", "web", 1, 2)
	n.add(t, "shop", "idle", 2, 0)
	n.add(t, "shop", "broken", 3, 1)
	n.failing[n.services[2].Ports[0].Key] = errors.New("no space")
	n.add(t, "bank", "odd", 4, 1).Problems = []statuspage.Problem{{Field: "spec.type", Message: "unknown"}}
	n.add(t, "bank", "web", 5, 1)
	page := n.page()
	for _, test := range []struct{ query, want string }{
		{"", "broken=failing odd=problem web=ready idle=no-endpoints web=ready"},
		{"?q=shop/", "broken=failing idle=no-endpoints web=ready"},
		{"?q=SHOP+web", "web=ready"},
		{"?q=10.96.0.2:80", "idle=no-endpoints"},
		{"?q=10.0.0.1:8001", "web=ready"},
		{"?q=80/tcp", "broken=failing odd=problem web=ready idle=no-endpoints web=ready"},
		{"?q=nothing", ""},
		{"?state=failing", "broken=failing"},
		{"?state=no-endpoints&q=shop", "idle=no-endpoints"},
		{"?state=other", "broken=failing odd=problem web=ready idle=no-endpoints web=ready"},
		{"?limit=2&page=2", "web=ready idle=no-endpoints"},
		{"?limit=2&page=99", "web=ready"},
		{"?limit=-1&page=x", "broken=failing odd=problem web=ready idle=no-endpoints web=ready"},
	} {
		if got := services(t, page, test.query).names(); got != test.want {
			t.Errorf("%s selects %q, want %q", test.query, got, test.want)
		}
	}
	if got := services(t, page, "?q=broken").Services[0].Ports[0]; got.Error != "no space" || !slices.Equal(got.Frontends, []string{"10.96.0.3:80/TCP"}) {
		t.Errorf("port %+v, want the frontend and the error", got)
	}
	if n.reads != 1 {
		t.Errorf("the Services were read %d times although none changed, want once", n.reads)
	}
}

// TestLive checks that the stream announces a change, and that the number of streams is bounded.
func TestLive(t *testing.T) {
	t.Parallel()
	recorder := history.New()
	page := statuspage.New(statuspage.Options{History: recorder, ServicesVersion: func() uint64 { return 0 }})
	server := httptest.NewUnstartedServer(page.Handler())
	server.Config.ReadTimeout, server.Config.WriteTimeout = time.Second, time.Second // shorter than the stream
	server.Start()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	open := func() *http.Response {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/live", nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = response.Body.Close() })
		return response
	}
	stream := open()
	read := func(want string) {
		t.Helper()
		text := make([]byte, len(want))
		if _, err := io.ReadFull(stream.Body, text); err != nil || string(text) != want {
			t.Fatalf("read %q, error %v; want %q", text, err, want)
		}
	}
	read("data: 0\n\n")
	time.Sleep(1500 * time.Millisecond) // the server's timeouts pass
	recorder.RecordEvent(history.Reload, false, "changed")
	read("data: 1\n\n")
	for range 15 {
		if r := open(); r.StatusCode != http.StatusOK {
			t.Fatalf("status %d of a further stream", r.StatusCode)
		}
	}
	if r := open(); r.StatusCode != http.StatusServiceUnavailable || r.Header.Get("Retry-After") == "" {
		t.Errorf("status %d of the 17th stream, want 503 with Retry-After", r.StatusCode)
	}
}

// BenchmarkPage measures requests with 10,000 Services: the first one after a change, and further
// ones with a filter.
func BenchmarkPage(b *testing.B) {
	n := &node{}
	for i := range 10_000 {
		n.add(b, fmt.Sprint("namespace-", i%100), fmt.Sprint("service-", i), i, 10)
	}
	for name, target := range map[string]string{"all": "http://127.0.0.1/", "filtered": "http://127.0.0.1/?q=10.96.3.7", "json": "http://127.0.0.1/api/services?q=service-99"} {
		b.Run(name, func(b *testing.B) {
			page := n.page()
			for b.Loop() {
				if w := request(b, page, http.MethodGet, target); w.Code != http.StatusOK {
					b.Fatal(w.Code)
				}
			}
		})
	}
	b.Run("changed", func(b *testing.B) {
		for b.Loop() {
			if w := request(b, n.page(), http.MethodGet, "http://127.0.0.1/"); w.Code != http.StatusOK {
				b.Fatal(w.Code)
			}
		}
	})
}
