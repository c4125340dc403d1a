package main

import (
	"context"
	"fmt"
	"log/slog"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
	"fairlead.io/fairlead/source/manifest"
)

// source is where objects come from. Run delivers everything there is, then each
// change, and returns nil when ctx is done.
type source interface {
	Run(ctx context.Context, deliver func(kube.Delta)) error
}

// events are where operators of a cluster look for what is wrong.
type events interface {
	Run(ctx context.Context) error
	Apply(d kube.Delta)
	Problem(p kube.Problem)
	NotProgrammed(key dataplane.Key, err error)
	HealthCheckFailed(service types.NamespacedName, port uint16, err error)
	OtherProxy(rules, effect, remove string)
	TableRebuilt(table, reason string)
}

var (
	_ events = (*apiserver.Events)(nil)
	_ events = noEvents{}
)

// noEvents are for where nobody could read them.
type noEvents struct{}

// Run implements events.
func (noEvents) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Apply implements events.
func (noEvents) Apply(kube.Delta) {}

// Problem implements events.
func (noEvents) Problem(kube.Problem) {}

// NotProgrammed implements events.
func (noEvents) NotProgrammed(dataplane.Key, error) {}

// HealthCheckFailed implements events.
func (noEvents) HealthCheckFailed(types.NamespacedName, uint16, error) {}

// OtherProxy implements events.
func (noEvents) OtherProxy(string, string, string) {}

// TableRebuilt implements events.
func (noEvents) TableRebuilt(string, string) {}

// open returns the source, and where Events go. It does not wait for anything.
func (c config) open(log *slog.Logger) (source, events, error) {
	if c.manifests != "" {
		s, err := manifest.New(manifest.Options{
			Dir: c.manifests, ServiceCIDRs: c.serviceCIDRs, NodeName: c.tracker.NodeName, Logger: log.With("component", "manifest"),
		})
		if err != nil {
			return nil, nil, fmt.Errorf("--manifests: %w", err)
		}
		return s, noEvents{}, nil
	}
	client, err := c.api.client()
	if err != nil {
		return nil, nil, err
	}
	e, err := apiserver.NewEvents(apiserver.EventOptions{
		Config: client, NodeName: c.tracker.NodeName, Version: version, Logger: log.With("component", "events"),
	})
	if err != nil {
		return nil, nil, fmt.Errorf("write Events to the API server: %w", err)
	}
	s, err := apiserver.New(apiserver.Options{
		Config: client, NodeName: c.tracker.NodeName, Version: version, BatchPeriod: c.api.batchPeriod,
		MassRemovalDelay: c.api.massRemovalDelay, Programmed: c.mode.served(log), Logger: log.With("component", "apiserver"),
		OnMassRemoval: func(resource string, removed, before int) {
			e.MassRemoval(resource, removed, before, c.api.massRemovalDelay)
		},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("follow the API server: %w", err)
	}
	return s, e, nil
}

// client returns how to reach the API server.
func (a apiConfig) client() (*rest.Config, error) {
	client, err := apiserver.Config(a.kubeconfig, a.master)
	if err != nil {
		label := a.label
		if a.master != "" {
			// Is it all the same without?
			if _, err := apiserver.Config(a.kubeconfig, ""); err == nil || a.kubeconfig == "" {
				label = "--master"
			}
		}
		return nil, fmt.Errorf("%s: %w", label, err)
	}
	client.QPS, client.Burst = a.qps, a.burst
	if a.contentType != "" {
		client.ContentType = a.contentType
		client.AcceptContentTypes = a.contentType + ",application/json"
	}
	if a.acceptContentTypes != "" {
		client.AcceptContentTypes = a.acceptContentTypes
	}
	return client, nil
}
