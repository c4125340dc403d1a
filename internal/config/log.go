package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"github.com/spf13/cobra"
)

// Defaults and help of the logging flags.
const (
	levelInfo   = "info"
	formatText  = "text"
	formatJSON  = "json"
	levelUsage  = "log level: debug (includes every commit to the kernel), info, warn or error"
	formatUsage = "log format: text or json"
)

func levels() []string  { return []string{"debug", levelInfo, "warn", "error"} }
func formats() []string { return []string{formatText, formatJSON} }

// LogFlags holds the logging flags of a command that has no other settings.
type LogFlags struct{ level, format string }

// AddFlags adds --log-level and --log-format to the command.
func (o *LogFlags) AddFlags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.level, "log-level", levelInfo, levelUsage)
	cmd.Flags().StringVar(&o.format, "log-format", formatText, formatUsage)
	completeWith(cmd, "log-level", levels()...)
	completeWith(cmd, "log-format", formats()...)
}

// Logger returns the logger, or an error that names each invalid flag.
func (o *LogFlags) Logger(w io.Writer) (*slog.Logger, error) {
	var errs []error
	level, err := parseLevel(cmp.Or(o.level, levelInfo))
	if err != nil {
		errs = append(errs, fmt.Errorf("--log-level: %w", err))
	}
	format := cmp.Or(o.format, formatText)
	if err := checkFormat(format); err != nil {
		errs = append(errs, fmt.Errorf("--log-format: %w", err))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return NewLogger(w, level, format), nil
}

// NewLogger returns a logger that writes to w in a format of --log-format.
func NewLogger(w io.Writer, level slog.Leveler, format string) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == formatJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

func parseLevel(name string) (level slog.Level, err error) {
	if err := level.UnmarshalText([]byte(name)); err != nil {
		return level, fmt.Errorf("unknown level %q: use debug, info, warn or error", name)
	}
	return level, nil
}

func checkFormat(name string) error {
	if !slices.Contains(formats(), name) {
		return fmt.Errorf("unknown format %q: use text or json", name)
	}
	return nil
}

// completeWith registers the values that shells complete for a flag.
func completeWith(cmd *cobra.Command, flag string, values ...string) {
	// It fails only if the flag does not exist or is already registered.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}
