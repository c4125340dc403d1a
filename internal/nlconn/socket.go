package nlconn

import (
	"encoding/binary"
	"errors"
	"iter"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// socketIO sends and receives on the socket of a netlink.Conn through reused buffers.
//
// The methods of netlink.Conn allocate for each message. In a virtual machine, SendMessages
// and Receive made an update of an IPVS endpoint 26 % slower (BenchmarkUpdate of package
// bench). ReceiveIter made a dump of 1,000 virtual servers 20 % slower (BenchmarkRead of
// package ipvs).
type socketIO struct {
	raw            syscall.RawConn
	requests       []byte // sent in one system call
	answer         []byte // the last datagram
	received       int
	err            error
	send, readInto func(fd uintptr) (done bool) // closures, allocated once
}

// attach sets the socket.
func (s *socketIO) attach(raw syscall.RawConn) {
	s.raw = raw
	if s.answer != nil {
		return
	}
	s.answer = make([]byte, MessageSize)
	kernel := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	s.send = func(fd uintptr) bool {
		for {
			s.err = unix.Sendto(int(fd), s.requests, 0, kernel)
			if !errors.Is(s.err, unix.EINTR) {
				return !errors.Is(s.err, unix.EAGAIN)
			}
		}
	}
	s.readInto = func(fd uintptr) bool {
		for {
			s.received, s.err = unix.Read(int(fd), s.answer)
			if !errors.Is(s.err, unix.EINTR) {
				return !errors.Is(s.err, unix.EAGAIN)
			}
		}
	}
}

func (s *socketIO) reset() { s.requests = s.requests[:0] }

// append adds a message with its header (netlink(7), struct nlmsghdr), padded to four bytes.
func (s *socketIO) append(m netlink.Message) {
	r := s.requests
	r = binary.NativeEndian.AppendUint32(r, uint32(unix.NLMSG_HDRLEN+len(m.Data))) //nolint:gosec // a request is small
	r = binary.NativeEndian.AppendUint16(r, uint16(m.Header.Type))
	r = binary.NativeEndian.AppendUint16(r, uint16(m.Header.Flags))
	r = binary.NativeEndian.AppendUint32(r, m.Header.Sequence)
	r = binary.NativeEndian.AppendUint32(r, 0) // port ID, which the kernel takes from the socket
	r = append(r, m.Data...)
	for len(r)%unix.NLMSG_ALIGNTO != 0 {
		r = append(r, 0)
	}
	s.requests = r
}

// flush sends the messages in one system call.
func (s *socketIO) flush() error { return errors.Join(s.raw.Write(s.send), s.err) }

// receive returns the next datagram, which is valid until the next call.
func (s *socketIO) receive() ([]byte, error) {
	if err := errors.Join(s.raw.Read(s.readInto), s.err); err != nil {
		return nil, err
	}
	if s.received == 0 {
		return nil, errors.New("empty message")
	}
	return s.answer[:s.received], nil
}

// message is a received netlink message. Its data shares memory with the datagram.
type message struct {
	typ, flags uint16
	sequence   uint32
	data       []byte
}

// Messages yields the data of the messages in a datagram that [Conn] has not received, such as a
// notification, up to the first truncated one. The data share memory with the datagram.
func Messages(datagram []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for len(datagram) > 0 {
			m, rest, err := nextMessage(datagram)
			if err != nil || !yield(m.data) {
				return
			}
			datagram = rest
		}
	}
}

// AnswerError returns the first error in a datagram that [Conn] has not received, or nil. An error
// of the kernel is an [*Error].
func AnswerError(datagram []byte) error {
	for len(datagram) > 0 {
		m, rest, err := nextMessage(datagram)
		if err != nil {
			return err
		}
		if answer, err := m.answer(); answer != nil || err != nil {
			return errors.Join(answer, err)
		}
		datagram = rest
	}
	return nil
}

// nextMessage splits off the first message of a datagram.
func nextMessage(datagram []byte) (m message, rest []byte, err error) {
	if len(datagram) < unix.NLMSG_HDRLEN {
		return message{}, nil, ErrTruncated
	}
	length := int(binary.NativeEndian.Uint32(datagram))
	if length < unix.NLMSG_HDRLEN || length > len(datagram) {
		return message{}, nil, ErrTruncated
	}
	m = message{
		typ:      binary.NativeEndian.Uint16(datagram[4:]),
		flags:    binary.NativeEndian.Uint16(datagram[6:]),
		sequence: binary.NativeEndian.Uint32(datagram[8:]),
		data:     datagram[unix.NLMSG_HDRLEN:length],
	}
	return m, datagram[min(align(length), len(datagram)):], nil
}

// align rounds a length up to a multiple of four bytes.
func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// answer returns the kernel's error in a message of type NLMSG_ERROR or NLMSG_DONE, or nil for
// an acknowledgement. The second error is about the message's format.
//
// NLMSG_ERROR contains a struct nlmsgerr: an errno and the header of the request, followed by
// the request's data unless the kernel omits them (NLM_F_CAPPED). NLMSG_DONE contains an errno
// or nothing. Attributes follow if the flag NLM_F_ACK_TLVS is set
// (Documentation/userspace-api/netlink/intro.rst).
func (m message) answer() (answer, err error) {
	const errnoLen = 4
	switch {
	case m.typ != unix.NLMSG_ERROR && m.typ != unix.NLMSG_DONE:
		return nil, nil
	case m.typ == unix.NLMSG_DONE && len(m.data) < errnoLen:
		return nil, nil
	case m.typ == unix.NLMSG_ERROR && len(m.data) < errnoLen+unix.NLMSG_HDRLEN:
		return nil, ErrTruncated
	}
	errno := -int32(binary.NativeEndian.Uint32(m.data)) //nolint:gosec // the kernel's int
	if errno <= 0 {
		return nil, nil
	}
	failure := &Error{Errno: unix.Errno(errno)} //nolint:gosec // positive
	if m.flags&unix.NLM_F_ACK_TLVS == 0 {
		return failure, nil
	}
	attributes := m.data[errnoLen:]
	if m.typ == unix.NLMSG_ERROR {
		echoed := unix.NLMSG_HDRLEN
		if m.flags&unix.NLM_F_CAPPED == 0 {
			echoed = int(binary.NativeEndian.Uint32(attributes))
		}
		attributes = attributes[min(align(echoed), len(attributes)):]
	}
	if text, ok := Attribute(attributes, unix.NLMSGERR_ATTR_MSG); ok {
		failure.Text = unix.ByteSliceToString(text)
	}
	return failure, nil
}
