package nodesettings

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"fairlead.io/fairlead/internal/nfhooks"
)

// Kind is the kind of setting of a [Problem], used as a metric label.
type Kind string

// The kinds of settings.
const (
	BridgeIPv4    Kind = "bridge-nf-call-iptables"
	BridgeIPv6    Kind = "bridge-nf-call-ip6tables"
	RouteLocalnet Kind = "route_localnet"
	IPForward     Kind = "ip_forward"
	// ForwardPolicy is the policy of iptables' chain FORWARD.
	ForwardPolicy Kind = "forward-policy"
)

// Kinds returns all kinds.
func Kinds() []Kind { return []Kind{BridgeIPv4, BridgeIPv6, RouteLocalnet, IPForward, ForwardPolicy} }

// Problem describes a node setting with a wrong value.
type Problem struct {
	Kind Kind
	// Setting is the sysctl's name in the notation of sysctl(8). Interface is the affected
	// interface, or "all".
	Setting, Interface string
	// Consequence and Fix describe the effect of the problem and how to fix it.
	Consequence, Fix string
}

// PodNetwork describes how to detect bridges that carry pods.
type PodNetwork struct {
	// CIDRs are the pod networks. A bridge with an address in these networks carries pods.
	CIDRs []netip.Prefix
	// Bridge is the name of the bridge that carries pods, if known.
	Bridge string
}

// sysctlDir holds the sysctls of the calling thread's network namespace.
const sysctlDir = "/proc/sys/net"

// Check reads the settings in the network namespace of the calling thread and returns the
// problems, sorted. It ignores settings that the kernel lacks.
func Check(pods PodNetwork) ([]Problem, error) {
	problems, err := checkBridges(pods)
	if err != nil {
		return nil, err
	}
	localnet, err := checkRouteLocalnet()
	if err != nil {
		return nil, err
	}
	forwarding, err := checkForwarding()
	if err != nil {
		return nil, err
	}
	problems = slices.Concat(problems, localnet, forwarding)
	slices.SortFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Setting, b.Setting), cmp.Compare(a.Interface, b.Interface))
	})
	return problems, nil
}

// checkBridges finds bridges that carry pods and bypass netfilter. On these, the reply of one
// pod to another pod arrives with the address of the pod instead of the Service.
func checkBridges(pods PodNetwork) ([]Problem, error) {
	links, err := listBridges()
	if err != nil {
		return nil, err
	}
	var problems []Problem
	for _, b := range links {
		if b.ports < 2 {
			continue
		}
		for _, kind := range []Kind{BridgeIPv4, BridgeIPv6} {
			if !b.carriesPods(pods, kind == BridgeIPv6) {
				continue
			}
			value, err := readSysctl(filepath.Join("bridge", string(kind)))
			if err != nil {
				return nil, err
			}
			if value == "1" {
				continue
			}
			fix := fmt.Sprintf("set net.bridge.%s to 1", kind)
			if value == "" {
				fix = "load the kernel module br_netfilter, and " + fix
			}
			problems = append(problems, Problem{
				Kind: kind, Setting: "net.bridge." + string(kind), Interface: b.name, Fix: fix,
				Consequence: "connections between two pods of this bridge through a Service time out",
			})
		}
	}
	return problems, nil
}

// checkRouteLocalnet finds interfaces whose neighbors can send packets to loopback addresses.
// The value of "all" applies to every interface.
func checkRouteLocalnet() ([]Problem, error) {
	conf := filepath.Join(sysctlDir, "ipv4/conf")
	entries, err := os.ReadDir(conf)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list interfaces with sysctls: %w", err)
	}
	var problems []Problem
	for _, e := range entries {
		name := e.Name()
		if name == "lo" || name == "default" {
			continue
		}
		value, err := readSysctl(filepath.Join("ipv4/conf", name, string(RouteLocalnet)))
		if err != nil {
			return nil, err
		}
		if value != "1" {
			continue
		}
		setting := "net.ipv4.conf." + name + "." + string(RouteLocalnet)
		p := Problem{
			Kind: RouteLocalnet, Setting: setting, Interface: name, Fix: "set " + setting + " to 0 if no other program needs it",
			Consequence: "other hosts and pods can send packets to 127.0.0.0/8 of this node, which Fairlead drops only while it listens there itself",
		}
		if name == "all" {
			return []Problem{p}, nil
		}
		problems = append(problems, p)
	}
	return problems, nil
}

// checkForwarding finds settings that drop packets to pods. Only kube-proxy's mode iptables adds
// rules that accept these packets in spite of the policy.
func checkForwarding() ([]Problem, error) {
	var problems []Problem
	value, err := readSysctl("ipv4/" + string(IPForward))
	if err != nil {
		return nil, err
	}
	if value == "0" {
		const setting = "net.ipv4." + string(IPForward)
		problems = append(problems, Problem{
			Kind: IPForward, Setting: setting, Interface: "all", Fix: "set " + setting + " to 1",
			Consequence: "connections to pods of this node and of other nodes are dropped",
		})
	}
	conn, err := nfhooks.Dial()
	if err != nil {
		return nil, err
	}
	droppers, err := conn.ForwardDrops()
	if err := errors.Join(err, conn.Close()); err != nil {
		return nil, err
	}
	for _, d := range droppers {
		problems = append(problems, Problem{
			Kind: ForwardPolicy, Setting: d.Name, Interface: "all", Fix: "accept connections to pods in another rule, or run " + d.Fix,
			Consequence: "the policy is DROP: connections to pods are dropped unless a rule accepts them",
		})
	}
	return problems, nil
}

// readSysctl returns the value of a file below /proc/sys/net, or "" if the file does not exist
// because the kernel lacks the sysctl or the interface was deleted.
func readSysctl(file string) (string, error) {
	value, err := os.ReadFile(filepath.Join(sysctlDir, file))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return string(bytes.TrimSpace(value)), nil
}
