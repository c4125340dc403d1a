// Package config reads the settings of `fairlead run` from flags and from a
// KubeProxyConfiguration file, and reloads the file when it changes.
package config

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
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/conntracksettings"
	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/servicecounters"
	"fairlead.io/fairlead/kube"
)

// Config holds the settings from flags and the configuration file.
type Config struct {
	// Tracker, LogLevel and Conntrack may change while the program runs. All other fields need
	// a restart.
	Tracker   kube.Options
	LogLevel  slog.Level
	Conntrack conntracksettings.Settings
	// Warnings lists settings that have no effect or are deprecated.
	Warnings []Warning
	// Fields has the fields of the KubeProxyConfiguration with the same settings.
	Fields Fields

	// Mode is the name of the backend, and Values holds the values of its flags.
	Mode   string
	Values backend.Values
	// ProxyMode is the mode of kube-proxy whose defaults apply: nftables, iptables or ipvs. It
	// is empty if kube-proxy has no mode like the backend. A change needs no restart unless
	// Mode changes, too.
	ProxyMode string
	// ModeSetting names the kube-proxy flag or field that sets ProxyMode. It is empty without
	// one.
	ModeSetting string
	InitOnly    bool
	// DryRun prints what would be written instead of writing it.
	DryRun bool
	// Cleanup removes the kernel state instead of programming it. WriteConfigTo is the path to
	// write the configuration to instead, empty for none.
	Cleanup       bool
	WriteConfigTo string
	// Manifests is the folder of manifests, empty if the source is the Kubernetes API.
	Manifests     string
	ServiceCIDRs  []netip.Prefix
	DNSListen     string
	ClusterDomain string

	API APIServer

	// HealthzAddress and MetricsAddress are host:port, or empty for no server.
	HealthzAddress, MetricsAddress string
	// StatusAddress is the host:port of the status page, or empty for none.
	StatusAddress string
	// HardFail makes the program exit if it cannot listen on an address.
	HardFail bool
	// GiveWayAfter is how long Fairlead's rules keep precedence over the rules of another
	// Service proxy after the program has exited.
	GiveWayAfter time.Duration
	// OwnTables sets the owner flag on Fairlead's nftables tables.
	OwnTables bool
	// ServiceMetrics selects the Services whose connections are counted.
	ServiceMetrics []servicecounters.Selector
	FlowOffload    FlowOffload
	Profiling      bool
	LogFormat      string
}

// FlowOffload describes which connections are put into a flowtable.
type FlowOffload struct {
	Enabled, Hardware bool
	// Threshold is the number of packets after which a connection is offloaded.
	Threshold uint32
}

// APIServer describes how to connect to the API server.
type APIServer struct {
	Kubeconfig, Master string
	// Label names the setting that Kubeconfig comes from, for errors.
	Label                           string
	QPS                             float32
	Burst                           int
	ContentType, AcceptContentTypes string
	BatchPeriod, MassRemovalDelay   time.Duration
}

// DebugVerbosity is the lowest verbosity of kube-proxy's flag --v that enables debug logs.
// kube-proxy's manifests commonly set -v=2.
const DebugVerbosity = 4

// Default ports of kube-proxy's servers.
const (
	healthzPort = "10256"
	metricsPort = "10249"
)

// statusPort is the default port of the status page. No Kubernetes component uses it.
const statusPort = "10265"

// parser converts settings from text and collects the errors.
type parser struct {
	input

	errs []error
}

func (p *parser) fail(name, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: "+format, append([]any{p.label(name)}, args...)...))
}

// text returns the value of a setting, or its default.
func (p *parser) text(name string) string {
	if value, ok := p.values[name]; ok {
		return value
	}
	for _, s := range settings() {
		if s.name == name {
			return s.defaultValue
		}
	}
	return ""
}

func (p *parser) boolean(name string) bool {
	value, err := strconv.ParseBool(cmp.Or(p.text(name), "false"))
	if err != nil {
		p.fail(name, "%q is not a boolean: use true or false", p.text(name))
	}
	return value
}

// integer returns an integer between least and most, or least if the setting is not set.
func (p *parser) integer(name string, least, most int64) int64 {
	value, err := strconv.ParseInt(cmp.Or(p.text(name), strconv.FormatInt(least, 10)), 0, 64)
	if err != nil || value < least || value > most {
		p.fail(name, "%q is not an integer from %d to %d", p.text(name), least, most)
		return least
	}
	return value
}

// rate returns a number of requests per second. Negative means unlimited, as in client-go; kube-proxy
// does not limit requests to infinity or NaN either.
func (p *parser) rate(name string) float32 {
	value, err := strconv.ParseFloat(cmp.Or(p.text(name), "0"), 32)
	switch {
	case err != nil:
		p.fail(name, "%q is not a number: write it as 5 or 2.5", p.text(name))
	case math.IsNaN(value) || math.IsInf(value, 0):
		return -1
	}
	return float32(value)
}

// cidrs returns a list of CIDRs. If exact is set, host bits, leading zeros and IPv4 networks in IPv6
// form are errors; kube-proxy accepts them in its own flags.
func (p *parser) cidrs(name string, exact bool) []netip.Prefix {
	var prefixes []netip.Prefix
	for part := range splitList(p.text(name)) {
		prefix, err := parseCIDR(part, exact)
		if err != nil {
			p.fail(name, "%w", err)
			return nil
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes
}

func parseCIDR(s string, exact bool) (netip.Prefix, error) {
	parse := kube.ParseNetwork
	if exact {
		parse = netip.ParsePrefix
	}
	p, err := parse(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is not a network: write it as 10.96.0.0/12 or fd00:96::/112", s)
	case p.Addr().Is4In6():
		return p, fmt.Errorf("%q is an IPv4 network in IPv6 form: write it as IPv4", s)
	case exact && p != p.Masked():
		return p, fmt.Errorf("%q has host bits set: write %s", s, p.Masked())
	}
	return p.Masked(), nil
}

// splitList returns the elements of a comma-separated list without surrounding spaces. An
// empty list has no elements.
func splitList(list string) iter.Seq[string] {
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

// parse returns the configuration, or an error that names all invalid settings.
func parse(in input) (Config, error) {
	p := &parser{input: in}
	c := Config{Warnings: in.warnings}
	b := p.backend(&c)
	c.Mode, c.Values = b.Name, p.backendValues(b)
	c.InitOnly, c.Cleanup, c.WriteConfigTo = p.boolean("init-only"), p.boolean("cleanup"), p.text("write-config-to")
	p.setDryRun(&c)
	p.setSource(&c)
	bind := p.bindAddress()
	c.Tracker = kube.Options{
		NodeName:          p.nodeName(&c),
		BindAddress:       bind,
		MasqueradeAll:     p.boolean("masquerade-all"),
		DetectLocal:       p.detectLocal(&c),
		NodePortAddresses: p.nodePortAddresses(c),
		PingServiceIPs:    p.boolean("ping-service-ips"),
		ServiceProxyName:  p.serviceProxyName(),
	}
	wildcard, loopback := "0.0.0.0", "127.0.0.1"
	if bind.Is6() {
		wildcard, loopback = "::", "::1"
	}
	c.HealthzAddress = p.serverAddress(&c, "healthz", wildcard, healthzPort)
	c.MetricsAddress = p.serverAddress(&c, "metrics", loopback, metricsPort)
	c.StatusAddress = p.statusAddress()
	c.Tracker.ProtectLoopback = slices.ContainsFunc([]string{c.HealthzAddress, c.MetricsAddress, c.StatusAddress, c.DNSListen}, isLoopback)
	c.Conntrack = p.conntrack()
	c.HardFail = p.boolean("bind-address-hard-fail")
	c.GiveWayAfter = p.giveWayAfter()
	c.OwnTables = p.boolean("nft-own-table")
	c.ServiceMetrics = p.serviceMetrics()
	c.FlowOffload = p.flowOffload(c.Mode)
	c.Profiling = p.boolean("profiling")
	c.LogLevel, c.LogFormat = p.logging()
	p.warnIgnored(&c)
	return c, errors.Join(p.errs...)
}

// setDryRun sets DryRun, which excludes the other tasks that end the program.
func (p *parser) setDryRun(c *Config) {
	if c.DryRun = p.boolean("dry-run"); !c.DryRun {
		return
	}
	for name, isSet := range map[string]bool{"init-only": c.InitOnly, "cleanup": c.Cleanup, "write-config-to": c.WriteConfigTo != ""} {
		if isSet {
			p.fail("dry-run", "cannot be combined with --%s: set one of them", name)
		}
	}
}

// The values of --flow-offload.
const (
	flowOffloadOff      = "off"
	flowOffloadSoftware = "software"
	flowOffloadHardware = "hardware"
)

// flowOffload returns the settings of the flowtable.
func (p *parser) flowOffload(mode string) FlowOffload {
	const name = "flow-offload"
	f := FlowOffload{Threshold: uint32(p.integer(name+"-threshold", 1, math.MaxInt32))} //nolint:gosec // in range
	switch value := p.text(name); value {
	case flowOffloadOff:
	case flowOffloadSoftware, flowOffloadHardware:
		f.Enabled, f.Hardware = true, value == flowOffloadHardware
	default:
		p.fail(name, "unknown value %q: use %s, %s or %s", value, flowOffloadOff, flowOffloadSoftware, flowOffloadHardware)
	}
	if f.Enabled && mode != backend.NFT {
		p.fail(name, "requires --mode=%s: IPVS receives packets as if they were for the node itself, and the kernel offloads only packets that the node forwards: remove the flag or change the mode", backend.NFT)
	}
	return f
}

// defaultFlowOffloadThreshold returns the default of --flow-offload-threshold as text.
func defaultFlowOffloadThreshold() string { return strconv.Itoa(flowoffload.DefaultThreshold) }

// serviceMetrics returns the Services whose connections are counted.
func (p *parser) serviceMetrics() []servicecounters.Selector {
	const name = "service-metrics"
	var all []servicecounters.Selector
	for text := range strings.SplitSeq(p.text(name), ",") {
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		s, err := servicecounters.ParseSelector(text)
		if err != nil {
			p.fail(name, "%v", err)
			continue
		}
		all = append(all, s)
	}
	return all
}

// serviceProxyName returns the value of the label of the Services to serve, empty for Services
// without the label.
func (p *parser) serviceProxyName() string {
	const name = "service-proxy-name"
	value := p.text(name)
	if !kube.IsLabelValue(value) {
		p.fail(name, "%q is not a valid label value: write it as fairlead or example.com_proxy-1", value)
	}
	return value
}

// conntrack returns the settings of connection tracking.
func (p *parser) conntrack() conntracksettings.Settings {
	return conntracksettings.Settings{
		MaxPerCore:            int(p.integer("conntrack-max-per-core", 0, math.MaxInt32)),
		Min:                   int(p.integer("conntrack-min", 0, math.MaxInt32)),
		TCPEstablishedTimeout: p.duration("conntrack-tcp-timeout-established"),
		TCPCloseWaitTimeout:   p.duration("conntrack-tcp-timeout-close-wait"),
		TCPBeLiberal:          p.boolean("conntrack-tcp-be-liberal"),
		UDPTimeout:            p.duration("conntrack-udp-timeout"),
		UDPStreamTimeout:      p.duration("conntrack-udp-timeout-stream"),
	}
}

// isLoopback reports whether an address with a port is a loopback address.
func isLoopback(address string) bool {
	a, err := netip.ParseAddrPort(address)
	return err == nil && a.Addr().IsLoopback()
}

// backendValues returns the values of the backend's flags, nil if the backend has no flags.
func (p *parser) backendValues(b backend.Backend) backend.Values {
	if len(b.Flags) == 0 {
		return nil
	}
	values := backend.Values{}
	for _, f := range b.Flags {
		if f.Parse != nil {
			value, err := f.Parse(p.text(f.Name))
			if err != nil {
				p.fail(f.Name, "%w", err)
			}
			values[f.Name] = value
			continue
		}
		switch f.Kind {
		case backend.Bool:
			values[f.Name] = p.boolean(f.Name)
		case backend.Duration:
			values[f.Name] = p.duration(f.Name)
		case backend.CIDRs:
			values[f.Name] = p.cidrs(f.Name, false)
		case backend.String:
			values[f.Name] = p.text(f.Name)
		}
	}
	return values
}

// duration returns a duration that is not negative.
func (p *parser) duration(name string) time.Duration {
	d, err := time.ParseDuration(cmp.Or(p.text(name), "0"))
	if err != nil || d < 0 {
		p.fail(name, "%q is not a duration: write it as 15m or 90s", p.text(name))
	}
	return d
}

// setSource sets the source of objects, which is a folder or the Kubernetes API, and its
// settings.
func (p *parser) setSource(c *Config) {
	c.Manifests = p.text("manifests")
	c.DNSListen = p.text("dns-listen")
	c.ClusterDomain = p.text("cluster-domain")
	c.ServiceCIDRs = p.serviceCIDRs()
	if c.DNSListen != "" {
		if _, err := netip.ParseAddrPort(c.DNSListen); err != nil {
			p.fail("dns-listen", "%q is not an address with a port: write it as 10.0.0.1:53 or [fd00::1]:53", c.DNSListen)
		}
	}
	if !kube.IsDNSSubdomain(strings.TrimSuffix(c.ClusterDomain, ".")) {
		p.fail("cluster-domain", "%q is not a domain name: write it as cluster.local", c.ClusterDomain)
	}
	c.API = APIServer{
		Kubeconfig: p.text("kubeconfig"), Master: p.text("master"), Label: p.label("kubeconfig"),
		QPS: p.rate("kube-api-qps"), Burst: int(p.integer("kube-api-burst", 0, 1<<31-1)),
		ContentType: p.values["kube-api-content-type"], AcceptContentTypes: p.values[acceptContentTypes],
		BatchPeriod:      p.apiDuration(c, "batch-period", maxBatchPeriod, "8ms, or 0 to read every change at once"),
		MassRemovalDelay: p.apiDuration(c, "mass-removal-delay", maxMassRemovalDelay, "1m, or 0 to remove Services and endpoints at once"),
	}
	exclude := []string{"kubeconfig", "master"}
	reason := "cannot be combined with --manifests: set one of them"
	if c.Manifests == "" {
		exclude = []string{"service-cidr", "dns-listen", "cluster-domain"}
		reason = "requires --manifests: with an API server, the cluster's own setting applies"
	}
	for _, name := range exclude {
		_, ok := p.values[name]
		switch {
		case ok && p.label(name) != "--"+name:
			c.Warnings = append(c.Warnings, Warning{Setting: p.label(name), Reason: "--manifests is set"})
		case ok:
			p.fail(name, "%s", reason)
		}
	}
}

const (
	// maxBatchPeriod is kube-proxy's default minimum interval between syncs.
	maxBatchPeriod      = time.Second
	maxMassRemovalDelay = time.Hour
)

// giveWayAfter returns how long Fairlead's rules keep precedence after the program has exited.
func (p *parser) giveWayAfter() time.Duration {
	const name = "give-way-after"
	d, err := time.ParseDuration(p.text(name))
	if err != nil || d < 0 {
		p.fail(name, "%q is not a duration: write it as 1m, or 0 to give precedence to another proxy's rules at once", p.text(name))
	}
	return d
}

// apiDuration returns a duration from 0 to longest that applies only to an API server.
func (p *parser) apiDuration(c *Config, name string, longest time.Duration, example string) time.Duration {
	d, err := time.ParseDuration(p.text(name))
	if err != nil || d < 0 || d > longest {
		p.fail(name, "%q is not a duration from 0 to %s: write it as %s", p.text(name), longest, example)
	}
	if _, ok := p.values[name]; ok && c.Manifests != "" {
		c.Warnings = append(c.Warnings, Warning{Setting: p.label(name), Reason: "it applies only to an API server, and --manifests is set"})
	}
	return d
}

// serviceCIDRs returns the CIDRs that cluster IPs are allocated from.
func (p *parser) serviceCIDRs() []netip.Prefix {
	const name = "service-cidr"
	prefixes := p.cidrs(name, true)
	for i, prefix := range prefixes {
		if prefix.Addr().BitLen()-prefix.Bits() < 2 {
			p.fail(name, "%s has no address to allocate: use a larger network", prefix)
			return nil
		}
		for _, other := range prefixes[:i] {
			if other.Addr().Is4() == prefix.Addr().Is4() {
				p.fail(name, "%s and %s have the same IP family: set one network, or one per family", other, prefix)
				return nil
			}
		}
	}
	return prefixes
}

// nodeName returns the name of this node, converted to lower case like the kubelet's. Like kube-proxy,
// it accepts names that no Node can have.
func (p *parser) nodeName(c *Config) string {
	const setting = "hostname-override"
	override := p.text(setting)
	name, origin := override, p.label(setting)
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			p.errs = append(p.errs, fmt.Errorf("%s is not set and the hostname is unknown: %w", origin, err))
			return ""
		}
		origin = "the hostname " + name
	}
	name = strings.ToLower(strings.TrimSpace(name))
	switch {
	case name == "":
		p.fail(setting, "%q is not a node name: write it as node-1 or node-1.example", override)
	case !kube.IsDNSSubdomain(name):
		c.Warnings = append(c.Warnings, Warning{
			origin, fmt.Sprintf("no Node has the name %q, so no endpoint is local: write it as node-1 or node-1.example", name), InvalidValue,
		})
	}
	return name
}

// detectLocal returns how to detect local pod traffic.
func (p *parser) detectLocal(c *Config) kube.DetectLocal {
	const name = "detect-local-mode"
	d := kube.DetectLocal{
		Mode: kube.DetectLocalMode(p.text(name)), ClusterCIDRs: p.clusterCIDRs(c),
		Interface: p.text("pod-bridge-interface"), InterfacePrefix: p.text("pod-interface-name-prefix"),
	}
	switch d.Mode {
	case kube.DetectByClusterCIDR:
	case kube.DetectByNodeCIDR:
		if c.Manifests != "" {
			p.fail(name, "NodeCIDR requires the Node object from an API server: use ClusterCIDR with --manifests")
		}
	case kube.DetectByBridgeInterface:
		if d.Interface == "" {
			p.fail(name, "BridgeInterface requires %s: set it to the name of the pods' bridge", p.label("pod-bridge-interface"))
		}
	case kube.DetectByInterfaceNamePrefix:
		if d.InterfacePrefix == "" {
			p.fail(name, "InterfaceNamePrefix requires %s: set it to the name prefix of the pods' interfaces", p.label("pod-interface-name-prefix"))
		}
	default:
		p.fail(name, "unknown mode %q: use ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix", d.Mode)
	}
	// The kernel's IFNAMSIZ without the terminating zero.
	const longest = 15
	for name, mode := range map[string]kube.DetectLocalMode{
		"pod-bridge-interface":      kube.DetectByBridgeInterface,
		"pod-interface-name-prefix": kube.DetectByInterfaceNamePrefix,
	} {
		switch value, ok := p.values[name]; {
		case !ok:
		case d.Mode != mode:
			c.Warnings = append(c.Warnings, Warning{Setting: p.label(name), Reason: fmt.Sprintf("it requires %s=%s", p.label("detect-local-mode"), mode)})
		case len(value) > longest || strings.ContainsAny(value, "/ \t\n"):
			p.fail(name, "%q is not a valid interface name: use at most %d characters, no slash and no space", value, longest)
		}
	}
	return d
}

// clusterCIDRs returns the networks of --cluster-cidr. Like kube-proxy, it accepts any text in other
// modes to detect local traffic.
func (p *parser) clusterCIDRs(c *Config) []netip.Prefix {
	const name, mode = "cluster-cidr", "detect-local-mode"
	if p.text(mode) == string(kube.DetectByClusterCIDR) {
		return p.cidrs(name, false)
	}
	var prefixes []netip.Prefix
	for part := range splitList(p.text(name)) {
		prefix, err := parseCIDR(part, false)
		if err != nil {
			c.Warnings = append(c.Warnings, Warning{Setting: p.label(name), Reason: fmt.Sprintf("it requires %s=%s", p.label(mode), kube.DetectByClusterCIDR)})
			return nil
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes
}

// bindAddress returns --bind-address, or the zero Addr if it is not set.
func (p *parser) bindAddress() netip.Addr {
	value := p.text("bind-address")
	if value == "" {
		return netip.Addr{}
	}
	addr, err := kube.ParseAddr(value)
	if err != nil {
		p.fail("bind-address", "%q is not an IP address: write it as 192.0.2.1 or 2001:db8::1", value)
		return netip.Addr{}
	}
	return addr
}

// nodePortAddresses returns the addresses that node ports are served on.
func (p *parser) nodePortAddresses(c Config) kube.NodePortAddresses {
	const name = "nodeport-addresses"
	a, err := kube.ParseNodePortAddresses(slices.Collect(splitList(p.text(name))))
	if err != nil {
		p.fail(name, "%w", err)
	}
	switch {
	case c.ProxyMode == proxyModeIPTables:
		return iptablesNodePortAddresses(a, p.boolean(localhostNodePorts))
	case a.IsZero() && c.Manifests != "":
		return kube.NodePortAddresses{All: true} // no Node object provides primary addresses
	}
	return a
}

// serverAddress returns the host:port of a server, or an empty string for no server.
func (p *parser) serverAddress(c *Config, what, host, port string) string {
	name := what + "-bind-address"
	value, ok := p.values[name]
	addr, err := kube.ParseAddr(value)
	portAllowed := ok && err == nil // the address has no port
	switch given, set := p.serverPort(c, what, portAllowed); {
	case set && given == 0:
		return ""
	case set && portAllowed:
		port = strconv.FormatInt(given, 10)
	}
	switch {
	case !ok:
		return net.JoinHostPort(host, port)
	case err == nil:
		return net.JoinHostPort(addr.String(), port)
	}
	host, given, err := net.SplitHostPort(value)
	if err == nil {
		addr, err = kube.ParseAddr(host)
	}
	if number, portErr := strconv.ParseUint(given, 10, 16); err != nil || portErr != nil || number == 0 {
		p.fail(name, "%q is not an address with a port: write it as 127.0.0.1:%s or [::1]:%s", value, port, port)
		return value
	}
	return net.JoinHostPort(addr.String(), given)
}

// statusAddress returns the address of the status page with its port, or an empty string for no
// page.
func (p *parser) statusAddress() string {
	const name = "status-address"
	value := p.text(name)
	if value == "" {
		return ""
	}
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		host, port = value, statusPort
	}
	addr, err := kube.ParseAddr(host)
	if number, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || number == 0 {
		p.fail(name, "%q is not an address with a port: write it as 127.0.0.1:%s or [::1]:%[2]s, or leave it empty for no status page", value, statusPort)
		return value
	}
	return net.JoinHostPort(addr.String(), port)
}

// serverPort returns the deprecated setting of a server's port, and whether it is set. As in
// kube-proxy, 0 means no server, and another port has no effect on an address with a port, such as
// the default.
func (p *parser) serverPort(c *Config, what string, allowed bool) (port int64, set bool) {
	name, replacement := what+"-port", p.label(what+"-bind-address")
	if _, ok := p.values[name]; !ok {
		return 0, false
	}
	reason := "use " + replacement
	port = p.integer(name, math.MinInt32, math.MaxInt32)
	switch {
	case port == 0:
	case allowed:
		port = p.integer(name, 1, math.MaxUint16)
	default:
		reason = fmt.Sprintf("it has no effect unless %s is an address without a port: use %[1]s", replacement)
	}
	c.Warnings = append(c.Warnings, Warning{p.label(name), reason, Deprecated})
	return port, true
}

// logging returns the log level and the log format.
func (p *parser) logging() (slog.Level, string) {
	level, err := parseLevel(cmp.Or(p.text("log-level"), levelInfo))
	if err != nil {
		p.fail("log-level", "%w", err)
	}
	if v := p.integer("v", 0, 1<<31-1); v >= DebugVerbosity && p.values["log-level"] == "" {
		level = slog.LevelDebug
	}
	name := "log-format"
	if p.values[name] == "" && p.values["logging-format"] != "" {
		name = "logging-format"
	}
	format := cmp.Or(p.text(name), formatText)
	if err := checkFormat(format); err != nil {
		p.fail(name, "%w", err)
	}
	return level, format
}

// warnIgnored adds a warning for each flag without effect, and an error if its value is invalid.
func (p *parser) warnIgnored(c *Config) {
	for _, s := range settings() {
		value, ok := p.values[s.name]
		why := s.ignoredIn(c.Mode)
		if s.onlyMode == proxyModeIPTables {
			why = s.ignoredIn(c.ProxyMode)
		}
		if !ok || why == "" {
			continue
		}
		var err error
		switch s.kind {
		case kindBool:
			_, err = strconv.ParseBool(value)
		case kindInt:
			_, err = strconv.ParseInt(value, 0, 64)
		case kindFloat:
			_, err = strconv.ParseFloat(value, 64)
		case kindDuration:
			_, err = time.ParseDuration(value)
		case kindString, kindList, kindVersion:
		}
		if err != nil {
			p.fail(s.name, "%q is not a value of type %s, and the flag has no effect: remove it", value, s.kind)
		}
		c.Warnings = append(c.Warnings, Warning{Setting: p.label(s.name), Reason: why})
	}
}

// RestartRequired returns the names of the settings that differ in o and that only a restart
// can change.
func (c Config) RestartRequired(o Config) []string {
	var names []string
	if c.Mode == o.Mode { // another mode has other values
		for name, value := range c.Values {
			if !reflect.DeepEqual(value, o.Values[name]) {
				names = append(names, name)
			}
		}
	}
	for name, same := range map[string]bool{
		"mode":                     c.Mode == o.Mode,
		"the source of objects":    c.Manifests == o.Manifests && c.API == o.API,
		"the node name":            c.Tracker.NodeName == o.Tracker.NodeName,
		"the address of /healthz":  c.HealthzAddress == o.HealthzAddress,
		"the address of /metrics":  c.MetricsAddress == o.MetricsAddress,
		"the status address":       c.StatusAddress == o.StatusAddress,
		"bind-address-hard-fail":   c.HardFail == o.HardFail,
		"profiling":                c.Profiling == o.Profiling,
		"give-way-after":           c.GiveWayAfter == o.GiveWayAfter,
		"nft-own-table":            c.OwnTables == o.OwnTables,
		"service-metrics":          slices.Equal(c.ServiceMetrics, o.ServiceMetrics),
		"flow-offload":             c.FlowOffload == o.FlowOffload,
		"the log format":           c.LogFormat == o.LogFormat,
		"settings for --manifests": slices.Equal(c.ServiceCIDRs, o.ServiceCIDRs) && c.DNSListen == o.DNSListen && c.ClusterDomain == o.ClusterDomain,
	} {
		if !same {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
