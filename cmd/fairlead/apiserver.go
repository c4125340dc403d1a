package main

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/source/apiserver"
)

// readServedTimeout limits the time to read the programmed Services at startup.
const readServedTimeout = 10 * time.Second

// servedServices returns a function that reads from the kernel which Services with endpoints an
// earlier process has programmed. The function logs errors and returns nil for them.
func servedServices(b backend.Backend, log *slog.Logger) func() map[types.NamespacedName]struct{} {
	if b.ServedServices == nil {
		return nil
	}
	return func() map[types.NamespacedName]struct{} {
		ctx, cancel := context.WithTimeout(context.Background(), readServedTimeout)
		defer cancel()
		texts, err := b.ServedServices(ctx)
		if err != nil {
			log.WarnContext(ctx, "reading the programmed Services failed; the first list of the API server is not compared with them", "error", err)
			return nil
		}
		names := make(map[types.NamespacedName]struct{}, len(texts))
		for text := range texts {
			name, _, _ := strings.Cut(text, ":")
			if namespace, name, ok := strings.Cut(name, "/"); ok && !strings.Contains(name, "~") {
				names[types.NamespacedName{Namespace: namespace, Name: name}] = struct{}{}
			}
		}
		return names
	}
}

// apiResources returns a function that converts the source's statistics for metrics.
func apiResources(api *apiserver.Source) func() []metrics.APIResource {
	return func() []metrics.APIResource {
		stats := api.Stats()
		lists := make([]metrics.APIResource, 0, len(stats))
		for _, l := range stats {
			list := metrics.APIResource{Resource: l.Resource, Synced: l.Synced, HeldRemovals: l.HeldRemovals, Recoveries: l.Recoveries}
			for failure, count := range l.Failures {
				list.Failures = append(list.Failures, metrics.APIFailures{Verb: failure.Verb, Code: failure.Code, Count: count})
			}
			lists = append(lists, list)
		}
		return lists
	}
}

// apiConnection returns a function that converts the state of the source's connection.
func apiConnection(api *apiserver.Source) func() metrics.APIConnection {
	return func() metrics.APIConnection {
		s := api.ConnectionStatus()
		return metrics.APIConnection{Connected: s.Connected, LastResponse: s.LastResponse, Failures: s.Failures}
	}
}
