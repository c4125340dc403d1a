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

// configFile is a file with a KubeProxyConfiguration, kube-proxy's configuration.
type configFile struct {
	values      Flags // by the names of the flags that say the same
	content     []byte
	fieldByFlag map[string]string // where each value stands
	warnings    []Warning
}

// acceptContentTypes is a field for which there is no flag.
const acceptContentTypes = "accept-content-types"

// fieldFlags has the flag that says the same as a field.
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
	}
}

// ignoredFieldReason returns why a field has no effect.
func ignoredFieldReason(field string) string {
	section, _, _ := strings.Cut(field, ".")
	switch {
	case strings.HasSuffix(field, "yncPeriod") && section != "configSyncPeriod":
		return ignoredSync
	case field == "iptables.localhostNodePorts":
		return ignoredLocalhost
	case field == "nftables.masqueradeAll":
		return ignoredNFTables
	case section == "nftables":
		return "Fairlead marks no packets"
	}
	return cmp.Or(map[string]string{
		"iptables": ignoredIPTables, "conntrack": ignoredConntrack, "oomScoreAdj": ignoredOOM,
		"featureGates": ignoredFeatureGates, "showHiddenMetricsForVersion": ignoredHiddenMetrics, "configSyncPeriod": ignoredConfigSync,
		"logging": ignoredLogging, "winkernel": ignoredWindows, "windowsRunAsService": ignoredWindows,
		"portRange": "it was of kube-proxy's userspace mode",
	}[section], "Fairlead does not know it")
}

// readConfigFile reads a file. An error names the file, and the field where
// there is one to name.
func readConfigFile(path string) (configFile, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return configFile{}, fmt.Errorf("--config: %w", err)
	}
	f, err := parseConfigFile(content)
	if err != nil {
		return configFile{}, fmt.Errorf("--config: %s: %w", path, err)
	}
	return f, nil
}

func parseConfigFile(content []byte) (configFile, error) {
	fields, err := proxyconfig.Decode(content)
	if err != nil {
		return configFile{}, err
	}
	f := configFile{values: Flags{}, content: content, fieldByFlag: map[string]string{}}
	f.addFields(fields)
	return f, nil
}

// label returns how the user knows a value.
func (f configFile) label(flag string) string { return "--config: " + f.fieldByFlag[flag] }

// addFields sorts the fields that are set into those with a flag and those without
// effect.
func (f *configFile) addFields(fields map[string]string) {
	flags := fieldFlags()
	// kube-proxy's mode nftables reads one of two fields. Its mode ipvs goes by what is said of iptables, and so does a file
	// that leaves the mode to it.
	switch fields["mode"] {
	case "nftables":
		delete(flags, "iptables.masqueradeAll")
	case "ipvs":
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
