// Command fairlead is a node agent that implements Kubernetes Services.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2" //nolint:depguard // client-go logs through klog

	"fairlead.io/fairlead/internal/config"
)

func main() {
	os.Exit(run(context.Background(), commandArgs(os.Args), os.Stdout, os.Stderr, klog.SetSlogLogger))
}

// commandArgs returns the arguments of the root command. A program with the name kube-proxy is
// `fairlead run` with kube-proxy's defaults, so that it replaces kube-proxy in a container image.
func commandArgs(args []string) []string {
	if len(args) == 0 || filepath.Base(args[0]) != "kube-proxy" {
		return args[min(1, len(args)):]
	}
	return append([]string{"run", "--" + config.KubeProxyDefaults}, args[1:]...)
}

// run implements main with explicit dependencies and returns the exit code. setClientLogger sets
// client-go's logger, which is global.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, setClientLogger func(*slog.Logger)) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal kills the process
	ctx, hungUp, stopHangup := endOnHangup(ctx)
	defer stopHangup()
	root := rootCommand(setClientLogger) //nolint:contextcheck // cobra passes ctx to the commands
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if errors.Is(err, errDifferences) {
		return exitDifferences
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		for line := range strings.Lines(err.Error()) {
			_, _ = fmt.Fprintln(stderr, "fairlead:", strings.TrimSpace(line))
		}
		if cmd.Name() == diffName {
			return exitDiffFailed
		}
		return 1
	}
	if hungUp() {
		return exitHangup
	}
	return 0
}

// rootCommand returns the command with all subcommands.
func rootCommand(setClientLogger func(*slog.Logger)) *cobra.Command {
	root := &cobra.Command{
		Use:   "fairlead",
		Short: "Implement Kubernetes Services on this node",
		Long: `Fairlead programs the kernel of a node to forward connections for Kubernetes Services
to their endpoints.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(runCommand(setClientLogger), checkCommand(), cleanupCommand(), versionCommand(), getCommand(), topCommand(), diffCommand(), reportCommand(), traceCommand())
	return root
}

// exitHangup is the exit code after SIGHUP: 128 plus the number of the signal, as a shell reports
// it. kube-proxy dies of the signal. Supervisors that restart failed programs, and therefore
// kube-proxy, restart Fairlead as well.
const exitHangup = 128 + int(syscall.SIGHUP)

var errHangup = errors.New("SIGHUP received")

// endOnHangup returns a context that ends at SIGHUP, a function that reports whether the signal
// arrived, and a function that releases resources. Further SIGHUPs have no effect, because systemd
// may send one directly after SIGTERM. A process whose parent ignores SIGHUP, as nohup does,
// continues to ignore it.
func endOnHangup(ctx context.Context) (_ context.Context, received func() bool, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	hangup := make(chan os.Signal, 1)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(hangup, syscall.SIGHUP)
	}
	go func() {
		select {
		case <-hangup:
			cancel(errHangup)
		case <-ctx.Done():
		}
	}()
	return ctx, func() bool { return errors.Is(context.Cause(ctx), errHangup) }, func() {
		signal.Stop(hangup)
		cancel(nil)
	}
}
