package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/internal/instance"
)

// dryRun implements `fairlead run --dry-run`. It reads the objects and the kernel, and writes to out
// only.
func dryRun(ctx context.Context, c config.Config, out io.Writer, log *slog.Logger) error {
	options, err := desiredOptions(c, desired.DefaultTimeout, log)
	if err != nil {
		return err
	}
	s, err := desired.Read(ctx, options)
	if err != nil {
		return err
	}
	r, err := compareKernel(ctx, c, options.Backend, s, log)
	if err != nil {
		return err
	}
	for _, p := range problemTexts(s) {
		if _, err := fmt.Fprintf(out, "# problem: %s\n", p); err != nil {
			return err
		}
	}
	if err := r.WriteText(out); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(out, "\ndry run: nothing was written\nsource: %s, node %s\n", sourceName(c), c.Tracker.NodeName); err != nil {
		return err
	}
	if err := r.WriteSummary(out); err != nil {
		return err
	}
	for _, line := range surroundings(ctx, options.Backend, s, log) {
		if _, err := fmt.Fprintln(out, line); err != nil {
			return err
		}
	}
	return nil
}

// surroundings describes what else programs this node.
func surroundings(ctx context.Context, b backend.Backend, s *desired.State, log *slog.Logger) []string {
	var lines []string
	for _, rules := range s.OtherProxies {
		lines = append(lines, fmt.Sprintf("rules of another Service proxy: %s; Fairlead's rules would take precedence, and %s", rules, rules.Effect()))
	}
	if len(s.OtherProxies) == 0 {
		lines = append(lines, "rules of another Service proxy: none")
	}
	holder, err := instance.FindHolder(ctx)
	switch {
	case err != nil:
		log.WarnContext(ctx, "cannot find out whether another Fairlead programs this node", "error", err)
	case holder != nil:
		lines = append(lines, fmt.Sprintf("another Fairlead programs this node (%s); this one would be on standby until it exits", holder))
	}
	for _, other := range backend.All() {
		if other.Name == b.Name || other.ServedServices == nil {
			continue
		}
		names, err := other.ServedServices(ctx)
		switch {
		case err != nil:
			log.WarnContext(ctx, "cannot read the Services of another mode", "mode", other.Name, "error", err)
		case len(names) > 0:
			lines = append(lines, fmt.Sprintf("mode %s: %d ports of Services are programmed, which would be removed once all Services are programmed", other.Name, len(names)))
		}
	}
	return lines
}
