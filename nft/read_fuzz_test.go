package nft

import (
	"cmp"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// FuzzDump puts arbitrary elements into the sets and reads them. The reader must classify
// each element as ours or as unexpected without panic. Elements classified as ours must be
// comparable with any Service.
func FuzzDump(f *testing.F) {
	seed := newTable(dataplane.IPv4)
	front := frontend(1)
	record := func(set string, key, val []byte) []byte {
		index := slices.IndexFunc(sortedSetReaders(newTableContent(), seed), func(r setReader) bool { return r.set.Name == set })
		return slices.Concat([]byte{byte(index), byte(len(key)), byte(len(val))}, key, val)
	}
	f.Add(slices.Concat(
		record("services", seed.encodeFrontend(front), seed.encodeClass(3)),
		record("endpoints-1", seed.encodeSlotKey(front, clusterEndpoints, 1), seed.encodeAddrPort(endpoint(1).Addr)),
		record("endpoints-1", seed.encodeSlotKey(front, localEndpoints, 1<<15), seed.encodeAddrPort(endpoint(2).Addr)),
	), false, false)
	f.Add([]byte{1, 8, 4, 10, 96, 0, 1, 6, 0, 0, 0, 255, 255, 255, 255}, true, true)
	f.Fuzz(func(t *testing.T, data []byte, v6, virtual bool) {
		family := dataplane.IPv4
		if v6 {
			family = dataplane.IPv6
		}
		d := &Dataplane{tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}}
		tab := d.tables[familyIndex(family)]
		if virtual {
			tab.renderer = virtualRenderer{}
		}
		d.resetState()
		c := newTableContent()
		readings := sortedSetReaders(c, tab)
		for len(data) > 3 {
			read, keyLen, valLen := readings[int(data[0])%len(readings)], int(data[1])%64, int(data[2])%64
			data = data[3:]
			if len(data) < keyLen+valLen {
				break
			}
			_ = read.parse(element{Key: data[:keyLen:keyLen], Val: data[keyLen : keyLen+valLen : keyLen+valLen]})
			data = data[keyLen+valLen:]
		}
		c.linkSharedLists()
		want := render(service(t, "s", []dataplane.Frontend{front}, []dataplane.Endpoint{endpoint(1)}), slotAssignment{}, dataplane.Node{})
		b := d.newBatch()
		for f, r := range c.frontends {
			_ = r.binding()
			_ = r.slotAssignment()
			_ = r.verdictElements()
			b.diffFrontendFromKernel(f, r, nil)
			b.diffFrontendFromKernel(f, r, want)
		}
	})
}

// sortedSetReaders returns the set readers in a fixed order.
func sortedSetReaders(c *tableContent, t *table) []setReader {
	readings := c.setReaders(t)
	slices.SortStableFunc(readings, func(a, b setReader) int { return cmp.Compare(a.set.Name, b.set.Name) })
	return readings
}
