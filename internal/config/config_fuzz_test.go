package config

import (
	"strings"
	"testing"
)

// FuzzConfigFile checks that a configuration file with any content is either accepted or
// rejected with an error that has one line of text per mistake.
func FuzzConfigFile(f *testing.F) {
	const head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
	for _, text := range []string{
		"", "a: [", "---\n---\n", head,
		head + "mode: nft\nclusterCIDR: 10.0.0.0/8\nnodePortAddresses: [primary, 10.0.0.0/8]\nhealthzBindAddress: 0.0.0.0:10256\n",
		head + "mode: ipvs\nipvs: {scheduler: lc, tcpTimeout: 5s, excludeCIDRs: [x]}\nclientConnection: {kubeconfig: /k, qps: -1, burst: 1e99}\n",
		head + "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: '', interfaceNamePrefix: x}\nconntrack: {maxPerCore: .inf}\n",
		head + "metricsBindAddress: [1, 2]\nportRange: {a: b}\nlogging: &x {format: *x}\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		file, err := parseConfigFile(content, "")
		if err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("the error has no text")
			}
			return
		}
		_, err = parse(mergeConfigFile(Flags{"config": "/config.conf"}, file))
		if err == nil {
			return
		}
		for line := range strings.Lines(err.Error()) {
			if strings.TrimSpace(line) == "" {
				t.Errorf("the error %q has an empty line", err)
			}
		}
	})
}
