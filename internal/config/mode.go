package config

import (
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/kube"
)

const (
	// proxyModeIPTables is the mode of kube-proxy that Fairlead replaces by the backend nft,
	// with the defaults of the iptables mode.
	proxyModeIPTables = "iptables"
	// defaultProxyMode is the mode that kube-proxy selects if none is set. Kubernetes 1.40
	// changes it to nftables.
	defaultProxyMode = proxyModeIPTables

	// localhostNodePorts is kube-proxy's flag for node ports on IPv4 loopback addresses.
	localhostNodePorts = "iptables-localhost-nodeports"
)

// proxyModes returns the values of --proxy-mode.
func proxyModes() []string { return append(backend.KubeProxyNames(), proxyModeIPTables) }

// backendForProxyMode returns the backend for a value of --proxy-mode, and whether it exists.
func backendForProxyMode(mode string) (backend.Backend, bool) {
	if mode == proxyModeIPTables {
		mode = "nftables"
	}
	return backend.ByKubeProxyName(mode)
}

// effectiveProxyMode returns the mode of kube-proxy whose defaults apply, from the values of
// --mode and of kube-proxy's mode in a configuration file. --mode takes precedence.
func effectiveProxyMode(mode, proxyMode string) string {
	b, err := backend.ByName(mode)
	switch other, _ := backendForProxyMode(proxyMode); {
	case mode == "" || err != nil || other.Name == mode:
		if proxyMode == "" {
			return defaultProxyMode
		}
		return proxyMode
	default:
		return b.KubeProxyName
	}
}

// backend returns the backend named by --mode or --proxy-mode, and sets c.ProxyMode.
func (p *parser) backend(c *Config) backend.Backend {
	mode, modeSet := p.values["mode"]
	proxyMode, proxyModeSet := p.values["proxy-mode"]
	label := p.label("proxy-mode")
	b, known := backendForProxyMode(proxyMode)
	fromFile := label != "--proxy-mode"
	switch {
	case !proxyModeSet && !modeSet && (fromFile || p.boolean(KubeProxyDefaults)):
		c.ProxyMode = defaultProxyMode
		b, _ = backendForProxyMode(defaultProxyMode)
		return b
	case !proxyModeSet:
	case !known:
		p.fail("proxy-mode", "unknown mode %q: use %s", proxyMode, strings.Join(proxyModes(), ", "))
	case modeSet && mode != b.Name && fromFile:
		c.Warnings = append(c.Warnings, Warning{Setting: label, Reason: "--mode=" + mode + " is set"})
	case modeSet && mode != b.Name:
		p.fail("proxy-mode", "%q conflicts with --mode=%s: set one of them", proxyMode, mode)
	default:
		c.ProxyMode, c.ModeSetting = proxyMode, label
		return b
	}
	b, err := backend.ByName(p.text("mode"))
	if err != nil {
		p.errs = append(p.errs, err)
	}
	c.ProxyMode = b.KubeProxyName
	return b
}

// noNodePorts selects no address.
func noNodePorts() netip.Prefix { return netip.PrefixFrom(netip.IPv4Unspecified(), 32) }

// iptablesNodePortAddresses returns the addresses that kube-proxy's iptables mode serves node ports
// on, all addresses by default. It serves node ports on IPv4 loopback addresses only, if localhost
// is set and the addresses include one.
func iptablesNodePortAddresses(a kube.NodePortAddresses, localhost bool) kube.NodePortAddresses {
	if a.IsZero() {
		a.All = true
	}
	loopback := netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)
	localhost = localhost && (a.All || a.Localhost || slices.ContainsFunc(a.CIDRs, loopback.Overlaps))
	a.Localhost = false
	a.CIDRs = slices.DeleteFunc(a.CIDRs, func(p netip.Prefix) bool { return p.Addr().IsLoopback() })
	if localhost {
		a.CIDRs = append(a.CIDRs, loopback)
	}
	if a.IsZero() {
		a.CIDRs = []netip.Prefix{noNodePorts()}
	}
	return a
}

// IPTablesNotice says how Fairlead replaces kube-proxy's iptables mode. It is empty in other modes.
func (c Config) IPTablesNotice() string {
	if c.ProxyMode != proxyModeIPTables {
		return ""
	}
	origin := c.ModeSetting + " is iptables"
	if c.ModeSetting == "" {
		origin = "no mode is set, which means iptables to kube-proxy"
	}
	return origin + ". Fairlead runs in mode nft with the defaults of the iptables mode: it serves " + c.nodePortText() +
		". Set nftables to serve them on the node's primary addresses only, or to hide this warning"
}

// nodePortText describes the addresses of node ports in the iptables mode.
func (c Config) nodePortText() string {
	a := c.Tracker.NodePortAddresses
	text := "node ports on the addresses in nodePortAddresses (--nodeport-addresses)"
	if a.All {
		text = "node ports on all addresses of the node"
	}
	if slices.ContainsFunc(a.CIDRs, func(p netip.Prefix) bool { return p.Addr().IsLoopback() }) {
		return text + ", and TCP node ports on 127.0.0.1"
	}
	return text + ", but not on 127.0.0.1"
}
