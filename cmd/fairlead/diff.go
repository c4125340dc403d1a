package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/compare"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/conntracksettings"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/internal/instance"
	"fairlead.io/fairlead/kube"
)

// The exit codes of `fairlead diff` are those of diff(1).
const (
	diffName = "diff"

	exitDifferences = 1
	exitDiffFailed  = 2
)

// errDifferences is returned if the kernel differs from the desired state. It has been printed.
var errDifferences = errors.New("the kernel differs from the desired state")

const (
	// confirmDelay is the time after which a difference is a difference: until then, the running agent
	// may be writing it.
	confirmDelay = time.Second
	// watchInterval is the time between two comparisons with --watch.
	watchInterval = 2 * time.Second
)

type diffOptions struct {
	output  string
	watch   bool
	timeout time.Duration
}

func diffCommand() *cobra.Command {
	var flags config.Flags
	var o diffOptions
	cmd := &cobra.Command{
		Use:   diffName,
		Short: "Compare the kernel with the Services that it should have",
		Long: `Compare the state of this node's kernel with the state that "fairlead run" would
program now for the objects of the API server or of --manifests. Lines with -
show the kernel's state, lines with + the desired state. The command writes
nothing.

Without flags of "fairlead run", it uses the flags of the Fairlead that runs on
this node, and its configuration file. A difference while Fairlead runs must
persist for a second, because Fairlead may be writing it.

The exit code is 0 without differences, 1 with differences and 2 after an error.`,
		Example: `  fairlead diff
  kubectl -n kube-system exec ds/fairlead -- fairlead diff
  fairlead diff --manifests=./services --service-cidr=10.96.0.0/16 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.output != outputText && o.output != outputJSON {
				return fmt.Errorf("--output: unknown format %q: use text or json", o.output)
			}
			settings, log, err := splitLogFlags(flags, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			c, err := agentSettings(cmd.Context(), settings)
			if err != nil {
				return err
			}
			return runDiff(cmd.Context(), c, o, cmd.OutOrStdout(), log)
		},
	}
	flags = config.AddFlags(cmd)
	hideUnusedFlags(cmd, "service-cidr", "nodeport-addresses")
	cmd.Flags().StringVarP(&o.output, "output", "o", outputText, "format of the differences: text or json")
	cmd.Flags().BoolVarP(&o.watch, "watch", "w", false, "print the differences again whenever they change, until the command is interrupted")
	cmd.Flags().DurationVar(&o.timeout, "timeout", desired.DefaultTimeout, "time to wait for all objects of the API server")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{outputText, outputJSON}, cobra.ShellCompDirectiveNoFileComp)) // the flag exists
	return cmd
}

const outputText = "text"

// runDiff implements `fairlead diff`.
func runDiff(ctx context.Context, c config.Config, o diffOptions, out io.Writer, log *slog.Logger) error {
	options, err := desiredOptions(c, o.timeout, log)
	if err != nil {
		return err
	}
	d := differ{config: c, backend: options.Backend, output: o.output, out: out, log: log, confirm: isAgentRunning(ctx)}
	options.Interval = confirmDelay
	if o.watch {
		options.Interval = watchInterval
		return desired.Follow(ctx, options, func(s *desired.State) error { return d.watch(ctx, s) })
	}
	err = desired.Follow(ctx, options, func(s *desired.State) error { return d.once(ctx, s) })
	if errors.Is(err, errSame) {
		return nil
	}
	return errors.Join(err, ctx.Err())
}

// isAgentRunning reports whether an agent may be writing to the kernel.
func isAgentRunning(ctx context.Context) bool {
	holder, err := instance.FindHolder(ctx)
	return err != nil || holder != nil
}

// errSame ends the comparison without a difference.
var errSame = errors.New("no differences")

// differ compares and prints.
type differ struct {
	config  config.Config
	backend backend.Backend
	output  string
	out     io.Writer
	log     *slog.Logger
	// confirm is set if a difference must be in two comparisons.
	confirm bool

	compared time.Time // of the last comparison
	differed bool      // the last comparison found a difference
	printed  *diffReport
}

// diffReport is the JSON document of `fairlead diff`.
type diffReport struct {
	*compare.Report

	// Problems lists the fields of objects that cannot be programmed as written.
	Problems []string `json:"problems,omitempty"`
}

// once compares until the result is certain.
func (d *differ) once(ctx context.Context, s *desired.State) error {
	r, err := d.report(ctx, s)
	if err != nil {
		return err
	}
	switch {
	case r.IsEmpty():
		if err := d.print(r); err != nil {
			return err
		}
		return errSame
	case d.confirm && (!d.differed || time.Since(d.compared) < confirmDelay):
		if !d.differed {
			d.differed, d.compared = true, time.Now()
		}
		return nil
	}
	if err := d.print(r); err != nil {
		return err
	}
	return errDifferences
}

// watch compares once per interval and prints changed results.
func (d *differ) watch(ctx context.Context, s *desired.State) error {
	if time.Since(d.compared) < watchInterval/2 {
		return nil // the next interval shows whether the agent has written the change
	}
	d.compared = time.Now()
	r, err := d.report(ctx, s)
	if err != nil {
		return err
	}
	confirmed := r.IsEmpty() || !d.confirm || d.differed
	d.differed = !r.IsEmpty()
	if !confirmed || d.printed != nil && reflect.DeepEqual(d.printed, r) {
		return nil
	}
	if d.output == outputText {
		if _, err := fmt.Fprintf(d.out, "# %s: %s\n", d.compared.Format(time.RFC3339), r.headline()); err != nil {
			return err
		}
	}
	d.printed = r
	return d.print(r)
}

func (r *diffReport) headline() string {
	if r.IsEmpty() {
		return "no differences"
	}
	return fmt.Sprintf("differences in %d Service ports and %d other objects", r.DifferingPorts(), len(r.Objects))
}

func (d *differ) report(ctx context.Context, s *desired.State) (*diffReport, error) {
	r, err := compareKernel(ctx, d.config, d.backend, s, d.log)
	if err != nil {
		return nil, err
	}
	return &diffReport{Report: r, Problems: problemTexts(s)}, nil
}

func (d *differ) print(r *diffReport) error {
	if d.output == outputJSON {
		encoder := json.NewEncoder(d.out)
		if d.printed == nil { // one line per document with --watch
			encoder.SetIndent("", "  ")
		}
		return encoder.Encode(r)
	}
	return r.WriteText(d.out)
}

// compareKernel compares the kernel, including the settings of connection tracking, with the desired
// state.
func compareKernel(ctx context.Context, c config.Config, b backend.Backend, s *desired.State, log *slog.Logger) (*compare.Report, error) {
	r, err := compare.Kernel(ctx, compare.Options{
		Backend: b, Values: c.Values, Node: s.Node, Services: slices.Collect(s.All()), Logger: log,
		Explain: func(namespace, name string) kube.Explanation {
			return s.Tracker.Explain(types.NamespacedName{Namespace: namespace, Name: name})
		},
	})
	if err != nil {
		return nil, err
	}
	pending, err := c.Conntrack.Pending()
	if err != nil && !errors.Is(err, conntracksettings.ErrNotLoaded) {
		return nil, fmt.Errorf("read the connection-tracking settings: %w", err)
	}
	for _, change := range pending {
		r.AddSetting(change.Name, fmt.Sprint(change.Old), fmt.Sprint(change.New))
	}
	return r, nil
}

func problemTexts(s *desired.State) []string {
	var texts []string
	for _, p := range s.Problems {
		texts = append(texts, p.String())
	}
	return texts
}
