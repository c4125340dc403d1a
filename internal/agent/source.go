package agent

import (
	"context"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
)

// Source delivers Kubernetes objects.
type Source interface {
	// Run delivers all objects, then changes, until ctx is done. It returns nil if ctx is done.
	Run(ctx context.Context, deliver func(kube.Delta)) error
}

// Events reports problems to the operators of a cluster.
type Events interface {
	Run(ctx context.Context) error
	Apply(d kube.Delta)
	Problem(p kube.Problem)
	NotProgrammed(key dataplane.Key, err error)
	HealthCheckFailed(namespace, name string, port uint16, err error)
	OtherProxy(rules, effect string)
	TableRebuilt(table, reason string)
	FlowOffloadFailed(err error)
	// ModeReplaced reports that another mode of kube-proxy is configured than the one that
	// Fairlead runs in.
	ModeReplaced(notice string)
	HealthzServerFailed(err error)
	MetricsServerFailed(err error)
}

var _ Events = NoEvents{}

// NoEvents discards all reports, for sources without a cluster.
type NoEvents struct{}

// Run implements Events.
func (NoEvents) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Apply implements Events.
func (NoEvents) Apply(kube.Delta) {}

// Problem implements Events.
func (NoEvents) Problem(kube.Problem) {}

// NotProgrammed implements Events.
func (NoEvents) NotProgrammed(dataplane.Key, error) {}

// HealthCheckFailed implements Events.
func (NoEvents) HealthCheckFailed(string, string, uint16, error) {}

// OtherProxy implements Events.
func (NoEvents) OtherProxy(string, string) {}

// TableRebuilt implements Events.
func (NoEvents) TableRebuilt(string, string) {}

// FlowOffloadFailed implements Events.
func (NoEvents) FlowOffloadFailed(error) {}

// ModeReplaced implements Events.
func (NoEvents) ModeReplaced(string) {}

// HealthzServerFailed implements Events.
func (NoEvents) HealthzServerFailed(error) {}

// MetricsServerFailed implements Events.
func (NoEvents) MetricsServerFailed(error) {}
