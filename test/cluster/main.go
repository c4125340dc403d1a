// Program cluster runs a Kubernetes cluster on one machine, and Kubernetes' end-to-end tests in
// it. It needs root, but no container engine and no network.
//
//	cluster start [flags]                 start a cluster and return when it is ready
//	cluster stop                          end the cluster
//	cluster shell [flags] [-- COMMAND]    run a shell or a command in the cluster
//	cluster conformance [flags]           run tests in a new cluster and record the results
//
// etcd, the API server, the controller manager, the scheduler, kubelets, containerd, CNI plugins
// and CoreDNS are real; build.sh builds them. Nodes are namespaces. Everything runs in namespaces
// of the cluster's own: nothing listens in the machine's network, and files outside of the state
// directory do not change. When the first process of the namespaces ends, everything ends.
//
// The program calls itself with the commands control and node inside of the namespaces.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"fairlead.io/fairlead/test/cluster/internal/control"
	"fairlead.io/fairlead/test/cluster/internal/lab"
	"fairlead.io/fairlead/test/cluster/internal/node"
)

var errUsage = errors.New("usage: cluster start, stop, shell or conformance; see go doc ./test/cluster")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && errors.Is(err, errCommand) {
		os.Exit(exit.ExitCode())
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		_, _ = fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	flags := flag.NewFlagSet("cluster "+args[0], flag.ContinueOnError)
	state := flags.String("state", "bin/cluster-state", "`directory` of the cluster's files")
	switch args[0] {
	case "start":
		o := addStartFlags(flags)
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return start(ctx, *state, o)
	case "stop":
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		l, err := lab.Open(*state)
		if err != nil {
			return err
		}
		return l.Stop()
	case "shell":
		nodeName := flags.String("node", "", "`name` of a node to run in; the default is the host of the control plane")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return shell(ctx, *state, *nodeName, flags.Args())
	case "conformance":
		o := addConformanceFlags(flags)
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return runConformance(ctx, *state, o)
	case "control":
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return control.Run(ctx, *state, slog.New(slog.NewTextHandler(os.Stdout, nil)))
	case "node":
		number := flags.Int("number", 0, "`number` of the node")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return node.Run(ctx, *state, *number)
	default:
		return errUsage
	}
}

// errCommand marks the error of a command that the user has given.
var errCommand = errors.New("command failed")

func shell(ctx context.Context, state, nodeName string, args []string) error {
	l, err := lab.Open(state)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		args = []string{"bash"}
	}
	// Ctrl-C is for the command.
	cmd, err := l.Command(context.WithoutCancel(ctx), nodeName, args...)
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %w", errCommand, err)
	}
	return nil
}
