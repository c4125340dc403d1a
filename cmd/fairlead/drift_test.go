package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Whatever somebody does to the tables by hand is undone at once.
func TestDrift(t *testing.T) {
	t.Parallel()
	// $SET, $KEY and $DATA are the element that leads TCP connections to Service
	// 10.96.0.10 to pod a, $SLOT the last part of the key; $ELSEWHERE is no pod
	// of the Service. 10.96.0.12 has no endpoints.
	for _, test := range []struct{ name, commands string }{
		{"IPv4 table deleted", "delete table ip fairlead"},
		{"IPv6 table deleted", "delete table ip6 fairlead"},
		{"ruleset flushed", "flush ruleset"},
		{"chain flushed", "flush chain ip fairlead nat-prerouting"},
		{"map flushed", "flush map ip6 fairlead services"},
		{"Service deleted from its map", "delete element ip fairlead services { 10.96.0.10 . tcp . 80 }"},
		{"endpoint deleted from its map", "delete element ip fairlead $SET { $KEY }"},
		{"endpoint led astray", "delete element ip fairlead $SET { $KEY }; add element ip fairlead $SET { $KEY : $ELSEWHERE . 8080 }"},
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
			backend, empty := serviceAddrs(10, 80), serviceAddrs(12, 80)
			n.awaitAnswers(backend, "a", "b")
			established := n.openConns(backend)
			want := n.ruleset()
			set, key, data := n.endpointElement("10.96.0.10", "a")
			commands := strings.NewReplacer("$SET", set, "$KEY", key, "$DATA", data,
				"$SLOT", key[strings.LastIndex(key, " ")+1:], "$ELSEWHERE", n.pods["elsewhere"].IPv4.String()).Replace(test.commands)

			// The second time is as good as the first.
			for range 2 {
				before := n.generation()
				n.nft(commands)
				if n.generation() == before {
					t.Fatalf("nft %q changed nothing", commands)
				}
				eventually(t, func() error {
					if got := n.ruleset(); !slices.Equal(got, want) {
						return fmt.Errorf("the ruleset is:\n%s", n.nft("list", "ruleset"))
					}
					return nil
				})
				// The packets' view of it.
				n.awaitAnswers(backend, "a", "b")
				n.awaitRefused(empty)
				established.checkOpen(t)
			}

			// And what is wanted afterwards still arrives.
			n.removeFile("pod-a.yaml")
			n.awaitAnswers(backend, "b")
		})
	}
}

// Other programs' changes are none of ours.
func TestOtherTables(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.awaitAnswers(serviceAddrs(10, 80), "a")
	n.nft(otherTables)
	before := len(n.program.log.records())
	n.nft("add rule ip foreign in counter accept; flush chain inet fairlead prerouting; delete table ip6 foreign")
	// Something of ours after it shows that the announcement was seen.
	n.writeFile("pod-a.yaml", n.podYAML("backend", "a", false))
	n.awaitRefused(serviceAddrs(10, 80))
	if got := n.program.log.records()[before:]; len(got) != 0 {
		t.Errorf("logged: %+v", got)
	}
}

// endpointElement finds the element that leads connections to TCP port 80 of
// the Service's address to the pod, as nft prints it.
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
	n.t.Fatalf("no element leads from %s to %s:\n%s", service, pod, n.nft("list", "table", "ip", "fairlead"))
	return "", "", ""
}

// otherTables are somebody else's, made with nft.
const otherTables = `
	add table ip foreign
	add chain ip foreign in { type filter hook input priority 0; policy accept; }
	add set ip foreign services { type ipv4_addr; elements = { 10.96.0.10 }; }
	add table ip6 foreign
	add table inet fairlead
	add chain inet fairlead prerouting
	add rule inet fairlead prerouting counter`
