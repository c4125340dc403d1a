package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"
)

// logOptions are the flags on logging.
type logOptions struct{ level, format string }

func (o *logOptions) addFlags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.level, "log-level", "info", "what to log: debug (every commit to the kernel), info, warn or error")
	cmd.Flags().StringVar(&o.format, "log-format", "text", "how to log: text or json")
	completeWith(cmd, "log-level", "debug", "info", "warn", "error")
	completeWith(cmd, "log-format", "text", "json")
}

// logger returns the logger, or an error that names each flag that is wrong.
func (o *logOptions) logger(w io.Writer) (*slog.Logger, error) {
	var errs []error
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.level)); err != nil {
		errs = append(errs, fmt.Errorf("--log-level: unknown level %q: use debug, info, warn or error", o.level))
	}
	var handler slog.Handler
	options := &slog.HandlerOptions{Level: level}
	switch o.format {
	case "text":
		handler = slog.NewTextHandler(w, options)
	case "json":
		handler = slog.NewJSONHandler(w, options)
	default:
		errs = append(errs, fmt.Errorf("--log-format: unknown format %q: use text or json", o.format))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return slog.New(handler), nil
}

// completeWith makes the shell complete a flag with the values that it takes.
func completeWith(cmd *cobra.Command, flag string, values ...string) {
	// The error is that the command has no such flag, or that this was done already.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}
