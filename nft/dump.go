package nft

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"runtime"
	"slices"
	"sync"

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
	// more are further connections for dumpSets.
	more []*dumpConn
	// seen contains the keys of the current dump.
	seen map[uint64]struct{}
}

// maxParallelDumps is the largest number of sets that are read at the same time. The kernel dumps
// sets without a lock (nf_tables_api.c, nf_tables_getsetelem is of type NFNL_CB_RCU), but takes
// time that grows with the square of a set's size.
const maxParallelDumps = 4

func dialDump(netns int) (*dumpConn, error) {
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, netns)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for reading sets: %w", err)
	}
	return &dumpConn{Conn: conn, seen: map[uint64]struct{}{}}, nil
}

// dialParallelDump is dialDump with connections to read several sets at the same time.
func dialParallelDump(netns int) (*dumpConn, error) {
	c, err := dialDump(netns)
	if err != nil {
		return nil, err
	}
	for range min(maxParallelDumps, runtime.GOMAXPROCS(0)) - 1 {
		more, err := dialDump(netns)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.more = append(c.more, more)
	}
	return c, nil
}

// Close closes the connections.
func (c *dumpConn) Close() error {
	err := c.Conn.Close()
	for _, more := range c.more {
		err = errors.Join(err, more.Close())
	}
	return err
}

// dumpSets reads sets in parallel. It calls visit with the index of the set and each of its
// elements, from several goroutines but one call at a time, as dumpElements does.
func (c *dumpConn) dumpSets(ctx context.Context, sets []*nftables.Set, visit func(set int, e element, extended bool)) error {
	var (
		goroutines sync.WaitGroup
		mu         sync.Mutex // for the following state, and excludes calls of visit
		next       int
		errs       []error
	)
	take := func() (set int, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if len(errs) > 0 || next == len(sets) {
			return 0, false
		}
		next++
		return next - 1, true
	}
	dump := func(conn *dumpConn) {
		for set, ok := take(); ok; set, ok = take() {
			err := conn.dumpParts(ctx, sets[set], func(part []dumpedElement) {
				mu.Lock()
				defer mu.Unlock()
				for i := range part {
					visit(set, part[i].element, part[i].extended)
				}
			})
			if err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("list the elements of set %s: %w", sets[set].Name, err))
				mu.Unlock()
			}
		}
	}
	for _, more := range c.more {
		goroutines.Go(func() { dump(more) })
	}
	dump(c)
	goroutines.Wait()
	for _, more := range c.more {
		c.inconsistent, more.inconsistent = c.inconsistent || more.inconsistent, false
	}
	return errors.Join(errs...)
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
// element has an attribute that our elements never have, such as a statement. The slices of the
// element are valid until visit returns.
func (c *dumpConn) dumpElements(ctx context.Context, s *nftables.Set, visit func(e element, extended bool)) error {
	return c.dumpParts(ctx, s, func(part []dumpedElement) {
		for i := range part {
			visit(part[i].element, part[i].extended)
		}
	})
}

// dumpedElement is an element with the argument extended of dumpElements.
type dumpedElement struct {
	element  element
	extended bool
}

// dumpParts calls visit with the elements of each buffer of a dump; see dumpElements.
//
// The kernel fills one buffer after another, and finds its position by counting elements
// from the start (nft_set_hash.c, nft_rhash_walk). If it moves the elements to a larger
// hash table between two buffers, some elements appear twice and as many are missing. It
// does so in the background and without a new generation. Therefore, a duplicate element
// means that the dump is inconsistent.
func (c *dumpConn) dumpParts(ctx context.Context, s *nftables.Set, visit func(part []dumpedElement)) error {
	seed, buffers := maphash.MakeSeed(), 0
	clear(c.seen)
	var part []dumpedElement
	return c.dump(ctx, byte(s.Table.Family), unix.NFT_MSG_GETSETELEM, []netlink.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(s.Table.Name + "\x00")},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(s.Name + "\x00")},
	}, func(attrs []byte) error {
		buffers++
		part = part[:0]
		err := parseElements(attrs, func(e element, extended bool) {
			if !s.Interval {
				key := maphash.Bytes(seed, e.Key)
				if _, twice := c.seen[key]; twice && buffers > 1 {
					c.inconsistent = true
				}
				c.seen[key] = struct{}{}
			}
			part = append(part, dumpedElement{e, extended})
		})
		visit(part)
		return err
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

// parseElement decodes one element, whose slices share memory with b. It leaves the value of a
// verdict map's element as netlink attributes.
func parseElement(b []byte) element {
	var e element
	if data, ok := nlconn.Attribute(b, unix.NFTA_SET_ELEM_KEY); ok {
		v, _ := nlconn.Attribute(data, unix.NFTA_DATA_VALUE)
		e.Key = v
	}
	if data, ok := nlconn.Attribute(b, unix.NFTA_SET_ELEM_DATA); ok {
		if v, ok := nlconn.Attribute(data, unix.NFTA_DATA_VALUE); ok {
			e.Val = v
		} else if v, ok := nlconn.Attribute(data, unix.NFTA_DATA_VERDICT); ok {
			e.Val = v
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

// cloneElement returns a copy with its own memory.
func cloneElement(e element) element {
	e.Key, e.Val = slices.Clone(e.Key), slices.Clone(e.Val)
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
