package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/internal/agent"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
)

func runCommand(setClientLogger func(*slog.Logger)) *cobra.Command {
	var flags config.Flags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Program this node and keep it programmed",
		Long: `Program this node's kernel with the Services of a Kubernetes API server or of a
folder of YAML files, until SIGTERM or SIGINT. Programmed Services keep working
after that; "fairlead cleanup" removes them. A start in another mode removes
the kernel state of the previous mode once it has programmed all Services.

Flags have the names of kube-proxy's flags where these exist. An empty value
means that a flag is not set. Flags of kube-proxy that have no effect here are
accepted with a warning.`,
		Example: `  fairlead run --kubeconfig=/etc/fairlead/kubeconfig.conf --cluster-cidr=10.244.0.0/16
  fairlead run --kubeconfig=/etc/fairlead/kubeconfig.conf --mode=ipvs --ipvs-scheduler=lc
  fairlead run --mode=nft --manifests=./services --service-cidr=10.96.0.0/16 --cluster-cidr=10.244.0.0/16`,
		Args: func(cmd *cobra.Command, args []string) error {
			// kube-proxy accepts empty arguments, which templates of manifests produce.
			return cobra.NoArgs(cmd, slices.DeleteFunc(args, func(arg string) bool { return arg == "" }))
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := requestedVersion(flags[config.VersionFlag])
			if err != nil {
				return err
			}
			if text != "" {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), text)
				return err
			}
			return runProgram(cmd.Context(), flags, flagValues(cmd), cmd.OutOrStdout(), cmd.ErrOrStderr(), setClientLogger)
		},
	}
	flags = config.AddFlags(cmd)
	return cmd
}

// runProgram implements `fairlead run`. flags has the flags that are set, and values has all flags.
func runProgram(ctx context.Context, flags config.Flags, values map[string]string, stdout, stderr io.Writer, setClientLogger func(*slog.Logger)) error {
	c, content, err := config.Load(flags)
	if err != nil {
		return err
	}
	level := &slog.LevelVar{}
	level.Set(c.LogLevel)
	log := config.NewLogger(stderr, level, c.LogFormat)
	setClientLogger(log.With("component", "client-go"))
	c.LogWarnings(ctx, log)
	switch {
	case c.WriteConfigTo != "":
		return c.WriteFile()
	case c.DryRun:
		return dryRun(ctx, c, stdout, log)
	case c.Cleanup:
		return cleanUp(ctx, log, false, nil) // like kube-proxy, even if connections end
	}
	b, err := backend.ByName(c.Mode)
	if err != nil {
		return err
	}
	if c.InitOnly {
		return agent.Initialize(ctx, c, b, log)
	}
	options := agent.Options{
		Config: c, Backend: b, Version: version, KubernetesVersion: kubernetesVersion(), ProcessMetrics: processMetrics(ctx), Logger: log, LogLevel: level, Flags: values,
	}
	if content != nil {
		options.File = &agent.ConfigFile{Flags: flags, Content: content}
	}
	if err := openSource(&options); err != nil { //nolint:contextcheck // sources have contexts of their own
		return err
	}
	a, err := agent.New(options)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
