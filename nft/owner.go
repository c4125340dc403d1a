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

// ownerFlags are the flags of a table that a Dataplane owns.
//
// A table can have an owner: the netlink socket that created it with the flag owner (Linux
// 5.12). The kernel rejects changes through other sockets, and `nft flush ruleset` skips
// the table. With the flag persist (Linux 6.9), the table stays when the socket is closed.
// It then has no owner, any process can change it, and a socket becomes its owner by adding
// it again. Neither flag can be added later to a table without the flag persist
// (nf_tables_api.c, nf_tables_updtable).
const ownerFlags = nftables.TableFlagOwner | nftables.TableFlagPersist

// ErrOwned is wrapped by the errors of [Dataplane.Replace] and [Cleanup] while another
// process owns a table. See [Options.OwnTables].
var ErrOwned = errors.New("the kernel accepts changes from its owner only")

// noOwnerReason is the reason for rebuilding a table that cannot have an owner.
const noOwnerReason = "the table was created without an owner, and the kernel cannot add one"

const (
	// ownerExitTimeout is how long Replace waits for a table's owner to exit. The lock of a
	// killed instance can be released before its netlink socket is closed.
	ownerExitTimeout = time.Second
	// ownerPollInterval is the time between two checks. The kernel sends no notification
	// when the owner exits.
	ownerPollInterval = 5 * time.Millisecond
)

// OwnsTables reports whether the Dataplane owns its tables. This requires
// [Options.OwnTables] and a kernel that supports it.
func (d *Dataplane) OwnsTables() bool { return d.ownTables }

// supportsOwner reports whether the kernel supports tables that outlive their owner. It
// creates one in a batch without an end message, which the kernel validates and then aborts
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
		return false, fmt.Errorf("check whether the kernel supports table owners: %w", err)
	default:
		return true, nil
	}
}

// waitForOwners waits up to ownerExitTimeout until no other process owns one of the tables.
// It returns an error if one still does.
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

// ownedError returns an error that names the table and its owner. port is the netlink port
// of the owner's socket.
func ownedError(t *table, port uint32) error {
	owner := fmt.Sprintf("an unknown process with netlink port %d", port)
	if process, err := socketowner.ByNetlinkPort(unix.NETLINK_NETFILTER, port); err == nil {
		owner = process.String()
	}
	return fmt.Errorf("table %s belongs to %s: %w: stop that process first", t, owner, ErrOwned)
}
