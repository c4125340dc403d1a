package nft

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"slices"

	"fairlead.io/fairlead/internal/nlconn"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// dumpConn reads sets and their elements. The library is 5 times slower with 100,000
// elements: it requests buffers of one page, and the kernel walks the set from its start
// for each buffer.
type dumpConn struct {
	*nlconn.Conn

	// inconsistent is set if a dump did not show a single state of the kernel. The caller
	// resets it.
	inconsistent bool
}

func dialDump(netns int) (*dumpConn, error) {
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, netns)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for reading sets: %w", err)
	}
	return &dumpConn{Conn: conn}, nil
}

// dump requests a dump and calls visit with the attributes of each message.
func (c *dumpConn) dump(ctx context.Context, family byte, typ uint16, attrs []netlink.Attribute, visit func(attrs []byte) error) error {
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return fmt.Errorf("encode the request: %w", err)
	}
	interrupted, err := c.Dump(ctx, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ)},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, b...),
	}, func(data []byte) error {
		if len(data) < 4 {
			return nil
		}
		return visit(data[4:])
	})
	c.inconsistent = c.inconsistent || interrupted
	return err
}

// dumpElements calls visit with each element of a set. The argument extended is true if the
// element has an attribute that our elements never have, such as a statement. visit may
// keep the slices of the element.
//
// The kernel fills one buffer after another, and finds its position by counting elements
// from the start (nft_set_hash.c, nft_rhash_walk). If it moves the elements to a larger
// hash table between two buffers, some elements appear twice and as many are missing. It
// does so in the background and without a new generation. Therefore, a duplicate element
// means that the dump is inconsistent.
func (c *dumpConn) dumpElements(ctx context.Context, s *nftables.Set, visit func(e element, extended bool)) error {
	seed, seen, buffers := maphash.MakeSeed(), map[uint64]struct{}{}, 0
	return c.dump(ctx, byte(s.Table.Family), unix.NFT_MSG_GETSETELEM, []netlink.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(s.Table.Name + "\x00")},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(s.Name + "\x00")},
	}, func(attrs []byte) error {
		buffers++
		return parseElements(attrs, func(e element, extended bool) {
			if !s.Interval {
				key := maphash.Bytes(seed, e.Key)
				if _, twice := seen[key]; twice && buffers > 1 {
					c.inconsistent = true
				}
				seen[key] = struct{}{}
			}
			visit(e, extended)
		})
	})
}

func parseElements(b []byte, visit func(e element, extended bool)) error {
	list, ok := nlconn.Attribute(b, unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	if !ok {
		return nil
	}
	for len(list) > 0 {
		_, item, rest, err := nlconn.NextAttribute(list)
		if err != nil {
			return err
		}
		visit(parseElement(item), hasExtraAttributes(item))
		list = rest
	}
	return nil
}

// parseElement decodes one element. It leaves the value of a verdict map's element as
// netlink attributes.
func parseElement(b []byte) element {
	var e element
	if data, ok := nlconn.Attribute(b, unix.NFTA_SET_ELEM_KEY); ok {
		v, _ := nlconn.Attribute(data, unix.NFTA_DATA_VALUE)
		e.Key = slices.Clone(v)
	}
	if data, ok := nlconn.Attribute(b, unix.NFTA_SET_ELEM_DATA); ok {
		if v, ok := nlconn.Attribute(data, unix.NFTA_DATA_VALUE); ok {
			e.Val = slices.Clone(v)
		} else if v, ok := nlconn.Attribute(data, unix.NFTA_DATA_VERDICT); ok {
			e.Val = slices.Clone(v)
		}
	}
	if v, ok := nlconn.Attribute(b, unix.NFTA_SET_ELEM_FLAGS); ok && len(v) == 4 {
		e.IntervalEnd = binary.BigEndian.Uint32(v)&unix.NFT_SET_ELEM_INTERVAL_END != 0
	}
	if v, ok := nlconn.Attribute(b, unix.NFTA_SET_ELEM_USERDATA); ok {
		e.Comment = parseComment(v)
	}
	return e
}

// hasExtraAttributes reports whether an element has an attribute that our elements never
// have: a statement, a timeout or a reference to an object.
func hasExtraAttributes(b []byte) bool {
	for len(b) > 0 {
		typ, _, rest, err := nlconn.NextAttribute(b)
		if err != nil {
			return true
		}
		switch typ {
		case unix.NFTA_SET_ELEM_KEY, unix.NFTA_SET_ELEM_DATA, unix.NFTA_SET_ELEM_FLAGS, unix.NFTA_SET_ELEM_USERDATA, unix.NFTA_SET_ELEM_PAD:
		default:
			return true
		}
		b = rest
	}
	return false
}

// parseComment returns the comment from the user data of an element. User data is a list of
// type, length and value, but other programs can write arbitrary bytes. The library's
// parser trusts the lengths.
func parseComment(b []byte) string {
	for len(b) >= 2 && len(b) >= 2+int(b[1]) {
		if userdata.Type(b[0]) == userdata.NFTNL_UDATA_SET_ELEM_COMMENT {
			return string(bytes.TrimSuffix(b[2:2+int(b[1])], []byte{0}))
		}
		b = b[2+int(b[1]):]
	}
	return ""
}
