package nft

import (
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// TestBulkAllocations checks that the memory for a transaction does not depend on the number of
// its elements.
func TestBulkAllocations(t *testing.T) {
	table := newTable(dataplane.IPv4)
	allocations := func(n int) float64 {
		elements := make([]element, n)
		for i := range elements {
			elements[i] = element{Key: make([]byte, 16), Val: make([]byte, 8)}
		}
		c := &bulkConn{}
		return testing.AllocsPerRun(5, func() {
			c.transaction = c.transaction[:0]
			if err := c.addBulk(table.endpoints[0], elements); err != nil {
				t.Error(err)
			}
		})
	}
	if few, many := allocations(1_000), allocations(20_000); many > 20*few+20 {
		t.Errorf("%v allocations for 1,000 elements, %v for 20,000", few, many)
	}
}
