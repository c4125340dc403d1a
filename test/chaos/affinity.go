package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/bench/system"
)

// metricsPort is the port of Fairlead's metrics server.
const metricsPort = 10249

// affinityNotRemembered returns the value of Fairlead's metric for connections whose client
// did not fit into a full affinity map. The family is IPv4 or IPv6.
func (t *testbed) affinityNotRemembered(ctx context.Context, family string) (float64, error) {
	client := http.Client{
		Timeout: connectTimeout,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return t.net.Node.Dial(ctx, network, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), metricsPort))
			},
		},
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node/metrics", nil)
	if err != nil {
		return 0, err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, fmt.Errorf("read the metrics: %w", err)
	}
	defer response.Body.Close() //nolint:errcheck // read-only
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return 0, fmt.Errorf("read the metrics: %w", err)
	}
	metric := fmt.Sprintf("fairlead_session_affinity_not_remembered_total{ip_family=%q,reason=%q} ", family, "full")
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, metric); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, fmt.Errorf("no metric %s", metric)
}

// requireAffinityMaps returns why the fault is unavailable, or "".
func (t *testbed) requireAffinityMaps() string {
	if t.options.mode != system.ModeNFT {
		return "mode " + t.options.mode + " has no affinity maps"
	}
	return ""
}

// floodAffinity sends datagrams from ever more source addresses to the Service `crowded`,
// until the affinity maps that it shares with `sticky` are full in both families.
func (t *testbed) floodAffinity(ctx context.Context) error {
	group := errgroup.Group{}
	for family, name := range []string{"IPv4", "IPv6"} {
		group.Go(func() error { return t.fillAffinityMap(ctx, family, name) })
	}
	return group.Wait()
}

// fillAffinityMap floods one family until ctx is done, or longer if a busy machine has not
// filled the map by then.
func (t *testbed) fillAffinityMap(ctx context.Context, family int, name string) error {
	before, err := t.affinityNotRemembered(withoutCancel(ctx), name)
	if err != nil {
		return err
	}
	limit := time.Now().Add(2 * time.Minute)
	for read := time.Now(); ; {
		if err := t.sendSpoofed(family); err != nil {
			return err
		}
		if ctx.Err() == nil || time.Since(read) < time.Second {
			continue
		}
		after, err := t.affinityNotRemembered(withoutCancel(ctx), name)
		if err != nil || after > before {
			return err
		}
		if read = time.Now(); read.After(limit) {
			return fmt.Errorf("the affinity map for %s is still not full", name)
		}
	}
}

// sendSpoofed sends some datagrams, then leaves the processors to the clients for a moment.
func (t *testbed) sendSpoofed(family int) error {
	const some = 1024
	begin := time.Now()
	err := t.client.SpoofUDP(t.serviceNamed("crowded").clusterAddrPort(family), func(yield func(netip.Addr) bool) {
		for n := 0; n < some && yield(spoofedSource(family, t.spoofedCount.Add(1))); n++ {
		}
	})
	time.Sleep(time.Since(begin) / 2)
	return err
}

// spoofedSource returns the nth unused source address. Each IPv6 address is in another /64
// network, because all clients of one /64 can use only a share of a map.
func spoofedSource(family int, n uint32) netip.Addr {
	if family == 0 {
		return netip.AddrFrom4([4]byte{100, 64 + byte(n>>16&0x3f), byte(n >> 8), byte(n)}) //nolint:gosec // the low bits
	}
	a := netip.MustParseAddr("2001:db8::1").As16()
	binary.BigEndian.PutUint32(a[4:], 0xbad<<20|n)
	return netip.AddrFrom16(a)
}
