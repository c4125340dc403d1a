// Command fairlead-bench measures Fairlead on this machine, alone or in comparison with
// kube-proxy, and writes reports of the results.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// version is set by the linker.
var version = "unknown"

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// run executes the program with the given arguments and returns its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	root := measureCommand()     //nolint:contextcheck // cobra passes ctx
	root.Version = version
	root.SilenceUsage, root.SilenceErrors = true, true
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(compareCommand(), reportCommand(), apiloadCommand()) //nolint:contextcheck // cobra passes ctx
	if err := root.ExecuteContext(ctx); err != nil && !errors.Is(err, context.Canceled) {
		for line := range strings.Lines(err.Error()) {
			_, _ = fmt.Fprintln(stderr, "fairlead-bench:", strings.TrimSpace(line))
		}
		return 1
	}
	return 0
}

// changedFlags returns the flags that the user has set, in a form that the command accepts.
func changedFlags(cmd *cobra.Command) []string {
	var given []string
	cmd.Flags().Visit(func(f *pflag.Flag) {
		value := f.Value.String()
		if list, ok := f.Value.(pflag.SliceValue); ok {
			value = strings.Join(list.GetSlice(), ",")
		}
		given = append(given, "--"+f.Name+"="+value)
	})
	return given
}

// completeWith makes the shell complete a flag with the given values.
func completeWith(cmd *cobra.Command, flag string, values ...string) {
	// RegisterFlagCompletionFunc fails only for an unknown flag or a second registration.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}
