package main

import (
	"fmt"
	"log/slog"

	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/internal/agent"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/source/apiserver"
	"fairlead.io/fairlead/source/manifest"
)

var _ agent.Events = (*apiserver.Events)(nil)

// openSource creates the source and Events, and sets them in o. It does not block.
func openSource(o *agent.Options) error {
	c, log := o.Config, o.Logger
	o.SourceName = sourceName(c)
	if c.Manifests != "" {
		s, err := newManifestSource(c, log)
		if err != nil {
			return err
		}
		o.Source, o.Events = s, agent.NoEvents{}
		return nil
	}
	client, err := clientConfig(c.API)
	if err != nil {
		return err
	}
	e, err := apiserver.NewEvents(apiserver.EventOptions{
		Config: client, NodeName: c.Tracker.NodeName, Version: version, Logger: log.With("component", "events"),
	})
	if err != nil {
		return fmt.Errorf("create the client for Events: %w", err)
	}
	api := apiOptions(c, client, log)
	api.ConvertObjects = true
	api.BatchPeriod, api.MassRemovalDelay = c.API.BatchPeriod, c.API.MassRemovalDelay
	api.ProgrammedServices = servedServices(o.Backend, log)
	api.OnMassRemoval = func(resource string, removed, before int) {
		e.MassRemoval(resource, removed, before, c.API.MassRemovalDelay)
	}
	s, err := newAPISource(api)
	if err != nil {
		return err
	}
	o.Source, o.Events, o.APIResources, o.APIConnection = s, e, apiResources(s), apiConnection(s)
	return nil
}

// openReadOnlySource creates the source of the same objects for a command that programs nothing. It
// delivers removals at once, and objects with all fields. It does not block.
func openReadOnlySource(c config.Config, log *slog.Logger) (desired.Source, error) {
	if c.Manifests != "" {
		return newManifestSource(c, log)
	}
	client, err := clientConfig(c.API)
	if err != nil {
		return nil, err
	}
	api := apiOptions(c, client, log)
	api.KeepAllFields = true
	return newAPISource(api)
}

func newManifestSource(c config.Config, log *slog.Logger) (*manifest.Source, error) {
	s, err := manifest.New(manifest.Options{
		Dir: c.Manifests, ServiceCIDRs: c.ServiceCIDRs, NodeName: c.Tracker.NodeName, Logger: log.With("component", "manifest"),
	})
	if err != nil {
		return nil, fmt.Errorf("--manifests: %w", err)
	}
	return s, nil
}

// apiOptions returns the options that select the objects of the API server.
func apiOptions(c config.Config, client *rest.Config, log *slog.Logger) apiserver.Options {
	return apiserver.Options{
		Config: client, NodeName: c.Tracker.NodeName, ServiceProxyName: c.Tracker.ServiceProxyName, Version: version, Logger: log.With("component", "apiserver"),
	}
}

func newAPISource(o apiserver.Options) (*apiserver.Source, error) {
	s, err := apiserver.New(o)
	if err != nil {
		return nil, fmt.Errorf("create the API server source: %w", err)
	}
	return s, nil
}

// sourceName describes the source of objects for the log.
func sourceName(c config.Config) string {
	switch {
	case c.Manifests != "":
		return "manifests " + c.Manifests
	case c.API.Kubeconfig != "":
		return "API server of " + c.API.Kubeconfig
	case c.API.Master != "":
		return "API server " + c.API.Master
	default:
		return "API server of this pod's cluster"
	}
}

// clientConfig returns the client-go configuration for the API server.
func clientConfig(a config.APIServer) (*rest.Config, error) {
	client, err := apiserver.Config(a.Kubeconfig, a.Master)
	if err != nil {
		label := a.Label
		if a.Master != "" {
			// Blame --master if the kubeconfig works without it.
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
