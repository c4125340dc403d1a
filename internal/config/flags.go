package config

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"fairlead.io/fairlead/internal/backend"
)

// setting is a flag of `fairlead run`. Values stay text until all of them are
// looked at together, see [parser], for two reasons: every mistake is then named
// at once, and the fields of a configuration file take the same way.
//
// An empty value means that the flag is not set.
type setting struct {
	name         string
	short        string // for one dash
	kind         kind
	usage        string
	defaultValue string // if it is not set
	// completions are what the shell completes, folder and file what sort of path.
	completions   []string
	isDir, isFile bool
	// fairleadOnly says that kube-proxy has no such flag, so that no configuration file
	// of its can stand for it.
	fairleadOnly bool
	// overridesFile says that the flag goes before a configuration file: --master, which
	// has no field there, --hostname-override, and all on logging.
	overridesFile bool
	// ignoredReason says why a flag of kube-proxy has no effect here, or in all modes but
	// one. It is accepted, so that command lines can stay as they are, and a
	// warning has the reason.
	ignoredReason string
	// onlyMode is the mode that a flag of kube-proxy is for. In the others it has no
	// effect, as idle says.
	onlyMode string
	// alternative says what to do instead of giving a flag of kube-proxy that has an
	// effect which is not to be had here.
	alternative string
}

// kind is the form of a value, by its name in the help.
type kind string

const (
	kindString   kind = "string"
	kindBool     kind = "bool"
	kindInt      kind = "int"
	kindFloat    kind = "float"
	kindDuration kind = "duration"
	kindList     kind = "strings" // comma-separated, and the flag may be given again
)

// Why flags of kube-proxy have no effect.
const (
	ignoredIPTables      = "it is about kube-proxy's iptables mode"
	ignoredLocalhost     = ignoredIPTables + ": node ports of TCP are served at 127.0.0.1 and ::1 where --nodeport-addresses (nodePortAddresses) has localhost"
	ignoredNFTables      = "it is about kube-proxy's nftables mode"
	ignoredSync          = "there are no rounds: a change is programmed when it arrives, and --batch-period says how changes gather before that"
	ignoredConntrack     = "Fairlead leaves the node's connection tracking as it is: set it with sysctl"
	ignoredOOM           = "Fairlead leaves its oom_score_adj as it is: in Kubernetes priorityClassName system-node-critical sets it"
	ignoredFeatureGates  = "Fairlead has no feature gates"
	ignoredHiddenMetrics = "Fairlead hides no metrics"
	ignoredConfigSync    = "changes arrive as they happen, and there is nothing to refresh"
	ignoredLogging       = "Fairlead writes each line of its log at once, to standard error"
	ignoredWindows       = "it is about Windows"
)

// ignoredOtherMode says why the flag of a backend has no effect with another.
func ignoredOtherMode(name string) string {
	return "it is about the mode " + name + ", and this is another"
}

// ignoredIn says why the flag has no effect in a mode, or is empty.
func (s setting) ignoredIn(mode string) string {
	if s.onlyMode != "" && s.onlyMode == mode {
		return ""
	}
	return s.ignoredReason
}

// settings are all flags of `fairlead run`.
func settings() []setting {
	active := []setting{
		{
			name: "mode", kind: kindString, fairleadOnly: true, defaultValue: backend.Names()[0], completions: backend.Names(),
			usage: "the kernel mechanism to program: nft, or ipvs for a choice of how endpoints are picked",
		},
		{
			name: "proxy-mode", kind: kindString, completions: backend.KubeProxyNames(),
			usage: "the same by kube-proxy's names: nftables is nft, and ipvs is ipvs",
		},
		{
			name: "config", kind: kindString, fairleadOnly: true, isFile: true,
			usage: "a file with a KubeProxyConfiguration, which is watched. kube-proxy's flags are then ignored, but for " +
				"--hostname-override, --master and those on logging",
		},

		{name: "kubeconfig", kind: kindString, isFile: true, usage: "a file that says how to reach the API server; empty: as every pod is told"},
		{name: "master", kind: kindString, overridesFile: true, usage: "the URL of the API server, whatever --kubeconfig says"},
		{name: "kube-api-qps", kind: kindFloat, defaultValue: "5", usage: "requests a second to the API server, in the long run"},
		{name: "kube-api-burst", kind: kindInt, defaultValue: "10", usage: "requests to the API server at once"},
		{
			name: "kube-api-content-type", kind: kindString, defaultValue: "application/vnd.kubernetes.protobuf",
			usage: "the content type of requests to the API server",
		},
		{
			name: "batch-period", kind: kindDuration, fairleadOnly: true, defaultValue: "50ms",
			usage: "how long changes of the API server may gather while there are many, to save processor time; a few are read at once. " +
				"0: all are",
		},
		{
			name: "mass-removal-delay", kind: kindDuration, fairleadOnly: true, defaultValue: "1m",
			usage: "how long removals wait if a list of the API server lacks more than half of the Services or EndpointSlices that are programmed, " +
				"before it is listed once more. 0: they do not wait",
		},
		{
			name: "give-way-after", kind: kindDuration, fairleadOnly: true, defaultValue: "1m",
			usage: "how long after this program has ended its rules still go before those of another Service proxy, such as kube-proxy, " +
				"if there are any. 0: no longer",
		},
		{
			name: "nft-own-table", kind: kindBool, fairleadOnly: true, defaultValue: "false",
			usage: "own the nftables tables: while this program runs, the kernel refuses changes of them by others, and nft flush ruleset " +
				"leaves them out. It needs Linux 6.9 or newer",
		},
		{name: "hostname-override", kind: kindString, overridesFile: true, usage: "the name of this node; empty: the hostname"},

		{
			name: "manifests", kind: kindString, fairleadOnly: true, isDir: true,
			usage: "a folder of YAML files with Services, Pods and EndpointSlices, which is watched, instead of an API server",
		},
		{
			name: "service-cidr", kind: kindList, fairleadOnly: true,
			usage: "with --manifests, the network that Services without a clusterIP get one from; for dual stack one of each family",
		},
		{
			name: "dns-listen", kind: kindString, fairleadOnly: true,
			usage: "with --manifests, the address and port to answer Services' DNS names on, such as 10.0.0.1:53; empty: nowhere",
		},
		{name: "cluster-domain", kind: kindString, fairleadOnly: true, defaultValue: "cluster.local", usage: "the domain of Services' DNS names"},

		{
			name: "cluster-cidr", kind: kindList,
			usage: "the networks of the pods; connections to cluster IPs from elsewhere are masqueraded. Empty: no connection is",
		},
		{
			name: "detect-local-mode", kind: kindString, defaultValue: "ClusterCIDR",
			completions: []string{"ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"},
			usage:       "how a client is told to be a pod: by --cluster-cidr, by the Node's podCIDRs, or by the interface that it comes in on",
		},
		{name: "pod-bridge-interface", kind: kindString, usage: "the bridge of the pods, for --detect-local-mode=BridgeInterface"},
		{name: "pod-interface-name-prefix", kind: kindString, usage: "how pods' interfaces are named, for --detect-local-mode=InterfaceNamePrefix"},
		{name: "masquerade-all", kind: kindBool, defaultValue: "false", usage: "masquerade every connection to a cluster IP"},
		{
			name: "nodeport-addresses", kind: kindList, completions: []string{"primary", "localhost", "all"},
			usage: "the addresses of this node that node ports are served on: networks, primary (those of the Node object), " +
				"localhost (TCP only, by a relay) or all (but localhost). Empty: primary, or with --mode=ipvs or --manifests all",
		},
		{
			name: "ping-service-ips", kind: kindBool, defaultValue: "false", fairleadOnly: true,
			usage: "answer pings to the addresses of Services that have endpoints",
		},
		{
			name: "bind-address", kind: kindString,
			usage: "this node's primary address, instead of the Node object's of its family; nothing is bound to it. " +
				"The default addresses of the servers below are of its family",
		},
		{
			name: "healthz-bind-address", kind: kindString, defaultValue: "0.0.0.0:10256",
			usage: "the address and port of /healthz and /livez",
		},
		{name: "healthz-port", kind: kindInt, usage: "deprecated: use --healthz-bind-address. 0: no /healthz"},
		{
			name: "metrics-bind-address", kind: kindString, defaultValue: "127.0.0.1:10249",
			usage: "the address and port of /metrics",
		},
		{name: "metrics-port", kind: kindInt, usage: "deprecated: use --metrics-bind-address. 0: no /metrics"},
		{
			name: "bind-address-hard-fail", kind: kindBool, defaultValue: "false",
			usage: "end if an address can't be listened on, instead of trying again every 5 s",
		},
		{name: "profiling", kind: kindBool, defaultValue: "false", usage: "show the program's profiles at --metrics-bind-address, /debug/pprof/"},
		{
			name: "init-only", kind: kindBool, defaultValue: "false", fairleadOnly: true,
			usage: "set up what may take more rights than CAP_NET_ADMIN, which are modules and sysctls for --mode=ipvs and nothing " +
				"for nft, and end",
		},
		{name: "log-level", kind: kindString, overridesFile: true, defaultValue: levelInfo, completions: levels(), usage: levelUsage},
		{name: "log-format", kind: kindString, overridesFile: true, defaultValue: formatText, completions: formats(), usage: formatUsage},
		{name: "v", short: "v", kind: kindInt, overridesFile: true, usage: "kube-proxy's way to set --log-level: 4 and more are debug"},
		{name: "cleanup", kind: kindBool, alternative: "run fairlead cleanup"},
		{name: "write-config-to", kind: kindString, alternative: "leave it out: Fairlead writes no files"},
		{name: "logging-format", kind: kindString, overridesFile: true, completions: formats(), usage: "kube-proxy's name for --log-format"},
	}
	return slices.Concat(active, backendSettings(), ignoredSettings())
}

// backendSettings are the flags that one backend obeys.
func backendSettings() []setting {
	var all []setting
	for _, b := range backend.All() {
		for _, f := range b.Flags {
			all = append(all, setting{
				name: f.Name, kind: kind(f.Kind), defaultValue: f.Default, completions: f.Choices, fairleadOnly: f.FairleadOnly, onlyMode: b.Name, ignoredReason: ignoredOtherMode(b.Name),
				usage: "with --mode=" + b.Name + ", " + f.Usage,
			})
		}
	}
	return all
}

// ignoredSettings are the flags of kube-proxy that have no effect in any mode.
func ignoredSettings() []setting {
	var idle []setting
	for _, group := range []struct {
		reason string
		flags  map[string]kind
	}{
		{ignoredIPTables, map[string]kind{"iptables-masquerade-bit": kindInt}},
		{ignoredLocalhost, map[string]kind{"iptables-localhost-nodeports": kindBool}},
		{ignoredSync, map[string]kind{
			"iptables-sync-period": kindDuration, "iptables-min-sync-period": kindDuration,
			"ipvs-sync-period": kindDuration, "ipvs-min-sync-period": kindDuration,
		}},
		{ignoredConntrack, map[string]kind{
			"conntrack-max-per-core": kindInt, "conntrack-min": kindInt, "conntrack-tcp-be-liberal": kindBool,
			"conntrack-tcp-timeout-established": kindDuration, "conntrack-tcp-timeout-close-wait": kindDuration,
			"conntrack-udp-timeout": kindDuration, "conntrack-udp-timeout-stream": kindDuration,
		}},
		{ignoredOOM, map[string]kind{"oom-score-adj": kindInt}},
		{ignoredFeatureGates, map[string]kind{"feature-gates": kindList}},
		{ignoredHiddenMetrics, map[string]kind{"show-hidden-metrics-for-version": kindString}},
		{ignoredConfigSync, map[string]kind{"config-sync-period": kindDuration}},
		{ignoredLogging, map[string]kind{
			"log-flush-frequency": kindDuration, "vmodule": kindList,
			"log-text-split-stream": kindBool, "log-text-info-buffer-size": kindString,
			"log-json-split-stream": kindBool, "log-json-info-buffer-size": kindString,
		}},
	} {
		for name, kind := range group.flags {
			idle = append(idle, setting{name: name, kind: kind, ignoredReason: group.reason, usage: "no effect: " + group.reason})
		}
	}
	slices.SortFunc(idle, func(a, b setting) int { return cmp.Compare(a.name, b.name) })
	return idle
}

// Flags has the values that are set, by the names of the flags. Empty ones are
// not in it.
type Flags map[string]string

// flagValue is a flag whose value goes into Flags.
type flagValue struct {
	setting setting
	flags   Flags
}

var _ pflag.Value = flagValue{}

// String implements [pflag.Value].
func (v flagValue) String() string { return cmp.Or(v.flags[v.setting.name], v.setting.defaultValue) }

// Set implements [pflag.Value].
func (v flagValue) Set(value string) error {
	if v.setting.kind == kindList && v.flags[v.setting.name] != "" && value != "" {
		value = v.flags[v.setting.name] + "," + value
	}
	if v.flags[v.setting.name] = value; value == "" {
		delete(v.flags, v.setting.name)
	}
	return nil
}

// Type implements [pflag.Value].
func (v flagValue) Type() string { return string(v.setting.kind) }

// AddFlags adds all settings to the command and returns what will hold those
// that are set.
func AddFlags(cmd *cobra.Command) Flags {
	into := Flags{}
	// As kube-proxy does.
	cmd.Flags().SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	for _, s := range settings() {
		flag := cmd.Flags().VarPF(flagValue{s, into}, s.name, s.short, s.usage)
		flag.Hidden = s.ignoredIn(s.onlyMode) != "" || s.alternative != ""
		if s.kind == kindBool {
			flag.NoOptDefVal = "true"
		}
		// The errors are that there is no such flag.
		switch {
		case s.isDir:
			_ = cmd.MarkFlagDirname(s.name)
		case s.isFile:
			_ = cmd.MarkFlagFilename(s.name)
		default:
			completeWith(cmd, s.name, s.completions...)
		}
	}
	return into
}

// input is where a configuration comes from.
type input struct {
	values Flags

	// labels say where a value stands that is from no flag.
	labels map[string]string
	// warnings are warnings about the input.
	warnings []Warning
}

// Warning warns of a setting that was given.
type Warning struct {
	// Setting is what the user wrote, and Reason why it has no effect, or what to use
	// if it is Deprecated.
	Setting, Reason string
	Deprecated      bool
}

// LogWarnings warns of settings without effect, and of deprecated ones.
func (c Config) LogWarnings(ctx context.Context, log *slog.Logger) {
	for _, n := range c.Warnings {
		if n.Deprecated {
			log.WarnContext(ctx, "a setting is deprecated", "setting", n.Setting, "instead", n.Reason)
			continue
		}
		log.WarnContext(ctx, "a setting has no effect", "setting", n.Setting, "reason", n.Reason)
	}
}

// label returns how the user knows the setting.
func (in input) label(name string) string {
	return cmp.Or(in.labels[name], "--"+name)
}

// fromFlags returns the input from flags alone.
func fromFlags(flags Flags) input { return input{values: flags} }

// mergeConfigFile returns the input from flags with a configuration file under them:
// kube-proxy's flags are ignored then, with few exceptions.
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
			in.warnings = append(in.warnings, Warning{Setting: "--" + s.name, Reason: "--config is set: write it into the file"})
		}
	}
	return in
}
