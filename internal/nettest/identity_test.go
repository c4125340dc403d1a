package nettest_test

import (
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

func TestIdentity(t *testing.T) {
	n := nettest.NewT(t, nettest.Options{})
	server, client := n.PodT(t, "server"), n.PodT(t, "client")
	for _, addr := range server.Addrs() {
		at := netip.AddrPortFrom(addr, 7)
		for _, network := range []string{nettest.TCP, nettest.UDP} {
			s, err := server.ServeIdentity(network, at, 42)
			if err != nil {
				t.Fatal(err)
			}
			c := &nettest.IdentityClient{Timeout: 10 * time.Second}
			for range 3 {
				var identity byte
				err := client.Do(func() (err error) {
					if network == nettest.UDP {
						identity, _, err = c.Ask(at)
					} else {
						identity, _, err = c.Connect(at)
					}
					return err
				})
				if err != nil || identity != 42 {
					t.Errorf("%s to %s: identity %d, error %v, want 42", network, at, identity, err)
				}
			}
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			if err := client.Do(func() error { _, _, err := c.Connect(at); return err }); err == nil {
				t.Errorf("%s to %s: answered after Close", network, at)
			}
		}
	}
}
