package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/inspect"
)

// getResource is an argument of `fairlead get`.
type getResource struct {
	name, short string
	aliases     []string
	// selectable reports whether names, addresses and ports select objects.
	selectable bool
	// table returns the columns and rows of the objects.
	table func(*getResult, bool) table
	// objects returns the objects for the formats other than tables.
	objects func(*getResult) []any
}

func getResources() []getResource {
	return []getResource{
		{
			name: "services", aliases: []string{"service", "svc"}, short: "Show the frontends of Services and how their connections are treated",
			selectable: true, table: (*getResult).serviceTable, objects: (*getResult).serviceObjects,
		},
		{
			name: "endpoints", aliases: []string{"endpoint", "ep"}, short: "Show the endpoints of Services with their state and connections",
			selectable: true, table: (*getResult).endpointTable, objects: (*getResult).endpointObjects,
		},
		{
			name: "counters", aliases: []string{"counter"}, short: "Show the counters of refused packets",
			table: (*getResult).counterTable, objects: (*getResult).counterObjects,
		},
	}
}

func getCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get",
		Short: "Show what the kernel of this node holds",
		Long: `Show what the kernel of this node holds, whichever mode is programmed. The
command reads the kernel and needs no running Fairlead. It changes nothing. Run
it as root in the node's network namespace.`,
		Example: `  fairlead get services -A
  fairlead get services web -o wide
  fairlead get services 10.96.0.10
  fairlead get endpoints web --watch
  kubectl -n kube-system exec ds/fairlead -- /fairlead get endpoints -A`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for _, r := range getResources() {
		cmd.AddCommand(getResourceCommand(r))
	}
	return cmd
}

// getOptions are the options of `fairlead get`.
type getOptions struct {
	output            string
	selector          string
	namespace         string
	allNamespaces     bool
	noHeaders         bool
	watch             bool
	outputWatchEvents bool
	connections       bool
	interval          time.Duration
}

func getResourceCommand(r getResource) *cobra.Command {
	var o getOptions
	var flags config.Flags
	cmd := &cobra.Command{Use: r.name, Aliases: r.aliases, Short: r.short, Args: cobra.NoArgs}
	if r.selectable {
		cmd.Use += " [NAME|ADDRESS|PORT]..."
		cmd.Args = cobra.ArbitraryArgs
		cmd.ValidArgsFunction = completeServices
		cmd.Long = r.short + `.

The arguments select Services: by NAME, NAMESPACE/NAME or NAME:PORTNAME, by the
ADDRESS of a frontend or an endpoint, with or without a port, or by a PORT.
Addresses and ports select Services in all namespaces unless --namespace is set.

The kernel contains neither labels nor the conditions of endpoints. --selector
and the state ServingTerminating need --kubeconfig, --manifests or --config, or a
running Fairlead, whose settings --selector uses.`
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o := o
		if r.selectable && !o.allNamespaces && !cmd.Flags().Changed("namespace") && allSelectAddresses(args) {
			o.allNamespaces = true
		}
		g, err := newGetter(r, o, flags, args)
		if err != nil {
			return err
		}
		g.out, g.errOut = cmd.OutOrStdout(), cmd.ErrOrStderr()
		return g.run(cmd.Context())
	}
	flags = config.AddFlags(cmd)
	hideFlagsExcept(cmd, "mode", "config", "kubeconfig", "master", "manifests", "hostname-override")
	f := cmd.Flags()
	f.Lookup("mode").Usage = "the mode to read: nft or ipvs. Default: the programmed mode"
	f.Lookup("mode").DefValue = ""
	f.StringVarP(&o.output, "output", "o", "", "format: "+strings.Join(outputFormats(), ", "))
	f.BoolVarP(&o.watch, "watch", "w", false, "after the objects, print each object that changes")
	f.BoolVar(&o.outputWatchEvents, "output-watch-events", false, "with --watch, print whether an object was added, modified or deleted")
	f.DurationVar(&o.interval, "watch-interval", time.Second, "with --watch, the time between two checks for changes")
	f.BoolVar(&o.noHeaders, "no-headers", false, "print no headers")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputFormats(), cobra.ShellCompDirectiveNoFileComp)) // the flag exists
	_ = cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions(inspect.Modes(), cobra.ShellCompDirectiveNoFileComp))   // the flag exists
	if !r.selectable {
		return cmd
	}
	f.StringVarP(&o.selector, "selector", "l", "", "label selector of Services, such as app=web. Labels are not in the kernel; they come from the API server or the manifests")
	f.StringVarP(&o.namespace, "namespace", "n", "default", "namespace of the Services")
	f.BoolVarP(&o.allNamespaces, "all-namespaces", "A", false, "show the Services of all namespaces")
	f.BoolVar(&o.connections, "connections", false,
		fmt.Sprintf("count connections even if connection tracking has more than %d entries, which takes 2.5 s per million", inspect.CheapConnections))
	_ = cmd.RegisterFlagCompletionFunc("namespace", completeNamespaces) // the flag exists
	return cmd
}

// hideFlagsExcept hides the flags of fairlead run that do not change the result of a command. They
// are accepted, so that the arguments of a DaemonSet can be used.
func hideFlagsExcept(cmd *cobra.Command, visible ...string) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) { f.Hidden = f.Hidden || !slices.Contains(visible, f.Name) })
}

// getter implements `fairlead get`.
type getter struct {
	resource    getResource
	options     getOptions
	flags       config.Flags
	queries     []serviceQuery
	printer     objectPrinter
	out, errOut io.Writer
}

func newGetter(r getResource, o getOptions, flags config.Flags, args []string) (*getter, error) {
	g := &getter{resource: r, options: o, flags: flags}
	for _, arg := range args {
		q, err := parseServiceQuery(arg)
		if err != nil {
			return nil, err
		}
		g.queries = append(g.queries, q)
	}
	var err error
	g.printer, err = newObjectPrinter(o)
	return g, err
}

func (g *getter) inspectOptions() inspect.Options {
	o := inspect.Options{Mode: g.flags["mode"]}
	if g.resource.selectable {
		o.Connections = inspect.CountIfCheap
	}
	if g.options.connections {
		o.Connections = inspect.CountAlways
	}
	return o
}

func (g *getter) run(ctx context.Context) error {
	result, err := g.read(ctx)
	if err != nil {
		return err
	}
	if missing := result.notFound(); missing != nil && !g.options.watch {
		return missing
	}
	for _, warning := range result.kernel.Warnings {
		_, _ = fmt.Fprintln(g.errOut, "Warning:", warning)
	}
	if err := g.printer.print(g.out, g.resource, result); err != nil {
		return err
	}
	if g.options.watch {
		return g.watch(ctx, result)
	}
	if g.resource.selectable && len(result.frontends) == 0 {
		_, _ = fmt.Fprintln(g.errOut, g.nothingFound())
	}
	return nil
}

// nothingFound returns kubectl's message for an empty result.
func (g *getter) nothingFound() string {
	if g.options.allNamespaces {
		return "No resources found"
	}
	return fmt.Sprintf("No resources found in %s namespace.", g.options.namespace)
}

// read reads the kernel and, if necessary, the API server.
func (g *getter) read(ctx context.Context) (*getResult, error) {
	kernel, err := inspect.Read(ctx, g.inspectOptions())
	if err != nil {
		return nil, err
	}
	if !kernel.ConnectionsCounted && g.resource.selectable {
		kernel.Warnings = append(kernel.Warnings, fmt.Sprintf(
			"connections are not counted and draining endpoints are not shown, because connection tracking has more than %d entries: use --connections",
			inspect.CheapConnections))
	}
	result := &getResult{kernel: kernel, options: g.options, queries: g.queries}
	if g.resource.selectable && g.needsObjects() {
		if result.objects, err = g.readObjects(ctx); err != nil {
			return nil, err
		}
	}
	if err := result.selectFrontends(); err != nil {
		return nil, err
	}
	return result, nil
}

// watch prints objects that change. The kernel does not report changes of virtual servers and
// connections, so watch polls.
func (g *getter) watch(ctx context.Context, last *getResult) error {
	if g.options.interval <= 0 {
		return fmt.Errorf("--watch-interval: %s is not positive", g.options.interval)
	}
	changes := inspect.NewPoller(g.inspectOptions())
	ticker := time.NewTicker(g.options.interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		changed, err := changes.Changed(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		case !changed:
			continue
		}
		result, err := g.read(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, inspect.ErrNotProgrammed):
			continue // the tables are being replaced
		case err != nil:
			return err
		}
		if err := g.printer.printChanges(g.out, g.resource, last, result); err != nil {
			return err
		}
		last = result
	}
}

// completeServices completes the names of Services from the kernel, with a namespace if the typed
// text has one.
func completeServices(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	names, err := inspect.Services(cmd.Context(), inspect.Options{})
	if err != nil {
		cobra.CompErrorln(err.Error())
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	namespace := "default"
	if f := cmd.Flags().Lookup("namespace"); f != nil {
		namespace = cmp.Or(f.Value.String(), namespace)
	}
	var completions []string
	for _, full := range names {
		in, name, _ := strings.Cut(full, "/")
		if strings.Contains(typed, "/") || in != namespace {
			name = full
		}
		if strings.HasPrefix(name, typed) && !slices.Contains(args, name) {
			completions = append(completions, name)
		}
	}
	return completions, cobra.ShellCompDirectiveNoFileComp
}

// completeNamespaces completes the namespaces of the Services in the kernel.
func completeNamespaces(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	names, err := inspect.Services(cmd.Context(), inspect.Options{})
	if err != nil {
		cobra.CompErrorln(err.Error())
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var namespaces []string
	for _, full := range names {
		if namespace, _, _ := strings.Cut(full, "/"); strings.HasPrefix(namespace, typed) {
			namespaces = append(namespaces, namespace)
		}
	}
	return slices.Compact(namespaces), cobra.ShellCompDirectiveNoFileComp
}
