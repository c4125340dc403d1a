package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/internal/inspect"
	"fairlead.io/fairlead/internal/trace"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/nft"
)

type traceOptions struct {
	output, namespace string
	timeout           time.Duration
	live              bool
}

func traceCommand() *cobra.Command {
	var flags config.Flags
	var o traceOptions
	cmd := &cobra.Command{
		Use:   "trace FROM TO[:PORT][/PROTOCOL]",
		Short: "Explain what this node does with a connection",
		Long: `Explain step by step what this node does with a new connection, and which object
and field decides each step. FROM is a pod (NAMESPACE/NAME), an address, or
"node" for a connection of the node itself. TO is a Service (NAME,
NAMESPACE/NAME or NAME.NAMESPACE), an address or localhost.

The command evaluates the rules in the kernel and sends no packet. With --live, it
waits for the connection and follows its first packet through the rules of all
nftables tables.

If the command finds the settings of Fairlead, as flags of "fairlead run" or from
the Fairlead that runs on this node, it also reads the objects, explains which
endpoints receive no connections and why, and shows where the kernel differs from
the desired state.`,
		Example: `  fairlead trace default/client web
  fairlead trace 192.0.2.7 203.0.113.10:443
  fairlead trace node localhost:30080 -o json
  kubectl -n kube-system exec ds/fairlead -- /fairlead trace default/client shop/cart:http`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeConnection,
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.output != "text" && o.output != "json" {
				return fmt.Errorf("--output: unknown format %q: use text or json", o.output)
			}
			return runTrace(cmd.Context(), flags, o, args[0], args[1], cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags = config.AddFlags(cmd)
	cmd.Flags().StringVarP(&o.output, "output", "o", "text", "format of the explanation: text or json")
	cmd.Flags().StringVarP(&o.namespace, "namespace", "n", "default", "namespace of pods and Services without one")
	cmd.Flags().BoolVar(&o.live, "live", false, "wait for this connection and follow its first packet through the rules")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 10*time.Second, "time to wait for all objects of the API server")
	return cmd
}

// completeConnection completes FROM with the word "node", and TO with a Service.
func completeConnection(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return []string{"node"}, cobra.ShellCompDirectiveNoFileComp
	case 1:
		return completeServices(cmd, nil, typed)
	default:
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
}

// tracer explains one connection.
type tracer struct {
	options   traceOptions
	mode      string // empty if nothing is programmed
	host      *trace.Host
	walker    *nft.Walker
	desired   *trace.Desired
	frontends []trace.NamedFrontend
	notes     []string
}

// runTrace implements `fairlead trace`.
func runTrace(ctx context.Context, flags config.Flags, o traceOptions, from, to string, out, errOut io.Writer) error {
	target, err := trace.ParseTarget(to)
	if err != nil {
		return err
	}
	t := &tracer{options: o}
	kernelErr := t.openKernel(ctx)
	desiredErr := t.readDesired(ctx, flags)
	if t.mode == "" && t.desired == nil {
		return errors.Join(kernelErr, desiredErr)
	}
	if kernelErr != nil {
		t.notes = append(t.notes, "the kernel is not examined: "+kernelErr.Error())
	}
	if desiredErr != nil {
		t.notes = append(t.notes, "the objects are not examined: "+desiredErr.Error())
	}
	if t.host, err = trace.OpenHost(0, t.mode == ipvsMode); err != nil {
		return err
	}
	defer t.host.Close()
	if t.walker != nil {
		defer t.walker.Close() //nolint:errcheck // nothing was written
	}
	if err := t.readFrontends(ctx); err != nil {
		return err
	}
	c, protocol, err := t.connection(from, to, target)
	if err != nil {
		return err
	}
	if o.live {
		return t.followLive(ctx, c, protocol, out, errOut)
	}
	report, err := trace.Explain(c, protocol, t.host, t.walker, t.desired)
	if err != nil {
		return err
	}
	report.Mode, report.Notes = t.mode, append(report.Notes, t.notes...)
	if o.output == "json" {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(report)
	}
	return report.WriteText(out)
}

const ipvsMode = "ipvs"

// openKernel connects to the kernel if a mode is programmed.
func (t *tracer) openKernel(ctx context.Context) error {
	mode, err := inspect.Mode(ctx, inspect.Options{})
	if err != nil {
		return err
	}
	table := nft.TableName
	if mode == ipvsMode {
		table = ipvs.TableName
	}
	walker, err := nft.NewWalker(nft.Options{Table: table})
	if err != nil {
		return err
	}
	t.mode, t.walker = mode, walker
	return nil
}

// readDesired reads the objects and computes the desired state.
func (t *tracer) readDesired(ctx context.Context, flags config.Flags) error {
	c, err := agentSettings(ctx, flags)
	if err != nil {
		return err
	}
	options, err := desiredOptions(c, t.options.timeout, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	state, err := desired.Read(ctx, options)
	if err != nil {
		return err
	}
	t.desired = &trace.Desired{Tracker: state.Tracker, Node: state.Node, Services: slices.Collect(state.All()), Pods: map[netip.Addr]trace.Pod{}}
	for _, slice := range state.Objects.EndpointSlices {
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if e.TargetRef == nil || e.TargetRef.Kind != "Pod" {
				continue
			}
			pod := trace.Pod{Name: types.NamespacedName{Namespace: cmp.Or(e.TargetRef.Namespace, slice.Namespace), Name: e.TargetRef.Name}.String()}
			if e.NodeName != nil {
				pod.Node = *e.NodeName
			}
			for _, text := range e.Addresses {
				if addr, err := netip.ParseAddr(text); err == nil {
					t.desired.Pods[addr] = pod
				}
			}
		}
	}
	return nil
}

// readFrontends reads the frontends by which the destination is found.
func (t *tracer) readFrontends(ctx context.Context) error {
	if t.desired != nil {
		for _, s := range t.desired.Services {
			for _, f := range s.Frontends {
				t.frontends = append(t.frontends, trace.NamedFrontend{
					Namespace: s.Key.Namespace, Service: s.Key.Name, Port: s.Key.Port, Kind: s.Key.Kind, Frontend: f,
				})
			}
		}
		return nil
	}
	kernel, err := inspect.Read(ctx, inspect.Options{Mode: t.mode})
	if err != nil {
		return err
	}
	for i := range kernel.Frontends {
		f := &kernel.Frontends[i]
		namespace, service, port := f.Service()
		t.frontends = append(t.frontends, trace.NamedFrontend{Namespace: namespace, Service: service, Port: port, Kind: f.Kind, Frontend: f.Frontend})
	}
	return nil
}

// nodeClient is the FROM of the node's own connections.
const nodeClient = "node"

// connection returns the connection from a client to a target.
func (t *tracer) connection(from, to string, target trace.Target) (trace.Connection, dataplane.Protocol, error) {
	c := trace.Connection{Client: from, Target: to}
	clients, err := t.clientAddrs(from)
	if err != nil {
		return c, 0, err
	}
	prefer := dataplane.IPv4
	if len(clients) > 0 {
		prefer = dataplane.FamilyOf(clients[0])
	}
	destination, protocol, err := target.Resolve(t.frontends, t.options.namespace, prefer)
	if err != nil {
		return c, 0, t.explainUnknown(err, target)
	}
	c.Destination, c.Protocol = destination, protocol.String()
	if from == nodeClient {
		source, ok, err := t.host.SourceFor(destination.Addr())
		switch {
		case err != nil:
			return c, 0, err
		case !ok:
			return c, 0, fmt.Errorf("destination %s: the node has no route to it, so it sends no packet: add a default route", destination.Addr())
		}
		c.Source = source
		return c, protocol, nil
	}
	i := slices.IndexFunc(clients, func(a netip.Addr) bool { return a.Is4() == destination.Addr().Is4() })
	if i < 0 {
		return c, 0, fmt.Errorf("client %s has no address of the family %s, which the destination %s has",
			from, dataplane.FamilyOf(destination.Addr()), destination.Addr())
	}
	c.Source = clients[i]
	local, err := t.host.IsLocal(c.Source)
	if err != nil || local {
		return c, protocol, err
	}
	name, ok, err := t.host.InterfaceTo(c.Source)
	if err != nil {
		return c, 0, err
	}
	if !ok {
		t.notes = append(t.notes, fmt.Sprintf("the node has no route to the client %s, so the interface on which it arrives is unknown", c.Source))
		name = "unknown"
	}
	c.Interface = name
	return c, protocol, nil
}

// clientAddrs returns the addresses of a client, none for the node.
func (t *tracer) clientAddrs(from string) ([]netip.Addr, error) {
	if from == nodeClient {
		return nil, nil
	}
	if addr, err := netip.ParseAddr(from); err == nil {
		return []netip.Addr{addr.Unmap()}, nil
	}
	pod := from
	if !strings.Contains(pod, "/") {
		pod = t.options.namespace + "/" + pod
	}
	var addrs []netip.Addr
	var names []string
	if t.desired != nil {
		for addr, p := range t.desired.Pods {
			if names = append(names, p.Name); p.Name == pod {
				addrs = append(addrs, addr)
			}
		}
	}
	if len(addrs) == 0 {
		text := fmt.Sprintf("client %q: no EndpointSlice names the pod %s", from, pod)
		if nearest := inspect.Nearest(pod, names); nearest != "" {
			text += fmt.Sprintf(": did you mean %q?", nearest)
		} else {
			text += ": use its address"
		}
		return nil, errors.New(text)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, nil
}

// explainUnknown adds why a Service that exists has no frontend.
func (t *tracer) explainUnknown(err error, target trace.Target) error {
	unknown := (*trace.UnknownError)(nil)
	if t.desired == nil || !errors.As(err, &unknown) {
		return err
	}
	namespace, name := target.ServiceName(t.options.namespace)
	if reason := t.desired.NotServed(namespace, name); reason != "" {
		return fmt.Errorf("destination %q: Service %s/%s is not served: %s", target.Host, namespace, name, reason)
	}
	return err
}

// followLive waits for the connection and prints its path.
func (t *tracer) followLive(ctx context.Context, c trace.Connection, p dataplane.Protocol, out, errOut io.Writer) error {
	path, err := trace.Follow(ctx, c, p, t.host, func() {
		_, _ = fmt.Fprintf(errOut, "waiting for a connection from %s to %s/%s; press Ctrl+C to end\n", c.Source, c.Destination, p)
	})
	if err != nil || len(path.Events) == 0 {
		return err
	}
	if t.options.output == "json" {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(path)
	}
	return path.WriteText(out)
}
