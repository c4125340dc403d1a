package nodesettings

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Interval is the default of [Options.Interval].
const Interval = time.Minute

// Options configure a [Watcher]. The zero value is ready to use.
type Options struct {
	// Interval is the time between reads. 0 means [Interval].
	Interval time.Duration
	// Logger receives a Warn for each new problem and an Info when it ends. Nil disables
	// logging.
	Logger *slog.Logger
}

// Watcher periodically checks the settings in the process's network namespace. Its methods may
// be called concurrently.
type Watcher struct {
	interval time.Duration
	log      *slog.Logger
	changed  chan struct{} // the pod network has changed

	mu         sync.Mutex
	podNetwork PodNetwork
	problems   []Problem
	failing    bool // the last check failed and was logged
}

// New returns a Watcher. Call [Watcher.Run] to start it.
func New(options Options) *Watcher {
	w := &Watcher{interval: options.Interval, log: options.Logger, changed: make(chan struct{}, 1)}
	if w.interval == 0 {
		w.interval = Interval
	}
	if w.log == nil {
		w.log = slog.New(slog.DiscardHandler)
	}
	return w
}

// SetPodNetwork sets how to detect bridges that carry pods. It does not block.
func (w *Watcher) SetPodNetwork(pods PodNetwork) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.podNetwork = pods
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Problems returns the problems found by the last check.
func (w *Watcher) Problems() []Problem {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.problems)
}

// Run checks the settings after the first SetPodNetwork, then once per interval and after each
// SetPodNetwork, until ctx is done. It returns nil.
func (w *Watcher) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-w.changed:
	}
	ticker := time.NewTicker(w.interval)
	defer ticker.Stop()
	for {
		w.refresh(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-w.changed:
		}
	}
}

func (w *Watcher) refresh(ctx context.Context) {
	w.mu.Lock()
	pods, before := w.podNetwork, w.problems
	w.mu.Unlock()
	now, err := Check(pods)
	if err != nil {
		if !w.failing {
			w.log.WarnContext(ctx, "cannot read node settings", "error", err)
		}
		w.failing = true
		return
	}
	w.failing = false
	w.mu.Lock()
	w.problems = now
	w.mu.Unlock()
	for _, p := range now {
		if !slices.Contains(before, p) {
			w.log.WarnContext(ctx, "a node setting has a wrong value", "consequence", p.Consequence, "setting", p.Setting, "interface", p.Interface, "fix", p.Fix)
		}
	}
	for _, p := range before {
		if !slices.Contains(now, p) {
			w.log.InfoContext(ctx, "a node setting is no longer a problem", "setting", p.Setting, "interface", p.Interface)
		}
	}
}
