// Package loadbalancer does for Services of type LoadBalancer what a cloud does: it gives them
// addresses, and routes connections from outside of the cluster to nodes. It runs in the network
// namespace of the control plane, in which the client of the tests is outside of the cluster.
//
// With externalTrafficPolicy Local, only nodes whose health-check node port succeeds get
// connections. Connections to an address without such nodes get no answer. Services with a
// loadBalancerClass belong to other implementations.
package loadbalancer

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// finalizer keeps a Service until its addresses are released. It is the one of cloud providers.
const finalizer = "service.kubernetes.io/load-balancer-cleanup"

// period is the time between two checks of Services and of health-check node ports.
const period = 500 * time.Millisecond

// Balancer serves the Services of a cluster.
type Balancer struct {
	client    kubernetes.Interface
	nodes     []topology.Node
	log       *slog.Logger
	http      *http.Client
	router    *router
	addresses *pool
	hops      map[netip.Addr][]topology.Node // of the current routes
}

// New returns a Balancer. It adds the client's addresses to the network namespace.
func New(client kubernetes.Interface, cluster *topology.Cluster, log *slog.Logger) (*Balancer, error) {
	r, err := newRouter()
	if err != nil {
		return nil, err
	}
	const timeout = time.Second
	return &Balancer{
		client: client, nodes: cluster.AllNodes(), log: log, router: r,
		http:      &http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true}},
		addresses: newPool(topology.LoadBalancerCIDRs()),
		hops:      map[netip.Addr][]topology.Node{},
	}, nil
}

// Run serves Services until ctx ends. It logs errors and tries again.
func (b *Balancer) Run(ctx context.Context) {
	services := cache.NewSharedInformer(
		cache.NewListWatchFromClient(b.client.CoreV1().RESTClient(), "services", metav1.NamespaceAll, fields.Everything()), &corev1.Service{}, 0)
	go services.RunWithContext(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(period):
		}
		if services.HasSynced() {
			b.sync(ctx, services.GetStore())
		}
	}
}

func (b *Balancer) sync(ctx context.Context, services cache.Store) {
	present := map[types.UID]bool{}
	for _, object := range services.List() {
		s, ok := object.(*corev1.Service)
		if !ok {
			continue
		}
		var err error
		switch wanted, ours := classify(s); {
		case wanted:
			present[s.UID] = true
			err = b.serve(ctx, s)
		case ours:
			err = b.release(ctx, s)
		}
		// A conflict means that the watch has not delivered the last change yet.
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			b.log.ErrorContext(ctx, "cannot serve the Service", "service", s.Namespace+"/"+s.Name, "error", err)
		}
	}
	b.removeRoutes(b.addresses.retain(present))
}

// classify reports whether a Service wants an address, and whether it has the finalizer.
func classify(s *corev1.Service) (wanted, ours bool) {
	ours = slices.Contains(s.Finalizers, finalizer)
	wanted = s.Spec.Type == corev1.ServiceTypeLoadBalancer && s.DeletionTimestamp == nil && s.Spec.LoadBalancerClass == nil
	return wanted, ours
}

// serve gives a Service its addresses and sets the routes to them.
func (b *Balancer) serve(ctx context.Context, s *corev1.Service) error {
	addresses, err := b.addresses.get(s.UID, s.Spec.IPFamilies)
	if err != nil {
		return err
	}
	if !slices.Contains(s.Finalizers, finalizer) {
		if err := b.patch(ctx, s, "", map[string]any{"metadata": map[string]any{
			"finalizers": append(slices.Clone(s.Finalizers), finalizer), "resourceVersion": s.ResourceVersion,
		}}); err != nil {
			return err
		}
	}
	hops := b.targets(ctx, s)
	for _, address := range addresses {
		current, known := b.hops[address]
		if known && slices.Equal(current, hops) {
			continue
		}
		if err := b.router.set(address, hops); err != nil {
			return fmt.Errorf("set the route to %s: %w", address, err)
		}
		b.hops[address] = hops
	}
	status := ingress(addresses)
	if slices.EqualFunc(s.Status.LoadBalancer.Ingress, status, func(a, b corev1.LoadBalancerIngress) bool { return a.IP == b.IP }) {
		return nil
	}
	return b.patch(ctx, s, "status", map[string]any{"status": map[string]any{"loadBalancer": map[string]any{"ingress": status}}})
}

func ingress(addresses []netip.Addr) []corev1.LoadBalancerIngress {
	mode := corev1.LoadBalancerIPModeVIP
	status := make([]corev1.LoadBalancerIngress, 0, len(addresses))
	for _, address := range addresses {
		status = append(status, corev1.LoadBalancerIngress{IP: address.String(), IPMode: &mode})
	}
	return status
}

// release releases the addresses of a Service and removes the finalizer and the status.
func (b *Balancer) release(ctx context.Context, s *corev1.Service) error {
	b.removeRoutes(b.addresses.release(s.UID))
	if s.DeletionTimestamp == nil && len(s.Status.LoadBalancer.Ingress) > 0 {
		if err := b.patch(ctx, s, "status", map[string]any{"status": map[string]any{"loadBalancer": map[string]any{"ingress": nil}}}); err != nil {
			return err
		}
	}
	remaining := slices.DeleteFunc(slices.Clone(s.Finalizers), func(f string) bool { return f == finalizer })
	return b.patch(ctx, s, "", map[string]any{"metadata": map[string]any{"finalizers": remaining}})
}

func (b *Balancer) removeRoutes(addresses []netip.Addr) {
	for _, address := range addresses {
		if err := b.router.remove(address); err != nil {
			b.log.Error("cannot remove the route", "address", address, "error", err)
		}
		delete(b.hops, address)
	}
}

func (b *Balancer) patch(ctx context.Context, s *corev1.Service, subresource string, change map[string]any) error {
	data, err := json.Marshal(change)
	if err != nil {
		return err
	}
	var subresources []string
	if subresource != "" {
		subresources = append(subresources, subresource)
	}
	_, err = b.client.CoreV1().Services(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, data, metav1.PatchOptions{}, subresources...)
	return err
}

// targets returns the nodes that connections go to, in the order of their numbers.
func (b *Balancer) targets(ctx context.Context, s *corev1.Service) []topology.Node {
	hops := b.nodes
	if s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		hops = b.healthy(ctx, s.Spec.HealthCheckNodePort)
	}
	// Connections of one client must reach one node, because nodes do not share affinity.
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP && len(hops) > 1 {
		hops = hops[:1]
	}
	return hops
}

// healthy returns the nodes whose health-check node port reports endpoints.
func (b *Balancer) healthy(ctx context.Context, port int32) []topology.Node {
	ok := make([]bool, len(b.nodes))
	var wait sync.WaitGroup
	for i, n := range b.nodes {
		wait.Go(func() { ok[i] = b.check(ctx, netip.AddrPortFrom(n.IPv4, uint16(port))) })
	}
	wait.Wait()
	var nodes []topology.Node
	for i, n := range b.nodes {
		if ok[i] {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

func (b *Balancer) check(ctx context.Context, address netip.AddrPort) bool {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address.String()+"/healthz", http.NoBody)
	if err != nil {
		return false
	}
	response, err := b.http.Do(request)
	if err != nil {
		return false
	}
	defer response.Body.Close() //nolint:errcheck // read-only
	return response.StatusCode == http.StatusOK
}
