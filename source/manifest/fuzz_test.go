package manifest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzParse parses arbitrary files: the parser and the model must not panic, each error
// must have a position in the file, and parsing the same file again must not change
// anything.
func FuzzParse(f *testing.F) {
	inputs, err := filepath.Glob("testdata/errors/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, input := range inputs {
		data, err := os.ReadFile(input)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(serviceYAML("web", "") + podYAML("w", "web", "10.0.0.1", "")))
	f.Add([]byte("a: &a [*a, *a]\n---\nkind: Pod\n<<: [*a]\n"))
	f.Add([]byte("\ufeff%YAML 1.2\r\n---\r\n{}\r\n...\r\n--- !!str x\n--- |\n  ---\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		addrs, err := newAddressAllocator(bothCIDR)
		if err != nil {
			t.Fatal(err)
		}
		m := newModel("here", addrs)
		file := parseFile("fuzz.yaml", data)
		// YAML's line breaks.
		lines := 1
		for _, r := range string(data) {
			if strings.ContainsRune("\n\r\u0085\u2028\u2029", r) {
				lines++
			}
		}
		m.update(map[string]*parsedFile{"fuzz.yaml": file})
		for _, err := range m.errors() {
			if err.File != "fuzz.yaml" || err.Line < 1 || err.Line > lines || err.Message == "" {
				t.Errorf("error without a position in %d lines: %+v", lines, err)
			}
		}
		if d := m.update(map[string]*parsedFile{"fuzz.yaml": parseFile("fuzz.yaml", data)}); !isEmpty(d) {
			t.Errorf("parsing the same file again changes %+v", d)
		}
	})
}
