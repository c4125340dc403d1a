package nlconn

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func mustEncode(tb testing.TB, fn func(*netlink.AttributeEncoder)) []byte {
	tb.Helper()
	b, err := Encode(nil, fn)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// TestAttributes checks that Attributes decodes encoded attributes without flags and padding.
func TestAttributes(t *testing.T) {
	t.Parallel()
	b := mustEncode(t, func(e *netlink.AttributeEncoder) {
		e.String(1, "rr")
		e.Nested(2, func(e *netlink.AttributeEncoder) error { e.Uint16(3, 0x1234); return nil })
		e.Bytes(4|unix.NLA_F_NET_BYTEORDER, []byte{0, 80})
		e.Bytes(5, nil)
	})
	if diff := cmp.Diff(map[uint16][]byte{
		1: []byte("rr\x00"), 2: mustEncode(t, func(e *netlink.AttributeEncoder) { e.Uint16(3, 0x1234) }), 4: {0, 80}, 5: {},
	}, maps.Collect(Attributes(b))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if value, ok := Attribute(b, 4); !ok || Uint16(value, binary.BigEndian) != 80 {
		t.Errorf("attribute 4 is % x (%t), want a port", value, ok)
	}
	if value, ok := Attribute(b, 6); ok {
		t.Errorf("attribute 6 is % x, want none", value)
	}
	for range Attributes(b) {
		break // iteration may end early
	}
}

// TestAppend checks that the Append functions encode like netlink.AttributeEncoder.
func TestAppend(t *testing.T) {
	t.Parallel()
	want := mustEncode(t, func(e *netlink.AttributeEncoder) {
		e.String(1, "wlc")
		e.Nested(2, func(e *netlink.AttributeEncoder) error { e.Uint16(3, 0x1234); e.Bytes(4, []byte{1}); return nil })
		e.Uint32(5, 0x12345678)
		e.Nested(6, func(*netlink.AttributeEncoder) error { return nil })
	})
	got := AppendString(nil, 1, "wlc")
	got = AppendNested(got, 2, func(b []byte) []byte { return AppendBytes(AppendUint16(b, 3, 0x1234), 4, []byte{1}) })
	got = AppendUint32(got, 5, 0x12345678)
	got = AppendNested(got, 6, func(b []byte) []byte { return b })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestTruncatedAttributes(t *testing.T) {
	t.Parallel()
	whole := mustEncode(t, func(e *netlink.AttributeEncoder) { e.Uint32(1, 7); e.Uint32(2, 8) })
	for _, b := range [][]byte{nil, whole[:3], whole[:7], {3, 0, 1, 0}, {0, 0, 0, 0}} {
		if _, _, _, err := NextAttribute(b); !errors.Is(err, ErrTruncated) {
			t.Errorf("% x: error %v, want %v", b, err, ErrTruncated)
		}
	}
	if got := maps.Collect(Attributes(whole[:12])); len(got) != 1 || Uint32(got[1]) != 7 {
		t.Errorf("attributes %v, want the first one", got)
	}
}

func TestIntegerSize(t *testing.T) {
	t.Parallel()
	for _, b := range [][]byte{nil, {1}, {1, 2, 3}, {1, 2, 3, 4, 5}} {
		if Uint16(b, binary.NativeEndian) != 0 || Uint32(b) != 0 {
			t.Errorf("% x is decoded as a number", b)
		}
	}
}

// FuzzAttributes checks that the decoder does not panic or return data from outside its input.
func FuzzAttributes(f *testing.F) {
	f.Add(mustEncode(f, func(e *netlink.AttributeEncoder) { e.String(1, "rr"); e.Bytes(2, []byte{1}) }))
	f.Add([]byte{5, 0, 1, 0, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		for rest := b; ; {
			_, value, next, err := NextAttribute(rest)
			if err != nil {
				break
			}
			if len(next) >= len(rest) || !bytes.Contains(b, value) {
				t.Fatalf("rest % x after % x", next, rest)
			}
			total += unix.NLA_HDRLEN + len(value)
			rest = next
		}
		if total > len(b) {
			t.Errorf("decoded %d bytes of %d", total, len(b))
		}
		for _, value := range Attributes(b) {
			_, _ = Attribute(value, 1)
			_, _ = Uint16(value, binary.BigEndian), Uint32(value)
		}
	})
}

// conntrackEntry returns the attributes of a connection-tracking entry.
func conntrackEntry(tb testing.TB) []byte {
	tb.Helper()
	tuple := func(e *netlink.AttributeEncoder) error {
		e.Nested(1, func(e *netlink.AttributeEncoder) error {
			e.Bytes(1, []byte{10, 0, 0, 1})
			e.Bytes(2, []byte{10, 0, 0, 2})
			return nil
		})
		e.Nested(2, func(e *netlink.AttributeEncoder) error {
			e.Uint8(1, unix.IPPROTO_UDP)
			e.Bytes(2, []byte{0, 53})
			e.Bytes(3, []byte{0, 53})
			return nil
		})
		return nil
	}
	return mustEncode(tb, func(e *netlink.AttributeEncoder) {
		e.Nested(1, tuple)
		e.Nested(2, tuple)
		for typ := range uint16(6) {
			e.Uint32(3+typ, 7)
		}
	})
}

// BenchmarkDecode compares Attributes with netlink.AttributeDecoder.
func BenchmarkDecode(b *testing.B) {
	entry := conntrackEntry(b)
	b.Run("by=Attributes", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			n := 0
			for typ, value := range Attributes(entry) {
				if typ > 2 {
					n++
					continue
				}
				for _, value := range Attributes(value) {
					for range Attributes(value) {
						n++
					}
				}
			}
			if n != 16 {
				b.Fatal(n)
			}
		}
	})
	b.Run("by=AttributeDecoder", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			n := 0
			d, err := netlink.NewAttributeDecoder(entry)
			if err != nil {
				b.Fatal(err)
			}
			for d.Next() {
				if d.Type() > 2 {
					n++
					continue
				}
				d.Nested(func(d *netlink.AttributeDecoder) error {
					for d.Next() {
						d.Nested(func(d *netlink.AttributeDecoder) error {
							for d.Next() {
								n++
							}
							return nil
						})
					}
					return nil
				})
			}
			if err := d.Err(); err != nil || n != 16 {
				b.Fatal(n, err)
			}
		}
	})
}
