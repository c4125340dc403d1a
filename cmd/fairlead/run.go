package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"

	"fairlead/dataplane"
	"fairlead/kube"
	"fairlead/source/manifest"
	"fairlead/source/manifest/dns"
	"fairlead/sync"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/util/validation"
)

// runOptions are the flags of `fairlead run`.
type runOptions struct {
	mode          string
	manifests     string
	serviceCIDR   string
	clusterCIDR   string
	nodeName      string
	dnsListen     string
	clusterDomain string
	logs          logOptions
}

func (o *runOptions) addFlags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&o.mode, "mode", string(modes()[0]), "the kernel mechanism to program: "+modeNames())
	flags.StringVar(&o.manifests, "manifests", "", "a folder of YAML files with Services, Pods and EndpointSlices, which is watched")
	flags.StringVar(&o.serviceCIDR, "service-cidr", "",
		"the network that Services without a clusterIP get one from; for dual stack one of each family, comma-separated")
	flags.StringVar(&o.clusterCIDR, "cluster-cidr", "",
		"the network of the pods, comma-separated if there are several; connections to Services from elsewhere are masqueraded. "+
			"Empty: no connection is")
	flags.StringVar(&o.nodeName, "hostname-override", "", "the name of this node; empty: the hostname")
	flags.StringVar(&o.dnsListen, "dns-listen", "", "the address and port to answer Services' DNS names on, such as 10.0.0.1:53; empty: nowhere")
	flags.StringVar(&o.clusterDomain, "cluster-domain", "cluster.local", "the domain of Services' DNS names")
	o.logs.addFlags(cmd)

	var names []string
	for _, m := range modes() {
		names = append(names, string(m))
	}
	completeWith(cmd, "mode", names...)
	for _, flag := range []string{"service-cidr", "cluster-cidr", "hostname-override", "dns-listen", "cluster-domain"} {
		completeWith(cmd, flag) // no files
	}
	_ = cmd.MarkFlagDirname("manifests")
}

// config is what the flags say.
type config struct {
	mode          mode
	manifests     string
	serviceCIDRs  []netip.Prefix
	clusterCIDRs  []netip.Prefix
	nodeName      string
	dnsListen     string
	clusterDomain string
}

// complete returns the configuration, or an error that names each flag that is
// wrong.
func (o *runOptions) complete() (config, error) {
	c := config{
		mode: mode(o.mode), manifests: o.manifests, dnsListen: o.dnsListen, clusterDomain: o.clusterDomain,
	}
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	note(c.mode.validate())
	if c.manifests == "" {
		note(errors.New("--manifests: give the folder with the Services' YAML files"))
	}
	var err error
	c.serviceCIDRs, err = parseServiceCIDRs(o.serviceCIDR)
	note(err)
	c.clusterCIDRs, err = parseCIDRs("--cluster-cidr", o.clusterCIDR)
	note(err)
	if c.dnsListen != "" {
		if _, err := netip.ParseAddrPort(c.dnsListen); err != nil {
			note(fmt.Errorf("--dns-listen: %q is not an address with a port: write 10.0.0.1:53 or [fd00::1]:53", c.dnsListen))
		}
	}
	if problems := validation.IsDNS1123Subdomain(strings.TrimSuffix(c.clusterDomain, ".")); len(problems) > 0 {
		note(fmt.Errorf("--cluster-domain: %q is not a domain: write it as cluster.local", c.clusterDomain))
	}
	c.nodeName, err = nodeName(o.nodeName)
	note(err)
	return c, errors.Join(errs...)
}

// nodeName returns the name of this node as the kubelet forms it, in lower case.
func nodeName(override string) (string, error) {
	name := override
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return "", fmt.Errorf("--hostname-override is not set and the hostname is unknown: %w", err)
		}
	}
	name = strings.ToLower(strings.TrimSpace(name))
	if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
		return "", fmt.Errorf("--hostname-override: %q is not the name of a node: write it as node-1 or node-1.example", cmp.Or(override, name))
	}
	return name, nil
}

// parseServiceCIDRs parses a list of networks that addresses are handed out from.
func parseServiceCIDRs(list string) ([]netip.Prefix, error) {
	const flag = "--service-cidr"
	prefixes, err := parseCIDRs(flag, list)
	if err != nil {
		return nil, err
	}
	for i, p := range prefixes {
		if p.Addr().BitLen()-p.Bits() < 2 {
			return nil, fmt.Errorf("%s: %s has no address to hand out: use a larger network", flag, p)
		}
		for _, q := range prefixes[:i] {
			if q.Addr().Is4() == p.Addr().Is4() {
				return nil, fmt.Errorf("%s: %s and %s are of one family: give one network, or one of each family", flag, q, p)
			}
		}
	}
	return prefixes, nil
}

// parseCIDRs parses a comma-separated list of networks. An empty one means unset.
func parseCIDRs(flag, list string) ([]netip.Prefix, error) {
	if list == "" {
		return nil, nil
	}
	var prefixes []netip.Prefix
	for part := range strings.SplitSeq(list, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: %q is not a network: write it as 10.96.0.0/12 or fd00:96::/112", flag, part)
		case p.Addr().Is4In6():
			return nil, fmt.Errorf("%s: %q is an IPv4 network in IPv6 form: write it as IPv4", flag, part)
		case p != p.Masked():
			return nil, fmt.Errorf("%s: %q has bits set behind its length: write %s", flag, part, p.Masked())
		}
		prefixes = append(prefixes, p)
	}
	return prefixes, nil
}

// resyncPeriod is how often the kernel is compared with what is wanted although
// nobody has announced a change: for announcements that were lost. Where nothing
// differs nothing is written.
const resyncPeriod = 15 * time.Minute

func runCommand() *cobra.Command {
	var options runOptions
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Program this node and keep it programmed",
		Long: `Program this node's kernel with the Services of a source, and keep it so until
the program is told to stop (SIGTERM or SIGINT). What is programmed then stays
and works; "fairlead cleanup" removes it.`,
		Example: "  fairlead run --mode=nft --manifests=./services --service-cidr=10.96.0.0/16 --cluster-cidr=10.244.0.0/16",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := options.complete()
			log, logErr := options.logs.logger(cmd.ErrOrStderr())
			if err := errors.Join(err, logErr); err != nil {
				return err
			}
			return config.run(cmd.Context(), log)
		},
	}
	options.addFlags(cmd)
	return cmd
}

// run joins the source, the tracker, the syncer and the dataplane, and blocks
// until ctx is done or one of them fails.
func (c config) run(ctx context.Context, log *slog.Logger) error {
	source, err := manifest.New(manifest.Options{
		Dir: c.manifests, ServiceCIDRs: c.serviceCIDRs, NodeName: c.nodeName, Logger: log.With("component", "manifest"),
	})
	if err != nil {
		return fmt.Errorf("--manifests: %w", err)
	}
	dp, err := c.mode.open(log)
	if err != nil {
		return err
	}
	defer func() {
		if err := dp.Close(); err != nil {
			log.WarnContext(ctx, "the connection to the kernel was not closed", "error", err)
		}
	}()
	syncer := sync.New(dp, sync.Options{
		Logger: log.With("component", "sync"), ResyncPeriod: resyncPeriod,
	})
	syncer.SetNode(dataplane.Node{PodCIDRs: c.clusterCIDRs})

	group, ctx := errgroup.WithContext(ctx)
	names, err := c.serveDNS(ctx, group, log)
	if err != nil {
		return err
	}
	delivery := delivery{tracker: kube.NewTracker(kube.Options{NodeName: c.nodeName}), syncer: syncer, log: log, names: names}
	group.Go(func() error { return syncer.Run(ctx) })
	group.Go(func() error { return source.Run(ctx, delivery.take) })
	log.InfoContext(ctx, "running", "version", version, "mode", string(c.mode), "manifests", c.manifests, "node", c.nodeName)
	if err := group.Wait(); err != nil {
		return err
	}
	log.InfoContext(ctx, "stopped; what is programmed stays in place")
	return nil
}

// serveDNS starts to answer DNS names, if it is asked for.
func (c config) serveDNS(ctx context.Context, group *errgroup.Group, log *slog.Logger) (*dns.Server, error) {
	if c.dnsListen == "" {
		return nil, nil
	}
	sockets, err := dns.Listen(ctx, c.dnsListen)
	if err != nil {
		return nil, fmt.Errorf("--dns-listen: %w", err)
	}
	server := dns.New(dns.Options{ClusterDomain: c.clusterDomain, Logger: log.With("component", "dns")})
	group.Go(func() error { return server.Serve(ctx, sockets) })
	return server, nil
}

// delivery passes what the source delivers on to those who need it.
type delivery struct {
	tracker  *kube.Tracker
	syncer   *sync.Syncer
	names    *dns.Server // nil if nobody asks for names
	log      *slog.Logger
	complete bool
}

func (d *delivery) take(delta kube.Delta) {
	result := d.tracker.Apply(delta)
	d.syncer.Update(result.Changes)
	if !d.complete {
		d.complete = true
		d.syncer.ListComplete()
	}
	if d.names != nil {
		d.names.Apply(delta)
	}
	for _, p := range result.Problems {
		log := d.log.With("service", p.Service.String())
		if p.EndpointSlice != "" {
			log = log.With("endpoint_slice", p.EndpointSlice)
		}
		log.Warn("Service can't be carried out as written", "field", p.Field, "problem", p.Message)
	}
}
