package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"fairlead.io/fairlead/internal/nlconn"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// bulkWriter is a ruleset that can change many elements in one transaction without memory for
// each of them.
type bulkWriter interface {
	// addBulk and deleteBulk add changes to a transaction that contains nothing else. The next
	// Flush commits it.
	addBulk(set *nftables.Set, elements []element) error
	deleteBulk(set *nftables.Set, elements []element) error
}

// bulkConn is a connection with a bulkWriter. The library copies an element about ten times
// between its attributes and the socket, which was two thirds of the memory that a cold start
// allocated.
type bulkConn struct {
	*nftables.Conn

	socket *netlink.Conn // of Conn
	// transaction contains the messages of a transaction. It is empty between transactions.
	transaction []byte
	sequence    uint32
}

var (
	_ ruleset    = (*bulkConn)(nil)
	_ bulkWriter = (*bulkConn)(nil)
)

const (
	// maxBulkMessage is the size in bytes at which a message ends. An attribute, such as the list
	// of elements, has at most 64 KiB.
	maxBulkMessage = 60 << 10
	// maxSpareTransaction is the largest buffer in bytes that is kept for the next transaction.
	maxSpareTransaction = 1 << 20
)

// Flush implements [ruleset].
func (c *bulkConn) Flush() error {
	if len(c.transaction) == 0 {
		return c.Conn.Flush()
	}
	c.appendBatchEdge(unix.NFNL_MSG_BATCH_END)
	err := c.send()
	if c.transaction = c.transaction[:0]; cap(c.transaction) > maxSpareTransaction {
		c.transaction = nil
	}
	return err
}

func (c *bulkConn) addBulk(set *nftables.Set, elements []element) error {
	return c.appendElements(unix.NFT_MSG_NEWSETELEM, set, elements)
}

func (c *bulkConn) deleteBulk(set *nftables.Set, elements []element) error {
	return c.appendElements(unix.NFT_MSG_DELSETELEM, set, elements)
}

// appendElements adds messages that add or delete elements.
func (c *bulkConn) appendElements(typ uint16, set *nftables.Set, elements []element) error {
	if len(elements) > 0 && len(c.transaction) == 0 {
		c.appendBatchEdge(unix.NFNL_MSG_BATCH_BEGIN)
	}
	for len(elements) > 0 {
		header := c.beginMessage(unix.NFNL_SUBSYS_NFTABLES<<8|typ, unix.NLM_F_REQUEST|unix.NLM_F_CREATE, byte(set.Table.Family), 0)
		b := nlconn.AppendString(c.transaction, unix.NFTA_SET_ELEM_LIST_TABLE, set.Table.Name)
		b = nlconn.AppendString(b, unix.NFTA_SET_ELEM_LIST_SET, set.Name)
		var err error
		b = nlconn.AppendNested(b, unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(b []byte) []byte {
			for len(elements) > 0 && len(b)-header < maxBulkMessage {
				if b, err = appendElement(b, &elements[0]); err != nil {
					break
				}
				elements = elements[1:]
			}
			return b
		})
		if c.transaction = b; err != nil {
			c.transaction = c.transaction[:0]
			return fmt.Errorf("set %s: %w", set.Name, err)
		}
		c.endMessage(header)
	}
	return nil
}

var errNotBulk = errors.New("only elements of a key, a value and a comment can be changed in bulk")

// appendElement appends an element as the library encodes it.
func appendElement(b []byte, e *element) ([]byte, error) {
	if e.KeyEnd != nil || e.IntervalEnd || e.IntervalOpen || e.VerdictData != nil || e.Timeout != 0 || e.Counter != nil {
		return b, errNotBulk
	}
	return nlconn.AppendNested(b, unix.NFTA_LIST_ELEM, func(b []byte) []byte {
		value := func(data []byte) func([]byte) []byte {
			return func(b []byte) []byte { return nlconn.AppendBytes(b, unix.NFTA_DATA_VALUE, data) }
		}
		b = nlconn.AppendNested(b, unix.NFTA_SET_ELEM_KEY, value(e.Key))
		if len(e.Val) > 0 {
			b = nlconn.AppendNested(b, unix.NFTA_SET_ELEM_DATA, value(e.Val))
		}
		if e.Comment != "" {
			b = nlconn.AppendBytes(b, unix.NFTA_SET_ELEM_USERDATA,
				userdata.AppendString(nil, userdata.NFTNL_UDATA_SET_ELEM_COMMENT, e.Comment))
		}
		return b
	}), nil
}

// beginMessage appends the headers of a message (struct nlmsghdr and struct nfgenmsg) and returns
// their position.
func (c *bulkConn) beginMessage(typ, flags uint16, family byte, resource uint16) int {
	header := len(c.transaction)
	c.sequence++
	b := binary.NativeEndian.AppendUint32(c.transaction, 0) // endMessage sets the length
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, c.sequence)
	b = binary.NativeEndian.AppendUint32(b, 0) // port ID, which the kernel takes from the socket
	c.transaction = binary.BigEndian.AppendUint16(append(b, family, unix.NFNETLINK_V0), resource)
	return header
}

// endMessage sets the length of the message at a position. All attributes are padded.
func (c *bulkConn) endMessage(header int) {
	binary.NativeEndian.PutUint32(c.transaction[header:], uint32(len(c.transaction)-header)) //nolint:gosec // about maxBulkMessage
}

// appendBatchEdge appends the message that begins or ends a transaction.
func (c *bulkConn) appendBatchEdge(typ uint16) {
	c.endMessage(c.beginMessage(typ, unix.NLM_F_REQUEST, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES))
}

// send sends the transaction and returns the kernel's first error. The kernel handles a
// transaction during the system call, so its answers are in the socket afterwards. It answers
// errors only.
func (c *bulkConn) send() error {
	raw, err := c.socket.SyscallConn()
	if err != nil {
		return fmt.Errorf("access netlink socket: %w", err)
	}
	kernel := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		for {
			sendErr = unix.Sendto(int(fd), c.transaction, 0, kernel)
			if !errors.Is(sendErr, unix.EINTR) {
				return !errors.Is(sendErr, unix.EAGAIN)
			}
		}
	})
	if err := errors.Join(err, sendErr); err != nil {
		return fmt.Errorf("send transaction: %w", err)
	}
	var answer error
	err = raw.Read(func(fd uintptr) bool {
		answer = drainAnswers(int(fd))
		return true
	})
	if err := errors.Join(answer, err); err != nil {
		return fmt.Errorf("change elements: %w", err)
	}
	return nil
}

// drainAnswers reads all answers in a socket and returns the first error.
func drainAnswers(fd int) error {
	var first error
	var buffer [1]byte
	var answer []byte
	for {
		size, _, err := unix.Recvfrom(fd, buffer[:], unix.MSG_DONTWAIT|unix.MSG_PEEK|unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return first
		case err != nil: // such as ENOBUFS, which discards answers
			if first != nil {
				return first
			}
			first = err
			continue
		}
		if cap(answer) < size {
			answer = make([]byte, size)
		}
		n, _, err := unix.Recvfrom(fd, answer[:size], unix.MSG_DONTWAIT)
		if err != nil {
			return errors.Join(first, err)
		}
		if err := nlconn.AnswerError(answer[:n]); first == nil {
			first = err
		}
	}
}
