package nft

import (
	"context"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// schemaLabel is the prefix of the table's comment, before the schema number. The comment
// is the part of the table's user data that nft prints. The kernel accepts user data only
// when a table is created (nf_tables_api.c, nf_tables_updtable).
const schemaLabel = "fairlead schema "

// Attributes of linux/netfilter/nf_tables.h.
const (
	tableUserData = 6 // NFTA_TABLE_USERDATA (Linux 5.10)
	tableOwner    = 7 // NFTA_TABLE_OWNER (Linux 5.12)
)

// firstSchema is the schema of tables without a label.
const firstSchema = 1

// tableInfo describes a table in the kernel.
type tableInfo struct {
	flags  nftables.TableFlags
	schema int
	owner  uint32 // netlink port of the owner's socket, with the flag owner
}

// listTables returns the tables of a family by name.
func (c *dumpConn) listTables(ctx context.Context, family nftables.TableFamily) (map[string]tableInfo, error) {
	all := map[string]tableInfo{}
	err := c.dump(ctx, byte(family), unix.NFT_MSG_GETTABLE, nil, func(attrs []byte) error {
		name, _ := nlconn.Attribute(attrs, unix.NFTA_TABLE_NAME)
		info := tableInfo{schema: firstSchema}
		if v, ok := nlconn.Attribute(attrs, unix.NFTA_TABLE_FLAGS); ok && len(v) == 4 {
			info.flags = nftables.TableFlags(binary.BigEndian.Uint32(v))
		}
		if v, ok := nlconn.Attribute(attrs, tableOwner); ok && len(v) == 4 {
			info.owner = binary.BigEndian.Uint32(v)
		}
		if v, ok := nlconn.Attribute(attrs, tableUserData); ok {
			if number, ok := strings.CutPrefix(parseComment(v), schemaLabel); ok {
				info.schema, _ = strconv.Atoi(number) // an invalid number becomes 0, which is never the current schema
			}
		}
		all[strings.TrimSuffix(string(name), "\x00")] = info
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	return all, nil
}

// desiredFlags returns the flags that a table with the flags have should get. The kernel
// never removes the flag persist (nf_tables_api.c, nf_tables_updtable).
func (d *Dataplane) desiredFlags(have nftables.TableFlags) nftables.TableFlags {
	if d.ownTables && have&nftables.TableFlagPersist != 0 {
		return ownerFlags
	}
	return have & nftables.TableFlagPersist
}

// encodeTableFlags encodes flags for the kernel.
func encodeTableFlags(flags nftables.TableFlags) []byte {
	return binary.BigEndian.AppendUint32(nil, uint32(flags))
}

// createTable creates an empty table with the schema in its user data. The library cannot
// set user data.
func (d *Dataplane) createTable(t *table) error {
	var flags nftables.TableFlags
	if d.ownTables {
		flags = ownerFlags
	}
	err := d.commitMessage(t, unix.NFT_MSG_NEWTABLE, netlink.Create, []netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(t.nf.Name + "\x00")},
		{Type: unix.NFTA_TABLE_FLAGS, Data: encodeTableFlags(flags)},
		{Type: tableUserData, Data: userdata.AppendString(
			nil, userdata.NFTNL_UDATA_SET_ELEM_COMMENT, schemaLabel+strconv.Itoa(d.schema))},
	})
	if err != nil {
		return fmt.Errorf("create table %s: %w", t, err)
	}
	return nil
}

// deleteCatchAll deletes the catch-all element of a set. The library cannot, because the
// element has no key.
func (d *Dataplane) deleteCatchAll(t *table, set *nftables.Set) error {
	const catchAll = 2 // NFT_SET_ELEM_CATCHALL
	nested := func(typ uint16, attr netlink.Attribute) netlink.Attribute {
		b, _ := netlink.MarshalAttributes([]netlink.Attribute{attr}) // fails only for more than 64 KiB
		return netlink.Attribute{Type: typ | unix.NLA_F_NESTED, Data: b}
	}
	err := d.commitMessage(t, unix.NFT_MSG_DELSETELEM, 0, []netlink.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(t.nf.Name + "\x00")},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(set.Name + "\x00")},
		nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, nested(unix.NFTA_LIST_ELEM, netlink.Attribute{
			Type: unix.NFTA_SET_ELEM_FLAGS, Data: binary.BigEndian.AppendUint32(nil, catchAll),
		})),
	})
	if err != nil {
		return fmt.Errorf("delete the catch-all element of set %s: %w", set.Name, err)
	}
	return nil
}

// commitMessage commits a transaction of one message. It uses the library's socket, so that
// the watch ignores the change.
func (d *Dataplane) commitMessage(t *table, typ uint16, flags netlink.HeaderFlags, attrs []netlink.Attribute) error {
	if d.dryRun != nil {
		object, op := "table", dataplane.Add
		if typ == unix.NFT_MSG_DELSETELEM {
			object, op = "element", dataplane.Delete
		}
		d.dryRun.Record(op, object, t.String(), 1)
		return d.recordCommit(nil)
	}
	messages, err := singleMessageBatch(t, typ, flags, attrs)
	if err != nil {
		return err
	}
	if _, err = d.socket.SendMessages(messages); err == nil {
		_, err = d.socket.Receive() // the acknowledgement of the message in the middle
	}
	return d.recordCommit(err)
}

// singleMessageBatch returns a message between the begin and end messages of a batch.
func singleMessageBatch(t *table, typ uint16, flags netlink.HeaderFlags, attrs []netlink.Attribute) ([]netlink.Message, error) {
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return nil, fmt.Errorf("encode the request: %w", err)
	}
	edge := func(typ netlink.HeaderType) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: typ, Flags: netlink.Request},
			Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	return []netlink.Message{
		edge(unix.NFNL_MSG_BATCH_BEGIN),
		{
			Header: netlink.Header{
				Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ),
				Flags: netlink.Request | netlink.Acknowledge | flags,
			},
			Data: append([]byte{byte(t.nf.Family), unix.NFNETLINK_V0, 0, 0}, b...),
		},
		edge(unix.NFNL_MSG_BATCH_END),
	}, nil
}
