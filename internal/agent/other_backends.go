package agent

import (
	"context"
	"log/slog"

	"fairlead.io/fairlead/internal/backend"
)

// removeOtherBackends removes the kernel state of other backends once the running backend has
// programmed all Services and existing connections have ended, so that connections are not
// interrupted. It only logs failures.
func removeOtherBackends(
	ctx context.Context, running backend.Backend, log *slog.Logger, programmed <-chan struct{}, remove func(backend.Backend, context.Context, *slog.Logger) error,
) {
	select {
	case <-ctx.Done():
		return
	case <-programmed:
	}
	for _, other := range backend.All() {
		if other.Name == running.Name {
			continue
		}
		if err := remove(other, ctx, log); ctx.Err() != nil {
			return // the next start continues
		} else if err != nil {
			log.WarnContext(ctx, "removing the kernel state of another mode failed; the next start retries",
				"other_mode", other.Name, "error", err)
			continue
		}
		log.InfoContext(ctx, "no kernel state of another mode remains", "other_mode", other.Name)
	}
}
