package nft

import (
	"encoding/binary"
	"math/bits"

	"github.com/google/nftables/expr"
)

// evalHash evaluates `jhash … mod n seed s offset o` (net/netfilter/nft_hash.c, nft_jhash_eval).
func (b *branch) evalHash(e *expr.Hash) (verdict, string, error) {
	if e.Type != expr.HashTypeJenkins {
		b.step(DecideUnsupported, "the rule computes a hash of type %d, which is unknown", e.Type)
		return verdictBreak, "", nil
	}
	h := jenkinsHash(b.register(e.SourceRegister)[:e.Length], e.Seed)
	n := uint32(uint64(h) * uint64(e.Modulus) >> 32) // reciprocal_scale
	b.load(e.DestRegister, binary.NativeEndian.AppendUint32(nil, e.Offset+n))
	b.step(DecideEndpoint, "the hash of the client's address %s selects slot %d of %d", b.packet.Source.Addr(), n, e.Modulus)
	return verdictContinue, "", nil
}

// jenkinsHash is the kernel's function jhash (linux/jhash.h, Bob Jenkins's lookup3). The kernel
// reads whole blocks in the byte order of the machine, and the rest as little-endian.
func jenkinsHash(data []byte, seed uint32) uint32 {
	a := 0xdeadbeef + uint32(len(data)) + seed //nolint:gosec // at most the length of all registers
	b, c := a, a
	for len(data) > 12 {
		a += binary.NativeEndian.Uint32(data)
		b += binary.NativeEndian.Uint32(data[4:])
		c += binary.NativeEndian.Uint32(data[8:])
		a = (a - c) ^ bits.RotateLeft32(c, 4)
		c += b
		b = (b - a) ^ bits.RotateLeft32(a, 6)
		a += c
		c = (c - b) ^ bits.RotateLeft32(b, 8)
		b += a
		a = (a - c) ^ bits.RotateLeft32(c, 16)
		c += b
		b = (b - a) ^ bits.RotateLeft32(a, 19)
		a += c
		c = (c - b) ^ bits.RotateLeft32(b, 4)
		b += a
		data = data[12:]
	}
	if len(data) == 0 {
		return c
	}
	var rest [12]byte
	copy(rest[:], data)
	a += binary.LittleEndian.Uint32(rest[:])
	b += binary.LittleEndian.Uint32(rest[4:])
	c += binary.LittleEndian.Uint32(rest[8:])
	c = (c ^ b) - bits.RotateLeft32(b, 14)
	a = (a ^ c) - bits.RotateLeft32(c, 11)
	b = (b ^ a) - bits.RotateLeft32(a, 25)
	c = (c ^ b) - bits.RotateLeft32(b, 16)
	a = (a ^ c) - bits.RotateLeft32(c, 4)
	b = (b ^ a) - bits.RotateLeft32(a, 14)
	c = (c ^ b) - bits.RotateLeft32(b, 24)
	return c
}
