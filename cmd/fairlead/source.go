package main

import (
	"context"
	"fmt"
	"log/slog"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
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

// openSource returns the source, and where Events go. It does not wait for anything.
func openSource(c config.Config, b backend.Backend, log *slog.Logger) (source, events, error) {
	if c.Manifests != "" {
		s, err := manifest.New(manifest.Options{
			Dir: c.Manifests, ServiceCIDRs: c.ServiceCIDRs, NodeName: c.Tracker.NodeName, Logger: log.With("component", "manifest"),
		})
		if err != nil {
			return nil, nil, fmt.Errorf("--manifests: %w", err)
		}
		return s, noEvents{}, nil
	}
	client, err := clientOf(c.API)
	if err != nil {
		return nil, nil, err
	}
	e, err := apiserver.NewEvents(apiserver.EventOptions{
		Config: client, NodeName: c.Tracker.NodeName, Version: version, Logger: log.With("component", "events"),
	})
	if err != nil {
		return nil, nil, fmt.Errorf("write Events to the API server: %w", err)
	}
	s, err := apiserver.New(apiserver.Options{
		Config: client, NodeName: c.Tracker.NodeName, Version: version, BatchPeriod: c.API.BatchPeriod,
		MassRemovalDelay: c.API.MassRemovalDelay, Programmed: servedServices(b, log), Logger: log.With("component", "apiserver"),
		OnMassRemoval: func(resource string, removed, before int) {
			e.MassRemoval(resource, removed, before, c.API.MassRemovalDelay)
		},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("follow the API server: %w", err)
	}
	return s, e, nil
}

// clientOf returns how to reach the API server.
func clientOf(a config.APIServer) (*rest.Config, error) {
	client, err := apiserver.Config(a.Kubeconfig, a.Master)
	if err != nil {
		label := a.Label
		if a.Master != "" {
			// Is it all the same without?
			if _, err := apiserver.Config(a.Kubeconfig, ""); err == nil || a.Kubeconfig == "" {
				label = "--master"
			}
		}
		return nil, fmt.Errorf("%s: %w", label, err)
	}
	client.QPS, client.Burst = a.QPS, a.Burst
	if a.ContentType != "" {
		client.ContentType = a.ContentType
		client.AcceptContentTypes = a.ContentType + ",application/json"
	}
	if a.AcceptContentTypes != "" {
		client.AcceptContentTypes = a.AcceptContentTypes
	}
	return client, nil
}
