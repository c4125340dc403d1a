package config

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
)

// Warning describes a setting that has no effect or is deprecated.
type Warning struct {
	// Setting names the flag or field. Reason explains why it has no effect; for a Deprecated
	// setting, it says what to use instead.
	Setting, Reason string
	Kind            WarningKind
}

// WarningKind is the kind of a [Warning]. The log has one line for each kind.
type WarningKind int

// The kinds of warnings.
const (
	// NoEffect marks a valid setting that Fairlead does not use.
	NoEffect WarningKind = iota
	// Deprecated marks a setting that has a replacement.
	Deprecated
	// IgnoredField marks a field of the configuration file that kube-proxy ignores, too.
	IgnoredField
	// InvalidValue marks an invalid value that kube-proxy accepts, too. The reason says what
	// applies instead.
	InvalidValue
)

// message returns the message of the log line.
func (k WarningKind) message() string {
	switch k {
	case Deprecated:
		return "settings are deprecated"
	case IgnoredField:
		return "fields of the configuration file are ignored"
	case InvalidValue:
		return "settings have invalid values"
	case NoEffect:
	}
	return "settings have no effect"
}

// LogWarnings logs c.Warnings, in one line for each kind, and [Config.IPTablesNotice].
func (c Config) LogWarnings(ctx context.Context, log *slog.Logger) {
	if notice := c.IPTablesNotice(); notice != "" {
		log.WarnContext(ctx, "kube-proxy's mode iptables is replaced", "notice", notice)
	}
	for _, kind := range []WarningKind{InvalidValue, IgnoredField, NoEffect, Deprecated} {
		if settings := c.warningText(kind); settings != "" {
			log.WarnContext(ctx, kind.message(), "settings", settings) //nolint:sloglint // a constant for each kind
		}
	}
}

// warningText lists the settings of one kind of warnings, grouped by reason. It is empty without
// such warnings.
func (c Config) warningText(kind WarningKind) string {
	var reasons []string
	settings := map[string][]string{} // by reason
	for _, w := range c.Warnings {
		if w.Kind != kind {
			continue
		}
		if !slices.Contains(reasons, w.Reason) {
			reasons = append(reasons, w.Reason)
		}
		settings[w.Reason] = append(settings[w.Reason], w.Setting)
	}
	var groups []string
	for _, reason := range reasons {
		groups = append(groups, fmt.Sprintf("%s (%s)", strings.Join(settings[reason], ", "), reason))
	}
	return strings.Join(groups, "; ")
}
