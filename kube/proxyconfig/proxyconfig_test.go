package proxyconfig_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/kube/proxyconfig"
)

const header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

func TestDecode(t *testing.T) {
	t.Parallel()
	type fields = map[string]string
	type ignored = []proxyconfig.IgnoredPart
	for _, test := range []struct {
		name, file string
		fields     fields
		ignored    ignored
	}{
		{"no fields", header, fields{}, nil},
		{"separators", "# kube-proxy\n---\n" + header + "mode: ipvs\n---\n", fields{"mode": "ipvs"}, nil},
		{"separators and comments", header + "mode: ipvs\n---\n# end\n---\n", fields{"mode": "ipvs"}, nil},
		{
			"further documents", header + "mode: ipvs\n---\n" + header + "mode: nftables\n---\na: b\n",
			fields{"mode": "ipvs"},
			ignored{{"the documents after the first one", "only the first document counts"}},
		},
		{
			"further document that is no YAML", header + "---\na: [",
			fields{},
			ignored{{"the documents after the first one", "only the first document counts"}},
		},
		{
			"fields of older releases", header + "resourceContainer: /kube-proxy\nudpIdleTimeout: 250ms\nconntrack: {max: 0, min: 5}\nportRange: ''\n",
			fields{"conntrack.min": "5"},
			ignored{{"conntrack.max", "unknown field"}, {"resourceContainer", "unknown field"}, {"udpIdleTimeout", "unknown field"}},
		},
		{
			"fields of newer releases", header + "autoscaler: {a: {b: 1}}\nnftables: {masqueradeAll: true, flowOffload: true}\n",
			fields{"nftables.masqueradeAll": "true"},
			ignored{{"autoscaler", "unknown field"}, {"nftables.flowOffload", "unknown field"}},
		},
		{
			"other case", header + "IPTables: {masqueradeAll: true}\nclustercidr: 10.0.0.0/8\nipvs: {strictArp: true}\n",
			fields{},
			ignored{
				{"IPTables", "unknown field: write it as iptables"},
				{"clustercidr", "unknown field: write it as clusterCIDR"},
				{"ipvs.strictArp", "unknown field: write it as ipvs.strictARP"},
			},
		},
		{
			"duplicate field", header + "mode: nftables\nclusterCIDR: 10.0.0.0/8\nmode: ipvs\nmode: iptables\n",
			fields{"mode": "iptables", "clusterCIDR": "10.0.0.0/8"},
			ignored{
				{"mode in line 3", "duplicate field: the value in line 6, iptables, counts"},
				{"mode in line 5", "duplicate field: the value in line 6, iptables, counts"},
			},
		},
		{
			"duplicate section", header + "ipvs: {scheduler: rr}\nipvs:\n  strictARP: true\n  strictARP: true\n",
			fields{"ipvs.strictARP": "true"},
			ignored{
				{"ipvs in line 3", "duplicate field: the value in line 4 counts"},
				{"ipvs.strictARP in line 5", "duplicate field: the value in line 6, true, counts"},
			},
		},
		{
			"JSON", `{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "clientConnection": {"qps": 2.5, "burst": 100}}`,
			fields{"clientConnection.qps": "2.5", "clientConnection.burst": "100"},
			nil,
		},
		{
			"values that differ from unset", header + "conntrack: {maxPerCore: 0, min: null, tcpEstablishedTimeout: 0s, udpTimeout: 0s}\n" +
				"iptables: {localhostNodePorts: false, masqueradeAll: false}\noomScoreAdj: 0\n",
			fields{"conntrack.maxPerCore": "0", "conntrack.tcpEstablishedTimeout": "0s", "iptables.localhostNodePorts": "false", "oomScoreAdj": "0"},
			nil,
		},
		{
			"values of several types", header + "nodePortAddresses: [primary, 10.0.0.0/8]\nfeatureGates: {A: true, B: false}\nbindAddressHardFail: yes\n" +
				"logging: {flushFrequency: 5s, vmodule: [{filePattern: a, verbosity: 3}], options: {json: {infoBufferSize: 1Ki}}}\n",
			fields{
				"nodePortAddresses": "primary,10.0.0.0/8", "featureGates.A": "true", "bindAddressHardFail": "true", "logging.flushFrequency": "5s",
				"logging.vmodule": "map[filePattern:a verbosity:3]", "logging.options.json.infoBufferSize": "1Ki",
			},
			nil,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, err := proxyconfig.Decode([]byte(test.file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(proxyconfig.Document{Fields: test.fields, Ignored: test.ignored}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
