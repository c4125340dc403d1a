package ipvs

import (
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// TestParseTemplate checks which lines of the kernel's list of connections are persistence
// templates.
func TestParseTemplate(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, line string
		want       template
	}{
		{
			name: "IPv4", line: "TCP C0000207 0000 0A60000A 0050 0AF40105 1F90 NONE        10799",
			want: template{dataplane.TCP, netip.MustParseAddr("192.0.2.7"), netip.MustParseAddrPort("10.96.0.10:80"), netip.MustParseAddrPort("10.244.1.5:8080"), 10799 * time.Second},
		},
		{
			name: "IPv6", line: "UDP [2001:0db8:0000:0000:0000:0000:0000:0007] 0000 [fd00:0000:0000:0000:0000:0000:0000:0010] 0035 [fd00:0000:0000:0000:0000:0000:0000:0105] 0035 NONE 60",
			want: template{dataplane.UDP, netip.MustParseAddr("2001:db8::7"), netip.MustParseAddrPort("[fd00::10]:53"), netip.MustParseAddrPort("[fd00::105]:53"), time.Minute},
		},
		{name: "a connection", line: "TCP C0000207 C350 0A60000A 0050 0AF40105 1F90 ESTABLISHED   899"},
		{name: "the header", line: "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData"},
		{name: "a firewall mark", line: "IP  C0000207 0000 00000001 0000 0AF40105 0000 NONE 60"},
		{name: "empty", line: ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, ok := parseTemplate(test.line)
			if ok != (test.want != template{}) || got != test.want {
				t.Errorf("%+v, %t, want %+v", got, ok, test.want)
			}
		})
	}
}
