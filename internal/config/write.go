package config

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"

	"fairlead.io/fairlead/kube/proxyconfig"
)

// Fields maps the paths of fields of a KubeProxyConfiguration to their values, in the form of
// [proxyconfig.Document.Fields].
type Fields map[string]string

// fields returns the fields of the KubeProxyConfiguration that has the settings of c. flags are the
// flags and file is the configuration file that c was loaded from, nil without one.
func (c Config) fields(flags Flags, file *configFile) Fields {
	fields := Fields{}
	if file != nil {
		maps.Copy(fields, file.fields)
		for _, field := range []string{"logging.format", "logging.verbosity", "logging.flushFrequency"} {
			if value, ok := flags[cmp.Or(fieldFlags()[field], unusedFieldFlags()[field])]; ok {
				fields[field] = value
			}
		}
	} else {
		addFlagFields(fields, flags, c.ProxyMode)
	}
	fields["mode"] = c.ProxyMode
	if flags["hostname-override"] != "" {
		fields["hostnameOverride"] = c.Tracker.NodeName
	}
	return fields
}

// Mode returns the mode under kube-proxy's name, empty if kube-proxy has no such mode.
func (f Fields) Mode() string { return f["mode"] }

// Configz returns the configuration as kube-proxy serves it at /configz, by API group.
func (f Fields) Configz() (map[string]json.RawMessage, error) {
	text, err := proxyconfig.EncodeJSON(f)
	return map[string]json.RawMessage{proxyconfig.Group: text}, err
}

// FieldsAfterReload returns the fields in effect after a reload of the configuration file: the
// fields of next, and the fields of c that only a restart can change.
func (c Config) FieldsAfterReload(next Config) Fields {
	fields := maps.Clone(next.Fields)
	keep := restartFields()
	if c.Mode != next.Mode {
		keep = append(keep, "mode")
	}
	for _, field := range keep {
		if value, ok := c.Fields[field]; ok {
			fields[field] = value
		} else {
			delete(fields, field)
		}
	}
	return fields
}

// restartFields lists the fields that only a restart can change, except mode, see
// [Config.RestartRequired].
func restartFields() []string {
	return []string{
		"bindAddressHardFail", "clientConnection.acceptContentTypes", "clientConnection.burst", "clientConnection.contentType",
		"clientConnection.kubeconfig", "clientConnection.qps", "enableProfiling", "healthzBindAddress", "hostnameOverride",
		"ipvs.excludeCIDRs", "ipvs.scheduler", "ipvs.strictARP", "ipvs.tcpFinTimeout", "ipvs.tcpTimeout", "ipvs.udpTimeout",
		"logging.format", "metricsBindAddress",
	}
}

// WriteFile writes the configuration as a KubeProxyConfiguration to the path in WriteConfigTo, as
// kube-proxy does.
func (c Config) WriteFile() error {
	text, err := proxyconfig.Encode(c.Fields)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.WriteConfigTo, text, 0o644); err != nil { //nolint:gosec // contains no secrets
		return fmt.Errorf("--write-config-to: %w", err)
	}
	return nil
}

// addFlagFields adds the fields of the flags that are set.
func addFlagFields(fields Fields, flags Flags, proxyMode string) {
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
		"iptables.masqueradeBit":      "iptables-masquerade-bit",
		"iptables.syncPeriod":         "iptables-sync-period",
		"iptables.minSyncPeriod":      "iptables-min-sync-period",
		"ipvs.syncPeriod":             "ipvs-sync-period",
		"ipvs.minSyncPeriod":          "ipvs-min-sync-period",
		"oomScoreAdj":                 "oom-score-adj",
		"configSyncPeriod":            "config-sync-period",
		"showHiddenMetricsForVersion": "show-hidden-metrics-for-version",
		"logging.flushFrequency":      "log-flush-frequency",
	}
}
