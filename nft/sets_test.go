package nft

import (
	"net/netip"
	"strings"
	"testing"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/go-cmp/cmp"
)

// TestNetworkIntervals checks the interval elements of pod CIDRs in the IPv4 table.
func TestNetworkIntervals(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		cidrs []string
		want  string // the elements of the IPv4 table
	}{
		{"no networks", nil, ""},
		{"one network", []string{"10.1.0.0/16"}, "10.1.0.0 10.2.0.0)"},
		{"networks of both families", []string{"10.1.0.0/16", "fd00::/64"}, "10.1.0.0 10.2.0.0)"},
		{"nested networks", []string{"10.1.2.0/24", "10.0.0.0/8", "10.1.0.0/16"}, "10.0.0.0 11.0.0.0)"},
		{"adjacent networks", []string{"10.1.0.0/24", "10.1.1.0/24"}, "10.1.0.0 10.1.1.0) 10.1.1.0 10.1.2.0)"},
		{"up to the last address", []string{"240.0.0.0/4"}, "240.0.0.0"},
		{"all addresses", []string{"0.0.0.0/0"}, "0.0.0.0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var node dataplane.Node
			for _, c := range test.cidrs {
				node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(c))
			}
			var got []string
			for _, e := range intervalElements(newTable(dataplane.IPv4).mergeNetworks(node.PodCIDRs)) {
				a, _ := netip.AddrFromSlice(e.Key)
				text := a.String()
				if e.IntervalEnd {
					text += ")"
				}
				got = append(got, text)
			}
			if diff := cmp.Diff(test.want, strings.Join(got, " ")); diff != "" {
				t.Errorf("elements (-want +got):\n%s", diff)
			}
		})
	}
}

// TestNodePortNetworks checks that loopback addresses and virtual servers get no node ports,
// and that packets pass a rule for networks only if networks are configured.
func TestNodePortNetworks(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		family         dataplane.Family
		networks, want string
	}{
		{dataplane.IPv4, "", ""},
		{dataplane.IPv4, "2001:db8::/32 198.51.100.0/24 198.51.100.0/25 192.0.2.0/24", "192.0.2.0/24 198.51.100.0/24"},
		{dataplane.IPv4, "127.0.0.0/8 127.0.0.128/25 240.0.0.0/16", ""},
		{dataplane.IPv4, "124.0.0.0/6", "124.0.0.0/7 126.0.0.0/8"},
		{dataplane.IPv4, "240.0.0.0/14", "240.1.0.0/16 240.2.0.0/15"},
		{dataplane.IPv4, "0.0.0.0/0", "0.0.0.0/2 64.0.0.0/3 96.0.0.0/4 112.0.0.0/5 120.0.0.0/6 124.0.0.0/7 126.0.0.0/8 " +
			"128.0.0.0/2 192.0.0.0/3 224.0.0.0/4 240.1.0.0/16 240.2.0.0/15 240.4.0.0/14 240.8.0.0/13 240.16.0.0/12 240.32.0.0/11 " +
			"240.64.0.0/10 240.128.0.0/9 241.0.0.0/8 242.0.0.0/7 244.0.0.0/6 248.0.0.0/5"},
		{dataplane.IPv6, "::/126", "::/128 ::2/127"},
		{dataplane.IPv6, "2001:db8::1/64", "2001:db8::/64"},
	} {
		table := newTable(tt.family)
		if tt.family == dataplane.IPv4 {
			table.virtualNetworks = []netip.Prefix{netip.MustParsePrefix("240.0.0.0/16")}
		}
		var node dataplane.Node
		for text := range strings.FieldsSeq(tt.networks) {
			node.NodePortNetworks = append(node.NodePortNetworks, netip.MustParsePrefix(text))
		}
		var got []string
		for _, p := range table.mergeNodePortNetworks(node) {
			got = append(got, p.String())
		}
		if diff := cmp.Diff(strings.Fields(tt.want), got, cmp.Transformer("text", func(s []string) string { return strings.Join(s, " ") })); diff != "" {
			t.Errorf("%s of %q (-want +got):\n%s", tt.family, tt.networks, diff)
		}
		want := len(table.dispatchRules(dataplane.Node{}))
		if tt.want != "" {
			want++
		}
		if got := len(table.dispatchRules(node)); got != want {
			t.Errorf("%s of %q: %d dispatch rules, want %d", tt.family, tt.networks, got, want)
		}
	}
}

// TestNoBitmapSets checks the flags of sets with short keys. Without one of these flags the
// kernel uses a bitmap, which walks all elements for each change of an element
// (nft_set_bitmap.c).
func TestNoBitmapSets(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		for _, s := range newTable(family).sets() {
			if s.KeyType.Bytes <= 2 && !s.IsMap && !s.Interval && !s.HasTimeout && !s.Dynamic {
				t.Errorf("%s set %s would be a bitmap", family, s.Name)
			}
		}
	}
}
