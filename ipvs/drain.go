package ipvs

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// drainPollPeriod is the interval at which Drain checks whether connections remain.
const drainPollPeriod = time.Second

// Drain keeps existing connections while another backend, which must have programmed the Services
// already, serves new ones. It returns when the last connection has ended, after
// [Options.DrainLimit], or when ctx is done. Cleanup must follow unless ctx is done. UDP flows do
// not drain. Virtual servers that kube-proxy uses, too, do not change. Drain does nothing if
// Fairlead has no virtual servers.
func Drain(ctx context.Context, opts Options) error {
	remain, shared, err := drainable(opts) //nolint:contextcheck // its netlink requests take milliseconds
	if err != nil || !remain {
		return err
	}
	opts.ExcludeCIDRs = slices.Concat(opts.ExcludeCIDRs, shared)
	d, err := Open(opts) //nolint:contextcheck // its netlink requests take milliseconds
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // Cleanup follows
	none := func(func(*dataplane.Service) bool) {}
	if err := d.Replace(ctx, dataplane.Node{}, none, nil); err != nil {
		return fmt.Errorf("drain the virtual servers: %w", err)
	}
	ticker := time.NewTicker(drainPollPeriod)
	defer ticker.Stop()
	for d.hasServers() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
	return nil
}

// hasServers reports whether virtual servers remain.
func (d *Dataplane) hasServers() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.servers) > 0
}

// drainable reports whether virtual servers of Fairlead remain. It also returns the addresses that
// kube-proxy uses, too.
func drainable(opts Options) (remain bool, shared []netip.Prefix, err error) {
	err = withManagedServers(opts, func(_ *ipvsConn, h *host, servers []serverKey) error {
		remain = len(servers) > 0
		addrs, err := h.kubeProxyAddrs()
		for a := range addrs {
			shared = append(shared, netip.PrefixFrom(a, a.BitLen()))
		}
		return err
	})
	return remain, shared, err
}

// OpenConnections returns the number of open TCP connections that end with Cleanup.
func OpenConnections(opts Options) (open int, err error) {
	err = withManagedServers(opts, func(c *ipvsConn, _ *host, servers []serverKey) error {
		open, err = c.countActive(servers)
		return err
	})
	return open, err
}

// withManagedServers calls read with the virtual servers of Fairlead.
func withManagedServers(opts Options, read func(*ipvsConn, *host, []serverKey) error) error {
	return inNamespace(opts.NetNS, func() error {
		return withIPVS(func(c *ipvsConn) error {
			h, err := openHost(0)
			if err != nil {
				return err
			}
			defer h.close() //nolint:errcheck // nothing was written
			servers, err := managedServers(c, h, opts)
			if err != nil {
				return err
			}
			return read(c, h, servers)
		})
	})
}
