package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	stdsync "sync"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/manifest/dns"
)

// join passes what happens on to those who need it. Objects, addresses of this
// node and configurations come in from goroutines of their own, one at a time.
type join struct {
	log     *slog.Logger
	flows   *conntrack.Cleaner // nil if the backend needs none
	relay   *relay.Relay
	ports   *health.Ports
	metrics *metrics.Metrics
	// settings warns of settings of the node's kernel.
	settings *nodesettings.Watcher
	events   Events
	names    *dns.Server // nil if nobody asks for names
	state    *nodeState

	mu       stdsync.Mutex
	pipeline *pipeline.Pipeline
	complete bool
	// nodePorts selects the addresses on which node ports are served. served has
	// these, loopback ones included.
	nodePorts kube.NodePortAddresses
	served    []netip.Addr
}

// deliver takes objects from the source. The first time it is everything.
func (j *join) deliver(d kube.Delta) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.metrics.Arrived(len(d.Services)+len(d.DeletedServices), len(d.EndpointSlices)+len(d.DeletedEndpointSlices))
	j.events.Apply(d)
	j.state.unknown.Store(d.NodeUnknown)
	result := j.pipeline.Track(d)
	j.pass(result)
	for _, name := range d.DeletedServices {
		j.metrics.Gone(name.Namespace, name.Name)
	}
	if !j.complete {
		j.complete = true
		j.pipeline.Syncer.ListComplete()
		j.state.check()
	} else {
		for t := range result.Triggers() {
			j.metrics.Triggered(t.Service.Namespace, t.Service.Name, t.At)
		}
	}
	if j.names != nil {
		j.names.Apply(d)
	}
}

// addresses takes the addresses of this node's interfaces.
func (j *join) addresses(addrs nodeip.Addresses) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pass(j.pipeline.Track(kube.Delta{LocalAddrs: addrs.All, VirtualAddrs: addrs.Virtual, LocalRoutes: addrs.Routes}))
}

// configure takes another configuration.
func (j *join) configure(options kube.Options) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.nodePorts = options.NodePortAddresses
	j.pass(j.pipeline.Configure(options))
	j.listen()
}

// listen sets the addresses on which health-check node ports answer: those of node
// ports, and the unspecified address for a family of which all are served. No
// socket can listen on a network, so that networks count only with the latter.
//
// Unless the operator chose addresses, they answer on all, as with kube-proxy's mode
// iptables: a load balancer that passes packets through probes its own address, which
// the node may have on its loopback device.
func (j *join) listen() {
	var addrs []netip.Addr
	for _, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		family := dataplane.FamilyOf(unspecified)
		if j.nodePorts.IsZero() || j.nodePorts.Everywhere(family) {
			addrs = append(addrs, unspecified)
			continue
		}
		for _, a := range j.served {
			if dataplane.FamilyOf(a) == family {
				addrs = append(addrs, a)
			}
		}
	}
	j.ports.SetAddrs(addrs)
}

// pass passes on what the tracker has made of its input.
func (j *join) pass(result kube.Result) {
	if result.Node != nil {
		if j.flows != nil {
			j.flows.SetNode(*result.Node)
		}
		j.settings.SetPods(podsOf(*result.Node))
		j.served = slices.Concat(result.Node.NodePortAddrs, result.Loopback)
		j.relay.SetFamilies(familiesOf(result.Loopback)...)
		j.listen()
	}
	for _, o := range result.Overlaps {
		j.log.Warn("addresses of pods or of this node lie in a ServiceCIDR; connections to them pass, to those of other nodes they may be dropped: use networks that do not overlap",
			"service_cidr", o.ServiceCIDR, "overlaps", o.Other)
	}
	j.pipeline.Program(result)
	for _, u := range result.UnservedNodePorts {
		j.log.Warn("node ports are not served, as no address of this node is one for them: check --nodeport-addresses "+
			"(nodePortAddresses in the file of --config), and the addresses of the Node, which count only if an interface "+
			"has them, and none that lies in a ServiceCIDR unless it is the Node's", "ip_family", u.Family.String(), "service", u.Example.String())
	}
	if result.NodeHealth != nil {
		j.state.health.Store(result.NodeHealth)
		if j.complete {
			j.state.check()
		}
	}
	checks := make(map[health.Service]*health.Check, len(result.HealthChecks))
	for name, check := range result.HealthChecks {
		var c *health.Check
		if check != nil {
			c = &health.Check{Port: check.Port, LocalEndpoints: check.LocalEndpoints}
		}
		checks[health.Service{Namespace: name.Namespace, Name: name.Name}] = c
	}
	j.ports.Set(checks)
	for _, p := range result.Problems {
		j.problem(p)
	}
}

// familiesOf returns the families that addresses are of.
func familiesOf(addrs []netip.Addr) []dataplane.Family {
	var families []dataplane.Family
	for _, a := range addrs {
		if f := dataplane.FamilyOf(a); !slices.Contains(families, f) {
			families = append(families, f)
		}
	}
	return families
}

// problem tells of what a Service asks for and does not get.
func (j *join) problem(p kube.Problem) {
	log := j.log.With("service", p.Service.String())
	if p.EndpointSlice != "" {
		log = log.With("endpoint_slice", p.EndpointSlice)
	}
	log.Warn("Service can't be carried out as written", "field", p.Field, "problem", p.Message)
	j.events.Problem(p)
	j.metrics.Problem()
}

// follow delivers the node's addresses and calls ready after the first time.
func (j *join) follow(ctx context.Context, watch func(context.Context, func(nodeip.Addresses)) error, ready func()) error {
	return watch(ctx, func(addrs nodeip.Addresses) {
		j.addresses(addrs)
		ready()
	})
}
