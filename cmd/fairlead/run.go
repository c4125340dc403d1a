package main

import (
	"context"
	"io"
	"log/slog"

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
		Long: `Program this node's kernel with the Services of a Kubernetes API server, or of a
folder of YAML files, and keep it so until the program is told to stop (SIGTERM
or SIGINT). What is programmed then stays and works; "fairlead cleanup" removes
it. A start in another mode takes over: what the mode before has programmed is
removed when everything is programmed anew.

The flags are kube-proxy's where it has one for the purpose, and an empty value
means that a flag is not set. kube-proxy's flags that have no effect here are
accepted as well, and named in a warning.`,
		Example: `  fairlead run --kubeconfig=/etc/fairlead/kubeconfig.conf --cluster-cidr=10.244.0.0/16
  fairlead run --kubeconfig=/etc/fairlead/kubeconfig.conf --mode=ipvs --ipvs-scheduler=lc
  fairlead run --mode=nft --manifests=./services --service-cidr=10.96.0.0/16 --cluster-cidr=10.244.0.0/16`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runProgram(cmd.Context(), flags, cmd.ErrOrStderr(), setClientLogger)
		},
	}
	flags = config.AddFlags(cmd)
	return cmd
}

// runProgram is `fairlead run`.
func runProgram(ctx context.Context, flags config.Flags, stderr io.Writer, setClientLogger func(*slog.Logger)) error {
	c, content, err := config.Load(flags)
	if err != nil {
		return err
	}
	level := &slog.LevelVar{}
	level.Set(c.LogLevel)
	log := config.NewLogger(stderr, level, c.LogFormat)
	setClientLogger(log.With("component", "client-go"))
	c.LogWarnings(ctx, log)
	b, err := backend.ByName(c.Mode)
	if err != nil {
		return err
	}
	if c.InitOnly {
		return b.Prepare(ctx, backend.Options{Logger: log, Values: c.Values})
	}
	options := agent.Options{Config: c, Backend: b, Version: version, Logger: log, LogLevel: level}
	if content != nil {
		options.File = &agent.ConfigFile{Flags: flags, Content: content}
	}
	if err := openSource(&options); err != nil { //nolint:contextcheck // what it opens has contexts of its own
		return err
	}
	a, err := agent.New(options)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
