package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// TestServiceByName checks connections by name to a Service and Pods from YAML files.
func TestServiceByName(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b", "c", "other")
	// The file has no address, so it is allocated from --service-cidr.
	n.writeFile("backend.yaml", `apiVersion: v1
kind: Service
metadata:
  name: backend
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: backend}
  ports:
    - {name: http, port: 80, targetPort: web}
    - {name: game, port: 9000, protocol: UDP, targetPort: 8080}
`)
	n.writePods("backend", "a", "b", "c")
	n.writePods("unrelated", "other")
	n.run()

	const fullName = "backend.default.svc.cluster.local"
	addrs := map[string]netip.Addr{}
	for family, cidr := range map[string]string{"ip4": "10.96.0.0/16", "ip6": "fd00:10:96::/112"} {
		found, err := n.lookup(family, fullName)
		if err != nil || len(found) != 1 || !netip.MustParsePrefix(cidr).Contains(found[0]) {
			t.Fatalf("%s addresses of the name: %v, error %v; want one address in %s", family, found, err, cidr)
		}
		addrs[family] = found[0]
		for _, name := range []string{"backend", "backend.default", "backend.default.svc"} {
			if short, err := n.lookup(family, name); err != nil || !slices.Equal(short, found) {
				t.Errorf("addresses of %s: %v, error %v; want %v like %s", name, short, err, found, fullName)
			}
		}
	}

	clients := map[string]*nettest.Host{"pod": n.client, "endpoint": n.pods["a"], "node": n.Node, "outside": n.Outside}
	for name, client := range clients {
		for network, port := range map[string]uint16{nettest.TCP: 80, nettest.UDP: 9000} {
			for family, addr := range addrs {
				t.Run(name+"/"+network+"/"+family, func(t *testing.T) {
					t.Parallel()
					if err := checkAnswers(t.Context(), client, network, netip.AddrPortFrom(addr, port), "a", "b", "c"); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// TestMasquerade checks that with --cluster-cidr, connections from pods keep their source address
// and other connections get the node's address.
func TestMasquerade(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	for i, addr := range agenttest.ServiceAddrs(10, 80) {
		for _, test := range []struct {
			client *nettest.Host
			want   netip.Addr
		}{
			{n.client, n.client.Addrs()[i]},
			{n.Outside, n.Node.Addrs()[i]},
		} {
			for _, network := range []string{nettest.TCP, nettest.UDP} {
				answer, err := connect(t.Context(), test.client, network, addr)
				if err != nil || answer.Source.Addr() != test.want {
					t.Errorf("%s from %s to %s: source address %s, error %v; want %s", network, test.client.Name, addr, answer.Source.Addr(), err, test.want)
				}
			}
		}
	}
}

// TestPodsComeAndGo checks that changes of pods take effect without failed connections.
func TestPodsComeAndGo(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b", "c")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.run()
	backend := agenttest.ServiceAddrs(10, 80)
	n.awaitAnswers(backend, "a", "b")
	stop := n.keepConnecting(backend)

	n.writePods("backend", "c")
	n.awaitAnswers(backend, "a", "b", "c")

	n.removeFile("pod-a.yaml")
	n.awaitAnswers(backend, "b", "c")

	n.writeFile("pod-b.yaml", n.podYAML("backend", "b", false))
	n.awaitAnswers(backend, "c")

	n.writeFile("pod-b.yaml", n.podYAML("backend", "b", true))
	n.awaitAnswers(backend, "b", "c")

	n.writeFile("pod-c.yaml", n.podYAML("other label", "c", true)) // invalid, so without effect
	n.program.awaitLog(func(r record) bool { return r.File == "pod-c.yaml" })
	n.writeFile("pod-c.yaml", n.podYAML("other", "c", true))
	n.awaitAnswers(backend, "b")
	stop()

	n.removeFile("pod-b.yaml")
	n.awaitRefused(backend)

	n.writePods("backend", "a")
	n.awaitAnswers(backend, "a")
}

func TestServicesComeAndGo(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writePods("one", "a")
	n.writePods("two", "b")
	n.run() // without Services

	n.writeFile("one.yaml", serviceYAML("one", 1, 80))
	n.awaitAnswers(agenttest.ServiceAddrs(1, 80), "a")
	n.writeFile("two.yaml", serviceYAML("two", 2, 80))
	n.awaitAnswers(agenttest.ServiceAddrs(2, 80), "b")
	stop := n.keepConnecting(agenttest.ServiceAddrs(2, 80))

	// The Service's port changes.
	n.writeFile("one.yaml", serviceYAML("one", 1, 81))
	n.awaitAnswers(agenttest.ServiceAddrs(1, 81), "a")
	n.awaitRefused(agenttest.ServiceAddrs(1, 80))

	n.removeFile("one.yaml")
	n.awaitGone(agenttest.ServiceAddrs(1, 81))
	if addrs, err := n.lookup("ip", "one"); !isNotFound(err) {
		t.Errorf("name of the deleted Service: %v, error %v; want not found", addrs, err)
	}
	stop()
}

// awaitGone waits until the ruleset no longer contains the addresses, and checks that connections to
// them time out.
func (n *testNode) awaitGone(addrs []netip.AddrPort) {
	n.t.Helper()
	for _, addr := range addrs {
		agenttest.Eventually(n.t, func() error {
			if strings.Contains(n.nft("list", "ruleset"), fmt.Sprintf("%s . tcp . %d", addr.Addr(), addr.Port())) {
				return fmt.Errorf("%s is still in the ruleset", addr)
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(n.t.Context(), connectTimeout/5)
		answer, err := n.client.Connect(ctx, nettest.TCP, addr)
		cancel()
		if !errors.Is(err, nettest.ErrTimeout) {
			n.t.Errorf("%s: answer %+v, error %v; want a timeout", addr, answer, err)
		}
	}
}

func isNotFound(err error) bool {
	dnsErr, ok := errors.AsType[*net.DNSError](err)
	return ok && dnsErr.IsNotFound
}

// TestNoEndpoints checks that connections to Services without endpoints are refused, both if no pod
// matches and if no pod is ready.
func TestNoEndpoints(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("empty.yaml", serviceYAML("empty", 1, 80))
	n.writeFile("waiting.yaml", serviceYAML("waiting", 2, 80))
	n.writeFile("pod-a.yaml", n.podYAML("waiting", "a", false))
	n.run()
	for last := range byte(2) {
		n.awaitRefused(agenttest.ServiceAddrs(last+1, 80))
	}
	// The DNS name exists without endpoints.
	if addrs, err := n.lookup("ip4", "empty"); err != nil || !slices.Equal(addrs, []netip.Addr{agenttest.ServiceAddrs(1, 80)[0].Addr()}) {
		t.Errorf("name of the Service: %v, error %v; want %s", addrs, err, agenttest.ServiceAddrs(1, 80)[0].Addr())
	}
}

// TestHeadless checks that the name of a headless Service resolves to its ready pods.
func TestHeadless(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("db.yaml", `apiVersion: v1
kind: Service
metadata:
  name: db
spec:
  clusterIP: None
  ipFamilyPolicy: PreferDualStack
  selector: {app: db}
  ports: [{name: web, port: 80, targetPort: web}]
`)
	n.writePods("db", "a")
	n.writeFile("pod-b.yaml", n.podYAML("db", "b", false))
	n.run()
	await := func(pods ...string) {
		t.Helper()
		for i, network := range []string{"ip4", "ip6"} {
			var want []netip.Addr
			for _, pod := range pods {
				want = append(want, n.pods[pod].Addrs()[i])
			}
			slices.SortFunc(want, netip.Addr.Compare)
			agenttest.Eventually(t, func() error {
				got, err := n.lookup(network, "db.default.svc.cluster.local")
				if !slices.Equal(got, want) || (err != nil && !isNotFound(err)) {
					return fmt.Errorf("%s addresses: %v, error %w; want %v", network, got, err, want)
				}
				return nil
			})
		}
	}
	await("a")
	n.writePods("db", "b")
	await("a", "b")
	n.removeFile("pod-a.yaml")
	await("b")
	n.removeFile("pod-b.yaml")
	await()
}

// TestInvalidManifest checks that an invalid file is reported, that its Service keeps its previous
// state, and that other Services are not affected.
func TestInvalidManifest(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writeFile("other.yaml", serviceYAML("other", 11, 80))
	n.writePods("backend", "a")
	n.writePods("other", "b")
	n.run()
	backend, other := agenttest.ServiceAddrs(10, 80), agenttest.ServiceAddrs(11, 80)
	n.awaitAnswers(backend, "a")
	n.awaitAnswers(other, "b")
	stop := n.keepConnecting(slices.Concat(backend, other))

	reported := func(err string) func(record) bool {
		return func(r record) bool { return r.Level == "ERROR" && r.File == "backend.yaml" && r.Error == err }
	}
	n.writeFile("backend.yaml", strings.Replace(serviceYAML("backend", 10, 80), "protocol: TCP", "protocol: tpc", 1))
	n.program.awaitLog(reported(`backend.yaml:11: spec.ports[0].protocol: "tpc" is not a protocol: use TCP, UDP or SCTP`))
	n.writeFile("backend.yaml", strings.Replace(serviceYAML("backend", 10, 80), "selector", "selektor", 1))
	n.program.awaitLog(reported(`backend.yaml:9: spec.selektor: unknown field: did you mean selector?`))
	n.writeFile("backend.yaml", "kind: Service\n\tmetadata: {}\n")
	n.program.awaitLog(func(r record) bool { return r.Level == "ERROR" && strings.HasPrefix(r.Error, "backend.yaml:2: ") })

	// Changes of other files, including files with Pods of the Service, still take effect.
	n.writeFile("pod-b.yaml", n.podYAML("backend", "b", true)+"---\n"+strings.Replace(n.podYAML("other", "a", true), "name: a", "name: a2", 1))
	n.awaitAnswers(backend, "a", "b")
	n.awaitAnswers(other, "a")
	stop()

	n.writeFile("backend.yaml", serviceYAML("backend", 10, 8080))
	n.awaitAnswers(agenttest.ServiceAddrs(10, 8080), "a", "b")
}

// TestInvalidManifestAtStart checks that a file that is invalid at the start affects no other Service.
func TestInvalidManifestAtStart(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("broken.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: broken}\nspec: {ports: [{port: 0}]}\n")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.program.awaitLog(func(r record) bool {
		return r.File == "broken.yaml" && strings.HasPrefix(r.Error, "broken.yaml:4: spec.ports[0].port: ")
	})
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
}

// TestManifestFolderRemoved checks that the program exits with an error if the folder disappears, and
// that programmed Services stay.
func TestManifestFolderRemoved(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	before := n.ruleset()
	// Rename the folder, because removing each file would be a change.
	if err := os.Rename(n.folder, n.folder+".gone"); err != nil {
		t.Fatal(err)
	}
	code := n.program.wait()
	want := "fairlead: watch folder " + n.folder + ": no such file or directory\n"
	if log := n.program.log.String(); code != 1 || !strings.HasSuffix(log, want) {
		t.Errorf("exit code %d, log:\n%s\nwant 1 and %q", code, log, want)
	}
	if !slices.Equal(n.ruleset(), before) {
		t.Error("the ruleset changed")
	}
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
}
