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

// measureCommand returns the root command, which measures Fairlead alone.
func measureCommand() *cobra.Command {
	var o bench.Options
	var only []string
	var file string
	cmd := &cobra.Command{
		Use:   "fairlead-bench",
		Short: "Measure Fairlead on this machine",
		Long: `Measure Fairlead on this machine. The benchmarks run in separate network namespaces,
do not affect the machine's network, and leave nothing behind. The command needs root.

Objects take the same path as in "fairlead run", but do not come from an API server. A
measurement starts with a watch event, and ends with the kernel's acknowledgement or with
the first packet that shows the change. Parts, for --only:

  update     latency of one change: an endpoint is replaced, added or removed, a Service
             is created or deleted
  start      cold start on a new node, until everything is programmed, and until all
             Services answer
  restart    warm restart with everything programmed
  churn      many changes per second: latency, processor time, commits, memory
  data-path  connections through a Service and direct connections
  established
             packets of established connections through a Service, with flow offload if the
             kernel supports it, and of direct ones
  fairness   distribution of connections over endpoints
  memory     memory of the process and of the kernel

The command prints a table, and writes all results to the file of --json. See
"go doc fairlead.io/fairlead/bench/result" for the file format.`,
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
	flags.StringVar(&o.Mode, "mode", bench.Modes()[0], "backend to measure: "+strings.Join(bench.Modes(), " or "))
	flags.IntVar(&o.Services, "services", 10_000, "number of Services")
	flags.IntVar(&o.Endpoints, "endpoints", 10, "number of endpoints of each Service")
	flags.IntVar(&o.Samples, "samples", 1000, "number of measurements of each kind of change, and of connections; starts are measured a hundredth as often, from 3 to 20 times")
	flags.StringSliceVar(&only, "only", nil, "parts to measure, one or more of "+bench.PartNames()+" (default all)")
	flags.Float64SliceVar(&o.Rates, "rates", []float64{100, 1000, 10_000}, "rates of churn in changes per second")
	flags.DurationVar(&o.ChurnTime, "churn-time", 10*time.Second, "duration of churn at each rate")
	flags.IntSliceVar(&o.Sizes, "data-path-services", []int{1, 1000, 10_000, 100_000}, "numbers of Services for data-path")
	flags.DurationVar(&o.ThroughputTime, "throughput-time", 500*time.Millisecond, "duration of each transfer of data-path")
	flags.StringVar(&file, "json", "", "`file` for all results as JSON")
	return cmd
}

// measure runs the benchmarks, writes the table to stdout, and the JSON to file unless file is
// empty.
func measure(ctx context.Context, o bench.Options, file string, stdout, stderr io.Writer) (err error) {
	if err := o.Validate(); err != nil {
		return err
	}
	// Open the file before the measurements, which take minutes, to report errors early. Its old
	// content stays until the results are written.
	var out *os.File
	if file != "" {
		_, lstatErr := os.Lstat(file)
		if out, err = os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o644); err != nil {
			return fmt.Errorf("--json: %w", err)
		}
		defer func() {
			if err = errors.Join(err, out.Close()); err != nil && errors.Is(lstatErr, os.ErrNotExist) {
				err = errors.Join(err, os.Remove(file))
			}
		}()
	}
	p := newProgress(stderr)
	o.Progress = p.show
	report, err := bench.Run(ctx, o)
	p.clear()
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted: network namespaces are removed, no results are written")
	}
	if err != nil {
		return err
	}
	return writeReport(report, out, stdout)
}

// writeReport writes the table to stdout, and the JSON to file unless file is nil.
func writeReport(report *result.Report, file *os.File, stdout io.Writer) error {
	if file != nil {
		err := report.Write(file)
		if info, statErr := file.Stat(); err == nil && statErr == nil && info.Mode().IsRegular() {
			// Remove the rest of a longer old content.
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

// progress shows the current step: on a terminal in one line that it overwrites, elsewhere as a
// new line every few seconds.
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

func (p *progress) show(line string) {
	if time.Since(p.shown) < p.interval {
		return
	}
	p.shown = time.Now()
	if !p.terminal {
		_, _ = fmt.Fprintln(p.out, line)
		return
	}
	_, _ = fmt.Fprintf(p.out, "\r%-*s", p.width, line)
	p.width = len(line)
}

// clear clears the line on a terminal.
func (p *progress) clear() {
	if p.terminal {
		_, _ = fmt.Fprintf(p.out, "\r%*s\r", p.width, "")
	}
}
