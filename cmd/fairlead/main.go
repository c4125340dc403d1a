// Command fairlead is the node agent that makes Kubernetes Services work.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2" //nolint:depguard // client-go logs with it
)

// version is set by the linker.
var version = "unknown"

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr, klog.SetSlogLogger))
}

// run is main with all that it depends on, and returns the exit code. client-go
// has one logger for the whole process, which setClientLogger sets.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, setClientLogger func(*slog.Logger)) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	root := &cobra.Command{
		Use:   "fairlead",
		Short: "Make Kubernetes Services work on this node",
		Long: `Fairlead programs the kernel of a node so that a connection to the address of a
Kubernetes Service reaches one of its pods.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(runCommand(setClientLogger), cleanupCommand(), versionCommand()) //nolint:contextcheck // cobra hands them ctx
	if err := root.ExecuteContext(ctx); err != nil && !errors.Is(err, context.Canceled) {
		for line := range strings.Lines(err.Error()) {
			_, _ = fmt.Fprintln(stderr, "fairlead:", strings.TrimSpace(line))
		}
		return 1
	}
	return 0
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "fairlead", version)
			return err
		},
	}
}
