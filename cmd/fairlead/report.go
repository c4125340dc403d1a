package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/internal/instance"
	"fairlead.io/fairlead/internal/preflight"
	"fairlead.io/fairlead/internal/report"
)

// stdoutName is the name of a file that means standard output.
const stdoutName = "-"

func reportCommand() *cobra.Command {
	var flags config.Flags
	var output string
	cmd := &cobra.Command{
		Use:   "report",
		Short: "Collect the state of this node into one file for a bug report",
		Long: `Collect versions, the result of "fairlead check", the configuration, the
programmed and the desired Services, Fairlead's tables and the order of all
netfilter hooks, recent changes and errors, metrics, kernel settings and
connection-tracking statistics into one tar.gz file.

The file contains no credentials: no contents of kubeconfig files, no
certificates, and only a few environment variables. It contains names and
addresses of Services and endpoints.

The command uses the settings of the running Fairlead. Without one, it accepts
the flags of "fairlead run". Parts that cannot be collected are named on
standard error and in report.json, and the exit code is then 1.`,
		Example: `  fairlead report
  kubectl -n kube-system exec ds/fairlead -- /fairlead report -o - > report.tar.gz`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeReport(cmd.Context(), output, flags, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags = config.AddFlags(cmd)
	hideUnusedFlags(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write, - for standard output (default fairlead-report-NODE-TIME.tar.gz in the current folder)")
	_ = cmd.MarkFlagFilename("output", "tar.gz") // the flag exists
	return cmd
}

// writeReport implements `fairlead report`. The error names the parts that are missing.
func writeReport(ctx context.Context, output string, flags config.Flags, stdout, stderr io.Writer) error {
	a := findAgent(ctx, flags)
	folder := reportName(a, time.Now())
	if output == "" {
		output = folder + ".tar.gz"
	}
	w := stdout
	var file *os.File
	if output != stdoutName {
		var err error
		const ownerOnly = 0o600
		if file, err = os.OpenFile(output, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, ownerOnly); err != nil {
			return fmt.Errorf("--output: %w", err)
		}
		defer file.Close() //nolint:errcheck // the error of the first Close counts
		w = file
	}
	summary, err := report.Write(ctx, w, folder, reportParts(a))
	if err != nil {
		return err
	}
	if file != nil {
		if err := file.Close(); err != nil {
			return fmt.Errorf("--output: %w", err)
		}
		_, _ = fmt.Fprintln(stderr, "wrote", output)
	}
	if err := summary.Missing(); err != nil {
		return fmt.Errorf("the report is written, but parts of it are missing:\n%w", err)
	}
	return nil
}

// findAgent returns the agent that programs this node, with its settings.
func findAgent(ctx context.Context, flags config.Flags) report.Agent {
	var a report.Agent
	holder, err := instance.FindHolder(ctx)
	if err == nil && holder != nil {
		a.Running, a.PID, a.Description = true, holder.PID, holder.String()
	}
	a.Flags = flags
	if len(flags) == 0 && a.PID != 0 {
		if line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(a.PID), "cmdline")); err == nil {
			a.Flags, _ = runFlags(splitCommandLine(line)) // agentSettings returns the error
		}
	}
	c, err := agentSettings(ctx, flags)
	if err != nil {
		a.ConfigErr = err
		return a
	}
	a.Config = &c
	return a
}

// reportName returns the name of the folder in the report.
func reportName(a report.Agent, now time.Time) string {
	node, err := os.Hostname()
	if a.Config != nil && a.Config.Tracker.NodeName != "" {
		node, err = a.Config.Tracker.NodeName, nil
	}
	if err != nil || strings.ContainsAny(node, `/\`) {
		node = "node"
	}
	return "fairlead-report-" + node + "-" + now.UTC().Format("20060102T150405Z")
}

// reportParts returns all parts of a report.
func reportParts(a report.Agent) []report.Part {
	parts := []report.Part{
		report.Versions(version, kubernetesVersion()), report.Modules(), report.Configuration(a),
		{Name: "check.json", Collect: func(ctx context.Context) ([]byte, error) {
			options := preflight.Options{}
			if a.Config != nil {
				options = checkOptions(*a.Config)
			}
			var text bytes.Buffer
			err := preflight.Run(ctx, options).WriteJSON(&text)
			return text.Bytes(), err
		}},
		report.Kernel(),
		report.Desired(func(ctx context.Context) (*desired.State, error) {
			if a.Config == nil {
				return nil, a.ConfigErr
			}
			const timeout = 10 * time.Second
			options, err := desiredOptions(*a.Config, timeout, slog.New(slog.DiscardHandler))
			if err != nil {
				return nil, err
			}
			return desired.Read(ctx, options)
		}),
		report.Ruleset(), report.Hooks(), report.OtherProxies(), report.Conntrack(), report.Sysctls(), report.Addresses(),
	}
	return append(parts, report.Requests(a)...)
}
