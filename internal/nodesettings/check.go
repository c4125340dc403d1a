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
)

// Kind is the kind of setting that a [Problem] is about, for a metric's label.
type Kind string

// The kinds of settings.
const (
	BridgeIPv4    Kind = "bridge-nf-call-iptables"
	BridgeIPv6    Kind = "bridge-nf-call-ip6tables"
	RouteLocalnet Kind = "route_localnet"
)

// Kinds returns all kinds.
func Kinds() []Kind { return []Kind{BridgeIPv4, BridgeIPv6, RouteLocalnet} }

// Problem is a setting that should be another.
type Problem struct {
	Kind Kind
	// Setting is the name of the sysctl, as sysctl(8) has it, and Interface the one
	// that it concerns, or "all".
	Setting, Interface string
	// Consequence and Fix say for people what does not work, and what to do.
	Consequence, Fix string
}

// PodNetwork says how pods are recognised.
type PodNetwork struct {
	// CIDRs are the networks of pods. A bridge with an address in them carries pods.
	CIDRs []netip.Prefix
	// Bridge is the name of the bridge that carries pods, if it is known.
	Bridge string
}

// sysctlDir is where sysctls of the calling thread's network namespace are.
const sysctlDir = "/proc/sys/net"

// Check reads the settings of the calling thread's network namespace, and returns what
// is wrong, sorted. Settings that the kernel does not have are no error.
func Check(pods PodNetwork) ([]Problem, error) {
	problems, err := checkBridges(pods)
	if err != nil {
		return nil, err
	}
	exposed, err := checkRouteLocalnet()
	if err != nil {
		return nil, err
	}
	problems = append(problems, exposed...)
	slices.SortFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Setting, b.Setting), cmp.Compare(a.Interface, b.Interface))
	})
	return problems, nil
}

// checkBridges looks for bridges that carry pods and bypass netfilter. A reply from one
// pod of a bridge to another then reaches the client with the pod's address in place of
// the Service's.
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

// checkRouteLocalnet looks for interfaces whose neighbours may send to loopback
// addresses. The value of "all" counts for every interface.
func checkRouteLocalnet() ([]Problem, error) {
	conf := filepath.Join(sysctlDir, "ipv4/conf")
	entries, err := os.ReadDir(conf)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the interfaces with sysctls: %w", err)
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

// readSysctl returns the value of a file below /proc/sys/net, or nothing if there is none:
// the kernel does not have it, or the interface has gone.
func readSysctl(file string) (string, error) {
	value, err := os.ReadFile(filepath.Join(sysctlDir, file))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read a sysctl: %w", err)
	}
	return string(bytes.TrimSpace(value)), nil
}
