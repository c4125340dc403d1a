package nft

import (
	"context"
	"errors"
	"fmt"
	"time"

	"fairlead.io/fairlead/internal/socketowner"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A table can have an owner, the netlink socket that has created it with the flag owner
// (Linux 5.12). The kernel refuses its changes through other sockets, and leaves it out
// of `nft flush ruleset`. With the flag persist (Linux 6.9) the table stays when the
// socket is closed. Then it has no owner, anybody can change it, and a socket becomes
// its owner by adding it again. A table without the flag persist gets neither flag
// later (nf_tables_api.c, nf_tables_updtable).
const ownerFlags = nftables.TableFlagOwner | nftables.TableFlagPersist

// ErrOwned is wrapped by the errors of [Dataplane.Replace] and [Cleanup] while another
// process owns a table, see [Options.OwnTables].
var ErrOwned = errors.New("the kernel lets nobody but its owner change it")

// noOwnerReason is the reason to rebuild a table that cannot get an owner.
const noOwnerReason = "the kernel gives no owner to a table that was created without one"

const (
	// ownerExitTimeout is how long Replace waits for the owner of a table to end. The lock of
	// an instance that was killed can be free before its netlink socket is closed.
	ownerExitTimeout = time.Second
	// ownerPollInterval is the time between looks. The kernel does not announce the end.
	ownerPollInterval = 5 * time.Millisecond
)

// OwnsTables reports whether the tables get an owner, which takes [Options.OwnTables]
// and a kernel that supports it.
func (d *Dataplane) OwnsTables() bool { return d.ownTables }

// supportsOwner reports whether the kernel supports tables that stay without their owner. It
// asks for one in a batch without an end, which the kernel validates and undoes
// (nfnetlink.c, nfnetlink_rcv_batch).
func supportsOwner(socket *netlink.Conn, t *table) (bool, error) {
	messages, err := singleMessageBatch(t, unix.NFT_MSG_NEWTABLE, netlink.Create, []netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(t.nf.Name + "-probe\x00")},
		{Type: unix.NFTA_TABLE_FLAGS, Data: encodeTableFlags(ownerFlags)},
	})
	if err != nil {
		return false, err
	}
	if _, err = socket.SendMessages(messages[:2]); err == nil {
		_, err = socket.Receive()
	}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("ask the kernel whether a table can have an owner: %w", err)
	default:
		return true, nil
	}
}

// waitForOwners waits a moment until no other process owns one of the tables, and returns
// an error if one still does.
func (d *Dataplane) waitForOwners(ctx context.Context) error {
	for deadline := time.Now().Add(ownerExitTimeout); ; {
		err := d.checkOwners(ctx)
		if err == nil || !errors.Is(err, ErrOwned) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(ownerPollInterval):
		}
	}
}

// checkOwners returns an error if another process owns one of the tables.
func (d *Dataplane) checkOwners(ctx context.Context) error {
	for i, t := range d.tables {
		tables, err := d.dump.listTables(ctx, t.nf.Family)
		if err != nil {
			return err
		}
		for _, name := range []string{t.nf.Name, t.nf.Name + nextSuffix} {
			info := tables[name]
			if info.flags&nftables.TableFlagOwner == 0 || info.owner == d.portID {
				continue
			}
			return ownedError(d.newTables(name)[i], info.owner)
		}
	}
	return nil
}

// ownedError returns an error that names a table and the process that owns it by the
// port of its netlink socket.
func ownedError(t *table, port uint32) error {
	who := fmt.Sprintf("a process that this one cannot see, by netlink port %d", port)
	if process, err := socketowner.ByNetlinkPort(unix.NETLINK_NETFILTER, port); err == nil {
		who = process.String()
	}
	return fmt.Errorf("table %s belongs to %s: %w: stop that process first", t, who, ErrOwned)
}
