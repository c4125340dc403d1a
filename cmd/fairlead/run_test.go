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

	"fairlead.io/fairlead/internal/nettest"
)

// From a Service and three Pods in YAML to connections by name.
func TestServiceByName(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b", "c", "other")
	// No address in the file: it comes from --service-cidr.
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
			t.Fatalf("the name's %s addresses are %v, error %v; want one of %s", family, found, err, cidr)
		}
		addrs[family] = found[0]
		for _, name := range []string{"backend", "backend.default", "backend.default.svc"} {
			if short, err := n.lookup(family, name); err != nil || !slices.Equal(short, found) {
				t.Errorf("%s has %v, error %v; want %v as %s has", name, short, err, found, fullName)
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

// --cluster-cidr: pods are seen with their own address, others with the node's.
func TestMasquerade(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	for i, addr := range serviceAddrs(10, 80) {
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
					t.Errorf("%s from %s to %s: the pod saw %s, error %v; want %s", network, test.client.Name, addr, answer.Source.Addr(), err, test.want)
				}
			}
		}
	}
}

// Traffic follows the files, and clients notice nothing of it.
func TestPodsComeAndGo(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b", "c")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.run()
	backend := serviceAddrs(10, 80)
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

	n.writeFile("pod-c.yaml", n.podYAML("other label", "c", true)) // not valid: stays as it was
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
	n.run() // with no Service at all

	n.writeFile("one.yaml", serviceYAML("one", 1, 80))
	n.awaitAnswers(serviceAddrs(1, 80), "a")
	n.writeFile("two.yaml", serviceYAML("two", 2, 80))
	n.awaitAnswers(serviceAddrs(2, 80), "b")
	stop := n.keepConnecting(serviceAddrs(2, 80))

	// Another port, and the old one is none of the Service's any more.
	n.writeFile("one.yaml", serviceYAML("one", 1, 81))
	n.awaitAnswers(serviceAddrs(1, 81), "a")
	n.awaitRefused(serviceAddrs(1, 80))

	n.removeFile("one.yaml")
	n.awaitGone(serviceAddrs(1, 81))
	if addrs, err := n.lookup("ip", "one"); !isNotFound(err) {
		t.Errorf("the deleted Service's name has %v, error %v; want that it does not exist", addrs, err)
	}
	stop()
}

// awaitGone waits until nothing on the node knows an address of the client's
// connections any more, so that they leave it to where nobody answers.
func (n *testNode) awaitGone(addrs []netip.AddrPort) {
	n.t.Helper()
	for _, addr := range addrs {
		eventually(n.t, func() error {
			if strings.Contains(n.nft("list", "ruleset"), fmt.Sprintf("%s . tcp . %d", addr.Addr(), addr.Port())) {
				return fmt.Errorf("%s is still in the ruleset", addr)
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(n.t.Context(), connectTimeout/5)
		answer, err := n.client.Connect(ctx, nettest.TCP, addr)
		cancel()
		if !errors.Is(err, nettest.ErrTimeout) {
			n.t.Errorf("%s: answer %+v, error %v; want none", addr, answer, err)
		}
	}
}

func isNotFound(err error) bool {
	dnsErr, ok := errors.AsType[*net.DNSError](err)
	return ok && dnsErr.IsNotFound
}

// Connections to a Service without endpoints are refused at once, for a Service
// that selects nothing yet as for one whose pods are not ready.
func TestNoEndpoints(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("empty.yaml", serviceYAML("empty", 1, 80))
	n.writeFile("waiting.yaml", serviceYAML("waiting", 2, 80))
	n.writeFile("pod-a.yaml", n.podYAML("waiting", "a", false))
	n.run()
	for last := range byte(2) {
		n.awaitRefused(serviceAddrs(last+1, 80))
	}
	// The name exists all the same.
	if addrs, err := n.lookup("ip4", "empty"); err != nil || !slices.Equal(addrs, []netip.Addr{serviceAddrs(1, 80)[0].Addr()}) {
		t.Errorf("the Service's name has %v, error %v; want %s", addrs, err, serviceAddrs(1, 80)[0].Addr())
	}
}

// The name of a headless Service is that of its ready pods.
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
			eventually(t, func() error {
				got, err := n.lookup(network, "db.default.svc.cluster.local")
				if !slices.Equal(got, want) || (err != nil && !isNotFound(err)) {
					return fmt.Errorf("the %s addresses are %v, error %w; want %v", network, got, err, want)
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

// A file that is not valid is reported, and nothing that worked stops to.
func TestInvalidManifest(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writeFile("other.yaml", serviceYAML("other", 11, 80))
	n.writePods("backend", "a")
	n.writePods("other", "b")
	n.run()
	backend, other := serviceAddrs(10, 80), serviceAddrs(11, 80)
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

	// The others' changes go on meanwhile, those of its Pods too.
	n.writeFile("pod-b.yaml", n.podYAML("backend", "b", true)+"---\n"+strings.Replace(n.podYAML("other", "a", true), "name: a", "name: a2", 1))
	n.awaitAnswers(backend, "a", "b")
	n.awaitAnswers(other, "a")
	stop()

	n.writeFile("backend.yaml", serviceYAML("backend", 10, 8080))
	n.awaitAnswers(serviceAddrs(10, 8080), "a", "b")
}

// A file that is not valid at the start keeps nothing else from working.
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
	n.awaitAnswers(serviceAddrs(10, 80), "a")
}

// Without the folder the program cannot know what is wanted: it ends and says
// so, and what is programmed stays.
func TestManifestFolderRemoved(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	before := n.ruleset()
	// Moved away rather than removed file by file, each of which is a change.
	if err := os.Rename(n.folder, n.folder+".gone"); err != nil {
		t.Fatal(err)
	}
	code := n.program.wait()
	want := "fairlead: watch folder " + n.folder + ": no such file or directory\n"
	if log := n.program.log.String(); code != 1 || !strings.HasSuffix(log, want) {
		t.Errorf("exit code %d, log:\n%s\nwant 1 and %q", code, log, want)
	}
	if !slices.Equal(n.ruleset(), before) {
		t.Error("the ruleset has changed")
	}
	n.awaitAnswers(serviceAddrs(10, 80), "a")
}
