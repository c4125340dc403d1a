package inspect

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

func newService(t testing.TB, name string, kind dataplane.Kind, frontend string, spec dataplane.ServiceSpec) *dataplane.Service {
	t.Helper()
	addr := netip.MustParseAddrPort(frontend)
	s, err := dataplane.NewService(
		dataplane.Key{Namespace: "default", Name: name, Port: "http", Family: dataplane.FamilyOf(addr.Addr()), Kind: kind},
		[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: addr}}, spec,
	)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRead reads the state of a node on which a connection to a removed endpoint remains.
func TestRead(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	a, b := network.PodT(t, "a"), network.PodT(t, "b")
	a.ServeT(t, nettest.TCP, 8080)
	b.ServeT(t, nettest.TCP, 8080)
	at := func(pod *nettest.Host) netip.AddrPort { return netip.AddrPortFrom(pod.IPv4, 8080) }
	opts := Options{NetNS: network.Node.Fd(), Connections: CountAlways}
	var notProgrammed *NotProgrammedError
	if _, err := Read(t.Context(), opts); !errors.As(err, &notProgrammed) || len(notProgrammed.Programmed) != 0 {
		t.Errorf("without tables: error %v, want that nothing is programmed", err)
	}

	d, err := nft.Open(nft.Options{NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	node := dataplane.Node{NodePortAddrs: []netip.Addr{network.Node.IPv4}}
	spec := func(pods ...*nettest.Host) (spec dataplane.ServiceSpec) {
		for _, pod := range pods {
			spec.Endpoints = append(spec.Endpoints, dataplane.Endpoint{Addr: at(pod), Local: true})
		}
		return spec
	}
	replace := func(pods ...*nettest.Host) {
		t.Helper()
		services := []*dataplane.Service{
			newService(t, "web", dataplane.ClusterIP, "10.96.0.10:80", spec(pods...)),
			newService(t, "web", dataplane.NodePort, "0.0.0.0:30080", spec(pods...)),
			newService(t, "web", dataplane.LoadBalancer, "203.0.113.1:80", spec(pods...)),
		}
		if err := d.Replace(t.Context(), node, slices.Values(services), nil); err != nil {
			t.Fatal(err)
		}
	}
	replace(a)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, addr := range []string{"10.96.0.10:80", netip.AddrPortFrom(network.Node.IPv4, 30080).String()} {
		conn, err := network.Outside.Dial(ctx, "tcp", netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	replace(b)

	k, err := Read(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	if k.Mode != "nft" || !k.ConnectionsCounted || len(k.Warnings) != 0 || len(k.Counters) == 0 {
		t.Errorf("mode %s, connections counted %v, warnings %q, %d counters", k.Mode, k.ConnectionsCounted, k.Warnings, len(k.Counters))
	}
	var kinds []string
	for _, f := range k.Frontends {
		kinds = append(kinds, f.KindName())
		if namespace, name, port := f.Service(); namespace != "default" || name != "web" || port != "http" {
			t.Errorf("%s: Service %s/%s:%s", f.Frontend, namespace, name, port)
		}
		want := []Endpoint{{Addr: at(b), Local: true, ForCluster: true}}
		if f.Kind != dataplane.LoadBalancer { // the client has used both other frontends
			want = append([]Endpoint{{Addr: at(a), Connections: 1}}, want...)
		}
		slices.SortFunc(want, func(a, b Endpoint) int { return a.Addr.Compare(b.Addr) })
		if !slices.Equal(f.Endpoints, want) {
			t.Errorf("%s: endpoints %+v, want %+v", f.Frontend, f.Endpoints, want)
		}
	}
	if want := []string{"ClusterIP", "NodePort", "LoadBalancer"}; !slices.Equal(kinds, want) {
		t.Errorf("kinds %q, want %q", kinds, want)
	}
	opts.Mode = "ipvs"
	if _, err := Read(t.Context(), opts); err == nil || !strings.Contains(err.Error(), "mode nft is") {
		t.Errorf("with another mode: error %v, want the programmed mode", err)
	}
	names, err := Services(t.Context(), Options{NetNS: network.Node.Fd()})
	if err != nil || !slices.Equal(names, []string{"default/web"}) {
		t.Errorf("Services: %q, error %v", names, err)
	}
}

func TestPermissionError(t *testing.T) {
	t.Parallel()
	err := explain(fs.ErrPermission)
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("error %v", err)
	}
}

func TestNearest(t *testing.T) {
	t.Parallel()
	names := []string{"default/web", "default/backend", "kube-system/kube-dns"}
	for unknown, want := range map[string]string{
		"default/wbe": "default/web", "default/bakcend": "default/backend", "kube-dns": "kube-system/kube-dns",
		"default/web-1": "default/web", "other/thing": "", "": "",
	} {
		if got := Nearest(unknown, names); got != want {
			t.Errorf("%q: got %q, want %q", unknown, got, want)
		}
	}
}
