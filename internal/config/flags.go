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
	name  string
	short string // for one dash
	kind  kind
	usage string
	value string // if it is not set
	// values are what the shell completes, folder and file what sort of path.
	values       []string
	folder, file bool
	// own says that kube-proxy has no such flag, so that no configuration file
	// of its can stand for it.
	own bool
	// first says that the flag goes before a configuration file: --master, which
	// has no field there, --hostname-override, and all on logging.
	first bool
	// idle says why a flag of kube-proxy has no effect here, or in all modes but
	// one. It is accepted, so that command lines can stay as they are, and a
	// warning has the reason.
	idle string
	// only is the mode that a flag of kube-proxy is for. In the others it has no
	// effect, as idle says.
	only string
	// instead says what to do instead of giving a flag of kube-proxy that has an
	// effect which is not to be had here.
	instead string
}

// kind is the form of a value, by its name in the help.
type kind string

const (
	text     kind = "string"
	boolean  kind = "bool"
	integer  kind = "int"
	number   kind = "float"
	duration kind = "duration"
	list     kind = "strings" // comma-separated, and the flag may be given again
)

// Why flags of kube-proxy have no effect.
const (
	idleIPTables  = "it is about kube-proxy's iptables mode"
	idleLocalhost = idleIPTables + ": node ports of TCP are served at 127.0.0.1 and ::1 where --nodeport-addresses (nodePortAddresses) has localhost"
	idleNFTables  = "it is about kube-proxy's nftables mode"
	idleSync      = "there are no rounds: a change is programmed when it arrives, and --batch-period says how changes gather before that"
	idleConntrack = "Fairlead leaves the node's connection tracking as it is: set it with sysctl"
	idleOOM       = "Fairlead leaves its oom_score_adj as it is: in Kubernetes priorityClassName system-node-critical sets it"
	idleGates     = "Fairlead has no feature gates"
	idleHidden    = "Fairlead hides no metrics"
	idleRefresh   = "changes arrive as they happen, and there is nothing to refresh"
	idleLog       = "Fairlead writes each line of its log at once, to standard error"
	idleWindows   = "it is about Windows"
)

// idleOutside says why the flag of a backend has no effect with another.
func idleOutside(name string) string { return "it is about the mode " + name + ", and this is another" }

// idleIn says why the flag has no effect in a mode, or is empty.
func (s setting) idleIn(mode string) string {
	if s.only != "" && s.only == mode {
		return ""
	}
	return s.idle
}

// settings are all flags of `fairlead run`.
func settings() []setting {
	active := []setting{
		{
			name: "mode", kind: text, own: true, value: backend.Names()[0], values: backend.Names(),
			usage: "the kernel mechanism to program: nft, or ipvs for a choice of how endpoints are picked",
		},
		{
			name: "proxy-mode", kind: text, values: backend.KubeProxyNames(),
			usage: "the same by kube-proxy's names: nftables is nft, and ipvs is ipvs",
		},
		{
			name: "config", kind: text, own: true, file: true,
			usage: "a file with a KubeProxyConfiguration, which is watched. kube-proxy's flags are then ignored, but for " +
				"--hostname-override, --master and those on logging",
		},

		{name: "kubeconfig", kind: text, file: true, usage: "a file that says how to reach the API server; empty: as every pod is told"},
		{name: "master", kind: text, first: true, usage: "the URL of the API server, whatever --kubeconfig says"},
		{name: "kube-api-qps", kind: number, value: "5", usage: "requests a second to the API server, in the long run"},
		{name: "kube-api-burst", kind: integer, value: "10", usage: "requests to the API server at once"},
		{
			name: "kube-api-content-type", kind: text, value: "application/vnd.kubernetes.protobuf",
			usage: "the content type of requests to the API server",
		},
		{
			name: "batch-period", kind: duration, own: true, value: "50ms",
			usage: "how long changes of the API server may gather while there are many, to save processor time; a few are read at once. " +
				"0: all are",
		},
		{
			name: "mass-removal-delay", kind: duration, own: true, value: "1m",
			usage: "how long removals wait if a list of the API server lacks more than half of the Services or EndpointSlices that are programmed, " +
				"before it is listed once more. 0: they do not wait",
		},
		{
			name: "give-way-after", kind: duration, own: true, value: "1m",
			usage: "how long after this program has ended its rules still go before those of another Service proxy, such as kube-proxy, " +
				"if there are any. 0: no longer",
		},
		{
			name: "nft-own-table", kind: boolean, own: true, value: "false",
			usage: "own the nftables tables: while this program runs, the kernel refuses changes of them by others, and nft flush ruleset " +
				"leaves them out. It needs Linux 6.9 or newer",
		},
		{name: "hostname-override", kind: text, first: true, usage: "the name of this node; empty: the hostname"},

		{
			name: "manifests", kind: text, own: true, folder: true,
			usage: "a folder of YAML files with Services, Pods and EndpointSlices, which is watched, instead of an API server",
		},
		{
			name: "service-cidr", kind: list, own: true,
			usage: "with --manifests, the network that Services without a clusterIP get one from; for dual stack one of each family",
		},
		{
			name: "dns-listen", kind: text, own: true,
			usage: "with --manifests, the address and port to answer Services' DNS names on, such as 10.0.0.1:53; empty: nowhere",
		},
		{name: "cluster-domain", kind: text, own: true, value: "cluster.local", usage: "the domain of Services' DNS names"},

		{
			name: "cluster-cidr", kind: list,
			usage: "the networks of the pods; connections to cluster IPs from elsewhere are masqueraded. Empty: no connection is",
		},
		{
			name: "detect-local-mode", kind: text, value: "ClusterCIDR",
			values: []string{"ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"},
			usage:  "how a client is told to be a pod: by --cluster-cidr, by the Node's podCIDRs, or by the interface that it comes in on",
		},
		{name: "pod-bridge-interface", kind: text, usage: "the bridge of the pods, for --detect-local-mode=BridgeInterface"},
		{name: "pod-interface-name-prefix", kind: text, usage: "how pods' interfaces are named, for --detect-local-mode=InterfaceNamePrefix"},
		{name: "masquerade-all", kind: boolean, value: "false", usage: "masquerade every connection to a cluster IP"},
		{
			name: "nodeport-addresses", kind: list, values: []string{"primary", "localhost", "all"},
			usage: "the addresses of this node that node ports are served on: networks, primary (those of the Node object), " +
				"localhost (TCP only, by a relay) or all (but localhost). Empty: primary, or with --mode=ipvs or --manifests all",
		},
		{
			name: "ping-service-ips", kind: boolean, value: "false", own: true,
			usage: "answer pings to the addresses of Services that have endpoints",
		},
		{
			name: "bind-address", kind: text,
			usage: "this node's primary address, instead of the Node object's of its family; nothing is bound to it. " +
				"The default addresses of the servers below are of its family",
		},
		{
			name: "healthz-bind-address", kind: text, value: "0.0.0.0:10256",
			usage: "the address and port of /healthz and /livez",
		},
		{name: "healthz-port", kind: integer, usage: "deprecated: use --healthz-bind-address. 0: no /healthz"},
		{
			name: "metrics-bind-address", kind: text, value: "127.0.0.1:10249",
			usage: "the address and port of /metrics",
		},
		{name: "metrics-port", kind: integer, usage: "deprecated: use --metrics-bind-address. 0: no /metrics"},
		{
			name: "bind-address-hard-fail", kind: boolean, value: "false",
			usage: "end if an address can't be listened on, instead of trying again every 5 s",
		},
		{name: "profiling", kind: boolean, value: "false", usage: "show the program's profiles at --metrics-bind-address, /debug/pprof/"},
		{
			name: "init-only", kind: boolean, value: "false", own: true,
			usage: "set up what may take more rights than CAP_NET_ADMIN, which are modules and sysctls for --mode=ipvs and nothing " +
				"for nft, and end",
		},
		{name: "log-level", kind: text, first: true, value: levelInfo, values: levels(), usage: levelUsage},
		{name: "log-format", kind: text, first: true, value: formatText, values: formats(), usage: formatUsage},
		{name: "v", short: "v", kind: integer, first: true, usage: "kube-proxy's way to set --log-level: 4 and more are debug"},
		{name: "cleanup", kind: boolean, instead: "run fairlead cleanup"},
		{name: "write-config-to", kind: text, instead: "leave it out: Fairlead writes no files"},
		{name: "logging-format", kind: text, first: true, values: formats(), usage: "kube-proxy's name for --log-format"},
	}
	return slices.Concat(active, backendSettings(), idleSettings())
}

// backendSettings are the flags that one backend obeys.
func backendSettings() []setting {
	var all []setting
	for _, b := range backend.All() {
		for _, f := range b.Flags {
			all = append(all, setting{
				name: f.Name, kind: kind(f.Kind), value: f.Default, values: f.Choices, own: f.Own, only: b.Name, idle: idleOutside(b.Name),
				usage: "with --mode=" + b.Name + ", " + f.Usage,
			})
		}
	}
	return all
}

// idleSettings are the flags of kube-proxy that have no effect in any mode.
func idleSettings() []setting {
	var idle []setting
	for _, group := range []struct {
		reason string
		flags  map[string]kind
	}{
		{idleIPTables, map[string]kind{"iptables-masquerade-bit": integer}},
		{idleLocalhost, map[string]kind{"iptables-localhost-nodeports": boolean}},
		{idleSync, map[string]kind{
			"iptables-sync-period": duration, "iptables-min-sync-period": duration,
			"ipvs-sync-period": duration, "ipvs-min-sync-period": duration,
		}},
		{idleConntrack, map[string]kind{
			"conntrack-max-per-core": integer, "conntrack-min": integer, "conntrack-tcp-be-liberal": boolean,
			"conntrack-tcp-timeout-established": duration, "conntrack-tcp-timeout-close-wait": duration,
			"conntrack-udp-timeout": duration, "conntrack-udp-timeout-stream": duration,
		}},
		{idleOOM, map[string]kind{"oom-score-adj": integer}},
		{idleGates, map[string]kind{"feature-gates": list}},
		{idleHidden, map[string]kind{"show-hidden-metrics-for-version": text}},
		{idleRefresh, map[string]kind{"config-sync-period": duration}},
		{idleLog, map[string]kind{
			"log-flush-frequency": duration, "vmodule": list,
			"log-text-split-stream": boolean, "log-text-info-buffer-size": text,
			"log-json-split-stream": boolean, "log-json-info-buffer-size": text,
		}},
	} {
		for name, kind := range group.flags {
			idle = append(idle, setting{name: name, kind: kind, idle: group.reason, usage: "no effect: " + group.reason})
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
	into    Flags
}

var _ pflag.Value = flagValue{}

// String implements [pflag.Value].
func (v flagValue) String() string { return cmp.Or(v.into[v.setting.name], v.setting.value) }

// Set implements [pflag.Value].
func (v flagValue) Set(value string) error {
	if v.setting.kind == list && v.into[v.setting.name] != "" && value != "" {
		value = v.into[v.setting.name] + "," + value
	}
	if v.into[v.setting.name] = value; value == "" {
		delete(v.into, v.setting.name)
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
		flag.Hidden = s.idleIn(s.only) != "" || s.instead != ""
		if s.kind == boolean {
			flag.NoOptDefVal = "true"
		}
		// The errors are that there is no such flag.
		switch {
		case s.folder:
			_ = cmd.MarkFlagDirname(s.name)
		case s.file:
			_ = cmd.MarkFlagFilename(s.name)
		default:
			completeWith(cmd, s.name, s.values...)
		}
	}
	return into
}

// input is where a configuration comes from.
type input struct {
	given Flags

	// labels say where a value stands that is from no flag.
	labels map[string]string
	// notes are warnings about the input.
	notes []Note
}

// Note warns of a setting that was given.
type Note struct {
	// Setting is what the user wrote, and Reason why it has no effect, or what to use
	// if it is Deprecated.
	Setting, Reason string
	Deprecated      bool
}

// LogNotes warns of settings without effect, and of deprecated ones.
func (c Config) LogNotes(ctx context.Context, log *slog.Logger) {
	for _, n := range c.Notes {
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
func fromFlags(flags Flags) input { return input{given: flags} }

// under returns the input from flags with a configuration file under them:
// kube-proxy's flags are ignored then, with few exceptions.
func under(flags Flags, file configFile) input {
	in := input{given: maps.Clone(file.given), labels: map[string]string{}, notes: slices.Clone(file.notes)}
	fields := fieldFlags()
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		in.labels[fields[field]] = "--config: " + field
	}
	for name := range file.given {
		in.labels[name] = file.label(name)
	}
	for _, s := range settings() {
		if _, ok := file.given[s.name]; !ok && (s.own || s.first) {
			delete(in.labels, s.name)
		}
		value, ok := flags[s.name]
		switch {
		case !ok:
		case s.own || s.first || s.idleIn(s.only) != "":
			in.given[s.name] = value
			delete(in.labels, s.name)
		default:
			in.notes = append(in.notes, Note{Setting: "--" + s.name, Reason: "--config is set: write it into the file"})
		}
	}
	return in
}
