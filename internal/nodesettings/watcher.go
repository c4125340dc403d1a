package nodesettings

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Interval is how often the settings are read where [Options] have no other.
const Interval = time.Minute

// Options adjust a [Watcher]. The zero value is ready to use.
type Options struct {
	// Interval is the time between two readings. 0 means [Interval].
	Interval time.Duration
	// Logger gets a Warn for each problem that begins. Nil means no logging.
	Logger *slog.Logger
}

// Watcher reads the settings of the network namespace of the process. Its methods may be
// called from any goroutine.
type Watcher struct {
	interval time.Duration
	log      *slog.Logger
	changed  chan struct{} // the pods are others

	mu         sync.Mutex
	podNetwork PodNetwork
	problems   []Problem
	failing    bool // the last reading failed, which was logged
}

// New returns a Watcher that has read nothing yet.
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

// SetPodNetwork tells which bridges carry pods. It does not block.
func (w *Watcher) SetPodNetwork(pods PodNetwork) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.podNetwork = pods
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Problems returns what the last reading has found.
func (w *Watcher) Problems() []Problem {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.problems)
}

// Run reads the settings after the first SetPodNetwork, then once an interval and after each
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
			w.log.WarnContext(ctx, "the node's settings cannot be read", "error", err)
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
			w.log.WarnContext(ctx, "a setting of the node breaks Services", "consequence", p.Consequence, "setting", p.Setting, "interface", p.Interface, "fix", p.Fix)
		}
	}
	for _, p := range before {
		if !slices.Contains(now, p) {
			w.log.InfoContext(ctx, "a setting of the node is no longer a problem", "setting", p.Setting, "interface", p.Interface)
		}
	}
}
