package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/internal/inspect"
	"fairlead.io/fairlead/kube"
)

// serviceObjects is what only the API server or the manifests know about Services.
type serviceObjects struct {
	services map[types.NamespacedName]*corev1.Service
	// conditions contains the conditions of endpoints.
	conditions map[endpointKey]discoveryv1.EndpointConditions
}

// endpointKey identifies an endpoint of a Service port.
type endpointKey struct {
	service  types.NamespacedName
	portName string
	addr     netip.AddrPort
}

// labels returns the labels of the Service that a frontend belongs to.
func (o *serviceObjects) labels(f *inspect.Frontend) labels.Set {
	namespace, name, _ := f.Service()
	if o == nil || o.services[types.NamespacedName{Namespace: namespace, Name: name}] == nil {
		return nil
	}
	return o.services[types.NamespacedName{Namespace: namespace, Name: name}].Labels
}

// servingTerminating reports whether the conditions of an endpoint say so.
func (o *serviceObjects) servingTerminating(f *inspect.Frontend, addr netip.AddrPort) bool {
	if o == nil {
		return false
	}
	namespace, name, port := f.Service()
	c := o.conditions[endpointKey{types.NamespacedName{Namespace: namespace, Name: name}, port, addr}]
	return isTrue(c.Terminating) && isTrue(c.Serving)
}

func isTrue(b *bool) bool { return b != nil && *b }

// needsObjects reports whether the command needs labels or conditions, which are not in the kernel.
func (g *getter) needsObjects() bool {
	if g.options.selector != "" {
		return true
	}
	for _, name := range []string{"kubeconfig", "master", "manifests", "config"} {
		if _, ok := g.flags[name]; ok {
			return true
		}
	}
	return false
}

// readObjects reads all Services and EndpointSlices.
func (g *getter) readObjects(ctx context.Context) (*serviceObjects, error) {
	objects, err := g.readDelta(ctx)
	if err != nil && g.options.selector != "" {
		return nil, fmt.Errorf("--selector: labels are not in the kernel, and cannot be read elsewhere: %w", err)
	}
	if err != nil {
		return nil, err
	}
	return newServiceObjects(objects), nil
}

func (g *getter) readDelta(ctx context.Context) (kube.Delta, error) {
	flags := config.Flags{}
	for name, value := range g.flags {
		if name != "mode" { // it selects what to read from the kernel
			flags[name] = value
		}
	}
	c, err := agentSettings(ctx, flags)
	if err != nil {
		return kube.Delta{}, err
	}
	source, err := openReadOnlySource(c, slog.New(slog.DiscardHandler))
	if err != nil {
		return kube.Delta{}, err
	}
	return firstDelta(ctx, source, sourceName(c))
}

// firstDelta returns the first Delta of a source, which contains all objects.
func firstDelta(ctx context.Context, source desired.Source, name string) (kube.Delta, error) {
	timeout, cancelTimeout := context.WithTimeout(ctx, desired.DefaultTimeout)
	defer cancelTimeout()
	running, cancel := context.WithCancel(timeout)
	defer cancel()
	var objects *kube.Delta
	err := source.Run(running, func(d kube.Delta) {
		if objects == nil {
			objects = &d
			cancel()
		}
	})
	switch {
	case objects != nil:
		return *objects, nil
	case err != nil:
		return kube.Delta{}, err
	case ctx.Err() != nil:
		return kube.Delta{}, ctx.Err()
	default:
		return kube.Delta{}, fmt.Errorf("%w: %s, within %s", desired.ErrTimeout, name, desired.DefaultTimeout)
	}
}

func newServiceObjects(objects kube.Delta) *serviceObjects {
	o := &serviceObjects{
		services:   map[types.NamespacedName]*corev1.Service{},
		conditions: map[endpointKey]discoveryv1.EndpointConditions{},
	}
	for _, s := range objects.Services {
		o.services[types.NamespacedName{Namespace: s.Namespace, Name: s.Name}] = s
	}
	for _, slice := range objects.EndpointSlices {
		o.addSlice(slice)
	}
	return o
}

func (o *serviceObjects) addSlice(slice *discoveryv1.EndpointSlice) {
	service := types.NamespacedName{Namespace: slice.Namespace, Name: slice.Labels[discoveryv1.LabelServiceName]}
	for _, p := range slice.Ports {
		if p.Port == nil {
			continue
		}
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		for _, e := range slice.Endpoints {
			for _, text := range e.Addresses {
				if addr, err := netip.ParseAddr(text); err == nil {
					o.conditions[endpointKey{service, name, netip.AddrPortFrom(addr, uint16(*p.Port))}] = e.Conditions //nolint:gosec // the API server validates ports
				}
			}
		}
	}
}
