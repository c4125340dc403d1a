package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/bench/apiload"
	"fairlead.io/fairlead/bench/system"
)

// apiloadFlags are the flags of `fairlead-bench apiload`.
type apiloadFlags struct {
	fairlead, kubeProxy         string
	fairleadArgs, kubeProxyArgs []string
	dir                         string
	quiet                       bool
	options                     apiload.Options
}

func apiloadCommand() *cobra.Command {
	f := &apiloadFlags{options: apiload.Options{IdleTime: 5 * time.Second}} //nolint:mnd // a default
	cmd := &cobra.Command{
		Use:   "apiload",
		Short: "Measure the load of Fairlead and kube-proxy on the API server",
		Long: `Measure requests, bytes and processor time that Fairlead's mode nft and kube-proxy's mode
nftables cause on a real API server: at their start, for each kind of change, and while
nothing changes. The EndpointSlice controller creates the EndpointSlices. There are no
kubelets. The command needs root, and the programs of "make controlplane".`,
		Example: `  fairlead-bench apiload --services=200 --starts=1
  fairlead-bench apiload --quiet-time=12m`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runAPILoad(cmd.Context(), f, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	o := &f.options
	flags := cmd.Flags()
	flags.StringVar(&f.fairlead, "fairlead", "bin/fairlead", "path of the fairlead binary; \"make build\" builds it")
	flags.StringVar(&f.kubeProxy, "kube-proxy", ".cache/kube-proxy/kube-proxy", "path of the kube-proxy binary; \"make kube-proxy\" builds it; empty leaves kube-proxy out")
	flags.StringSliceVar(&f.kubeProxyArgs, "kube-proxy-args", nil, "additional arguments for kube-proxy")
	flags.StringSliceVar(&f.fairleadArgs, "fairlead-args", nil, "additional arguments for fairlead run")
	flags.StringVar(&o.Programs, "apiserver", "", "`directory` with etcd, kube-apiserver and kube-controller-manager (default .cache/controlplane)")
	flags.StringSliceVar(&o.APIServerArgs, "apiserver-args", nil, "additional arguments for kube-apiserver")
	flags.StringSliceVar(&o.ControllerManagerArgs, "controller-manager-args", nil, "additional arguments for kube-controller-manager")
	flags.IntVar(&o.Nodes, "nodes", 200, "number of Nodes")           //nolint:mnd // a default
	flags.IntVar(&o.Services, "services", 5000, "number of Services") //nolint:mnd // a default
	flags.IntVar(&o.Endpoints, "endpoints", 10, "number of endpoints of each Service")
	flags.IntVar(&o.Starts, "starts", 5, "number of starts of each system, and of reads of each encoding")
	flags.IntVar(&o.Changes, "changes", 20, "number of changes of each kind")
	flags.IntVar(&o.Watchers, "watchers", 200, "number of additional clients with the watches of a Service proxy")
	flags.DurationVar(&o.QuietTime, "quiet-time", 3*time.Minute, "duration of the measurement without changes")
	flags.StringVar(&f.dir, "logs", "", "`directory` for logs (default: a temporary directory, removed at the end)")
	flags.BoolVar(&f.quiet, "quiet", false, "do not show progress")
	_ = cmd.MarkFlagFilename("fairlead")
	_ = cmd.MarkFlagFilename("kube-proxy")
	_ = cmd.MarkFlagDirname("apiserver")
	_ = cmd.MarkFlagDirname("logs")
	return cmd
}

func runAPILoad(ctx context.Context, f *apiloadFlags, stdout, stderr io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("fairlead-bench apiload creates network namespaces: run it as root")
	}
	fairlead := system.Fairlead{Binary: f.fairlead, Mode: system.ModeNFT, Args: f.fairleadArgs}
	if _, err := fairlead.Path(); err != nil {
		return fmt.Errorf("--fairlead: %w: build it with `make build`", err)
	}
	o := f.options
	o.Systems = []system.System{fairlead}
	if f.kubeProxy != "" {
		kubeProxy := system.KubeProxy{Binary: f.kubeProxy, Mode: "nftables", Args: f.kubeProxyArgs}
		if _, err := kubeProxy.Path(); err != nil {
			return fmt.Errorf("--kube-proxy: %w: build it with `make kube-proxy`", err)
		}
		o.Systems = append(o.Systems, kubeProxy)
	}
	o.Dir = f.dir
	if o.Dir == "" {
		if o.Dir, err = os.MkdirTemp("", "fairlead-bench-"); err != nil {
			return fmt.Errorf("create the directory for logs: %w", err)
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.Dir)) }()
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return fmt.Errorf("--logs: %w", err)
	}
	begin := time.Now()
	o.Progress = func(message string) {
		if !f.quiet {
			_, _ = fmt.Fprintf(stderr, "%6.1fs %s\n", time.Since(begin).Seconds(), message)
		}
	}
	r, err := apiload.Run(ctx, o)
	if r == nil {
		return err
	}
	return errors.Join(err, r.Write(stdout))
}
