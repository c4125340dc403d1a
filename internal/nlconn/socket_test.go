package nlconn

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// testSequence is the sequence number of all test messages.
const testSequence = 7

// header encodes a struct nlmsghdr in host byte order.
func header(typ, flags uint16, dataLen int) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+dataLen)) //nolint:gosec // small
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, testSequence)
	return binary.NativeEndian.AppendUint32(b, 0)
}

func encode(typ, flags uint16, data ...[]byte) []byte {
	joined := slices.Concat(data...)
	return append(header(typ, flags, len(joined)), joined...)
}

func errno(e unix.Errno) []byte {
	return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) //nolint:gosec // the kernel's int
}

func TestMessageAnswer(t *testing.T) {
	text := AppendString(nil, unix.NLMSGERR_ATTR_MSG, "no route")
	request := header(unix.RTM_NEWROUTE, 0, 0)
	longRequest := append(header(unix.RTM_NEWROUTE, 0, 3), 1, 2, 3, 0)
	for name, tt := range map[string]struct {
		datagram []byte
		want     *Error
		err      error
	}{
		"acknowledgement":               {datagram: encode(unix.NLMSG_ERROR, 0, errno(0), request)},
		"another type":                  {datagram: encode(unix.RTM_NEWROUTE, 0, []byte{1, 2, 3, 4})},
		"end of a dump":                 {datagram: encode(unix.NLMSG_DONE, 0, errno(0))},
		"end of a dump without data":    {datagram: encode(unix.NLMSG_DONE, 0)},
		"failed dump":                   {datagram: encode(unix.NLMSG_DONE, 0, errno(unix.EINTR)), want: &Error{Errno: unix.EINTR}},
		"error":                         {datagram: encode(unix.NLMSG_ERROR, 0, errno(unix.ENOENT), request), want: &Error{Errno: unix.ENOENT}},
		"error with a text":             {datagram: encode(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, errno(unix.ENOENT), longRequest, text), want: &Error{Errno: unix.ENOENT, Text: "no route"}},
		"error with a text, capped":     {datagram: encode(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS|unix.NLM_F_CAPPED, errno(unix.ENOENT), header(1, 0, 900), text), want: &Error{Errno: unix.ENOENT, Text: "no route"}},
		"failed dump with a text":       {datagram: encode(unix.NLMSG_DONE, unix.NLM_F_ACK_TLVS, errno(unix.EINVAL), text), want: &Error{Errno: unix.EINVAL, Text: "no route"}},
		"request longer than its error": {datagram: encode(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, errno(unix.ENOENT), header(1, 0, 900), text), want: &Error{Errno: unix.ENOENT}},
		"truncated error":               {datagram: encode(unix.NLMSG_ERROR, 0, errno(unix.ENOENT)), err: ErrTruncated},
	} {
		t.Run(name, func(t *testing.T) {
			m, rest, err := nextMessage(append(tt.datagram, encode(unix.NLMSG_NOOP, 0)...))
			if err != nil || m.sequence != testSequence || len(rest) != unix.NLMSG_HDRLEN {
				t.Fatalf("got sequence %d, %d bytes left, error %v", m.sequence, len(rest), err)
			}
			answer, err := m.answer()
			if !errors.Is(err, tt.err) {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			var got *Error
			if errors.As(answer, &got) != (tt.want != nil) || got != nil && *got != *tt.want {
				t.Errorf("got answer %v, want %v", answer, tt.want)
			}
		})
	}
}

// FuzzMessages checks that nextMessage consumes every datagram or returns an error.
func FuzzMessages(f *testing.F) {
	f.Add(encode(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, errno(unix.ENOENT), header(1, 0, 0), []byte{8, 0, 1, 0, 'a', 'b', 'c', 0}))
	f.Add(encode(unix.NLMSG_DONE, unix.NLM_F_MULTI))
	f.Add([]byte{16, 0, 0, 0})
	f.Fuzz(func(t *testing.T, datagram []byte) {
		for len(datagram) > 0 {
			m, rest, err := nextMessage(datagram)
			if err != nil {
				return
			}
			if len(rest) >= len(datagram) {
				t.Fatal("no progress")
			}
			_, _ = m.answer()
			datagram = rest
		}
	})
}
