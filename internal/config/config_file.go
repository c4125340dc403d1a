package config

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"fairlead.io/fairlead/kube/proxyconfig"
)

// configFile represents a file with a KubeProxyConfiguration.
type configFile struct {
	values      Flags // by the names of the equivalent flags
	content     []byte
	fields      map[string]string // all fields that kube-proxy knows, by path
	fieldByFlag map[string]string // origin of each value
	warnings    []Warning
}

// acceptContentTypes names the setting of a field that has no flag.
const acceptContentTypes = "accept-content-types"

// fieldFlags maps fields to the equivalent flags.
func fieldFlags() map[string]string {
	return map[string]string{
		"clientConnection.kubeconfig":         "kubeconfig",
		"clientConnection.acceptContentTypes": acceptContentTypes,
		"clientConnection.contentType":        "kube-api-content-type",
		"clientConnection.qps":                "kube-api-qps",
		"clientConnection.burst":              "kube-api-burst",
		"logging.format":                      "logging-format",
		"logging.verbosity":                   "v",
		"hostnameOverride":                    "hostname-override",
		"bindAddress":                         "bind-address",
		"healthzBindAddress":                  "healthz-bind-address",
		"metricsBindAddress":                  "metrics-bind-address",
		"bindAddressHardFail":                 "bind-address-hard-fail",
		"enableProfiling":                     "profiling",
		"mode":                                "proxy-mode",
		"iptables.masqueradeAll":              "masquerade-all",
		"iptables.localhostNodePorts":         localhostNodePorts,
		"nftables.masqueradeAll":              "masquerade-all",
		"detectLocalMode":                     "detect-local-mode",
		"detectLocal.bridgeInterface":         "pod-bridge-interface",
		"detectLocal.interfaceNamePrefix":     "pod-interface-name-prefix",
		"clusterCIDR":                         "cluster-cidr",
		"nodePortAddresses":                   "nodeport-addresses",
		"ipvs.scheduler":                      "ipvs-scheduler",
		"ipvs.excludeCIDRs":                   "ipvs-exclude-cidrs",
		"ipvs.strictARP":                      "ipvs-strict-arp",
		"ipvs.tcpTimeout":                     "ipvs-tcp-timeout",
		"ipvs.tcpFinTimeout":                  "ipvs-tcpfin-timeout",
		"ipvs.udpTimeout":                     "ipvs-udp-timeout",
		"conntrack.maxPerCore":                "conntrack-max-per-core",
		"conntrack.min":                       "conntrack-min",
		"conntrack.tcpEstablishedTimeout":     "conntrack-tcp-timeout-established",
		"conntrack.tcpCloseWaitTimeout":       "conntrack-tcp-timeout-close-wait",
		"conntrack.tcpBeLiberal":              "conntrack-tcp-be-liberal",
		"conntrack.udpTimeout":                "conntrack-udp-timeout",
		"conntrack.udpStreamTimeout":          "conntrack-udp-timeout-stream",
	}
}

// ignoredFieldReason returns why a field has no effect.
func ignoredFieldReason(field string) string {
	section, _, _ := strings.Cut(field, ".")
	switch {
	case strings.HasSuffix(field, "yncPeriod") && section != "configSyncPeriod":
		return ignoredSync
	case field == "logging.vmodule":
		return ignoredVModule
	case field == "nftables.masqueradeAll":
		return ignoredNFTables
	case section == "nftables":
		return "Fairlead does not mark packets"
	}
	return cmp.Or(map[string]string{
		"iptables": ignoredIPTables, "oomScoreAdj": ignoredOOM,
		"featureGates": ignoredFeatureGates, "showHiddenMetricsForVersion": ignoredHiddenMetrics, "configSyncPeriod": ignoredConfigSync,
		"logging": ignoredLogging, "winkernel": ignoredWindows, "windowsRunAsService": ignoredWindows,
		"portRange": "it applied to kube-proxy's userspace mode",
	}[section], "Fairlead does not support it")
}

// readConfigFile reads a configuration file. mode is the value of --mode. Errors name the file
// and, if possible, the field.
func readConfigFile(path, mode string) (configFile, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return configFile{}, fmt.Errorf("--config: %w", err)
	}
	f, err := parseConfigFile(content, mode)
	if err != nil {
		return configFile{}, fmt.Errorf("--config: %s: %w", path, err)
	}
	return f, nil
}

func parseConfigFile(content []byte, mode string) (configFile, error) {
	document, err := proxyconfig.Decode(content)
	if err != nil {
		return configFile{}, err
	}
	f := configFile{values: Flags{}, content: content, fields: document.Fields, fieldByFlag: map[string]string{}}
	for _, part := range document.Ignored {
		f.warnings = append(f.warnings, Warning{Setting: part.Name, Reason: part.Reason, Kind: IgnoredField})
	}
	f.addFields(document.Fields, effectiveProxyMode(mode, document.Fields["mode"]))
	return f, nil
}

// label names the field that a setting comes from, for messages.
func (f configFile) label(flag string) string { return "--config: " + f.fieldByFlag[flag] }

// addFields stores the fields that have an equivalent flag, and adds a warning for each
// field without effect in kube-proxy's mode.
func (f *configFile) addFields(fields map[string]string, proxyMode string) {
	flags := fieldFlags()
	switch proxyMode {
	case "nftables":
		delete(flags, "iptables.masqueradeAll")
	case proxyModeIPTables, "ipvs":
		delete(flags, "nftables.masqueradeAll")
	}
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		flag, ok := flags[field]
		if !ok {
			f.warnings = append(f.warnings, Warning{Setting: "--config: " + field, Reason: ignoredFieldReason(field)})
			continue
		}
		f.values[flag] = fields[field]
		f.fieldByFlag[flag] = field
	}
}
