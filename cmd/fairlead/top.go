package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"fairlead.io/fairlead/internal/inspect"
	"fairlead.io/fairlead/internal/top"
)

func topCommand() *cobra.Command {
	o := topOptions{order: string(top.ByRate)}
	cmd := &cobra.Command{
		Use:   "top [NAME]",
		Short: "Show new connections per second by Service and endpoint",
		Long: `Show the new connections per second to each Service and endpoint, in any mode and
without a running agent. NAME selects Services whose namespace/name contains it.

In a terminal, the numbers are updated until you press q. Otherwise, or with
--count, the command prints a table for each interval. It counts while it runs,
from the kernel's events for new connections. When no program listens, the
kernel makes no events. A UDP flow counts once, until no datagram is sent for
net.netfilter.nf_conntrack_udp_timeout. If connections come faster than they can
be counted, the command says so, and the numbers are lower bounds.

Connections that no endpoint receives do not count. Neither do connections to
node ports on localhost, which Fairlead relays.`,
		Example: `  fairlead top
  fairlead top default/web --endpoints -n 1
  fairlead top -n 10 --interval=5s -o json
  kubectl -n kube-system exec -it ds/fairlead -- /fairlead top`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.filter = args[0]
			}
			if err := o.check(cmd.Flags().Changed("count")); err != nil {
				return err
			}
			return o.run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			names, _ := inspect.Services(cmd.Context(), inspect.Options{Mode: o.mode}) // no completion without permission
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
	f := cmd.Flags()
	f.IntVarP(&o.count, "count", "n", 0, "number of tables to print; 0: no limit")
	f.DurationVarP(&o.interval, "interval", "d", time.Second, "time between updates, at least 100ms")
	f.StringVarP(&o.output, "output", "o", outputTable, "format without a terminal: table, or json with an object for each interval on one line")
	f.StringVar(&o.order, "sort", o.order, "order: rate, total or name")
	f.BoolVar(&o.endpoints, "endpoints", false, "print a line for each endpoint")
	f.BoolVar(&o.active, "active", false, "also count connections that have not ended; in mode nft, this reads the kernel's whole table of connections")
	f.StringVar(&o.mode, "mode", "", "mode to read, nft or ipvs; empty: the programmed mode")
	for name, values := range map[string][]string{
		"output": {outputTable, outputJSON}, "sort": {string(top.ByRate), string(top.ByTotal), string(top.ByName)}, "mode": inspect.Modes(),
	} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)) // the flag exists
	}
	return cmd
}

// topOptions are the flags of `fairlead top`.
type topOptions struct {
	filter            string
	count             int
	interval          time.Duration
	output, order     string
	endpoints, active bool
	mode              string
	print             bool // print instead of showing a screen
}

// minTopInterval bounds the work of short intervals.
const minTopInterval = 100 * time.Millisecond

func (o *topOptions) check(countSet bool) error {
	switch {
	case o.output != outputTable && o.output != outputJSON:
		return fmt.Errorf("--output: unknown format %q: use table or json", o.output)
	case !slices.Contains(top.Orders(), top.Order(o.order)):
		return fmt.Errorf("--sort: unknown order %q: use rate, total or name", o.order)
	case o.interval < minTopInterval:
		return fmt.Errorf("--interval: %s is too short: use at least %s", o.interval, minTopInterval)
	case o.count < 0:
		return fmt.Errorf("--count: %d is negative: use 0 for no limit", o.count)
	}
	o.print = countSet || o.output == outputJSON || o.endpoints
	return nil
}

func (o *topOptions) run(ctx context.Context, in io.Reader, out io.Writer) error {
	monitor, err := top.Open(ctx, top.Options{Mode: o.mode, Interval: o.interval})
	if err != nil {
		return err
	}
	defer monitor.Close()                                                              //nolint:errcheck // nothing was written
	if file, ok := out.(*os.File); !o.print && ok && term.IsTerminal(int(file.Fd())) { //nolint:gosec // a file descriptor
		return monitor.RunScreen(ctx, top.ScreenOptions{Input: in, Output: out, Order: top.Order(o.order), Filter: o.filter, Active: o.active})
	}
	monitor.CountActive(o.active)
	printed := 0
	var failure error
	err = monitor.Run(ctx, func(s top.Sample) bool {
		s.Filter(o.filter)
		s.Sort(top.Order(o.order))
		if o.output == outputJSON {
			failure = s.WriteJSON(out)
		} else {
			if printed > 0 {
				_, _ = fmt.Fprintln(out)
			}
			failure = s.WriteTable(out, o.endpoints)
		}
		printed++
		return failure == nil && (o.count == 0 || printed < o.count)
	})
	if errors.Is(err, context.Canceled) {
		err = nil // interrupted by the user
	}
	return errors.Join(failure, err)
}
