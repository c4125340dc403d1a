package relay

import (
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

func endpoints(addrs ...string) []dataplane.Endpoint {
	var es []dataplane.Endpoint
	for _, a := range addrs {
		es = append(es, dataplane.Endpoint{Addr: netip.MustParseAddrPort(a)})
	}
	return es
}

// TestAffinityTimeout checks that affinity lasts for the timeout after the last client
// connected.
func TestAffinityTimeout(t *testing.T) {
	t.Parallel()
	const timeout = time.Minute
	all := endpoints("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80", "10.0.0.6:80", "10.0.0.7:80", "10.0.0.8:80")
	start := time.Unix(1000, 0)
	for _, tt := range []struct {
		name     string
		affinity time.Duration
		gaps     []time.Duration // between clients that share an endpoint
		last     time.Duration   // between them and one more client
		want     bool
	}{
		{"immediately", timeout, []time.Duration{0, 0}, 0, true},
		{"each within the timeout of the previous", timeout, []time.Duration{timeout, timeout}, timeout, true},
		{"after the timeout", timeout, nil, timeout + 1, false},
		{"no affinity", 0, nil, 0, false},
	} {
		same := true
		for range 20 { // a random endpoint is the same in one of 8 cases
			p := &port{service: &dataplane.Service{ServiceSpec: dataplane.ServiceSpec{Endpoints: all, Affinity: tt.affinity}}}
			now := start
			first, _ := p.pickEndpoint(now, nil)
			for _, gap := range tt.gaps {
				now = now.Add(gap)
				if got, ok := p.pickEndpoint(now, nil); got != first || !ok {
					t.Fatalf("%s: %s after %s", tt.name, got, first)
				}
			}
			got, ok := p.pickEndpoint(now.Add(tt.last), nil)
			if !ok {
				t.Fatalf("%s: no endpoint", tt.name)
			}
			same = same && got == first
		}
		if same != tt.want {
			t.Errorf("%s: same endpoint: %t, want %t", tt.name, same, tt.want)
		}
	}
}

// TestPickEndpointSkipsTried checks that a client never gets an endpoint that it has already
// tried, and that with affinity later clients get its new endpoint.
func TestPickEndpointSkipsTried(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	for _, affinity := range []time.Duration{0, time.Minute} {
		p := &port{service: &dataplane.Service{ServiceSpec: dataplane.ServiceSpec{
			Endpoints: endpoints("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"), Affinity: affinity,
		}}}
		var tried []netip.AddrPort
		for range 3 {
			addr, ok := p.pickEndpoint(now, tried)
			if !ok || !addr.IsValid() {
				t.Fatalf("affinity %s: no endpoint after %v", affinity, tried)
			}
			for _, before := range tried {
				if addr == before {
					t.Fatalf("affinity %s: got %s twice", affinity, addr)
				}
			}
			tried = append(tried, addr)
		}
		if affinity > 0 {
			if got, _ := p.pickEndpoint(now, nil); got != tried[2] {
				t.Errorf("another client gets %s, want %s", got, tried[2])
			}
		}
		if addr, ok := p.pickEndpoint(now, tried); ok {
			t.Errorf("affinity %s: got %s after all were tried", affinity, addr)
		}
	}
	if addr, ok := (&port{}).pickEndpoint(now, nil); ok {
		t.Errorf("got %s without a Service", addr)
	}
}
