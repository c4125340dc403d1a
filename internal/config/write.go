package config

import (
	"fmt"
	"maps"
	"os"

	"fairlead.io/fairlead/kube/proxyconfig"
)

// WriteFile writes the configuration as a KubeProxyConfiguration to the path in WriteConfigTo, as
// kube-proxy does. flags are the flags that c was loaded from.
func (c Config) WriteFile(flags Flags) error {
	fields := map[string]string{}
	if path, ok := flags["config"]; ok {
		content, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("--config: %w", err)
		}
		document, err := proxyconfig.Decode(content)
		if err != nil {
			return fmt.Errorf("--config: %s: %w", path, err)
		}
		maps.Copy(fields, document.Fields)
	} else {
		addFlagFields(fields, flags, c.ProxyMode)
	}
	fields["mode"] = c.ProxyMode
	if flags["hostname-override"] != "" {
		fields["hostnameOverride"] = c.Tracker.NodeName
	}
	text, err := proxyconfig.Encode(fields)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.WriteConfigTo, text, 0o644); err != nil { //nolint:gosec // contains no secrets
		return fmt.Errorf("--write-config-to: %w", err)
	}
	return nil
}

// addFlagFields adds the fields of the flags that are set.
func addFlagFields(fields map[string]string, flags Flags, proxyMode string) {
	for field, flag := range unusedFieldFlags() {
		if value, ok := flags[flag]; ok {
			fields[field] = value
		}
	}
	for field, flag := range fieldFlags() {
		if value, ok := flags[flag]; ok {
			fields[field] = value
		}
	}
	if _, ok := flags["ipvs-min-sync-period"]; !ok {
		fields["ipvs.minSyncPeriod"] = "1s" // the default for flags; a file has none
	}
	// kube-proxy uses these flags in all modes but ipvs. The encoder clears the sections of
	// other modes.
	for field, flag := range map[string]string{"SyncPeriod": "sync-period", "MinSyncPeriod": "min-sync-period"} {
		if value, ok := flags["iptables-"+flag]; ok && proxyMode == "nftables" {
			fields["nftables."+string(field[0]|0x20)+field[1:]] = value
		}
	}
}

// unusedFieldFlags maps fields that Fairlead does not use to kube-proxy's equivalent flags.
func unusedFieldFlags() map[string]string {
	return map[string]string{
		"iptables.masqueradeBit":          "iptables-masquerade-bit",
		"iptables.syncPeriod":             "iptables-sync-period",
		"iptables.minSyncPeriod":          "iptables-min-sync-period",
		"ipvs.syncPeriod":                 "ipvs-sync-period",
		"ipvs.minSyncPeriod":              "ipvs-min-sync-period",
		"conntrack.maxPerCore":            "conntrack-max-per-core",
		"conntrack.min":                   "conntrack-min",
		"conntrack.tcpBeLiberal":          "conntrack-tcp-be-liberal",
		"conntrack.tcpEstablishedTimeout": "conntrack-tcp-timeout-established",
		"conntrack.tcpCloseWaitTimeout":   "conntrack-tcp-timeout-close-wait",
		"conntrack.udpTimeout":            "conntrack-udp-timeout",
		"conntrack.udpStreamTimeout":      "conntrack-udp-timeout-stream",
		"oomScoreAdj":                     "oom-score-adj",
		"configSyncPeriod":                "config-sync-period",
		"showHiddenMetricsForVersion":     "show-hidden-metrics-for-version",
		"logging.flushFrequency":          "log-flush-frequency",
	}
}
