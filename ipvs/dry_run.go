package ipvs

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net/netip"
	"os"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/nft"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dryRunIPVS reads IPVS and records changes instead of making them. Its conn is nil if the kernel
// has not loaded IPVS: there are no virtual servers then, and a request would load the module.
type dryRunIPVS struct {
	conn   *ipvsConn
	dryRun *dataplane.DryRun
}

func (c dryRunIPVS) run(requests []request) ([]error, error) {
	for _, r := range requests {
		object := "virtual server"
		if r.dest.IsValid() {
			object = "destination"
		}
		op := dataplane.Modify
		switch r.command { //nolint:exhaustive // the other commands change
		case newService, newDest:
			op = dataplane.Add
		case delService, delDest:
			op = dataplane.Delete
		}
		c.dryRun.Record(op, object, r.serverKey.String(), 1)
	}
	return make([]error, len(requests)), nil
}

func (c dryRunIPVS) countServers() (int, error) {
	if c.conn == nil {
		return 0, nil
	}
	return c.conn.countServers()
}

func (c dryRunIPVS) readServers(f dataplane.Family, visit func(serverKey, serverState)) (complete bool, count int, err error) {
	if c.conn == nil {
		return true, 0, nil
	}
	return c.conn.readServers(f, visit)
}

func (c dryRunIPVS) readDestinations(s serverKey, expected int) ([]addressedDestination, error) {
	if c.conn == nil {
		return nil, nil
	}
	return c.conn.readDestinations(s, expected)
}

func (c dryRunIPVS) dumpServers() (map[serverKey]settings, error) {
	if c.conn == nil {
		return map[serverKey]settings{}, nil
	}
	return c.conn.dumpServers()
}

func (c dryRunIPVS) addMissing(servers map[serverKey]settings, expected iter.Seq[serverKey]) error {
	if c.conn == nil {
		return nil
	}
	return c.conn.addMissing(servers, expected)
}

func (c dryRunIPVS) getServer(s serverKey) (settings, bool, error) {
	if c.conn == nil {
		return settings{}, false, nil
	}
	return c.conn.getServer(s)
}

func (c dryRunIPVS) dumpDestinations(s serverKey) (map[netip.AddrPort]destination, error) {
	if c.conn == nil {
		return nil, nil
	}
	return c.conn.dumpDestinations(s)
}

// setTimeouts does nothing: the kernel does not report the timeouts of IPVS over netlink.
func (dryRunIPVS) setTimeouts(time.Duration, time.Duration, time.Duration) error { return nil }

func (c dryRunIPVS) close() error {
	if c.conn == nil {
		return nil
	}
	return c.conn.close()
}

// dryRunHost reads the configuration of the host and records changes instead of making them.
type dryRunHost struct {
	*host

	dryRun *dataplane.DryRun
}

// differ records an object that is missing or has another value.
func (h dryRunHost) differ(op, kind, name, problem string, values ...[]string) {
	values = append(values, nil, nil)
	h.dryRun.Differ(kind+" "+name, problem, values[0], values[1])
	h.dryRun.Record(op, kind, name, 1)
}

func (h dryRunHost) setUp() error {
	link, err := h.handle.LinkByName(LinkName)
	switch notFound := (netlink.LinkNotFoundError{}); {
	case errors.As(err, &notFound):
		h.differ(dataplane.Add, "interface", LinkName, dataplane.Missing)
	case err != nil:
		return fmt.Errorf("find interface %s: %w", LinkName, err)
	case link.Type() != "dummy":
		return fmt.Errorf("interface %s is of type %s, want dummy: another program created it; remove or rename it", LinkName, link.Type())
	case link.Attrs().Flags&unix.IFF_UP == 0:
		h.differ(dataplane.Modify, "interface", LinkName, "down")
	}
	for _, f := range families() {
		exists, err := h.hasLookupRule(f)
		switch {
		case err != nil && !isFamilyUnsupported(f, err):
			return err
		case err == nil && !exists:
			h.differ(dataplane.Add, "routing rule", fmt.Sprintf("%s lookup %d", f, RouteTable), dataplane.Missing)
		}
	}
	return nil
}

func (h dryRunHost) setSysctls(values map[string]string) error {
	return inNamespace(h.netns, func() error {
		for name, value := range values {
			have, err := os.ReadFile("/proc/sys/" + name)
			text := strings.TrimSpace(string(have))
			switch {
			case err != nil && !errors.Is(err, fs.ErrNotExist):
				return fmt.Errorf("read sysctl %s: %w", strings.ReplaceAll(name, "/", "."), err)
			case err != nil: // IPVS is not loaded
				h.differ(dataplane.Modify, "sysctl", strings.ReplaceAll(name, "/", "."), dataplane.Missing, nil, []string{value})
			case text != value:
				h.differ(dataplane.Modify, "sysctl", strings.ReplaceAll(name, "/", "."), dataplane.Differs, []string{text}, []string{value})
			}
		}
		return nil
	})
}

func (h dryRunHost) changeBindings(typ uint16, addrs []netip.Addr) ([]error, error) {
	op := dataplane.Add
	if typ == unix.RTM_DELROUTE {
		op = dataplane.Delete
	}
	for _, addr := range addrs {
		h.dryRun.Record(op, "local route", addr.String(), 1)
	}
	return make([]error, len(addrs)), nil
}

// openDryRun connects to the kernel for a dry run. It loads no modules, creates nothing, and does not
// watch for drift.
func openDryRun(d *Dataplane, opts Options) (*Dataplane, error) {
	c := dryRunIPVS{dryRun: opts.DryRun}
	err := inNamespace(opts.NetNS, func() error {
		_, err := os.Stat("/proc/thread-self/net/ip_vs")
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("find IPVS: %w", err)
	default:
		if c.conn, err = dialIPVS(opts.NetNS); err != nil {
			return nil, err
		}
	}
	h, err := openHost(opts.NetNS)
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	if link, err := h.handle.LinkByName(LinkName); err == nil {
		h.link = link.Attrs().Index
	}
	r, err := nft.Open(nft.Options{
		NetNS: opts.NetNS, Logger: d.log, Table: TableName, Translator: d, VirtualNetworks: internalNets(), DryRun: opts.DryRun,
	})
	if err != nil {
		return nil, errors.Join(err, h.close(), c.close())
	}
	d.ipvs, d.host, d.rules = c, dryRunHost{h, opts.DryRun}, r
	return d, nil
}
