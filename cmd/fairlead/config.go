package main

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
)

// config is what the flags and the configuration file say.
type config struct {
	static

	tracker  kube.Options
	logLevel slog.Level
	notes    []note
}

// static is what can't change while the program runs.
type static struct {
	mode mode
	// ipvs has the settings of the mode ipvs, without a logger, and is zero in
	// others.
	ipvs     ipvs.Options
	initOnly bool
	// manifests is empty if the source is the API.
	manifests     string
	serviceCIDRs  []netip.Prefix
	dnsListen     string
	clusterDomain string

	api apiConfig

	// healthz and metrics are addresses with a port, or empty for none.
	healthz, metrics string
	hardFail         bool
	// giveWayAfter is how long after the program's end its rules go before those of
	// another proxy.
	giveWayAfter time.Duration
	// ownTables makes the program the owner of its nftables tables.
	ownTables bool
	profiling bool
	logFormat string
}

// apiConfig says how to reach the API server.
type apiConfig struct {
	kubeconfig, master string
	// label is how the user knows where the kubeconfig is to be written.
	label                           string
	qps                             float32
	burst                           int
	contentType, acceptContentTypes string
	batchPeriod, massRemovalDelay   time.Duration
}

// Ports that kube-proxy serves on.
const (
	healthzPort = "10256"
	metricsPort = "10249"
)

// parser makes values of text, and collects what is wrong with it.
type parser struct {
	input

	errs []error
}

func (p *parser) fail(name, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: "+format, append([]any{p.label(name)}, args...)...))
}

// text returns the value of a setting.
func (p *parser) text(name string) string {
	if value, ok := p.given[name]; ok {
		return value
	}
	for _, s := range settings() {
		if s.name == name {
			return s.value
		}
	}
	return ""
}

func (p *parser) is(name string) bool {
	value, err := strconv.ParseBool(cmp.Or(p.text(name), "false"))
	if err != nil {
		p.fail(name, "%q is neither true nor false", p.text(name))
	}
	return value
}

// whole returns an integer between least and most, or least if it is not set.
func (p *parser) whole(name string, least, most int64) int64 {
	value, err := strconv.ParseInt(cmp.Or(p.text(name), strconv.FormatInt(least, 10)), 10, 64)
	if err != nil || value < least || value > most {
		p.fail(name, "%q is not an integer from %d to %d", p.text(name), least, most)
		return least
	}
	return value
}

func (p *parser) float(name string) float32 {
	value, err := strconv.ParseFloat(cmp.Or(p.text(name), "0"), 32)
	if err != nil || math.IsNaN(value) || math.IsInf(value, 0) {
		p.fail(name, "%q is not a number: write it as 5 or 2.5", p.text(name))
	}
	return float32(value)
}

// networks returns a list of networks. Bits behind the length are no mistake to
// kube-proxy; where it does not have the flag they are.
func (p *parser) networks(name string, exact bool) []netip.Prefix {
	var prefixes []netip.Prefix
	for part := range elements(p.text(name)) {
		prefix, err := parseNetwork(part, exact)
		if err != nil {
			p.fail(name, "%w", err)
			return nil
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes
}

func parseNetwork(s string, exact bool) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is not a network: write it as 10.96.0.0/12 or fd00:96::/112", s)
	case p.Addr().Is4In6():
		return p, fmt.Errorf("%q is an IPv4 network in IPv6 form: write it as IPv4", s)
	case exact && p != p.Masked():
		return p, fmt.Errorf("%q has bits set behind its length: write %s", s, p.Masked())
	}
	return p.Masked(), nil
}

// elements returns the elements of a comma-separated list without the spaces
// around them. An empty list has none.
func elements(list string) iter.Seq[string] {
	return func(yield func(string) bool) {
		if list == "" {
			return
		}
		for part := range strings.SplitSeq(list, ",") {
			if !yield(strings.TrimSpace(part)) {
				return
			}
		}
	}
}

// parse returns the configuration, or an error that names everything that is
// wrong.
func parse(in input) (config, error) {
	p := &parser{input: in}
	c := config{notes: in.notes}
	c.mode = p.mode()
	if c.mode == modeIPVS {
		c.ipvs = p.ipvs()
	}
	c.initOnly = p.is("init-only")
	p.source(&c)
	nodeName, err := nodeName(p.label("hostname-override"), p.text("hostname-override"))
	if err != nil {
		p.errs = append(p.errs, err)
	}
	bind := p.bindAddress()
	c.tracker = kube.Options{
		NodeName:          nodeName,
		BindAddress:       bind,
		MasqueradeAll:     p.is("masquerade-all"),
		DetectLocal:       p.detectLocal(&c),
		NodePortAddresses: p.nodePortAddresses(c.manifests != ""),
		PingServiceIPs:    p.is("ping-service-ips"),
	}
	wildcard, loopback := "0.0.0.0", "127.0.0.1"
	if bind.Is6() {
		wildcard, loopback = "::", "::1"
	}
	c.healthz = p.server(&c, "healthz", wildcard, healthzPort)
	c.metrics = p.server(&c, "metrics", loopback, metricsPort)
	c.tracker.ProtectLoopback = slices.ContainsFunc([]string{c.healthz, c.metrics, c.dnsListen}, isLoopback)
	c.hardFail = p.is("bind-address-hard-fail")
	c.giveWayAfter = p.giveWayAfter()
	c.ownTables = p.is("nft-own-table")
	c.profiling = p.is("profiling")
	c.logLevel, c.logFormat = p.logging()
	p.instead()
	p.idle(&c)
	return c, errors.Join(p.errs...)
}

// isLoopback reports whether an address with a port is a loopback address.
func isLoopback(address string) bool {
	a, err := netip.ParseAddrPort(address)
	return err == nil && a.Addr().IsLoopback()
}

// mode returns the backend, by its name here or kube-proxy's.
func (p *parser) mode() mode {
	own, has := p.given["mode"]
	theirs, alias := p.given["proxy-mode"]
	m, known := fromKubeProxy(theirs)
	switch {
	case !alias:
	case !known:
		p.fail("proxy-mode", "unknown mode %q: use %s", theirs, strings.Join(kubeProxyNames(), " or "))
	case has && own != string(m):
		p.fail("proxy-mode", "%q differs from --mode=%s: give one of them", theirs, own)
	default:
		return m
	}
	m = mode(p.text("mode"))
	if err := m.validate(); err != nil {
		p.errs = append(p.errs, err)
	}
	return m
}

// ipvs returns the settings of the mode ipvs.
func (p *parser) ipvs() ipvs.Options {
	const name = "ipvs-scheduler"
	scheduler, all := p.text(name), ipvs.Schedulers()
	if !slices.Contains(all, scheduler) {
		p.fail(name, "%q is not a scheduler: use one of %s", scheduler, strings.Join(all, ", "))
	}
	return ipvs.Options{
		Scheduler:     scheduler,
		ExcludeCIDRs:  p.networks("ipvs-exclude-cidrs", false),
		StrictARP:     p.is("ipvs-strict-arp"),
		TCPTimeout:    p.timeout("ipvs-tcp-timeout"),
		TCPFinTimeout: p.timeout("ipvs-tcpfin-timeout"),
		UDPTimeout:    p.timeout("ipvs-udp-timeout"),
	}
}

// longestTimeout is what the kernel takes whatever the frequency of its clock: it
// keeps timeouts in ticks, of which there are up to 1,000 a second.
const longestTimeout = math.MaxInt32 / 1000 * time.Second

// timeout returns one of IPVS's timeouts.
func (p *parser) timeout(name string) time.Duration {
	d, err := time.ParseDuration(cmp.Or(p.text(name), "0"))
	if err != nil || d < 0 || d > longestTimeout || d%time.Second != 0 {
		p.fail(name, "%q is not a number of whole seconds up to %s: write it as 15m or 90s, or 0 to leave the kernel's",
			p.text(name), longestTimeout)
	}
	return d
}

// source fills in where the objects come from: a folder or the API.
func (p *parser) source(c *config) {
	c.manifests = p.text("manifests")
	c.dnsListen = p.text("dns-listen")
	c.clusterDomain = p.text("cluster-domain")
	c.serviceCIDRs = p.serviceCIDRs()
	if c.dnsListen != "" {
		if _, err := netip.ParseAddrPort(c.dnsListen); err != nil {
			p.fail("dns-listen", "%q is not an address with a port: write 10.0.0.1:53 or [fd00::1]:53", c.dnsListen)
		}
	}
	if problems := validation.IsDNS1123Subdomain(strings.TrimSuffix(c.clusterDomain, ".")); len(problems) > 0 {
		p.fail("cluster-domain", "%q is not a domain: write it as cluster.local", c.clusterDomain)
	}
	c.api = apiConfig{
		kubeconfig: p.text("kubeconfig"), master: p.text("master"), label: p.label("kubeconfig"),
		qps: p.float("kube-api-qps"), burst: int(p.whole("kube-api-burst", 0, 1<<31-1)),
		contentType: p.given["kube-api-content-type"], acceptContentTypes: p.given[acceptContentTypes],
		batchPeriod:      p.apiTime(c, "batch-period", longestBatch, "50ms, or 0 to have every change read at once"),
		massRemovalDelay: p.apiTime(c, "mass-removal-delay", longestMassRemovalDelay, "1m, or 0 to have everything removed at once"),
	}
	exclude := []string{"kubeconfig", "master"}
	instead := "use either, --manifests is set"
	if c.manifests == "" {
		exclude = []string{"service-cidr", "dns-listen", "cluster-domain"}
		instead = "it needs --manifests: where there is an API server, the cluster has its own"
	}
	for _, name := range exclude {
		if _, ok := p.given[name]; ok {
			p.fail(name, "%s", instead)
		}
	}
}

const (
	// longestBatch is as long as kube-proxy waits between its rounds.
	longestBatch            = time.Second
	longestMassRemovalDelay = time.Hour
)

// giveWayAfter returns for how long other proxies' rules wait after the program's end.
func (p *parser) giveWayAfter() time.Duration {
	const name = "give-way-after"
	d, err := time.ParseDuration(p.text(name))
	if err != nil || d < 0 {
		p.fail(name, "%q is not a time: write it as 1m, or 0 to let another proxy's rules go first at once", p.text(name))
	}
	return d
}

// apiTime returns a time from 0 to the longest that concerns an API server.
func (p *parser) apiTime(c *config, name string, longest time.Duration, example string) time.Duration {
	d, err := time.ParseDuration(p.text(name))
	if err != nil || d < 0 || d > longest {
		p.fail(name, "%q is not a time up to %s: write it as %s", p.text(name), longest, example)
	}
	if _, ok := p.given[name]; ok && c.manifests != "" {
		c.notes = append(c.notes, note{what: p.label(name), why: "it is about an API server, and --manifests is set"})
	}
	return d
}

// serviceCIDRs returns the networks that addresses are handed out from.
func (p *parser) serviceCIDRs() []netip.Prefix {
	const name = "service-cidr"
	prefixes := p.networks(name, true)
	for i, prefix := range prefixes {
		if prefix.Addr().BitLen()-prefix.Bits() < 2 {
			p.fail(name, "%s has no address to hand out: use a larger network", prefix)
			return nil
		}
		for _, other := range prefixes[:i] {
			if other.Addr().Is4() == prefix.Addr().Is4() {
				p.fail(name, "%s and %s are of one family: give one network, or one of each family", other, prefix)
				return nil
			}
		}
	}
	return prefixes
}

// nodeName returns the name of this node as the kubelet forms it, in lower case.
func nodeName(label, override string) (string, error) {
	name := override
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return "", fmt.Errorf("%s is not set and the hostname is unknown: %w", label, err)
		}
	}
	name = strings.ToLower(strings.TrimSpace(name))
	if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
		return "", fmt.Errorf("%s: %q is not the name of a node: write it as node-1 or node-1.example", label, cmp.Or(override, name))
	}
	return name, nil
}

// detectLocal returns how a client is told to be a pod.
func (p *parser) detectLocal(c *config) kube.DetectLocal {
	const name = "detect-local-mode"
	d := kube.DetectLocal{
		Mode: kube.DetectLocalMode(p.text(name)), ClusterCIDRs: p.networks("cluster-cidr", false),
		Interface: p.text("pod-bridge-interface"), InterfacePrefix: p.text("pod-interface-name-prefix"),
	}
	switch d.Mode {
	case kube.DetectByClusterCIDR:
	case kube.DetectByNodeCIDR:
		if c.manifests != "" {
			p.fail(name, "NodeCIDR needs the Node object of an API server: use ClusterCIDR with --manifests")
		}
	case kube.DetectByBridgeInterface:
		if d.Interface == "" {
			p.fail(name, "BridgeInterface needs %s: give the pods' bridge", p.label("pod-bridge-interface"))
		}
	case kube.DetectByInterfaceNamePrefix:
		if d.InterfacePrefix == "" {
			p.fail(name, "InterfaceNamePrefix needs %s: give how pods' interfaces are named", p.label("pod-interface-name-prefix"))
		}
	default:
		p.fail(name, "unknown mode %q: use ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix", d.Mode)
	}
	// The kernel's IFNAMSIZ, less the zero at the end.
	const longest = 15
	for name, value := range map[string]string{"pod-bridge-interface": d.Interface, "pod-interface-name-prefix": d.InterfacePrefix} {
		if len(value) > longest || strings.ContainsAny(value, "/ \t\n") {
			p.fail(name, "%q can't be the name of an interface: it has at most %d characters, no slash and no space", value, longest)
		}
	}
	for name, mode := range map[string]kube.DetectLocalMode{
		"pod-bridge-interface":      kube.DetectByBridgeInterface,
		"pod-interface-name-prefix": kube.DetectByInterfaceNamePrefix,
	} {
		if _, ok := p.given[name]; ok && d.Mode != mode {
			c.notes = append(c.notes, note{what: p.label(name), why: fmt.Sprintf("it needs %s=%s", p.label("detect-local-mode"), mode)})
		}
	}
	return d
}

// bindAddress returns --bind-address, or no address if it is not set.
func (p *parser) bindAddress() netip.Addr {
	value := p.text("bind-address")
	if value == "" {
		return netip.Addr{}
	}
	addr, err := netip.ParseAddr(value)
	if err != nil || addr.Zone() != "" {
		p.fail("bind-address", "%q is not an address: write it as 192.0.2.1 or 2001:db8::1", value)
		return netip.Addr{}
	}
	return addr.Unmap()
}

// nodePortAddresses returns where node ports are served.
func (p *parser) nodePortAddresses(manifests bool) kube.NodePortAddresses {
	const name = "nodeport-addresses"
	if p.text(name) == "" && manifests {
		return kube.NodePortAddresses{All: true} // a folder has no Node, whose addresses could be primary
	}
	a, err := kube.ParseNodePortAddresses(slices.Collect(elements(p.text(name))))
	if err != nil {
		p.fail(name, "%w", err)
	}
	return a
}

// server returns the address and port of a server, empty for none.
func (p *parser) server(c *config, what, host, port string) string {
	name, portName := what+"-bind-address", what+"-port"
	if _, ok := p.given[portName]; ok {
		c.notes = append(c.notes, note{p.label(portName), "use " + p.label(name), true})
		given := p.whole(portName, 0, 1<<16-1)
		if given == 0 {
			return ""
		}
		port = strconv.FormatInt(given, 10)
	}
	value, ok := p.given[name]
	if !ok {
		return net.JoinHostPort(host, port)
	}
	if addr, err := netip.ParseAddr(value); err == nil && addr.Zone() == "" {
		return net.JoinHostPort(value, port)
	}
	if addr, err := netip.ParseAddrPort(value); err != nil || addr.Port() == 0 || addr.Addr().Zone() != "" {
		p.fail(name, "%q is not an address with a port: write 127.0.0.1:%s or [::1]:%s", value, port, port)
	}
	return value
}

// logging returns what to log and how.
func (p *parser) logging() (slog.Level, string) {
	level, err := parseLevel(cmp.Or(p.text("log-level"), levelInfo))
	if err != nil {
		p.fail("log-level", "%w", err)
	}
	// kube-proxy's manifests have 2 more often than not, so that is no debugging.
	const debugging = 4
	if v := p.whole("v", 0, 1<<31-1); v >= debugging && p.given["log-level"] == "" {
		level = slog.LevelDebug
	}
	name := "log-format"
	if p.given[name] == "" && p.given["logging-format"] != "" {
		name = "logging-format"
	}
	format := cmp.Or(p.text(name), formatText)
	if err := checkFormat(format); err != nil {
		p.fail(name, "%w", err)
	}
	return level, format
}

// instead refuses the flags of kube-proxy that ask for something else.
func (p *parser) instead() {
	for _, s := range settings() {
		value := p.given[s.name]
		if s.instead != "" && value != "" && value != "false" {
			p.fail(s.name, "%s", s.instead)
		}
	}
}

// idle notes the flags that have no effect, and still says if their values make
// no sense.
func (p *parser) idle(c *config) {
	for _, s := range settings() {
		value, ok := p.given[s.name]
		why := s.idleIn(c.mode)
		if !ok || why == "" {
			continue
		}
		var err error
		switch s.kind {
		case boolean:
			_, err = strconv.ParseBool(value)
		case integer:
			_, err = strconv.ParseInt(value, 10, 64)
		case number:
			_, err = strconv.ParseFloat(value, 64)
		case duration:
			_, err = time.ParseDuration(value)
		case text, list:
		}
		if err != nil {
			p.fail(s.name, "%q is no value of type %s, and the flag has no effect: leave it out", value, s.kind)
		}
		c.notes = append(c.notes, note{what: p.label(s.name), why: why})
	}
}

// restart returns the names of what differs from o and can't change in a
// running program.
func (c config) restart(o config) []string {
	var names []string
	settings := o.ipvs
	if c.mode != o.mode {
		settings = c.ipvs // they come with the mode
	}
	for name, same := range map[string]bool{
		"mode":                        c.mode == o.mode,
		"the source of the objects":   c.manifests == o.manifests && c.api == o.api,
		"the node's name":             c.tracker.NodeName == o.tracker.NodeName,
		"the address of /healthz":     c.healthz == o.healthz,
		"the address of /metrics":     c.metrics == o.metrics,
		"bind-address-hard-fail":      c.hardFail == o.hardFail,
		"profiling":                   c.profiling == o.profiling,
		"give-way-after":              c.giveWayAfter == o.giveWayAfter,
		"nft-own-table":               c.ownTables == o.ownTables,
		"the format of the log":       c.logFormat == o.logFormat,
		"ipvs-scheduler":              c.ipvs.Scheduler == settings.Scheduler,
		"ipvs-exclude-cidrs":          slices.Equal(c.ipvs.ExcludeCIDRs, settings.ExcludeCIDRs),
		"ipvs-strict-arp":             c.ipvs.StrictARP == settings.StrictARP,
		"ipvs-tcp-timeout":            c.ipvs.TCPTimeout == settings.TCPTimeout,
		"ipvs-tcpfin-timeout":         c.ipvs.TCPFinTimeout == settings.TCPFinTimeout,
		"ipvs-udp-timeout":            c.ipvs.UDPTimeout == settings.UDPTimeout,
		"what --manifests depends on": slices.Equal(c.serviceCIDRs, o.serviceCIDRs) && c.dnsListen == o.dnsListen && c.clusterDomain == o.clusterDomain,
	} {
		if !same {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
