package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/bench"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/table"
)

// measureCommand returns `fairlead-bench` itself, which measures Fairlead alone.
func measureCommand() *cobra.Command {
	var o bench.Options
	var only []string
	var file string
	cmd := &cobra.Command{
		Use:   "fairlead-bench",
		Short: "Measure Fairlead on this machine",
		Long: `Measure Fairlead on this machine, in network namespaces of its own: nothing that
runs here is touched, and nothing is left. It needs root.

Objects go the way that they go in "fairlead run", without an API server before:
what is measured begins with an event as a watch has it, and ends with the kernel's
acknowledgement, or with the first packet that shows it. Parts, for --only:

  update     one change at a time: an endpoint is replaced, comes or goes, a
             Service comes or goes
  start      on a new node, until all is programmed, and until all Services answer
  restart    where all is programmed
  churn      many changes a second: time, processor, commits, memory
  data-path  connections through a Service, and direct ones
  fairness   how connections spread over endpoints
  memory     of the program, and of what it has the kernel hold

A table goes to standard output, and all figures to the file of --json: see
"go doc fairlead.io/fairlead/bench/result" for what is in it.`,
		Example: `  fairlead-bench
  fairlead-bench --services=1000 --only=update,start --json=result.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, part := range only {
				o.Only = append(o.Only, bench.Part(part))
			}
			o.Version, o.Command = version, append([]string{cmd.CommandPath()}, changedFlags(cmd)...)
			return measure(cmd.Context(), o, file, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Mode, "mode", bench.Modes()[0], "the backend: "+strings.Join(bench.Modes(), " or "))
	flags.IntVar(&o.Services, "services", 10_000, "how many Services there are")
	flags.IntVar(&o.Endpoints, "endpoints", 10, "how many endpoints each Service has")
	flags.IntVar(&o.Samples, "samples", 1000, "how often each change and connection is measured; starts a hundredth of it, from 3 to 20 times")
	flags.StringSliceVar(&only, "only", nil, "parts to measure, some of "+bench.PartNames()+" (default all)")
	flags.Float64SliceVar(&o.Rates, "rates", []float64{100, 1000, 10_000}, "changes a second, for churn")
	flags.DurationVar(&o.ChurnTime, "churn-time", 10*time.Second, "how long churn lasts at each rate")
	flags.IntSliceVar(&o.Sizes, "data-path-services", []int{1, 1000, 10_000, 100_000}, "numbers of Services, for data-path")
	flags.DurationVar(&o.ThroughputTime, "throughput-time", 500*time.Millisecond, "how long each transfer lasts, for data-path")
	flags.StringVar(&file, "json", "", "file to write all figures to")
	return cmd
}

// measure runs the benchmarks, writes the table to stdout and the JSON to the file, if there is one.
func measure(ctx context.Context, o bench.Options, file string, stdout, stderr io.Writer) (err error) {
	if err := o.Validate(); err != nil {
		return err
	}
	// Whether the file can be written is told now, and not after minutes; what is in
	// it stays until then.
	var out *os.File
	if file != "" {
		_, there := os.Lstat(file)
		if out, err = os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o644); err != nil {
			return fmt.Errorf("--json: %w", err)
		}
		defer func() {
			if err = errors.Join(err, out.Close()); err != nil && errors.Is(there, os.ErrNotExist) {
				err = errors.Join(err, os.Remove(file))
			}
		}()
	}
	p := newProgress(stderr)
	o.Progress = p.show
	report, err := bench.Run(ctx, o)
	p.clear()
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted: its network namespaces are removed, and no results are written")
	}
	if err != nil {
		return err
	}
	return writeReport(report, out, stdout)
}

// writeReport writes the table, and the JSON if there is a file.
func writeReport(report *result.Report, file *os.File, stdout io.Writer) error {
	if file != nil {
		err := report.Write(file)
		if info, statErr := file.Stat(); err == nil && statErr == nil && info.Mode().IsRegular() {
			// What was longer in it before.
			var end int64
			if end, err = file.Seek(0, io.SeekCurrent); err == nil {
				err = file.Truncate(end)
			}
		}
		if err != nil {
			return fmt.Errorf("--json: %w", err)
		}
	}
	return table.Write(stdout, report)
}

// progress shows what is under way: on a terminal in one line, elsewhere in one
// every few seconds.
type progress struct {
	out      io.Writer
	terminal bool
	interval time.Duration
	shown    time.Time
	width    int
}

func newProgress(to io.Writer) *progress {
	p := &progress{out: to, interval: 5 * time.Second}
	if f, ok := to.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.terminal, p.interval = true, 100*time.Millisecond
		}
	}
	return p
}

func (p *progress) show(words string) {
	if time.Since(p.shown) < p.interval {
		return
	}
	p.shown = time.Now()
	if !p.terminal {
		_, _ = fmt.Fprintln(p.out, words)
		return
	}
	_, _ = fmt.Fprintf(p.out, "\r%-*s", p.width, words)
	p.width = len(words)
}

// clear clears the line.
func (p *progress) clear() {
	if p.terminal {
		_, _ = fmt.Fprintf(p.out, "\r%*s\r", p.width, "")
	}
}
