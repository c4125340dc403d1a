package config

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"fairlead.io/fairlead/internal/backend"
)

// setting describes a flag of `fairlead run`. Values stay text until [parser] converts them
// all, so that one error names all mistakes, and fields of a configuration file are parsed
// in the same way. An empty value means that the flag is not set.
type setting struct {
	name         string
	short        string // one-letter shorthand
	kind         kind
	usage        string
	defaultValue string
	// completions are the values that shells complete. isDir and isFile complete paths.
	completions   []string
	isDir, isFile bool
	// fairleadOnly marks a flag that a configuration file cannot set, so that the flag applies
	// together with --config.
	fairleadOnly bool
	// emptyDisables marks a flag whose empty value turns its feature off. All other flags with an
	// empty value are not set.
	emptyDisables bool
	// overridesFile marks a kube-proxy flag that takes precedence over a configuration file:
	// --master, which has no field there, --hostname-override and the logging flags.
	overridesFile bool
	// ignoredReason explains why a kube-proxy flag has no effect, in any mode or outside of
	// onlyMode. The flag is accepted with a warning, so that command lines of kube-proxy
	// work unchanged.
	ignoredReason string
	// onlyMode is the value of --mode, or kube-proxy's mode iptables, that a kube-proxy flag
	// applies to.
	onlyMode string
}

// Names of flags that commands use.
const (
	VersionFlag       = "version"
	KubeProxyDefaults = "kube-proxy-defaults"
)

// kind is the type of a value, as shown in the help.
type kind string

const (
	kindString   kind = "string"
	kindBool     kind = "bool"
	kindInt      kind = "int"
	kindFloat    kind = "float"
	kindDuration kind = "duration"
	kindVersion  kind = "version" // true, false, raw, or a version
	kindList     kind = "strings" // comma-separated; the flag may be repeated
)

// Reasons why kube-proxy flags have no effect.
const (
	ignoredIPTables      = "it applies only to kube-proxy's iptables mode"
	ignoredLocalhost     = ignoredIPTables + ". To serve TCP node ports on 127.0.0.1 and ::1, add localhost to --nodeport-addresses (nodePortAddresses)"
	ignoredNFTables      = "it applies only to kube-proxy's nftables mode"
	ignoredSync          = "Fairlead programs changes as they arrive instead of periodically; use --batch-period to batch them"
	ignoredOOM           = "Fairlead does not set its oom_score_adj: in Kubernetes, priorityClassName system-node-critical sets it"
	ignoredFeatureGates  = "Fairlead has no feature gates, and always serves external IPs"
	ignoredHiddenMetrics = "Fairlead has no hidden metrics"
	ignoredConfigSync    = "Fairlead watches for changes and has nothing to refresh"
	ignoredLogging       = "Fairlead writes each log line to standard error at once"
	ignoredVModule       = "Fairlead has one log level for all source files: use --log-level"
	ignoredWindows       = "it applies only to Windows"
)

// ignoredOtherMode returns why a flag of the named backend has no effect with another backend.
func ignoredOtherMode(name string) string {
	return "it applies only to --mode=" + name
}

// ignoredIn returns why the flag has no effect in a mode, empty if it has one.
func (s setting) ignoredIn(mode string) string {
	if s.onlyMode != "" && s.onlyMode == mode {
		return ""
	}
	return s.ignoredReason
}

// settings returns all flags of `fairlead run`.
func settings() []setting {
	active := []setting{
		{
			name: "mode", kind: kindString, fairleadOnly: true, defaultValue: backend.Names()[0], completions: backend.Names(),
			usage: "kernel backend to program: nft or ipvs",
		},
		{
			name: "proxy-mode", kind: kindString, completions: proxyModes(),
			usage: "kube-proxy's name for --mode: nftables (nft), ipvs, or iptables (nft, with the iptables mode's default for --nodeport-addresses)",
		},
		{
			name: "config", kind: kindString, fairleadOnly: true, isFile: true,
			usage: "path of a KubeProxyConfiguration file, which is watched for changes. kube-proxy's flags are then ignored, except " +
				"--hostname-override, --master and the logging flags",
		},

		{name: "kubeconfig", kind: kindString, isFile: true, usage: "path of the kubeconfig file for the API server; empty: in-cluster configuration"},
		{name: "master", kind: kindString, overridesFile: true, usage: "URL of the API server, overrides --kubeconfig"},
		{name: "kube-api-qps", kind: kindFloat, defaultValue: "5", usage: "sustained requests per second to the API server"},
		{name: "kube-api-burst", kind: kindInt, defaultValue: "10", usage: "burst of requests to the API server"},
		{
			name: "kube-api-content-type", kind: kindString, defaultValue: "application/vnd.kubernetes.protobuf",
			usage: "content type of requests to the API server",
		},
		{
			name: "batch-period", kind: kindDuration, fairleadOnly: true, defaultValue: "8ms",
			usage: "maximum time to batch a continuous stream of changes from the API server, to save CPU time; isolated " +
				"changes are processed at once. 0: no batching",
		},
		{
			name: "mass-removal-delay", kind: kindDuration, fairleadOnly: true, defaultValue: "1m",
			usage: "how long to delay removals, before listing again, if a list from the API server lacks more than half of the " +
				"programmed Services or EndpointSlices. 0: no delay",
		},
		{
			name: "give-way-after", kind: kindDuration, fairleadOnly: true, defaultValue: "1m",
			usage: "how long Fairlead's rules keep precedence over the rules of another Service proxy, such as kube-proxy, after " +
				"Fairlead has exited. 0: until it exits",
		},
		{
			name: "service-metrics", kind: kindList, fairleadOnly: true,
			usage: "count the connections of these Services and of their endpoints for metrics: NAMESPACE/NAME, or NAMESPACE/* for all " +
				"Services of a namespace. At most 20000 addresses of Services and of their endpoints are counted. Empty: none",
		},
		{
			name: "flow-offload", kind: kindString, fairleadOnly: true, defaultValue: flowOffloadOff,
			completions: []string{flowOffloadOff, flowOffloadSoftware, flowOffloadHardware},
			usage: "put established TCP connections and UDP flows to Services into a flowtable, so that their packets bypass the netfilter " +
				"hooks of this node: software, hardware (where the drivers of the interfaces can), or off. Only with --mode=nft",
		},
		{
			name: "flow-offload-threshold", kind: kindInt, fairleadOnly: true, defaultValue: defaultFlowOffloadThreshold(),
			usage: "with --flow-offload, packets of a connection, in both directions, after which it is offloaded",
		},
		{
			name: "nft-own-table", kind: kindBool, fairleadOnly: true, defaultValue: "false",
			usage: "own the nftables tables: while Fairlead runs, the kernel rejects changes to them by other programs, and nft flush ruleset " +
				"skips them. Requires Linux 6.9 or newer",
		},
		{name: "hostname-override", kind: kindString, overridesFile: true, usage: "name of this node; empty: the hostname"},

		{
			name: "manifests", kind: kindString, fairleadOnly: true, isDir: true,
			usage: "folder of YAML files with Services, Pods and EndpointSlices to use instead of an API server; it is watched for changes",
		},
		{
			name: "service-cidr", kind: kindList, fairleadOnly: true,
			usage: "with --manifests, network to allocate cluster IPs from; for dual stack, one network per IP family",
		},
		{
			name: "dns-listen", kind: kindString, fairleadOnly: true,
			usage: "with --manifests, address and port to serve DNS names of Services on, such as 10.0.0.1:53; empty: no DNS server",
		},
		{name: "cluster-domain", kind: kindString, fairleadOnly: true, defaultValue: "cluster.local", usage: "with --manifests, domain of the DNS names of Services"},

		{
			name: "cluster-cidr", kind: kindString, // kube-proxy uses the last value of a repeated flag
			usage: "networks of the pods; connections to cluster IPs from other sources are masqueraded. Empty: no masquerading by source",
		},
		{
			name: "detect-local-mode", kind: kindString, defaultValue: "ClusterCIDR",
			completions: []string{"ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"},
			usage:       "how to detect local pod traffic: by --cluster-cidr, by the Node's podCIDRs, or by the incoming interface",
		},
		{name: "pod-bridge-interface", kind: kindString, usage: "bridge interface of the pods, for --detect-local-mode=BridgeInterface"},
		{name: "pod-interface-name-prefix", kind: kindString, usage: "name prefix of the pods' interfaces, for --detect-local-mode=InterfaceNamePrefix"},
		{name: "masquerade-all", kind: kindBool, defaultValue: "false", usage: "masquerade all connections to cluster IPs"},
		{
			name: "nodeport-addresses", kind: kindList, completions: []string{"primary", "localhost", "all"},
			usage: "addresses of this node to serve node ports on: networks, primary (addresses of the Node object), " +
				"localhost (TCP only, relayed) or all (except localhost). Empty: primary; with --mode=ipvs, --proxy-mode=iptables or --manifests: all",
		},
		{
			name: "service-proxy-name", kind: kindString, fairleadOnly: true,
			usage: "serve only Services with the label service.kubernetes.io/service-proxy-name=NAME, beside kube-proxy, which ignores them; " +
				"empty: Services without the label",
		},
		{
			name: "ping-service-ips", kind: kindBool, defaultValue: "false", fairleadOnly: true,
			usage: "answer pings to the addresses of Services with endpoints",
		},
		{
			name: "bind-address", kind: kindString,
			usage: "primary address of this node, overrides the Node object's address of the same IP family; no socket is bound to it. " +
				"It also selects the IP family of the default server addresses",
		},
		{
			name: "healthz-bind-address", kind: kindString, defaultValue: "0.0.0.0:10256",
			usage: "address and port to serve /healthz and /livez on",
		},
		{name: "healthz-port", kind: kindInt, usage: "deprecated: use --healthz-bind-address. 0: no server"},
		{
			name: "metrics-bind-address", kind: kindString, defaultValue: "127.0.0.1:10249",
			usage: "address and port to serve /metrics on",
		},
		{name: "metrics-port", kind: kindInt, usage: "deprecated: use --metrics-bind-address. 0: no server"},
		{
			name: "status-address", kind: kindString, fairleadOnly: true, emptyDisables: true, defaultValue: "127.0.0.1:" + statusPort,
			usage: "address and port to serve the read-only status page on; empty: no status page",
		},
		{
			name: "bind-address-hard-fail", kind: kindBool, defaultValue: "false",
			usage: "exit if a listen address is unavailable, instead of retrying every 5s",
		},
		{name: "profiling", kind: kindBool, defaultValue: "false", usage: "serve profiles on --metrics-bind-address at /debug/pprof/"},
		{
			name: "init-only", kind: kindBool, defaultValue: "false", fairleadOnly: true,
			usage: "perform the initialization that may need more privileges than CAP_NET_ADMIN, and exit: the --conntrack-* settings, and with " +
				"--mode=ipvs also kernel modules and other sysctls",
		},
		{
			name: "dry-run", kind: kindBool, defaultValue: "false", fairleadOnly: true,
			usage: "print what would be written to the kernel, write nothing, and exit",
		},
		{name: "log-level", kind: kindString, overridesFile: true, defaultValue: levelInfo, completions: levels(), usage: levelUsage},
		{name: "log-format", kind: kindString, overridesFile: true, defaultValue: formatText, completions: formats(), usage: formatUsage},
		{name: "v", short: "v", kind: kindInt, overridesFile: true, usage: "kube-proxy's alternative to --log-level: 4 and higher mean debug"},
		{
			name: localhostNodePorts, kind: kindBool, defaultValue: "true", onlyMode: proxyModeIPTables, ignoredReason: ignoredLocalhost,
			usage: "with --proxy-mode=iptables, serve TCP node ports on 127.0.0.1, unless --nodeport-addresses excludes it",
		},
		{
			name: "cleanup", kind: kindBool, defaultValue: "false", fairleadOnly: true,
			usage: "do the same as fairlead cleanup, and exit",
		},
		{
			name: "write-config-to", kind: kindString, isFile: true, fairleadOnly: true,
			usage: "write the configuration as a KubeProxyConfiguration with kube-proxy's defaults to this file, and exit",
		},
		{
			name: VersionFlag, kind: kindVersion, fairleadOnly: true,
			usage: "print the version, with raw also the Go version and the platform, and exit",
		},
		{
			name: KubeProxyDefaults, kind: kindBool, defaultValue: "false", fairleadOnly: true,
			usage: "without a mode, use kube-proxy's default mode: iptables. Set if the program's name is kube-proxy",
		},
		{name: "logging-format", kind: kindString, overridesFile: true, completions: formats(), usage: "kube-proxy's name for --log-format"},
	}
	return slices.Concat(active, conntrackFlags(), backendSettings(), ignoredSettings())
}

// conntrackFlags returns the flags of the settings of connection tracking.
func conntrackFlags() []setting {
	return []setting{
		{
			name: "conntrack-max-per-core", kind: kindInt, defaultValue: "32768",
			usage: "connections to track for each CPU of the host; raises nf_conntrack_max, but not beyond 1048576, and never lowers it. " +
				"0: leave it as it is",
		},
		{name: "conntrack-min", kind: kindInt, defaultValue: "131072", usage: "connections to track at least, if --conntrack-max-per-core is not 0"},
		{
			name: "conntrack-tcp-timeout-established", kind: kindDuration, defaultValue: "24h",
			usage: "idle timeout of established TCP connections. 0: leave it as it is",
		},
		{
			name: "conntrack-tcp-timeout-close-wait", kind: kindDuration, defaultValue: "1h",
			usage: "timeout of TCP connections in the state CLOSE_WAIT. 0: leave it as it is",
		},
		{
			name: "conntrack-tcp-be-liberal", kind: kindBool, defaultValue: "false",
			usage: "do not treat TCP packets outside the window as invalid. false: leave the setting as it is",
		},
		{name: "conntrack-udp-timeout", kind: kindDuration, defaultValue: "0s", usage: "idle timeout of UDP flows without a reply. 0: leave it as it is"},
		{name: "conntrack-udp-timeout-stream", kind: kindDuration, defaultValue: "0s", usage: "idle timeout of other UDP flows. 0: leave it as it is"},
	}
}

// backendSettings returns the flags that apply to one backend.
func backendSettings() []setting {
	var all []setting
	for _, b := range backend.All() {
		for _, f := range b.Flags {
			all = append(all, setting{
				name: f.Name, kind: kind(f.Kind), defaultValue: f.Default, completions: f.Choices, fairleadOnly: f.FairleadOnly,
				onlyMode: b.Name, ignoredReason: ignoredOtherMode(b.Name),
				usage: "with --mode=" + b.Name + ", " + f.Usage,
			})
		}
	}
	return all
}

// ignoredSettings returns the kube-proxy flags that have no effect in any mode.
func ignoredSettings() []setting {
	var ignored []setting
	for _, group := range []struct {
		reason string
		flags  map[string]kind
	}{
		{ignoredIPTables, map[string]kind{"iptables-masquerade-bit": kindInt}},
		{ignoredSync, map[string]kind{
			"iptables-sync-period": kindDuration, "iptables-min-sync-period": kindDuration,
			"ipvs-sync-period": kindDuration, "ipvs-min-sync-period": kindDuration,
		}},
		{ignoredOOM, map[string]kind{"oom-score-adj": kindInt}},
		{ignoredFeatureGates, map[string]kind{"feature-gates": kindList}},
		{ignoredHiddenMetrics, map[string]kind{"show-hidden-metrics-for-version": kindString}},
		{ignoredVModule, map[string]kind{"vmodule": kindList}},
		{ignoredConfigSync, map[string]kind{"config-sync-period": kindDuration}},
		{ignoredLogging, map[string]kind{
			"log-flush-frequency":   kindDuration,
			"log-text-split-stream": kindBool, "log-text-info-buffer-size": kindString,
			"log-json-split-stream": kindBool, "log-json-info-buffer-size": kindString,
		}},
	} {
		for name, kind := range group.flags {
			ignored = append(ignored, setting{name: name, kind: kind, ignoredReason: group.reason, usage: "no effect: " + group.reason})
		}
	}
	slices.SortFunc(ignored, func(a, b setting) int { return cmp.Compare(a.name, b.name) })
	return ignored
}

// Flags maps the names of flags to their values. It contains only values that are set and not
// empty, except for a flag whose empty value turns its feature off.
type Flags map[string]string

// flagValue implements [pflag.Value] for a setting, and stores its value in flags.
type flagValue struct {
	setting setting
	flags   Flags
}

var _ pflag.Value = flagValue{}

// String implements [pflag.Value].
func (v flagValue) String() string {
	if value, ok := v.flags[v.setting.name]; ok {
		return value
	}
	return v.setting.defaultValue
}

// Set implements [pflag.Value].
func (v flagValue) Set(value string) error {
	if v.setting.kind == kindList && v.flags[v.setting.name] != "" && value != "" {
		value = v.flags[v.setting.name] + "," + value
	}
	if v.flags[v.setting.name] = value; value == "" && !v.setting.emptyDisables {
		delete(v.flags, v.setting.name)
	}
	return nil
}

// Type implements [pflag.Value].
func (v flagValue) Type() string { return string(v.setting.kind) }

// AddFlags adds all settings to the command. The Flags that it returns hold the values once
// the command line is parsed.
func AddFlags(cmd *cobra.Command) Flags {
	flags := Flags{}
	// kube-proxy accepts underscores in names, too.
	cmd.Flags().SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	for _, s := range settings() {
		flag := cmd.Flags().VarPF(flagValue{s, flags}, s.name, s.short, s.usage)
		flag.Hidden = s.ignoredIn(s.onlyMode) != ""
		if s.kind == kindBool || s.kind == kindVersion {
			flag.NoOptDefVal = "true"
		}
		// These fail only if the flag does not exist.
		switch {
		case s.isDir:
			_ = cmd.MarkFlagDirname(s.name)
		case s.isFile:
			_ = cmd.MarkFlagFilename(s.name)
		default:
			completeWith(cmd, s.name, s.completions...)
		}
	}
	return flags
}

// input holds settings as text, with their origin.
type input struct {
	values Flags

	// labels name the fields of settings that come from a configuration file.
	labels map[string]string
	// warnings are problems of the input that do not prevent its use.
	warnings []Warning
}

// label names the flag or field that a setting comes from, for messages.
func (in input) label(name string) string {
	return cmp.Or(in.labels[name], "--"+name)
}

// fromFlags returns the input from flags without a configuration file.
func fromFlags(flags Flags) input { return input{values: flags} }

// mergeConfigFile returns the input from a configuration file and the flags that apply
// together with it. Other kube-proxy flags are ignored with a warning.
func mergeConfigFile(flags Flags, file configFile) input {
	in := input{values: maps.Clone(file.values), labels: map[string]string{}, warnings: slices.Clone(file.warnings)}
	fields := fieldFlags()
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		in.labels[fields[field]] = "--config: " + field
	}
	for name := range file.values {
		in.labels[name] = file.label(name)
	}
	for _, s := range settings() {
		if _, ok := file.values[s.name]; !ok && (s.fairleadOnly || s.overridesFile) {
			delete(in.labels, s.name)
		}
		value, ok := flags[s.name]
		switch {
		case !ok:
		case s.fairleadOnly || s.overridesFile || s.ignoredIn(s.onlyMode) != "":
			in.values[s.name] = value
			delete(in.labels, s.name)
		default:
			in.warnings = append(in.warnings, Warning{Setting: "--" + s.name, Reason: "--config is set: set it in the file"})
		}
	}
	return in
}
