package manifest

import (
	"fmt"
	"testing"
)

// BenchmarkUpdate measures the time to parse a file with one changed Pod and update its
// Service, which has 10 more. It must not depend on the number of Services.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{100, 1_000, 5_000} {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			addrs, err := newAddressAllocator(bothCIDR)
			if err != nil {
				b.Fatal(err)
			}
			m := newModel("here", addrs)
			files := map[string]*parsedFile{}
			for i := range n {
				name := fmt.Sprintf("web%d", i)
				text := serviceYAML(name, "")
				for p := range 10 {
					text += podYAML(fmt.Sprintf("%s-%d", name, p), name, fmt.Sprintf("10.%d.%d.%d", p, i>>8, i&0xff), "")
				}
				files[name] = parseFile(name, []byte(text))
			}
			m.update(files)
			i := 0
			for b.Loop() {
				i++
				text := podYAML("extra", "web7", fmt.Sprintf("10.200.0.%d", 1+i%2), "")
				d := m.update(map[string]*parsedFile{"extra": parseFile("extra", []byte(text))})
				if len(d.EndpointSlices) != 1 || len(m.errors()) > 0 {
					b.Fatalf("Delta %+v", d)
				}
			}
		})
	}
}
