package proxyconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"
)

// findRepetitions returns the values of duplicate fields that do not count, and a part for the
// documents after the first one.
func findRepetitions(content []byte) []IgnoredPart {
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	var first, rest yaml.Node
	if err := decoder.Decode(&first); err != nil {
		return nil // the caller has decoded the document with another decoder
	}
	parts := findDuplicates("", &first)
	for {
		err := decoder.Decode(&rest)
		if errors.Is(err, io.EOF) {
			return parts
		}
		if err != nil || !isEmpty(&rest) {
			return append(parts, IgnoredPart{Name: "the documents after the first one", Reason: "only the first document counts"})
		}
	}
}

// isEmpty reports whether a document has no content, like the one after a trailing separator.
func isEmpty(document *yaml.Node) bool {
	return len(document.Content) == 0 || document.Content[0].Tag == "!!null"
}

// findDuplicates returns the duplicate fields below a node, whose path is given.
func findDuplicates(path string, node *yaml.Node) []IgnoredPart {
	var parts []IgnoredPart
	if node.Kind != yaml.MappingNode {
		for _, child := range node.Content {
			parts = append(parts, findDuplicates(path, child)...)
		}
		return parts
	}
	last := map[string]int{} // the last position of each key
	for i := 0; i+1 < len(node.Content); i += 2 {
		last[node.Content[i].Value] = i
	}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		name := key.Value
		if path != "" {
			name = path + "." + name
		}
		counts := last[key.Value]
		if counts == i {
			parts = append(parts, findDuplicates(name, value)...)
			continue
		}
		which := fmt.Sprintf("the value in line %d", node.Content[counts].Line)
		if text := node.Content[counts+1].Value; text != "" {
			which += fmt.Sprintf(", %s,", text)
		}
		parts = append(parts, IgnoredPart{Name: fmt.Sprintf("%s in line %d", name, key.Line), Reason: "duplicate field: " + which + " counts"})
	}
	return parts
}
