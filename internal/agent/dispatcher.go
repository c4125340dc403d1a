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

// dispatcher passes objects, addresses of this node and configurations on to the parts that
// need them. They come in from goroutines of their own, one at a time.
type dispatcher struct {
	log          *slog.Logger
	conntrack    *conntrack.Cleaner // nil if the backend needs none
	relay        *relay.Relay
	healthChecks *health.Ports
	metrics      *metrics.Metrics
	// nodeSettings warns of settings of the node's kernel.
	nodeSettings *nodesettings.Watcher
	events       Events
	dns          *dns.Server // nil if nobody asks for names
	nodeState    *nodeState

	mu       stdsync.Mutex
	pipeline *pipeline.Pipeline
	synced   bool
	// nodePortAddresses selects the addresses on which node ports are served. served has
	// these, loopback ones included.
	nodePortAddresses kube.NodePortAddresses
	servedAddrs       []netip.Addr
}

// deliver processes objects from the source. The first time it is everything.
func (d *dispatcher) deliver(delta kube.Delta) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.metrics.RecordObjectChanges(len(delta.Services)+len(delta.DeletedServices), len(delta.EndpointSlices)+len(delta.DeletedEndpointSlices))
	d.events.Apply(delta)
	d.nodeState.existenceUnknown.Store(delta.NodeUnknown)
	result := d.pipeline.Track(delta)
	d.distribute(result)
	for _, name := range delta.DeletedServices {
		d.metrics.RemoveService(name.Namespace, name.Name)
	}
	if !d.synced {
		d.synced = true
		d.pipeline.Syncer.FinishInitialList()
		d.nodeState.logExistence()
	} else {
		for t := range result.Triggers() {
			d.metrics.RecordTrigger(t.Service.Namespace, t.Service.Name, t.At)
		}
	}
	if d.dns != nil {
		d.dns.Apply(delta)
	}
}

// setAddresses updates the addresses of this node's interfaces.
func (d *dispatcher) setAddresses(addrs nodeip.Addresses) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.distribute(d.pipeline.Track(kube.Delta{LocalAddrs: addrs.All, VirtualAddrs: addrs.Virtual, LocalRoutes: addrs.Routes}))
}

// configure updates the options of the tracker.
func (d *dispatcher) configure(options kube.Options) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nodePortAddresses = options.NodePortAddresses
	d.distribute(d.pipeline.Configure(options))
	d.setHealthCheckAddrs()
}

// setHealthCheckAddrs sets the addresses on which health-check node ports answer: those
// of node ports, and the unspecified address for a family of which all are served. No
// socket can listen on a network, so that networks count only with the latter.
//
// Unless the operator chose addresses, they answer on all, as with kube-proxy's mode
// iptables: a load balancer that passes packets through probes its own address, which
// the node may have on its loopback device.
func (d *dispatcher) setHealthCheckAddrs() {
	var addrs []netip.Addr
	for _, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		family := dataplane.FamilyOf(unspecified)
		if d.nodePortAddresses.IsZero() || d.nodePortAddresses.SelectsAll(family) {
			addrs = append(addrs, unspecified)
			continue
		}
		for _, a := range d.servedAddrs {
			if dataplane.FamilyOf(a) == family {
				addrs = append(addrs, a)
			}
		}
	}
	d.healthChecks.SetAddrs(addrs)
}

// distribute hands a result of the tracker to the parts.
func (d *dispatcher) distribute(result kube.Result) {
	if result.Node != nil {
		if d.conntrack != nil {
			d.conntrack.SetNode(*result.Node)
		}
		d.nodeSettings.SetPodNetwork(podNetworks(*result.Node))
		d.servedAddrs = slices.Concat(result.Node.NodePortAddrs, result.LoopbackNodePortAddrs)
		d.relay.SetFamilies(addrFamilies(result.LoopbackNodePortAddrs)...)
		d.setHealthCheckAddrs()
	}
	for _, o := range result.Overlaps {
		d.log.Warn("addresses of pods or of this node lie in a ServiceCIDR; connections to them pass, to those of other nodes they may be dropped: use networks that do not overlap",
			"service_cidr", o.ServiceCIDR, "overlaps", o.Other)
	}
	d.pipeline.Program(result)
	for _, u := range result.NodePortsWithoutAddress {
		d.log.Warn("node ports are not served, as no address of this node is one for them: check --nodeport-addresses "+
			"(nodePortAddresses in the file of --config), and the addresses of the Node, which count only if an interface "+
			"has them, and none that lies in a ServiceCIDR unless it is the Node's", "ip_family", u.Family.String(), "service", u.Example.String())
	}
	if result.NodeHealth != nil {
		d.nodeState.health.Store(result.NodeHealth)
		if d.synced {
			d.nodeState.logExistence()
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
	d.healthChecks.Set(checks)
	for _, p := range result.Problems {
		d.reportProblem(p)
	}
}

// addrFamilies returns the families that addresses are of.
func addrFamilies(addrs []netip.Addr) []dataplane.Family {
	var families []dataplane.Family
	for _, a := range addrs {
		if f := dataplane.FamilyOf(a); !slices.Contains(families, f) {
			families = append(families, f)
		}
	}
	return families
}

// reportProblem tells of what a Service asks for and does not get.
func (d *dispatcher) reportProblem(p kube.Problem) {
	log := d.log.With("service", p.Service.String())
	if p.EndpointSlice != "" {
		log = log.With("endpoint_slice", p.EndpointSlice)
	}
	log.Warn("Service can't be carried out as written", "field", p.Field, "problem", p.Message)
	d.events.Problem(p)
	d.metrics.RecordProblem()
}

// watchAddresses delivers the node's addresses and calls ready after the first time.
func (d *dispatcher) watchAddresses(ctx context.Context, watch func(context.Context, func(nodeip.Addresses)) error, ready func()) error {
	return watch(ctx, func(addrs nodeip.Addresses) {
		d.setAddresses(addrs)
		ready()
	})
}
