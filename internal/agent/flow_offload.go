package agent

import (
	"context"
	"log/slog"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/scratchns"
)

// initializeFlowOffload loads the kernel's modules of flowtables. A kernel without flowtables is no
// error, because Services work without them.
func initializeFlowOffload(ctx context.Context, c config.FlowOffload, log *slog.Logger) {
	if !c.Enabled {
		return
	}
	if err := tryFlowtable(); err != nil {
		log.WarnContext(ctx, "connections will not be offloaded to a flowtable; Services are not affected", "error", err)
		return
	}
	log.InfoContext(ctx, "the kernel supports flowtables", "reason", "--init-only")
}

// tryFlowtable creates a flowtable in a network namespace of its own.
func tryFlowtable() error {
	namespace, err := scratchns.New()
	if err != nil {
		return err
	}
	defer namespace.Close() //nolint:errcheck // nothing was written to it
	return flowoffload.Check(int(namespace.Fd()))
}

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

// readFlowOffload reads the state of the flowtable for a scrape.
func (a *Agent) readFlowOffload() flowoffload.Stats {
	ctx, cancel := context.WithTimeout(context.Background(), countersTimeout)
	defer cancel()
	return a.flowOffload.Stats(ctx)
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
