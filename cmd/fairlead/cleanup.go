package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/instance"
	"fairlead.io/fairlead/internal/kubeproxycleanup"
	"fairlead.io/fairlead/internal/otherproxy"
	"fairlead.io/fairlead/internal/servicecounters"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/nft"
)

func cleanupCommand() *cobra.Command {
	var logs config.LogFlags
	var force, kubeProxy bool
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that Fairlead or kube-proxy has programmed on this node",
		Long: `Remove everything that Fairlead has programmed on this node, in any mode. Other
programs' rules are not changed. Stop Fairlead first: a running instance would
program everything again. Start another Service proxy first, too: without its
rules, new connections to Services fail, and established connections end if no
other program has NAT rules. Connections through IPVS always end. The command
refuses to end connections.

With --kube-proxy, remove what kube-proxy has left on this node instead, in any
of its modes and without its programs (iptables, ipset, ipvsadm), and print one
line for each removed object. Fairlead may run; its connections are not
affected. Stop kube-proxy first: it would program everything again. The command
finds a running kube-proxy only if it shares the PID namespace, and if it is not
part of another program, as in k3s. Connections through virtual servers of
kube-proxy's mode ipvs end, so the command refuses while there are any.`,
		Example: `  fairlead cleanup
  fairlead cleanup --kube-proxy`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.Logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if kubeProxy {
				return cleanUpKubeProxy(cmd.Context(), cmd.OutOrStdout(), force)
			}
			check := checkConnections
			if force {
				check = nil
			}
			return cleanUp(cmd.Context(), log, force, check)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "clean up even if a proxy would program everything again, or if connections end")
	cmd.Flags().BoolVar(&kubeProxy, "kube-proxy", false, "remove what kube-proxy has programmed, and nothing of Fairlead")
	logs.AddFlags(cmd)
	return cmd
}

// cleanUp removes the kernel state of all backends. Without force, it fails while another instance
// is running. It also fails if check, which may be nil, returns an error.
func cleanUp(ctx context.Context, log *slog.Logger, force bool, check func(context.Context) error) error {
	if !force {
		lock, err := lockInstance(ctx)
		if err != nil {
			return err
		}
		defer lock.Release() //nolint:errcheck // the process exits
	}
	if check != nil {
		if err := check(ctx); err != nil {
			return err
		}
	}
	var errs []error
	for _, b := range backend.All() {
		err := b.Remove(log)
		errs = append(errs, err)
		if errors.Is(err, fs.ErrPermission) {
			return errors.Join(errs...) // the others would fail, too
		}
	}
	if errors.Join(errs...) == nil {
		errs = append(errs, servicecounters.Remove(0), flowoffload.Remove(0))
	}
	return errors.Join(errs...)
}

// checkConnections returns an error if connections would end with Fairlead's rules: those through
// IPVS, and all others if no other Service proxy has rules on this node.
func checkConnections(ctx context.Context) error {
	if err := checkTranslated(ctx); err != nil {
		return err
	}
	open, err := ipvs.OpenConnections(ipvs.Options{}) //nolint:contextcheck // its netlink requests take milliseconds
	if err != nil || open == 0 {
		return nil //nolint:nilerr // the clean-up reports missing privileges
	}
	return fmt.Errorf("%d TCP connections through Fairlead's IPVS virtual servers would end: run Fairlead with --mode=nft, which keeps them until they are closed, or use --force", open)
}

// checkTranslated returns an error if no other Service proxy has rules on this node and connections
// would end with Fairlead's rules.
func checkTranslated(ctx context.Context) error {
	scanner, err := otherproxy.NewScanner()
	if err != nil {
		return nil // the clean-up reports missing privileges
	}
	defer scanner.Close() //nolint:errcheck // nothing was written
	if proxies, err := scanner.Scan(); err != nil || len(proxies) > 0 {
		return nil // the clean-up reports missing privileges
	}
	rules, err := scanner.NATRules([]string{nft.TableName, ipvs.TableName, servicecounters.TableName})
	if err != nil || !rules.Own {
		return nil // the clean-up reports missing privileges
	}
	var ending conntrack.Translated
	for family, remains := range map[dataplane.Family]bool{dataplane.IPv4: rules.IPv4, dataplane.IPv6: rules.IPv6} {
		if remains {
			continue
		}
		count, err := conntrack.CountTranslated(ctx, family)
		if err != nil {
			return nil // without connection tracking there are no connections
		}
		ending.TCP += count.TCP
		ending.Other += count.Other
	}
	if ending == (conntrack.Translated{}) {
		return nil
	}
	return fmt.Errorf("%d TCP connections and %d flows of other protocols to Services would end, because no other Service proxy has rules on this node: start kube-proxy first, or use --force",
		ending.TCP, ending.Other)
}

// cleanUpKubeProxy removes what kube-proxy has programmed. Without force, it fails while kube-proxy
// is running or connections would end.
func cleanUpKubeProxy(ctx context.Context, out io.Writer, force bool) error {
	if !force {
		if pid := kubeproxycleanup.RunningKubeProxy(); pid != 0 {
			return fmt.Errorf("kube-proxy is running on this node (PID %d) and would program everything again: stop it first, or use --force", pid)
		}
		connections, err := kubeproxycleanup.IPVSConnections(ctx)
		if err != nil {
			return err
		}
		if connections > 0 {
			return fmt.Errorf("%d TCP connections through kube-proxy's IPVS virtual servers would end: wait until they are closed (ipvsadm -Ln), or use --force", connections)
		}
	}
	err := kubeproxycleanup.Remove(ctx, func(object string) { _, _ = fmt.Fprintln(out, "removed", object) })
	if kubeproxycleanup.RouteLocalnet() {
		_, _ = fmt.Fprintln(out, "not changed: net.ipv4.conf.all.route_localnet is 1, as kube-proxy's mode iptables sets it; if no other program needs it, run: sysctl -w net.ipv4.conf.all.route_localnet=0")
	}
	return err
}

// errRunning is returned while another instance is running.
var errRunning = errors.New("stop it first, because it would program everything again; --force cleans up anyway, except tables that the other instance owns (--nft-own-table)")

// lockInstance acquires the instance lock, so that no other instance starts programming during
// cleanup. It returns an error if another instance is running. If another user's process holds
// the lock, or the holder has just exited, it returns a nil Lock without an error.
func lockInstance(ctx context.Context) (*instance.Lock, error) {
	lock, err := instance.TryAcquire(instance.Options{Description: "fairlead cleanup"}) //nolint:contextcheck // a Lock outlives ctx
	if err == nil {
		return lock, nil
	}
	holder, err := instance.FindHolder(ctx)
	if err != nil || holder == nil { // another user's process, or the holder has just exited
		return nil, nil //nolint:nilerr // cleanup continues without the lock
	}
	return nil, fmt.Errorf("another Fairlead programs this node (%s): %w", holder, errRunning)
}
