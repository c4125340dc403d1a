package nft

import (
	"testing"

	"fairlead/dataplane"
)

// The kernel makes a bitmap of a set with short keys that has none of these flags,
// and for each change of an element walks all of them (nft_set_bitmap.c).
func TestNoSetIsABitmap(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		for _, s := range newTable(family).sets() {
			if s.KeyType.Bytes <= 2 && !s.IsMap && !s.Interval && !s.HasTimeout && !s.Dynamic {
				t.Errorf("%s set %s is a bitmap", family, s.Name)
			}
		}
	}
}
