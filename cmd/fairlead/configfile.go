package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/kube-proxy/config/v1alpha1"
	kubejson "sigs.k8s.io/json"
)

// configFile is a file with a KubeProxyConfiguration
// (kubeproxy.config.k8s.io/v1alpha1), kube-proxy's configuration.
type configFile struct {
	given // by the names of the flags that say the same

	content []byte
	fields  map[string]string // where each value stands
	notes   []note
}

const (
	configKind = "KubeProxyConfiguration"
	// acceptContentTypes is a field for which there is no flag.
	acceptContentTypes = "accept-content-types"
)

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

// whyIdle returns why a field has no effect.
func whyIdle(field string) string {
	section, _, _ := strings.Cut(field, ".")
	switch {
	case strings.HasSuffix(field, "yncPeriod") && section != "configSyncPeriod":
		return idleSync
	case field == "iptables.localhostNodePorts":
		return idleLocalhost
	case field == "nftables.masqueradeAll":
		return idleNFTables
	case section == "nftables":
		return "Fairlead marks no packets"
	}
	return cmp.Or(map[string]string{
		"iptables": idleIPTables, "conntrack": idleConntrack, "oomScoreAdj": idleOOM,
		"featureGates": idleGates, "showHiddenMetricsForVersion": idleHidden, "configSyncPeriod": idleRefresh,
		"logging": idleLog, "winkernel": idleWindows, "windowsRunAsService": idleWindows,
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
	f := configFile{given: given{}, content: content, fields: map[string]string{}}
	if err := f.decode(); err != nil {
		return configFile{}, fmt.Errorf("--config: %s: %w", path, err)
	}
	return f, nil
}

// label returns how the user knows a value.
func (f configFile) label(flag string) string { return "--config: " + f.fields[flag] }

func (f *configFile) decode() error {
	var document map[string]any
	decoder := yaml.NewDecoder(bytes.NewReader(f.content))
	if err := decoder.Decode(&document); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var second any
	if err := decoder.Decode(&second); !errors.Is(err, io.EOF) {
		return errors.New("more than one document: leave only the " + configKind)
	}
	if got, want := document["apiVersion"], v1alpha1.SchemeGroupVersion.String(); got != want {
		return fmt.Errorf("apiVersion: %v is not known: write %s", orNothing(got), want)
	}
	if got := document["kind"]; got != configKind {
		return fmt.Errorf("kind: %v is not known: write %s", orNothing(got), configKind)
	}
	asJSON, err := json.Marshal(document)
	if err != nil {
		return err
	}
	// For its types only: what is set, and what is not, is in the document.
	var typed v1alpha1.KubeProxyConfiguration
	strict, err := kubejson.UnmarshalStrict(asJSON, &typed)
	if err := errors.Join(append(strict, err)...); err != nil {
		return err
	}
	delete(document, "apiVersion")
	delete(document, "kind")
	f.take(leaves("", document))
	return nil
}

func orNothing(value any) string {
	if value == nil {
		return "nothing"
	}
	return fmt.Sprintf("%q", fmt.Sprint(value))
}

// take sorts the fields that are set into those with a flag and those without
// effect.
func (f *configFile) take(fields map[string]string) {
	flags := fieldFlags()
	// kube-proxy's mode ipvs goes by what is said of iptables, and so does a file
	// that leaves the mode to it.
	switch fields["mode"] {
	case modeNFT.kubeProxyName():
		delete(flags, "iptables.masqueradeAll")
	case modeIPVS.kubeProxyName():
		delete(flags, "nftables.masqueradeAll")
	}
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		flag, ok := flags[field]
		if !ok {
			f.notes = append(f.notes, note{what: "--config: " + field, why: whyIdle(field)})
			continue
		}
		f.given[flag] = fields[field]
		f.fields[flag] = field
	}
}

// leaves returns the fields of a document with their values as flags have them.
// Those that are empty, zero or false are not set, as they are to kube-proxy.
func leaves(path string, document map[string]any) map[string]string {
	found := map[string]string{}
	for name, value := range document {
		if path != "" {
			name = path + "." + name
		}
		switch value := value.(type) {
		case map[string]any:
			maps.Copy(found, leaves(name, value))
		case []any:
			var elements []string
			for _, element := range value {
				elements = append(elements, fmt.Sprint(element))
			}
			found[name] = strings.Join(elements, ",")
		case nil:
		default:
			found[name] = fmt.Sprint(value)
		}
		switch found[name] {
		case "", "0", "0s", "false":
			delete(found, name)
		}
	}
	return found
}
