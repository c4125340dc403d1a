// Package topology describes a cluster: its nodes, their zones, and all addresses. Every process
// of a cluster reads the description from a file, so that all of them agree.
//
//	172.30.0.0/24     fd00:172:30::/64       nodes; .1 is the host of the control plane
//	172.30.1.0/24     fd00:172:30:1::/64     Services of type LoadBalancer
//	10.244.n.0/24     fd00:10:244:n::/64     pods of node n
//	10.96.0.0/16      fd00:10:96::/112       Services
//	192.0.2.1         2001:db8::1            a client outside of the cluster
//
// All of them exist only in the cluster's network namespaces.
package topology

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// MaxNodes is the number of nodes that the addresses allow.
const MaxNodes = 200

// APIServerPort is the port of the API server.
const APIServerPort = 6443

// Proxies.
const (
	Fairlead  = "fairlead"
	KubeProxy = "kube-proxy"
	NoProxy   = "none"
)

// Cluster describes a cluster.
type Cluster struct {
	// Nodes is the number of nodes.
	Nodes int `json:"nodes"`
	// Zones is the number of zones. Node 1 is in zone a, node 2 in zone b, and so on.
	Zones int `json:"zones"`
	// Proxy is the Service proxy: Fairlead, KubeProxy or NoProxy.
	Proxy string `json:"proxy"`
	// Mode is the mode of the proxy. Fairlead has nft and ipvs; kube-proxy has nftables, iptables
	// and ipvs.
	Mode string `json:"mode"`
	// Values are values of the Helm chart in YAML, which change the defaults.
	Values string `json:"values,omitempty"`

	// Programs is the directory of the programs that build.sh builds.
	Programs string `json:"programs"`
	// ControlPlane is the directory of etcd, kube-apiserver and kube-controller-manager.
	ControlPlane string `json:"controlPlane"`
	// Images are the archives of container images that the nodes load.
	Images []string `json:"images"`
	// SandboxImage is the image of pods' sandboxes.
	SandboxImage string `json:"sandboxImage"`
	// Chart is the directory of Fairlead's Helm chart.
	Chart string `json:"chart"`
}

// Validate checks the numbers and the names.
func (c *Cluster) Validate() error {
	const maxZones = 26
	if c.Nodes < 1 || c.Nodes > MaxNodes {
		return fmt.Errorf("nodes: %d: want 1 to %d", c.Nodes, MaxNodes)
	}
	if c.Zones < 1 || c.Zones > maxZones {
		return fmt.Errorf("zones: %d: want 1 to %d", c.Zones, maxZones)
	}
	modes := map[string][]string{Fairlead: {"nft", "ipvs"}, KubeProxy: {"nftables", "iptables", "ipvs"}, NoProxy: {""}}
	allowed, ok := modes[c.Proxy]
	if !ok {
		return fmt.Errorf("proxy: %q: want %s, %s or %s", c.Proxy, Fairlead, KubeProxy, NoProxy)
	}
	if slices.Contains(allowed, c.Mode) {
		return nil
	}
	return fmt.Errorf("mode of %s: %q: want one of %q", c.Proxy, c.Mode, allowed)
}

// DefaultMode returns the mode that a proxy has in its installation.
func DefaultMode(proxy string) string {
	switch proxy {
	case Fairlead:
		return "nft"
	case KubeProxy:
		return "nftables"
	default:
		return ""
	}
}

// Node is a node of a cluster.
type Node struct {
	// Name is node1 for the first node.
	Name string
	// Number starts at 1.
	Number int
	// Zone is a for the first zone.
	Zone string
	// IPv4 and IPv6 are the node's addresses.
	IPv4, IPv6 netip.Addr
	// PodsIPv4 and PodsIPv6 are the networks of the node's pods.
	PodsIPv4, PodsIPv6 netip.Prefix
}

// Addresses returns the node's addresses, IPv4 first.
func (n Node) Addresses() []netip.Addr { return []netip.Addr{n.IPv4, n.IPv6} }

// PodCIDRs returns the networks of the node's pods, IPv4 first.
func (n Node) PodCIDRs() []netip.Prefix { return []netip.Prefix{n.PodsIPv4, n.PodsIPv6} }

// AllNodes returns the nodes in the order of their numbers.
func (c *Cluster) AllNodes() []Node {
	nodes := make([]Node, c.Nodes)
	for i := range nodes {
		nodes[i] = c.Node(i + 1)
	}
	return nodes
}

// Node returns a node by its number, which starts at 1.
func (c *Cluster) Node(number int) Node {
	const firstHost = 10
	return Node{
		Name:     fmt.Sprintf("node%d", number),
		Number:   number,
		Zone:     string(rune('a' + (number-1)%c.Zones)),
		IPv4:     host(nodesIPv4, firstHost+number),
		IPv6:     host(nodesIPv6, firstHost+number),
		PodsIPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(number), 0}), 24),
		PodsIPv6: netip.PrefixFrom(subnet(podsIPv6.Addr(), number), 64),
	}
}

const (
	nodesIPv4 = "172.30.0.0/24"
	nodesIPv6 = "fd00:172:30::/64"
)

var podsIPv6 = netip.MustParsePrefix("fd00:10:244::/56") //nolint:gochecknoglobals // a constant

// host returns the address with a number in a network.
func host(network string, number int) netip.Addr {
	address := netip.MustParsePrefix(network).Addr()
	bytes := address.AsSlice()
	low := bytes[len(bytes)-2:]
	binary.BigEndian.PutUint16(low, binary.BigEndian.Uint16(low)+uint16(number))
	address, _ = netip.AddrFromSlice(bytes)
	return address
}

// subnet returns the IPv6 network with a number, in the fourth group of the address.
func subnet(address netip.Addr, number int) netip.Addr {
	bytes := address.As16()
	binary.BigEndian.PutUint16(bytes[6:8], binary.BigEndian.Uint16(bytes[6:8])+uint16(number))
	return netip.AddrFrom16(bytes)
}

// Host returns the addresses of the control plane's host, with the prefix length of the nodes'
// network.
func Host() []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(host(nodesIPv4, 1), 24), netip.PrefixFrom(host(nodesIPv6, 1), 64)}
}

// APIServer is the address of the API server.
func APIServer() netip.AddrPort { return netip.AddrPortFrom(host(nodesIPv4, 1), APIServerPort) }

// PodCIDRs are the networks of all pods.
func PodCIDRs() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), podsIPv6}
}

// ServiceCIDRs are the networks of Services.
func ServiceCIDRs() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")}
}

// DNS is the address of the cluster's DNS Service.
func DNS() netip.Addr { return host("10.96.0.0/16", 10) }

// LoadBalancerCIDRs are the networks for the addresses of Services of type LoadBalancer.
func LoadBalancerCIDRs() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("172.30.1.0/24"), netip.MustParsePrefix("fd00:172:30:1::/64")}
}

// Client returns the addresses of a client outside of the cluster.
func Client() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
}

// Join returns the text of addresses or networks, separated by commas.
func Join[T fmt.Stringer](items []T) string {
	texts := make([]string, len(items))
	for i, item := range items {
		texts[i] = item.String()
	}
	return strings.Join(texts, ",")
}

const fileName = "cluster.json"

// Write writes the description to the state directory of the cluster.
func (c *Cluster) Write(state string) error {
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(state, fileName), data, 0o600)
}

// Read reads the description from the state directory of a cluster.
func Read(state string) (*Cluster, error) {
	data, err := os.ReadFile(filepath.Join(state, fileName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("no cluster in %s: run make cluster: %w", state, err)
	}
	if err != nil {
		return nil, err
	}
	c := &Cluster{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(state, fileName), err)
	}
	return c, nil
}
