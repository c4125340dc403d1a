package nlconn

import (
	"encoding/binary"
	"errors"
	"iter"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrTruncated means that an attribute is longer than the data that contains it.
var ErrTruncated = errors.New("a netlink attribute is longer than its message")

const attributeFlags = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER

// NextAttribute splits off the first attribute (netlink(7), struct nlattr): two bytes of
// length, which includes the header, two bytes of type, and the value, padded to four bytes.
// The value and the rest share memory with b. The returned type has no flags.
func NextAttribute(b []byte) (typ uint16, value, rest []byte, err error) {
	if len(b) < unix.NLA_HDRLEN {
		return 0, nil, nil, ErrTruncated
	}
	length := int(binary.NativeEndian.Uint16(b))
	if length < unix.NLA_HDRLEN || length > len(b) {
		return 0, nil, nil, ErrTruncated
	}
	typ = binary.NativeEndian.Uint16(b[2:]) &^ attributeFlags
	padded := min((length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b))
	return typ, b[unix.NLA_HDRLEN:length], b[padded:], nil
}

// Attributes yields the types and values of the attributes in b, up to the first truncated
// one. The values share memory with b.
func Attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for {
			typ, value, rest, err := NextAttribute(b)
			if err != nil || !yield(typ, value) {
				return
			}
			b = rest
		}
	}
}

// Attribute returns the value of the first attribute with the given type.
func Attribute(b []byte, typ uint16) ([]byte, bool) {
	for t, value := range Attributes(b) {
		if t == typ {
			return value, true
		}
	}
	return nil, false
}

// Uint16 decodes a value in the given byte order. It returns 0 for a value of another size.
func Uint16(value []byte, order binary.ByteOrder) uint16 {
	if len(value) != 2 {
		return 0
	}
	return order.Uint16(value)
}

// Uint32 decodes a value in host byte order. It returns 0 for a value of another size.
func Uint32(value []byte) uint32 {
	if len(value) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(value)
}

// Encode returns a header followed by the encoded attributes. The error means that a value is
// too long for an attribute.
func Encode(header []byte, encode func(*netlink.AttributeEncoder)) ([]byte, error) {
	e := netlink.NewAttributeEncoder()
	encode(e)
	b, err := e.Encode()
	if err != nil {
		return nil, err
	}
	return append(header, b...), nil
}

// AppendBytes appends an attribute with a value of at most 65,531 bytes, and padding. Unlike
// [Encode], the Append functions need no allocation per value; use them for large batches of
// requests.
func AppendBytes(b []byte, typ uint16, value []byte) []byte {
	b = appendHeader(b, typ, len(value))
	return pad(append(b, value...))
}

// AppendUint16 appends an attribute with a value in host byte order.
func AppendUint16(b []byte, typ, value uint16) []byte {
	return pad(binary.NativeEndian.AppendUint16(appendHeader(b, typ, 2), value))
}

// AppendUint32 appends an attribute with a value in host byte order.
func AppendUint32(b []byte, typ uint16, value uint32) []byte {
	return binary.NativeEndian.AppendUint32(appendHeader(b, typ, 4), value)
}

// AppendString appends an attribute with a null-terminated string.
func AppendString(b []byte, typ uint16, text string) []byte {
	b = appendHeader(b, typ, len(text)+1)
	return pad(append(append(b, text...), 0))
}

// AppendNested appends an attribute that contains the attributes appended by appendValue.
func AppendNested(b []byte, typ uint16, appendValue func([]byte) []byte) []byte {
	start := len(b)
	b = appendValue(appendHeader(b, unix.NLA_F_NESTED|typ, 0))
	binary.NativeEndian.PutUint16(b[start:], uint16(len(b)-start)) //nolint:gosec // documented limit of 65,535
	return b
}

func appendHeader(b []byte, typ uint16, length int) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.NLA_HDRLEN+length)) //nolint:gosec // documented limit of 65,535
	return binary.NativeEndian.AppendUint16(b, typ)
}

// pad pads the last attribute in b. All attributes before it must be padded.
func pad(b []byte) []byte {
	for len(b)%unix.NLA_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}
