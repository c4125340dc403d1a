package testbed

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// FirstPackets sends first packets of TCP connections and measures how long they take. The host of the
// endpoints drops them before its own protocols see them. A FirstPackets must not be used concurrently.
// The caller must close it.
type FirstPackets struct {
	testbed *Testbed
	probe   *Probe
	conn    *nftables.Conn
	table   *nftables.Table
	counter *nftables.CounterObj
	sent    uint64
}

// OpenFirstPackets prepares the host of the endpoints. Until Close, probes receive nothing.
func (r *Testbed) OpenFirstPackets() (_ *FirstPackets, err error) {
	f := &FirstPackets{testbed: r}
	if f.probe, err = r.NewProbe(); err != nil {
		return nil, err
	}
	if f.conn, err = nftables.New(nftables.WithNetNSFd(r.Endpoints.Fd())); err != nil {
		return nil, errors.Join(fmt.Errorf("drop first packets at the endpoints: %w", err), f.probe.Close())
	}
	f.table = f.conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "first-packets"})
	f.counter = &nftables.CounterObj{Table: f.table, Name: "arrived"}
	f.conn.AddObj(f.counter)
	chain := f.conn.AddChain(&nftables.Chain{
		Table: f.table, Name: "prerouting", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw,
	})
	clients := clientCIDR.Masked()
	first, last := clients.Addr().As4(), AddrPlus(clients.Addr(), 1<<(32-clients.Bits())-1).As4()
	const sourceOffset = 12 // in the IPv4 header
	f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: chain, Exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: sourceOffset, Len: 4},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: first[:], ToData: last[:]},
		&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: f.counter.Name},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	if err := f.conn.Flush(); err != nil {
		return nil, errors.Join(fmt.Errorf("drop first packets at the endpoints: %w", err), f.probe.Close())
	}
	return f, nil
}

// Send sends a first packet to each address and returns the mean time of one, from the system call until
// the packet has arrived at the host of the endpoints: the kernel passes packets from one namespace to the
// next before the system call returns. Each packet has an unused source.
func (f *FirstPackets) Send(to []netip.AddrPort) (time.Duration, error) {
	runtime.LockOSThread() // keeps the processor's caches warm
	defer runtime.UnlockOSThread()
	start := time.Now()
	for _, addr := range to {
		if err := f.probe.send(addr); err != nil {
			return 0, err
		}
	}
	took := time.Since(start)
	f.sent += uint64(len(to))
	return took / time.Duration(len(to)), nil
}

// ForgetConnections deletes the node's conntrack entries, so that the table stays small.
func (f *FirstPackets) ForgetConnections() error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(f.testbed.Node.Fd()), unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open netlink in the node's namespace: %w", err)
	}
	defer handle.Close()
	if err := handle.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("delete the node's conntrack entries: %w", err)
	}
	return nil
}

// CheckArrived returns an error if packets of Send have not arrived at the host of the endpoints.
func (f *FirstPackets) CheckArrived() error {
	// A busy machine may pass packets on later.
	const tries, period = 50, 20 * time.Millisecond
	var arrived uint64
	for range tries {
		o, err := f.conn.GetObject(f.counter)
		if err != nil {
			return fmt.Errorf("count first packets at the endpoints: %w", err)
		}
		if counter, ok := o.(*nftables.CounterObj); ok {
			arrived = counter.Packets
		}
		if arrived == f.sent {
			return nil
		}
		time.Sleep(period)
	}
	return fmt.Errorf("%d of %d first packets arrived at the endpoints", arrived, f.sent)
}

// Close ends the drop at the endpoints.
func (f *FirstPackets) Close() error {
	f.conn.DelTable(f.table)
	return errors.Join(f.conn.Flush(), f.probe.Close())
}
