package nft

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// mustDryRun returns the result of a dry run of Replace. It fails the test if the kernel's
// ruleset changes.
func mustDryRun(t *testing.T, ns *nettest.Namespace, node dataplane.Node, services []*dataplane.Service, translator ...Translator) dataplane.DryRun {
	t.Helper()
	var dryRun dataplane.DryRun
	opts := Options{DryRun: &dryRun}
	if len(translator) > 0 {
		opts.Translator = translator[0]
	}
	d := openWithOptions(t, ns, opts)
	before := generation(t, d)
	mustReplace(t, d, node, services...)
	if after := generation(t, d); after != before {
		t.Errorf("the dry run has changed the ruleset from generation %d to %d", before, after)
	}
	return dryRun
}

// wantEmptyDryRun fails the test if a Replace would write anything.
func wantEmptyDryRun(t *testing.T, ns *nettest.Namespace, node dataplane.Node, services []*dataplane.Service, translator ...Translator) {
	t.Helper()
	dryRun := mustDryRun(t, ns, node, services, translator...)
	if len(dryRun.Writes) > 0 || len(dryRun.Differences) > 0 {
		t.Errorf("a dry run has found %v and would write %v, want nothing", dryRun.Differences, dryRun.Writes)
	}
}

// TestDryRun compares what a dry run records with what Replace writes.
func TestDryRun(t *testing.T) {
	t.Parallel()
	_, ns := newDataplane(t)
	services := sampleServices(t)
	cold := mustDryRun(t, ns, nodeWithAllSettings(), services)
	var objects []string
	for _, d := range cold.Differences {
		objects = append(objects, d.Object+": "+d.Problem)
	}
	if want := []string{"table ip fairlead: missing", "table ip6 fairlead: missing"}; !slices.Equal(objects, want) {
		t.Errorf("differences without tables: %q, want %q", objects, want)
	}
	mustReplace(t, openInNamespace(t, ns), nodeWithAllSettings(), services...)
	wantEmptyDryRun(t, ns, nodeWithAllSettings(), services)
	listing := runNFT(t, ns, nftBinaries(t)["1.0.6"], "list ruleset")
	for object, prefix := range map[string]string{"chain": "\n\tchain ", "counter": "\n\tcounter ", "set": "\n\tset |\n\tmap "} {
		written := 0
		for w, n := range cold.Writes {
			if w.Object == object && w.Op == dataplane.Add {
				written += n
			}
		}
		want := 0
		for p := range strings.SplitSeq(prefix, "|") {
			want += strings.Count(listing, p)
		}
		if written != want {
			t.Errorf("the dry run would have added %d %ss, Replace has added %d", written, object, want)
		}
	}
}

// TestDryRunDifferences checks the descriptions of edits of the tables.
func TestDryRunDifferences(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, script, want string }{
		{"a chain is added", "add chain ip fairlead extra", `chain extra in table ip fairlead: unexpected [] []`},
		{"a rule is added", "insert rule ip fairlead nat-prerouting counter accept", `chain nat-prerouting in table ip fairlead: rule 1 of `},
		{"a rule is appended", "add rule ip fairlead filter-input counter", `chain filter-input in table ip fairlead: 3 rules instead of 2`},
		{"a chain drops by default", "add chain ip fairlead nat-prerouting { policy drop; }", `chain nat-prerouting in table ip fairlead: different [] []`},
		{"a set is added", "add set ip fairlead extra { type mark; }", `set extra in table ip fairlead: unexpected [] []`},
		{
			"the pod networks are changed", "flush set ip fairlead pod-cidrs; add element ip fairlead pod-cidrs { 192.168.0.0/16 }",
			`set pod-cidrs in table ip fairlead: different [192.168.0.0/16] [10.1.0.0/16]`,
		},
		{"node ports are on another address", "add element ip fairlead node-port-addrs { 192.0.2.9 }", `set node-port-addrs in table ip fairlead: different [192.0.2.9] []`},
		{"an unused endpoint port is added", "add element ip fairlead endpoint-ports { 7 }", `set endpoint-ports in table ip fairlead: different [7] []`},
		{"a Service has a catch-all", "add element ip fairlead services { * : 0:1 }", `elements of set services in table ip fairlead: unexpected [*] []`},
		{
			"an invalid slot is added", "add element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . 1:7 : 10.1.0.9 . 9 }",
			`elements of set endpoints-1 in table ip fairlead: unexpected [10.96.0.1:80/TCP] []`,
		},
		{"the table is dormant", "add table ip fairlead { flags dormant; }", `table ip fairlead: dormant [] []`},
		{"a table is deleted", "delete table ip6 fairlead", `table ip6 fairlead: missing [] []`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d, ns := newDataplane(t)
			services := sampleServices(t)
			mustReplace(t, d, nodeWithAllSettings(), services...)
			runNFT(t, ns, nftBinaries(t)["1.0.6"], strings.ReplaceAll(test.script, "; ", "\n"))
			dryRun := mustDryRun(t, ns, nodeWithAllSettings(), services)
			var texts []string
			for _, d := range dryRun.Differences {
				texts = append(texts, fmt.Sprintf("%s: %s %s %s", d.Object, d.Problem, d.Have, d.Want))
			}
			if len(texts) != 1 || !strings.HasPrefix(texts[0], test.want) {
				t.Errorf("differences %q, want one: %q", texts, test.want)
			}
		})
	}
}

// TestDryRunOfRandomStates checks that a dry run records writes exactly if Replace writes.
func TestDryRunOfRandomStates(t *testing.T) {
	t.Parallel()
	for name, translator := range testTranslators() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, ns := newDataplane(t, translator)
			for seed := range uint64(6) {
				random := rand.New(rand.NewPCG(seed, 17))
				services, node := randomServices(t, random, 30), randomNode(random)
				if dryRun := mustDryRun(t, ns, node, services, translator); len(dryRun.Writes) == 0 {
					t.Fatalf("seed %d: the dry run would write nothing", seed)
				}
				mustReplace(t, d, node, services...)
				wantEmptyDryRun(t, ns, node, services, translator)
			}
		})
	}
}
