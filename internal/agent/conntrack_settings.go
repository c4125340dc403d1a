package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	stdsync "sync"
	"sync/atomic"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/conntracksettings"
)

// Initialize implements --init-only: it performs the initialization that may need more privileges
// than CAP_NET_ADMIN. It tries all steps before it returns an error.
func Initialize(ctx context.Context, c config.Config, b backend.Backend, log *slog.Logger) error {
	initializeFlowOffload(ctx, c.FlowOffload, log)
	return errors.Join(b.Prepare(ctx, backend.Options{Logger: log, Values: c.Values}), initializeConntrack(ctx, c.Conntrack, log))
}

func initializeConntrack(ctx context.Context, s conntracksettings.Settings, log *slog.Logger) error {
	result, err := s.Apply()
	if errors.Is(err, conntracksettings.ErrNotLoaded) {
		if err := conntracksettings.Load(); err != nil {
			return fmt.Errorf("connection-tracking settings: %w", err)
		}
		result, err = s.Apply()
	}
	logConntrackChanges(ctx, result, log)
	if err != nil {
		return fmt.Errorf("connection-tracking settings: %w", err)
	}
	if len(result.Failures) > 0 {
		return fmt.Errorf("connection-tracking settings: cannot set %s: run in a privileged container on the host network, "+
			"or set the matching fields of conntrack (--conntrack-*) to 0", join(result.Failures))
	}
	return nil
}

// conntrackSettings applies the settings of connection tracking, at the start and when the
// configuration file changes.
type conntrackSettings struct {
	log *slog.Logger
	// programmed is closed when the backend has programmed its rules. The kernel has loaded
	// connection tracking then.
	programmed <-chan struct{}
	changed    chan struct{}
	failing    atomic.Int64 // settings that the last attempt could not apply

	mu       stdsync.Mutex
	settings conntracksettings.Settings
}

func newConntrackSettings(s conntracksettings.Settings, programmed <-chan struct{}, log *slog.Logger) *conntrackSettings {
	return &conntrackSettings{log: log, programmed: programmed, changed: make(chan struct{}, 1), settings: s}
}

// set sets the desired settings. It does not block.
func (c *conntrackSettings) set(s conntracksettings.Settings) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.settings == s {
		return
	}
	c.settings = s
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// run applies the settings at once and after each change, until ctx is done. It returns nil:
// Services work without the settings.
func (c *conntrackSettings) run(ctx context.Context) error {
	for {
		c.apply(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-c.changed:
		}
	}
}

func (c *conntrackSettings) apply(ctx context.Context) {
	c.mu.Lock()
	s := c.settings
	c.mu.Unlock()
	result, err := s.Apply()
	if errors.Is(err, conntracksettings.ErrNotLoaded) {
		select {
		case <-ctx.Done():
			return
		case <-c.programmed:
		}
		result, err = s.Apply()
	}
	logConntrackChanges(ctx, result, c.log)
	c.failing.Store(int64(len(result.Failures)))
	const fix = "run `fairlead run --init-only` with the same settings in a privileged init container, set them on the host with sysctl, " +
		"or set the matching fields of conntrack (--conntrack-*) to 0"
	switch {
	case err != nil:
		c.log.WarnContext(ctx, "connection-tracking settings were not applied", "error", err)
	case len(result.Failures) > 0:
		c.log.WarnContext(ctx, "connection-tracking settings were not applied", "settings", join(result.Failures), "fix", fix)
	}
}

func logConntrackChanges(ctx context.Context, result conntracksettings.Result, log *slog.Logger) {
	if len(result.Changes) > 0 {
		log.InfoContext(ctx, "connection-tracking settings applied", "settings", join(result.Changes))
	}
}

func join[T fmt.Stringer](list []T) string {
	texts := make([]string, 0, len(list))
	for _, element := range list {
		texts = append(texts, element.String())
	}
	return strings.Join(texts, ", ")
}
