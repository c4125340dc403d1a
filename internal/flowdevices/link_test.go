package flowdevices

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// TestDevices checks which interfaces take part for each way to detect local traffic.
func TestDevices(t *testing.T) {
	t.Parallel()
	node := links{}
	for _, i := range []link{
		{Device: Device{1, "lo"}, loopback: true},
		{Device: Device{2, "eth0"}},
		{Device: Device{3, "eth1"}, master: 4, slaveKind: "bond"},
		{Device: Device{4, "bond0"}, kind: "bond"},
		{Device: Device{5, "bond0.7"}, kind: "vlan"},
		{Device: Device{6, "br-uplink"}, kind: kindBridge},
		{Device: Device{7, "eth2"}, master: 6, slaveKind: kindBridge},
		{Device: Device{8, "kube-ipvs0"}, kind: "dummy"},
		{Device: Device{9, "flannel.1"}, kind: "vxlan"},
		{Device: Device{10, "cni0"}, kind: kindBridge},
		{Device: Device{11, "veth1"}, kind: kindVeth, master: 10, slaveKind: kindBridge},
		{Device: Device{12, "docker0"}, kind: kindBridge},
		{Device: Device{13, "dveth1"}, kind: kindVeth, master: 12, slaveKind: kindBridge},
		{Device: Device{14, "cali1"}, kind: kindVeth},
		{Device: Device{15, "ovs-port"}, kind: kindVeth, slaveKind: "openvswitch"},
		{Device: Device{16, "wg0"}, kind: "wireguard"},
	} {
		node[i.Index] = i
	}
	common := []string{"eth0", "bond0", "bond0.7", "br-uplink", "eth2", "flannel.1", "cni0", "docker0", "cali1", "wg0"}
	for _, test := range []struct {
		name  string
		pods  PodInterfaces
		ports []string // interfaces in bridges that take part, too
	}{
		{"by address", PodInterfaces{}, []string{"veth1", "dveth1"}},
		{"by bridge", PodInterfaces{Bridge: "cni0"}, []string{"veth1"}},
		{"by another bridge", PodInterfaces{Bridge: "br9"}, nil},
		{"by prefix", PodInterfaces{Prefix: "veth"}, []string{"veth1"}},
		{"by the prefix of routed interfaces", PodInterfaces{Prefix: "cali"}, nil},
	} {
		var got []string
		for _, device := range node.devices(test.pods) {
			got = append(got, device.Name)
		}
		want := slices.Concat(common, test.ports)
		slices.Sort(want)
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
	if d := links(nil).devices(PodInterfaces{}); len(d) != 0 {
		t.Errorf("devices of no interfaces: %v", d)
	}
}

// TestParseLink decodes messages as the kernel sends them.
func TestParseLink(t *testing.T) {
	t.Parallel()
	message := func(family byte, index, flags uint32) []byte {
		b := append([]byte{family, 0, 1, 0}, binary.NativeEndian.AppendUint32(nil, index)...)
		b = binary.NativeEndian.AppendUint32(b, flags)
		return append(b, 0, 0, 0, 0)
	}
	port := nlconn.AppendString(message(unix.AF_UNSPEC, 5, unix.IFF_UP), unix.IFLA_IFNAME, "veth1")
	port = nlconn.AppendUint32(port, unix.IFLA_MASTER, 3)
	port = nlconn.AppendNested(port, unix.IFLA_LINKINFO, func(b []byte) []byte {
		return nlconn.AppendString(nlconn.AppendString(b, unix.IFLA_INFO_KIND, "veth"), unix.IFLA_INFO_SLAVE_KIND, "bridge")
	})
	for _, test := range []struct {
		name string
		data []byte
		want link
		ok   bool
	}{
		{"port of a bridge", port, link{Device: Device{5, "veth1"}, kind: "veth", master: 3, slaveKind: "bridge"}, true},
		{"loopback", nlconn.AppendString(message(unix.AF_UNSPEC, 1, unix.IFF_LOOPBACK), unix.IFLA_IFNAME, "lo"), link{Device: Device{1, "lo"}, loopback: true}, true},
		{"the bridge's view of a port", nlconn.AppendString(message(unix.AF_BRIDGE, 5, 0), unix.IFLA_IFNAME, "veth1"), link{}, false},
		{"no name", message(unix.AF_UNSPEC, 5, 0), link{Device: Device{Index: 5}}, false},
		{"truncated", port[:10], link{}, false},
	} {
		got, ok := parseLink(netlink.Message{Data: test.data})
		if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(link{})); diff != "" || ok != test.ok {
			t.Errorf("%s: ok %t, want %t (-want +got):\n%s", test.name, ok, test.ok, diff)
		}
	}
}
