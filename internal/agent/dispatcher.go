package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	stdsync "sync"
	"sync/atomic"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/otherproxy"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/manifest/dns"
)

// dispatcher passes objects, addresses of this node and configuration changes to the
// components. A mutex serializes calls from several goroutines.
type dispatcher struct {
	log          *slog.Logger
	conntrack    *conntrack.Cleaner // nil if the backend does not use conntrack
	relay        *relay.Relay
	healthChecks *health.Ports
	metrics      *metrics.Metrics
	history      *history.Recorder
	// nodeSettings warns of harmful kernel settings of the node.
	nodeSettings *nodesettings.Watcher
	events       Events
	dns          *dns.Server // nil without --dns-listen
	nodeState    *nodeState

	mu       stdsync.Mutex
	pipeline *pipeline.Pipeline
	synced   bool
	// nodePortAddresses selects the addresses that node ports are served on. servedAddrs
	// lists them, including loopback addresses.
	nodePortAddresses kube.NodePortAddresses
	servedAddrs       []netip.Addr
	// proxyName is the name of this proxy, empty for the default proxy.
	proxyName string
	// otherProxies are the rules of other Service proxies.
	otherProxies []otherproxy.Rules

	// results counts the results of the tracker.
	results atomic.Uint64
}

// deliver processes a Delta from the source. The first Delta contains all objects.
func (d *dispatcher) deliver(delta kube.Delta) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.metrics.RecordObjectChanges(len(delta.Services)+len(delta.ConvertedServices)+len(delta.DeletedServices),
		len(delta.EndpointSlices)+len(delta.ConvertedSlices)+len(delta.DeletedEndpointSlices))
	d.events.Apply(delta)
	d.nodeState.existenceUnknown.Store(delta.NodeUnknown)
	result := d.pipeline.Track(delta)
	if d.synced { // before distribute, which may program the changes
		for t := range result.Triggers() {
			d.metrics.RecordTrigger(t.Service.Namespace, t.Service.Name, t.At)
			d.history.RecordTrigger(t.Service.Namespace, t.Service.Name, t.At)
		}
	}
	d.distribute(result)
	for _, name := range delta.DeletedServices {
		d.metrics.RemoveService(name.Namespace, name.Name)
	}
	if !d.synced {
		d.synced = true
		d.pipeline.Syncer.FinishInitialList()
		d.nodeState.logExistence()
	}
	if d.dns != nil {
		d.dns.Apply(delta)
	}
}

// setAddresses updates the addresses of this node's interfaces.
func (d *dispatcher) setAddresses(addrs nodeip.Addresses) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.distribute(d.pipeline.TrackAddresses(addrs))
}

// configure updates the options of the tracker.
func (d *dispatcher) configure(options kube.Options) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nodePortAddresses = options.NodePortAddresses
	d.distribute(d.pipeline.Configure(options))
	d.setHealthCheckAddrs()
}

// setHealthCheckAddrs sets the listen addresses of health-check node ports. These are the
// addresses of node ports, and the unspecified address for a family whose addresses are all
// selected. Sockets cannot listen on networks of local routes, so only the unspecified
// address covers these.
//
// Without --nodeport-addresses, health-check node ports listen on the unspecified addresses,
// as in kube-proxy's iptables mode. A load balancer that forwards packets unchanged probes its
// own address, which may be assigned to the node's loopback device.
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

// distribute passes a result of the tracker to the components.
func (d *dispatcher) distribute(result kube.Result) {
	d.results.Add(1)
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
		d.log.Warn("ServiceCIDR overlaps with addresses of pods or of this node; connections to such addresses on other nodes may be dropped: use networks that do not overlap",
			"service_cidr", o.ServiceCIDR, "overlaps", o.Other)
	}
	d.pipeline.Program(result)
	for _, u := range result.NodePortsWithoutAddress {
		d.log.Warn("node ports are not served because this node has no address for them: check --nodeport-addresses "+
			"(nodePortAddresses in the file of --config) and the addresses of the Node object. An address of the Node counts only "+
			"if an interface has it; other addresses count only outside of ServiceCIDRs", "ip_family", u.Family.String(), "service", u.Example.String())
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

// addrFamilies returns the IP families of the addresses.
func addrFamilies(addrs []netip.Addr) []dataplane.Family {
	var families []dataplane.Family
	for _, a := range addrs {
		if f := dataplane.FamilyOf(a); !slices.Contains(families, f) {
			families = append(families, f)
		}
	}
	return families
}

// reportProblem reports a problem of a Service in the log, Events and metrics.
func (d *dispatcher) reportProblem(p kube.Problem) {
	log := d.log.With("service", p.Service.String())
	if p.EndpointSlice != "" {
		log = log.With("endpoint_slice", p.EndpointSlice)
	}
	log.Warn("Service cannot be programmed as written", "field", p.Field, "problem", p.Message)
	d.events.Problem(p)
	d.metrics.RecordProblem()
}

// watchAddresses passes on the node's addresses, and calls ready after each update.
func (d *dispatcher) watchAddresses(ctx context.Context, watch func(context.Context, func(nodeip.Addresses)) error, ready func()) error {
	return watch(ctx, func(addrs nodeip.Addresses) {
		d.setAddresses(addrs)
		ready()
	})
}
