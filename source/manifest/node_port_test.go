package manifest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
)

// nodePortServiceYAML returns a Service with ports such as "80", "53/UDP" and, with a
// requested node port, "80=30080".
func nodePortServiceYAML(name, ports, more string) string {
	var list []string
	for text := range strings.FieldsSeq(ports) {
		text, nodePort, requested := strings.Cut(text, "=")
		port, protocol, ok := strings.Cut(text, "/")
		if !ok {
			protocol = "TCP"
		}
		item := fmt.Sprintf("{name: p%d, port: %s, protocol: %s", len(list), port, protocol)
		if requested {
			item += ", nodePort: " + nodePort
		}
		list = append(list, item+"}")
	}
	if !strings.Contains(more, "type: ") {
		more += "\ntype: NodePort"
	}
	text := serviceYAML(name, more)
	return strings.Replace(text, "ports: [{port: 80, targetPort: 8080}]", "ports: ["+strings.Join(list, ", ")+"]", 1)
}

// nodePortsByName returns the node ports of a Delta's Services by name, such as "30080/TCP
// 30053/UDP health 31000".
func nodePortsByName(d kube.Delta) map[string]string {
	out := map[string]string{}
	for _, svc := range d.Services {
		var words []string
		for _, p := range svc.Spec.Ports {
			words = append(words, fmt.Sprintf("%d/%s", p.NodePort, p.Protocol))
		}
		if n := svc.Spec.HealthCheckNodePort; n != 0 {
			words = append(words, fmt.Sprintf("health %d", n))
		}
		out[svc.Name] = strings.Join(words, " ")
	}
	return out
}

const (
	loadBalancerSpec      = "type: LoadBalancer"
	localLoadBalancerSpec = "type: LoadBalancer\nexternalTrafficPolicy: Local"
)

// TestNodePortsAreStable pins the allocated node ports: a version that allocates others
// would break the clients of every Service at its first start.
func TestNodePortsAreStable(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, file string
		want       map[string]string
	}{
		{"NodePort", nodePortServiceYAML("web", "80 443", ""), map[string]string{"web": "32066/TCP 30845/TCP"}},
		{"in another order", nodePortServiceYAML("web", "443 80", ""), map[string]string{"web": "30845/TCP 32066/TCP"}},
		{"LoadBalancer", nodePortServiceYAML("web", "80", loadBalancerSpec), map[string]string{"web": "32066/TCP"}},
		{"health checks", nodePortServiceYAML("web", "80", localLoadBalancerSpec), map[string]string{"web": "32066/TCP health 31727"}},
		{"health checks have a port even if nothing else has", nodePortServiceYAML("web", "80", localLoadBalancerSpec+"\nallocateLoadBalancerNodePorts: false"), map[string]string{"web": "0/TCP health 31727"}},
		{"only requested node ports", nodePortServiceYAML("web", "80 81=30081", loadBalancerSpec+"\nallocateLoadBalancerNodePorts: false"), map[string]string{"web": "0/TCP 30081/TCP"}},
		{"ClusterIP", serviceYAML("web", ""), map[string]string{"web": "0/TCP"}},
		{"one number for all protocols of a port", nodePortServiceYAML("dns", "53/UDP 53/TCP 53/SCTP", ""), map[string]string{"dns": "31452/UDP 31452/TCP 31452/SCTP"}},
		{"the requested number for all protocols of a port", nodePortServiceYAML("dns", "53/UDP 53/TCP=30053", ""), map[string]string{"dns": "30053/UDP 30053/TCP"}},
		{"all requested", nodePortServiceYAML("dns", "53/UDP=30053 53/TCP=30054", localLoadBalancerSpec+"\nhealthCheckNodePort: 30055"), map[string]string{"dns": "30053/UDP 30054/TCP health 30055"}},
		{"outside of the range", nodePortServiceYAML("web", "80=80", localLoadBalancerSpec+"\nhealthCheckNodePort: 10256"), map[string]string{"web": "80/TCP health 10256"}},
		{"the same number in protocols of two Services", nodePortServiceYAML("a", "80=30080", "") + nodePortServiceYAML("b", "80/UDP=30080", ""), map[string]string{"a": "30080/TCP", "b": "30080/UDP"}},
		{"a number requested by another Service is not allocated", nodePortServiceYAML("web", "80", "") + nodePortServiceYAML("zzz", "1=32066", ""), map[string]string{"web": "32067/TCP", "zzz": "32066/TCP"}},
		{"nor if it is requested for another protocol", nodePortServiceYAML("web", "80", "") + nodePortServiceYAML("zzz", "1/UDP=32066", ""), map[string]string{"web": "32067/TCP", "zzz": "32066/UDP"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d, err := Load(Options{Dir: writeFolder(t, "a.yaml", tt.file), ServiceCIDRs: oneCIDR})
			if err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(tt.want, nodePortsByName(d)); diff != "" {
				t.Errorf("node ports (-want +got):\n%s", diff)
			}
		})
	}
}

// TestNodePortAllocationExhaustsRange allocates the whole range, the static band last.
func TestNodePortAllocationExhaustsRange(t *testing.T) {
	t.Parallel()
	p := newNodePortAllocator()
	give := func(i int) (nodePort, bool) {
		return p.allocateNext(types.NamespacedName{Namespace: "default", Name: fmt.Sprint(i)}, portKey{corev1.ProtocolTCP, 80})
	}
	var got []int32
	for i := range 2768 {
		port, ok := give(i)
		if !ok {
			t.Fatalf("allocated only %d ports", i)
		}
		got = append(got, port.number)
	}
	if first := slices.Min(got[:2768-86]); first != 30086 {
		t.Errorf("the lowest of the first 2682 ports is %d, want 30086", first)
	}
	slices.Sort(got)
	if first, last, unique := got[0], got[2767], len(slices.Compact(got)); first != 30000 || last != 32767 || unique != 2768 {
		t.Errorf("allocated %d different ports from %d to %d, want 2768 from 30000 to 32767", unique, first, last)
	}
	if port, ok := give(2768); ok {
		t.Errorf("allocated %v although all ports are in use", port)
	}
	free := nodePort{corev1.ProtocolTCP, 30500}
	p.release(free, types.NamespacedName{Name: "other"})
	if port, ok := give(2768); ok {
		t.Errorf("allocated %v after a release by another Service", port)
	}
	p.release(free, p.owners[free])
	if port, ok := give(2768); !ok || port != free {
		t.Errorf("allocated %v, %v, want the released %v", port, ok, free)
	}
}

// TestNodePortUpdates checks which Service has which node port as files change.
func TestNodePortUpdates(t *testing.T) {
	t.Parallel()
	m := newTestModel(t)
	have := map[string]string{}
	for _, step := range []struct {
		name, file string
		want       map[string]string
		errs       string
	}{
		{
			name: "allocated", file: nodePortServiceYAML("a", "80 53/UDP", localLoadBalancerSpec),
			want: map[string]string{"a": "30766/TCP 30178/UDP health 31531"},
		},
		{
			name: "another Service that requests one of them fails", file: nodePortServiceYAML("a", "80 53/UDP", localLoadBalancerSpec) + nodePortServiceYAML("b", "80=30766", ""),
			want: map[string]string{"a": "30766/TCP 30178/UDP health 31531"},
			errs: "x.yaml:17: spec.ports[0].nodePort: 30766/TCP is already a node port of Service default/a: change one of them, or remove the field to allocate one",
		},
		{
			name: "a port in another protocol is added, and no port changes", file: nodePortServiceYAML("a", "80 53 53/UDP", localLoadBalancerSpec),
			want: map[string]string{"a": "30766/TCP 30178/TCP 30178/UDP health 31531"},
		},
		{
			name: "the file requests a node port, which releases the previous one", file: nodePortServiceYAML("a", "80=30080 53/UDP", localLoadBalancerSpec) + nodePortServiceYAML("b", "80=30766", ""),
			want: map[string]string{"a": "30080/TCP 30178/UDP health 31531", "b": "30766/TCP"},
		},
		{
			name: "a node port is kept when it is no longer requested", file: nodePortServiceYAML("a", "80 53/UDP", localLoadBalancerSpec) + nodePortServiceYAML("b", "80", ""),
			want: map[string]string{"a": "30080/TCP 30178/UDP health 31531", "b": "30766/TCP"},
		},
		{
			name: "two Services swap node ports", file: nodePortServiceYAML("a", "80=30766 53/UDP", localLoadBalancerSpec) + nodePortServiceYAML("b", "80=30080", ""),
			want: map[string]string{"a": "30766/TCP 30178/UDP health 31531", "b": "30080/TCP"},
		},
		{
			name: "requested for another port of the same Service, whose old port gets a new one", file: nodePortServiceYAML("a", "80 81=30766 53/UDP", localLoadBalancerSpec),
			want: map[string]string{"a": "30767/TCP 30766/TCP 30178/UDP health 31531"},
		},
		{
			name: "requested for health checks, which releases their port", file: nodePortServiceYAML("a", "80 81 53/UDP", localLoadBalancerSpec+"\nhealthCheckNodePort: 30766") + nodePortServiceYAML("b", "80=31531", ""),
			want: map[string]string{"a": "30767/TCP 31107/TCP 30178/UDP health 30766", "b": "31531/TCP"},
		},
		{
			name: "one of two requests conflicts: the Service is unchanged", file: nodePortServiceYAML("a", "80=30180 81=31531 53/UDP", localLoadBalancerSpec+"\nhealthCheckNodePort: 30766") + nodePortServiceYAML("b", "80", ""),
			want: map[string]string{"a": "30767/TCP 31107/TCP 30178/UDP health 30766", "b": "31531/TCP"},
			errs: "x.yaml:7: spec.ports[1].nodePort: 31531/TCP is already a node port of Service default/b: change one of them, or remove the field to allocate one",
		},
		{
			name: "only the requested node ports remain", file: nodePortServiceYAML("a", "80 53/UDP=30178", loadBalancerSpec+"\nallocateLoadBalancerNodePorts: false") + nodePortServiceYAML("b", "80=30767", ""),
			want: map[string]string{"a": "0/TCP 30178/UDP", "b": "30767/TCP"},
		},
		{
			name: "ClusterIP releases all", file: serviceYAML("a", "") + nodePortServiceYAML("b", "80=30178 53/UDP=30178", ""),
			want: map[string]string{"a": "0/TCP", "b": "30178/TCP 30178/UDP"},
		},
		{name: "removed", file: "# nothing", want: map[string]string{}},
	} {
		d := m.update(map[string]*parsedFile{"x.yaml": parseFile("x.yaml", []byte(step.file))})
		for _, name := range d.DeletedServices {
			delete(have, name.Name)
		}
		maps.Copy(have, nodePortsByName(d))
		if diff := cmp.Diff(step.want, have); diff != "" {
			t.Errorf("%s: node ports (-want +got):\n%s", step.name, diff)
		}
		if got := m.errors().Error(); got != step.errs {
			t.Errorf("%s: errors\n%s\nwant\n%s", step.name, got, step.errs)
		}
	}
}

// TestRandomNodePorts applies random updates. No two Services may have the same port, every
// Service must have all ports that it needs, and the allocator must agree with the
// delivered Services.
func TestRandomNodePorts(t *testing.T) {
	t.Parallel()
	errs := 0
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 4))
		m := newTestModel(t)
		have := map[types.NamespacedName]*corev1.Service{}
		for step := range 30 {
			changed := map[string]*parsedFile{}
			for range 1 + r.IntN(3) {
				name := fmt.Sprintf("f%d.yaml", r.IntN(5))
				changed[name] = nil
				if r.IntN(5) > 0 {
					changed[name] = parseFile(name, []byte(randomNodePortServices(r)))
				}
			}
			d := m.update(changed)
			for _, name := range d.DeletedServices {
				delete(have, name)
			}
			for _, svc := range d.Services {
				have[types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}] = svc
			}
			owners := map[nodePort]types.NamespacedName{}
			for name, svc := range have {
				for _, req := range nodePortRequests(svc) {
					other, taken := owners[req.requestedPort()]
					if req.requested == 0 || taken {
						t.Fatalf("seed %d, step %d: %s of %s is %v, which %s has", seed, step, req.field, name, req.requestedPort(), other)
					}
					owners[req.requestedPort()] = name
				}
			}
			if diff := cmp.Diff(owners, m.nodePorts.owners); diff != "" {
				t.Fatalf("seed %d, step %d: owners (-delivered +allocated):\n%s", seed, step, diff)
			}
			numbers, used := map[int32]int{}, 0
			for port := range owners {
				if numbers[port.number]++; numbers[port.number] == 1 && port.number >= 30000 {
					used++
				}
			}
			if !maps.Equal(numbers, m.nodePorts.protocolsPerNumber) || used != m.nodePorts.used {
				t.Fatalf("seed %d, step %d: counted %v and %d, want %v and %d", seed, step, m.nodePorts.protocolsPerNumber, m.nodePorts.used, numbers, used)
			}
			errs += len(m.failedServices)
		}
	}
	if errs == 0 {
		t.Error("no node ports conflicted: the test is void")
	}
}

// randomNodePortServices returns a few Services with requested and allocated node ports
// that often conflict.
func randomNodePortServices(r *rand.Rand) string {
	var b strings.Builder
	for range 1 + r.IntN(3) {
		name := fmt.Sprintf("s%d", r.IntN(6))
		var list []string
		for _, port := range []string{"80", "53", "53/UDP", "81/UDP"} {
			switch requested := []int{30001, 30002, 30003, 80}[r.IntN(4)]; r.IntN(3) {
			case 0:
				list = append(list, port)
			case 1:
				list = append(list, fmt.Sprintf("%s=%d", port, requested))
			}
		}
		more := []string{"", loadBalancerSpec + "\nallocateLoadBalancerNodePorts: false", localLoadBalancerSpec, localLoadBalancerSpec + "\nhealthCheckNodePort: 30002"}[r.IntN(4)]
		switch {
		case len(list) == 0 || r.IntN(8) == 0:
			b.WriteString(serviceYAML(name, ""))
		default:
			b.WriteString(nodePortServiceYAML(name, strings.Join(list, " "), more))
		}
	}
	return b.String()
}

// TestAllocatedNodePortsAreLogged checks that each allocated node port is logged once.
func TestAllocatedNodePortsAreLogged(t *testing.T) {
	t.Parallel()
	w := startSource(t, writeFolder(t, "a.yaml", nodePortServiceYAML("a", "80 53/UDP=30053", localLoadBalancerSpec)))
	w.firstDelta()
	const one, two = `msg="node port allocated" service=default/a port=80/TCP node_port=30766`,
		`msg="node port allocated" service=default/a port="health check" node_port=31531`
	w.expectLog(one)
	w.expectLog(two)
	writeFile(t, w.dir, "b.yaml", nodePortServiceYAML("a", "1", "")+nodePortServiceYAML("b", "80", "")) // the first Service a is active
	w.expectLog("service=default/b")
	if n := strings.Count(w.logged.String(), "node port allocated"); n != 3 {
		t.Errorf("%d logged, want 3:\n%s", n, w.logged)
	}
}
