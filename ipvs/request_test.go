package ipvs

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"

	"golang.org/x/sys/unix"
)

func tcpServer(addr string) serverKey {
	return serverKey{dataplane.TCP, netip.MustParseAddrPort(addr)}
}

// TestServiceRoundTrip checks that parseService decodes the encoded virtual server.
func TestServiceRoundTrip(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		serverKey
		settings
	}{
		{"IPv4", tcpServer("10.96.0.1:80"), settings{scheduler: "rr"}},
		{"IPv6", tcpServer("[fd00::1]:80"), settings{scheduler: "wlc"}},
		{"UDP", serverKey{dataplane.UDP, netip.MustParseAddrPort("10.96.0.10:53")}, settings{scheduler: "sh"}},
		{"SCTP", serverKey{dataplane.SCTP, netip.MustParseAddrPort("10.96.0.10:36412")}, settings{scheduler: "lc"}},
		{"persistent", tcpServer("10.96.0.1:80"), settings{scheduler: "rr", flags: flagPersistent, timeout: 10800}},
		{"a scheduler's flag", tcpServer("10.96.0.1:80"), settings{scheduler: "mh", flags: flagSched2}},
		{"the highest port", tcpServer("10.96.0.1:65535"), settings{scheduler: "rr"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := request{command: newService, serverKey: tt.serverKey, settings: tt.settings}.message(30)
			if m.Header.Type != 30 || m.Data[0] != byte(newService) || m.Data[1] != 1 {
				t.Errorf("the message has type %d and header % x, want the family's number, the command and version 1", m.Header.Type, m.Data[:4])
			}
			found := 0
			for typ, data := range nlconn.Attributes(m.Data[4:]) {
				if typ != attrService {
					t.Errorf("attribute %d, want only a service", typ)
				}
				found++
				if s, set, ok := parseService(data); !ok || s != tt.serverKey || set != tt.settings {
					t.Errorf("read %v %+v (%t), want %v %+v", s, set, ok, tt.serverKey, tt.settings)
				}
			}
			if found != 1 {
				t.Errorf("%d services, want 1", found)
			}
		})
	}
}

// TestTimeoutWithoutPersistence checks that parseService ignores the timeout of a virtual
// server without persistence, because the kernel keeps the old value.
func TestTimeoutWithoutPersistence(t *testing.T) {
	t.Parallel()
	m := request{command: newService, serverKey: tcpServer("10.96.0.1:80"), settings: settings{scheduler: "rr", timeout: 360}}.message(30)
	if _, set, ok := parseService(m.Data[8:]); !ok || set != (settings{scheduler: "rr"}) {
		t.Errorf("read %+v (%t), want no timeout", set, ok)
	}
}

func TestFwmarkServersIgnored(t *testing.T) {
	t.Parallel()
	marked := nlconn.AppendUint32(tcpServer("0.0.0.0:0").appendKey(nil), serviceFwmark, 7)
	marked = nlconn.AppendString(marked, serviceScheduler, "rr")
	if s, _, ok := parseService(marked); ok {
		t.Errorf("a virtual server with a firewall mark is decoded as %s", s)
	}
}

func TestDestinationRoundTrip(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		serverKey
		dest string
	}{{tcpServer("10.96.0.1:80"), "10.244.1.5:8080"}, {tcpServer("[fd00::1]:80"), "[fd01::5]:8080"}} {
		dest := netip.MustParseAddrPort(tt.dest)
		m := request{command: newDest, serverKey: tt.serverKey, dest: dest, weight: 1}.message(30)
		found := 0
		for typ, data := range nlconn.Attributes(m.Data[4:]) {
			if typ != attrDest {
				continue
			}
			found++
			addr, d := parseDestination(data, unix.AF_UNSPEC)
			if want := (destination{weight: 1, nat: true}); addr != dest || d != want {
				t.Errorf("read %s %+v, want %s %+v", addr, d, dest, want)
			}
		}
		if found != 1 {
			t.Errorf("%d destinations, want 1", found)
		}
	}
}

func TestConnectionCount(t *testing.T) {
	t.Parallel()
	b := nlconn.AppendUint32(nlconn.AppendUint32(nlconn.AppendUint32(nil, destActive, 3), destInactive, 4), destForwarding, 3)
	if _, d := parseDestination(b, unix.AF_INET); d.connections != 7 || d.nat {
		t.Errorf("%+v, want 7 connections and no NAT", d)
	}
}

// TestRequestKey checks that every request identifies its virtual server.
func TestRequestKey(t *testing.T) {
	t.Parallel()
	for _, c := range []command{newService, setService, delService, newDest, setDest, delDest} {
		r := request{command: c, serverKey: tcpServer("10.96.0.1:80"), settings: settings{scheduler: "rr"}}
		if c >= newDest {
			r.dest = netip.MustParseAddrPort("10.0.0.1:1")
		}
		m := r.message(30)
		for typ, data := range nlconn.Attributes(m.Data[4:]) {
			if s, _, ok := parseService(data); typ == attrService && (!ok || s != r.serverKey) {
				t.Errorf("%s: %s (%t), want %s", r, s, ok, r.serverKey)
			}
		}
		if c.String() == "" {
			t.Errorf("command %d has no name", c)
		}
	}
}

// FuzzParse checks that the decoders do not panic and return valid addresses.
func FuzzParse(f *testing.F) {
	f.Add(nlconn.AppendString(tcpServer("10.96.0.1:80").appendKey(nil), serviceScheduler, "rr"))
	f.Add(request{command: newDest, serverKey: tcpServer("[fd00::1]:80"), dest: netip.MustParseAddrPort("[fd01::5]:80")}.message(30).Data)
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, _, ok := parseService(b); ok && !s.addr.Addr().IsValid() {
			t.Errorf("virtual server without an address: %v", s)
		}
		parseDestination(b, unix.AF_INET6)
		h := host{link: 1}
		if addr, ok := h.parseRoute(b); ok && !addr.IsValid() {
			t.Errorf("route without an address: % x", b)
		}
	})
}
