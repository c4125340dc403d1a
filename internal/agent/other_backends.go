package agent

import (
	"context"
	"log/slog"

	"fairlead.io/fairlead/internal/backend"
)

// removeOtherBackends removes what other backends have left, once the running one has programmed
// everything: Services work all the time. A failure is logged and holds up nothing.
func removeOtherBackends(
	ctx context.Context, running backend.Backend, log *slog.Logger, programmed <-chan struct{}, cleanup func(backend.Backend, *slog.Logger) error,
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
		if err := cleanup(other, log); err != nil {
			log.WarnContext(ctx, "what another mode may have programmed is still there; the next start tries again",
				"other_mode", other.Name, "error", err)
			continue
		}
		log.InfoContext(ctx, "nothing that another mode has programmed is left", "other_mode", other.Name)
	}
}
