package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/test/controlplane"
)

// api is the API server that Fairlead watches. Its methods may be called concurrently, but
// not for the same object.
type api interface {
	// create and update write an object. They return when the server has stored it.
	create(ctx context.Context, o apiserver.Object) error
	update(ctx context.Context, o apiserver.Object) error
	// writeKubeconfig writes a kubeconfig file for programs on the node.
	writeKubeconfig(path string) error
	// stop ends the server like a crash, which breaks connections. start starts it again with
	// the same objects.
	stop() error
	start(ctx context.Context) error
	close() error
}

// realAPI is an etcd and a kube-apiserver on the outside host.
type realAPI struct {
	cp              *controlplane.ControlPlane
	core, discovery *rest.RESTClient
}

func newRealAPI(ctx context.Context, at *nettest.Host) (_ *realAPI, err error) {
	a := &realAPI{}
	a.cp, err = controlplane.New(ctx, controlplane.Options{
		Namespace: at.Namespace, Address: at.IPv4, ServiceCIDRs: serviceCIDRs(),
	})
	if err != nil {
		return nil, err
	}
	if a.core, err = a.cp.Client(corev1.SchemeGroupVersion, corev1.AddToScheme); err == nil {
		a.discovery, err = a.cp.Client(discoveryv1.SchemeGroupVersion, discoveryv1.AddToScheme)
	}
	if err == nil {
		o := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
		err = a.core.Post().Resource("namespaces").Body(o).Do(ctx).Error()
	}
	if err != nil {
		return nil, errors.Join(err, a.cp.Close())
	}
	return a, nil
}

func (a *realAPI) writeKubeconfig(path string) error {
	return a.cp.Kubeconfig(path, "chaos", "system:masters")
}

func (a *realAPI) create(ctx context.Context, o apiserver.Object) error {
	return a.write(ctx, "create", o, func(c *rest.RESTClient) *rest.Request { return c.Post() })
}

func (a *realAPI) update(ctx context.Context, o apiserver.Object) error {
	return a.write(ctx, "update", o, func(c *rest.RESTClient) *rest.Request { return c.Put().Name(o.GetName()) })
}

func (a *realAPI) write(ctx context.Context, verb string, o apiserver.Object, request func(*rest.RESTClient) *rest.Request) error {
	// A request must not hang if stop interrupts it.
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	client, resource := a.core, "services"
	switch o.(type) {
	case *corev1.Node:
		resource = "nodes"
	case *discoveryv1.EndpointSlice:
		client, resource = a.discovery, "endpointslices"
	}
	err := request(client).NamespaceIfScoped(o.GetNamespace(), o.GetNamespace() != "").Resource(resource).Body(o).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("%s %s %s: %w", verb, resource, o.GetName(), err)
	}
	return nil
}

func (a *realAPI) stop() error { return a.cp.StopAPIServer() }

func (a *realAPI) start(ctx context.Context) error { return a.cp.StartAPIServer(ctx) }

func (a *realAPI) close() error { return a.cp.Close() }

// feedAPI is a server in this process, at a loopback address of the node.
type feedAPI struct {
	node  *nettest.Host
	feed  *apiserver.Server
	clock apiserver.VersionSequence

	mu             sync.Mutex // also keeps the order of object versions
	server         *http.Server
	cancelRequests context.CancelFunc // ends requests in progress
}

func newFeedAPI(ctx context.Context, at *nettest.Host) (*feedAPI, error) {
	a := &feedAPI{node: at, feed: apiserver.New()}
	cidr := &networkingv1.ServiceCIDR{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "ServiceCIDR"},
		ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
	}
	for _, p := range serviceCIDRs() {
		cidr.Spec.CIDRs = append(cidr.Spec.CIDRs, p.String())
	}
	return a, errors.Join(a.create(ctx, cidr), a.start(ctx))
}

func (a *feedAPI) address() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 6443)
}

func (a *feedAPI) writeKubeconfig(path string) error {
	text := `apiVersion: v1
kind: Config
clusters: [{name: chaos, cluster: {server: "http://` + a.address().String() + `"}}]
users: [{name: chaos}]
contexts: [{name: chaos, context: {cluster: chaos, user: chaos}}]
current-context: chaos
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write a kubeconfig: %w", err)
	}
	return nil
}

func (a *feedAPI) create(_ context.Context, o apiserver.Object) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.server == nil && a.cancelRequests != nil {
		return errors.New("the API server is stopped")
	}
	v, err := a.clock.Stamp(o)
	if err == nil {
		a.feed.Put(v)
	}
	return err
}

func (a *feedAPI) update(ctx context.Context, o apiserver.Object) error { return a.create(ctx, o) }

func (a *feedAPI) start(ctx context.Context) error {
	listener, err := a.node.Listen(ctx, "tcp4", a.address())
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	requests, end := context.WithCancel(context.WithoutCancel(ctx))
	a.cancelRequests = end
	s := &http.Server{
		Handler: a.feed, ReadHeaderTimeout: time.Minute,
		BaseContext: func(net.Listener) context.Context { return requests },
	}
	a.server = s
	go func() { _ = s.Serve(listener) }() // returns when stop closes the server
	return nil
}

func (a *feedAPI) stop() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.server == nil {
		return nil
	}
	a.cancelRequests()
	err := a.server.Close()
	a.server = nil
	return err
}

func (a *feedAPI) close() error { return a.stop() }
