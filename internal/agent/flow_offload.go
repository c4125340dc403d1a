package agent

import (
	"context"
	"log/slog"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/flowoffload"
)

// newFlowOffload sets a.flowOffload and returns the Dataplane to program.
func (a *Agent) newFlowOffload(inner dataplane.Dataplane, c config.FlowOffload, events Events) (dataplane.Dataplane, error) {
	if !c.Enabled {
		return inner, nil
	}
	d, err := flowoffload.New(inner, flowoffload.Options{
		Hardware: c.Hardware, Threshold: c.Threshold, OnFailure: events.FlowOffloadFailed, Logger: a.log.With("component", "flow-offload"),
	})
	if err != nil {
		return nil, err
	}
	a.flowOffload = d
	return d, nil
}

// removeFlowOffload removes the flowtable of an earlier process with --flow-offload, once all Services
// are programmed.
func removeFlowOffload(ctx context.Context, log *slog.Logger, programmed <-chan struct{}) {
	select {
	case <-ctx.Done():
	case <-programmed:
		if err := flowoffload.Remove(0); err != nil {
			log.WarnContext(ctx, "removing the flowtable of an earlier --flow-offload failed; the next start retries", "error", err)
		}
	}
}
