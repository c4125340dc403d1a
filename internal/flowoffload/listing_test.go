package flowoffload

import (
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
)

// TestListing checks how nft prints the table.
func TestListing(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Fatal("nft is missing: run make deps: ", err)
	}
	n := newTestNode(t)
	n.replace(
		dataplanetest.NewService(t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, 1)}, "tcp 10.96.0.10:80"),
		dataplanetest.NewService(t, "node6", dataplane.NodePort, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv6, 1)}, "udp [::]:30080"),
	)
	var out []byte
	err = n.Node.Do(func() error {
		var err error
		out, err = exec.Command(nft, "list", "table", "inet", TableName).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got := regexp.MustCompile(`(devices =|elements =) \{[^}]*veth[^}]*\}`).ReplaceAllString(string(out), "$1 { … }")
	want := `table inet fairlead-flows {
	counter offloaded {
		packets 0 bytes 0
	}

	set devices {
		type iface_index
		elements = { … }
	}

	set frontends-ipv4 {
		type ipv4_addr . inet_proto . inet_service
		elements = { 10.96.0.10 . tcp . 80 }
	}

	set frontends-ipv6 {
		type ipv6_addr . inet_proto . inet_service
		elements = { :: . udp . 30080 }
	}

	flowtable flows {
		hook ingress priority 100
		devices = { … }
		counter
	}

	chain offload {
		meta nfproto ipv4 ct original ip daddr . meta l4proto . ct original proto-dst @frontends-ipv4 flow add @flows counter name "offloaded" return
		meta nfproto ipv4 ct original ip daddr & 0.0.0.0 . meta l4proto . ct original proto-dst @frontends-ipv4 flow add @flows counter name "offloaded" return
		meta nfproto ipv6 ct original ip6 daddr . meta l4proto . ct original proto-dst @frontends-ipv6 flow add @flows counter name "offloaded" return
		meta nfproto ipv6 ct original ip6 daddr & :: . meta l4proto . ct original proto-dst @frontends-ipv6 flow add @flows counter name "offloaded" return
	}

	chain forward {
		type filter hook forward priority 200; policy accept;
		ct status dnat ct state established iif @devices oif @devices ct packets > 12 goto offload comment "version 1, threshold 12, hardware false, UDP true"
	}
}
`
	if !n.dp.table.withUDP { // Linux 6.3 and older
		want = strings.Replace(want, "established iif", "established meta l4proto tcp iif", 1)
		want = strings.Replace(want, "UDP true", "UDP false", 1)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
