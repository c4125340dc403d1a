package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// TestDrift checks that manual changes of the tables are repaired at once.
func TestDrift(t *testing.T) {
	t.Parallel()
	// $SET, $KEY and $DATA identify the element that directs TCP connections for Service
	// 10.96.0.10 to pod a. $SLOT is the last part of the key. $ELSEWHERE is a pod that is not
	// an endpoint. 10.96.0.12 has no endpoints.
	for _, test := range []struct{ name, commands string }{
		{"IPv4 table deleted", "delete table ip fairlead"},
		{"IPv6 table deleted", "delete table ip6 fairlead"},
		{"ruleset flushed", "flush ruleset"},
		{"chain flushed", "flush chain ip fairlead nat-prerouting"},
		{"map flushed", "flush map ip6 fairlead services"},
		{"Service deleted from its map", "delete element ip fairlead services { 10.96.0.10 . tcp . 80 }"},
		{"endpoint deleted from its map", "delete element ip fairlead $SET { $KEY }"},
		{"endpoint replaced", "delete element ip fairlead $SET { $KEY }; add element ip fairlead $SET { $KEY : $ELSEWHERE . 8080 }"},
		{"endpoint added", "add element ip fairlead $SET { 10.96.0.99 . tcp . 80 . $SLOT : $DATA }"},
		{"Service with endpoints refused", "delete element ip fairlead services { 10.96.0.10 . tcp . 80 }; add element ip fairlead services { 10.96.0.10 . tcp . 80 : 0:0 }"},
		{"Service without endpoints not refused", "delete element ip fairlead services { 10.96.0.12 . tcp . 80 }"},
		{"rule added in front", "insert rule ip fairlead nat-prerouting ip daddr 10.96.0.10 drop"},
		{"chain added", "add chain ip fairlead mine; add rule ip fairlead mine drop"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, "a", "b", "elsewhere")
			n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
			n.writeFile("empty.yaml", serviceYAML("empty", 12, 80))
			n.writePods("backend", "a", "b")
			n.run()
			backend, empty := agenttest.ServiceAddrs(10, 80), agenttest.ServiceAddrs(12, 80)
			n.awaitAnswers(backend, "a", "b")
			established := n.openConns(backend)
			want := n.ruleset()
			set, key, data := n.endpointElement("10.96.0.10", "a")
			commands := strings.NewReplacer("$SET", set, "$KEY", key, "$DATA", data,
				"$SLOT", key[strings.LastIndex(key, " ")+1:], "$ELSEWHERE", n.pods["elsewhere"].IPv4.String()).Replace(test.commands)

			for range 2 { // repairs work repeatedly
				before := n.generation()
				n.nft(commands)
				if n.generation() == before {
					t.Fatalf("nft %q did not change the ruleset", commands)
				}
				agenttest.Eventually(t, func() error {
					if got := n.ruleset(); !slices.Equal(got, want) {
						return fmt.Errorf("ruleset is not repaired:\n%s", n.nft("list", "ruleset"))
					}
					return nil
				})
				n.awaitAnswers(backend, "a", "b")
				n.awaitRefused(empty)
				established.checkOpen(t)
			}

			// Later changes are still programmed.
			n.removeFile("pod-a.yaml")
			n.awaitAnswers(backend, "b")
		})
	}
}

// TestOtherTables checks that Fairlead ignores changes of other programs' tables.
func TestOtherTables(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	// This is the last record of a start.
	n.program.awaitLog(func(r record) bool { return r.Msg == "no kernel state of another mode remains" })
	n.nft(agenttest.OtherTables)
	before := len(n.program.log.records())
	n.nft("add rule ip foreign in counter accept; flush chain inet fairlead prerouting; delete table ip6 foreign")
	// A later change of ours shows that the notification was processed.
	n.writeFile("pod-a.yaml", n.podYAML("backend", "a", false))
	n.awaitRefused(agenttest.ServiceAddrs(10, 80))
	if got := n.program.log.records()[before:]; len(got) != 0 {
		t.Errorf("logged: %+v", got)
	}
}

// endpointElement returns the map element that directs connections to TCP port 80 of the Service's
// address to the pod, in nft's syntax.
func (n *testNode) endpointElement(service, pod string) (set, key, data string) {
	n.t.Helper()
	element := regexp.MustCompile(`(` + regexp.QuoteMeta(service) + ` \. tcp \. 80 \. \S+) .*?: (` + regexp.QuoteMeta(n.pods[pod].IPv4.String()) + ` \. \d+)`)
	for line := range strings.Lines(n.nft("list", "table", "ip", "fairlead")) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "map "); ok {
			set, _, _ = strings.Cut(name, " ")
		}
		for part := range strings.SplitSeq(line, ",") {
			if m := element.FindStringSubmatch(part); m != nil {
				return set, m[1], m[2]
			}
		}
	}
	n.t.Fatalf("no element directs %s to %s:\n%s", service, pod, n.nft("list", "table", "ip", "fairlead"))
	return "", "", ""
}
