package compare

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/test/controlplane"
)

// controlPlaneFactory starts a real etcd and kube-apiserver for each server.
type controlPlaneFactory struct {
	programs string
	content  *content
	progress func(format string, args ...any)
}

func (p *controlPlaneFactory) open(ctx context.Context) (_ server, err error) {
	begin := time.Now()
	s := &controlPlane{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start API server: %w", err), s.close())
		}
	}()
	if s.machine, err = testbed.NewMachine("api-server"); err != nil {
		return nil, err
	}
	if s.programs, err = controlplane.New(ctx, controlplane.Options{
		Programs: p.programs, Namespace: s.machine.Namespace, Address: s.machine.IPv4, ServiceCIDRs: []netip.Prefix{testbed.ServiceCIDR},
	}); err != nil {
		return nil, err
	}
	if err := s.newClients(); err != nil {
		return nil, err
	}
	if err := s.load(ctx, p.content); err != nil {
		return nil, err
	}
	p.progress("an API server has started and stored all Services after %s", time.Since(begin).Round(time.Millisecond))
	return s, nil
}

// controlPlane is a real etcd and kube-apiserver on a separate machine.
type controlPlane struct {
	machine         *nettest.Host
	programs        *controlplane.ControlPlane
	core, discovery *rest.RESTClient
}

// newClients creates the REST clients.
func (s *controlPlane) newClients() (err error) {
	if s.core, err = s.programs.Client(corev1.SchemeGroupVersion, corev1.AddToScheme); err != nil {
		return err
	}
	s.discovery, err = s.programs.Client(discoveryv1.SchemeGroupVersion, discoveryv1.AddToScheme)
	return err
}

// load creates the objects of c.
func (s *controlPlane) load(ctx context.Context, c *content) error {
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: cluster.Namespace}}
	if err := s.core.Post().Resource("namespaces").Body(namespace).Do(ctx).Error(); err != nil {
		return fmt.Errorf("create namespace %s: %w", cluster.Namespace, err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxConcurrentRequests)
	for _, o := range c.objects() {
		if o.GetObjectKind().GroupVersionKind().Kind == "ServiceCIDR" {
			continue // kube-apiserver creates it
		}
		group.Go(func() error { return s.create(ctx, o).wait() })
	}
	return group.Wait()
}

func (s *controlPlane) attach(_ context.Context, r *testbed.Testbed, kubeconfig string) (func() error, error) {
	if err := s.programs.Kubeconfig(kubeconfig, "bench", "system:masters"); err != nil {
		return nil, err
	}
	return func() error { return nil }, r.Attach(s.machine)
}

func (s *controlPlane) create(ctx context.Context, objects ...apiserver.Object) *request {
	return s.requestEach(ctx, "create", objects, func(client *rest.RESTClient, o apiserver.Object) *rest.Request {
		return client.Post().Body(o)
	})
}

func (s *controlPlane) update(ctx context.Context, objects ...apiserver.Object) *request {
	return s.requestEach(ctx, "update", objects, func(client *rest.RESTClient, o apiserver.Object) *rest.Request {
		return client.Put().Name(o.GetName()).Body(o)
	})
}

func (s *controlPlane) delete(ctx context.Context, objects ...apiserver.Object) *request {
	return s.requestEach(ctx, "delete", objects, func(client *rest.RESTClient, o apiserver.Object) *rest.Request {
		return client.Delete().Name(o.GetName())
	})
}

// requestEach makes one request for each object, in order.
func (s *controlPlane) requestEach(
	ctx context.Context, verb string, objects []apiserver.Object, newRequest func(*rest.RESTClient, apiserver.Object) *rest.Request,
) *request {
	return startRequest(func() error {
		for _, o := range objects {
			client, resource, err := s.clientFor(o)
			if err == nil {
				err = newRequest(client, o).NamespaceIfScoped(o.GetNamespace(), o.GetNamespace() != "").Resource(resource).Do(ctx).Error()
			}
			if err != nil {
				return fmt.Errorf("%s %s %s: %w", verb, resource, o.GetName(), err)
			}
		}
		return nil
	})
}

// clientFor returns the REST client and the resource name for an object.
func (s *controlPlane) clientFor(o apiserver.Object) (client *rest.RESTClient, resource string, err error) {
	switch o.(type) {
	case *corev1.Service:
		return s.core, "services", nil
	case *corev1.Node:
		return s.core, "nodes", nil
	case *discoveryv1.EndpointSlice:
		return s.discovery, "endpointslices", nil
	default:
		return nil, "", fmt.Errorf("unsupported object type %T", o)
	}
}

func (s *controlPlane) close() error {
	var errs []error
	if s.programs != nil {
		errs = append(errs, s.programs.Close())
	}
	if s.machine != nil {
		errs = append(errs, s.machine.Close())
	}
	return errors.Join(errs...)
}
