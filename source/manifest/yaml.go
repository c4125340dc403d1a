package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// node is a YAML value with its line. Aliases are expanded and merge keys (<<) are applied.
type node struct {
	line  int
	kind  yaml.Kind // MappingNode, SequenceNode or ScalarNode
	tag   string    // short, as in !!int
	value string    // of a scalar
	// fields has the fields of a mapping in file order, items the items of a sequence.
	fields []nodeField
	items  []*node
}

type nodeField struct {
	name  string
	line  int
	value *node
}

// field returns the value of a field, or nil.
func (n *node) field(name string) *node {
	if n == nil {
		return nil
	}
	for i := range n.fields {
		if n.fields[i].name == name {
			return n.fields[i].value
		}
	}
	return nil
}

// fieldText returns the text of a field, or "".
func (n *node) fieldText(name string) string {
	if v := n.field(name); v != nil && v.kind == yaml.ScalarNode && v.tag != "!!null" {
		return v.value
	}
	return ""
}

// lineOf returns the line of the field with the path. If the field does not exist, it
// returns the line of the nearest enclosing value.
func (n *node) lineOf(path string) int {
	line := n.line
	for path != "" && n != nil {
		var segment string
		if path[0] == '[' {
			end := strings.IndexByte(path, ']')
			if end < 0 {
				return line
			}
			segment, path = path[1:end], path[end+1:]
			path = strings.TrimPrefix(path, ".")
			if n.kind == yaml.SequenceNode {
				i, err := strconv.Atoi(segment)
				if err != nil || i < 0 || i >= len(n.items) {
					return line
				}
				n = n.items[i]
				line = n.line
				continue
			}
		} else {
			end := strings.IndexAny(path, ".[")
			if end < 0 {
				end = len(path)
			}
			segment, path = path[:end], strings.TrimPrefix(path[end:], ".")
		}
		found := false
		for i := range n.fields {
			if n.fields[i].name == segment {
				line, n, found = n.fields[i].line, n.fields[i].value, true
				break
			}
		}
		if !found {
			return line
		}
	}
	return line
}

// jsonValue returns the value as decoded by encoding/json.
func (n *node) jsonValue() any {
	switch n.kind {
	case yaml.MappingNode:
		m := make(map[string]any, len(n.fields))
		for _, f := range n.fields {
			m[f.name] = f.value.jsonValue()
		}
		return m
	case yaml.SequenceNode:
		s := make([]any, len(n.items))
		for i, item := range n.items {
			s[i] = item.jsonValue()
		}
		return s
	default:
		return n.scalarValue()
	}
}

// scalarValue returns the value of a scalar as nil, bool, int64, uint64, float64 or string.
// Values of other types are returned as text.
func (n *node) scalarValue() any {
	var v any
	switch n.tag {
	case "!!null":
		return nil
	case "!!bool", "!!int", "!!float":
		raw := yaml.Node{Kind: yaml.ScalarNode, Tag: n.tag, Value: n.value}
		if err := raw.Decode(&v); err != nil {
			return n.value
		}
		switch i := v.(type) {
		case int:
			return int64(i)
		case bool, int64, uint64, float64:
			return v
		}
	}
	return n.value
}

// chunk is the text of one YAML document and the number of lines before it.
type chunk struct {
	text        []byte
	linesBefore int
}

// splitDocuments splits a file into its documents, so that a syntax error affects only one
// of them. A line that begins with --- starts a document everywhere in YAML, even inside a
// quoted string.
func splitDocuments(data []byte) []chunk {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	var chunks []chunk
	start, startLine, line := 0, 0, 0
	content := false // whether the chunk has anything except comments and directives
	for pos := 0; pos < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		text := data[pos:end]
		marker := bytes.HasPrefix(text, []byte("---")) && (len(text) == 3 || strings.ContainsRune(" \t\r\n", rune(text[3])))
		if marker && content {
			chunks = append(chunks, chunk{data[start:pos], startLine})
			start, startLine, content = pos, line, false
		}
		if trimmed := bytes.TrimSpace(text); marker || (len(trimmed) > 0 && trimmed[0] != '#' && trimmed[0] != '%') {
			content = true
		}
		pos = end
	}
	if content {
		chunks = append(chunks, chunk{data[start:], startLine})
	}
	return chunks
}

// maxNodes limits the number of values that the aliases of one document expand to.
const maxNodes = 1_000_000

// maxDepth limits nesting, far above the depth of any Kubernetes object.
const maxDepth = 100

// treeError is an error at a line, before its file and field are known.
type treeError struct {
	line    int
	message string
}

// parseTrees parses the documents in a chunk: usually one, but several if they are
// separated by lines with three dots.
func parseTrees(c chunk) ([]*node, []treeError) {
	decoder := yaml.NewDecoder(bytes.NewReader(c.text))
	var nodes []*node
	for {
		var doc yaml.Node
		err := decoder.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return nodes, nil
		}
		if err != nil {
			return nodes, []treeError{syntaxError(c, err)}
		}
		if len(doc.Content) == 0 {
			continue
		}
		r := treeBuilder{linesBefore: c.linesBefore, budget: maxNodes}
		n := r.build(doc.Content[0], 0)
		if len(r.errs) > 0 {
			return nodes, r.errs
		}
		if n.tag != "!!null" {
			nodes = append(nodes, n)
		}
	}
}

// syntaxError returns an error with its line. The YAML package provides the line only as
// part of the error's text.
func syntaxError(c chunk, err error) treeError {
	message := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if n, scanErr := fmt.Sscanf(message, "line %d:", &line); n == 1 && scanErr == nil {
		_, message, _ = strings.Cut(message, ": ")
	} else if parts := strings.Split(message, "'"); len(parts) == 3 {
		// An unknown anchor is reported with its name but without a line.
		before, _, _ := bytes.Cut(c.text, []byte("*"+parts[1]))
		line = bytes.Count(before, []byte("\n")) + 1
	}
	// The package reports some errors at the end of the text one line too late.
	line = max(1, min(line, bytes.Count(bytes.TrimRight(c.text, "\r\n\t "), []byte("\n"))+1))
	lines := bytes.Split(c.text, []byte("\n"))
	for i := max(0, line-2); i < min(line+1, len(lines)); i++ {
		if text := bytes.TrimLeft(lines[i], " "); len(text) > 0 && text[0] == '\t' {
			return treeError{c.linesBefore + i + 1, "not YAML: the line begins with a tab: indent with spaces"}
		}
	}
	return treeError{c.linesBefore + line, "not YAML: " + message + ": correct this line or one before it"}
}

// treeBuilder converts a yaml.Node to a node.
type treeBuilder struct {
	linesBefore int
	// budget is the number of values that may still be created, see maxNodes.
	budget int
	errs   []treeError
}

func (b *treeBuilder) fail(line int, format string, args ...any) {
	b.errs = append(b.errs, treeError{line, fmt.Sprintf(format, args...)})
}

func (b *treeBuilder) build(y *yaml.Node, depth int) *node {
	n := &node{line: b.linesBefore + max(y.Line, 1), kind: yaml.ScalarNode, tag: "!!null"}
	b.budget--
	switch {
	case b.budget < 0:
		if b.budget == -1 {
			b.fail(n.line, "the aliases of this document expand to more than %d values: use fewer", maxNodes)
		}
		return n
	case depth > maxDepth:
		if b.budget > 0 {
			b.fail(n.line, "nested more than %d levels deep: an alias may contain itself", maxDepth)
		}
		b.budget = -2 // report this error once
		return n
	}
	switch y.Kind {
	case yaml.AliasNode:
		target := b.build(y.Alias, depth+1)
		target.line = n.line
		return target
	case yaml.MappingNode:
		n.kind, n.tag = y.Kind, y.ShortTag()
		b.buildMapping(n, y, depth)
	case yaml.SequenceNode:
		n.kind, n.tag = y.Kind, y.ShortTag()
		for _, item := range y.Content {
			n.items = append(n.items, b.build(item, depth+1))
		}
	default:
		n.tag, n.value = y.ShortTag(), y.Value
	}
	return n
}

func (b *treeBuilder) buildMapping(n *node, y *yaml.Node, depth int) {
	var merges []*node
	lines := map[string]int{}
	for i := 0; i+1 < len(y.Content); i += 2 {
		key, value := y.Content[i], y.Content[i+1]
		line := b.linesBefore + max(key.Line, 1)
		if key.Kind == yaml.AliasNode && key.Alias != nil {
			key = key.Alias
		}
		switch {
		case key.Kind == yaml.ScalarNode && key.ShortTag() == "!!merge":
			merges = append(merges, b.build(value, depth+1))
			continue
		case key.Kind != yaml.ScalarNode:
			b.fail(line, "a key is not text: write one word before the colon")
			continue
		case key.ShortTag() != "!!str":
			b.fail(line, "key %s is not text: write %q", key.Value, key.Value)
			continue
		}
		if first, ok := lines[key.Value]; ok {
			b.fail(line, "duplicate field %s, first in line %d: remove one", key.Value, first)
			continue
		}
		lines[key.Value] = line
		n.fields = append(n.fields, nodeField{key.Value, line, b.build(value, depth+1)})
	}
	for _, merge := range merges {
		sources := []*node{merge}
		if merge.kind == yaml.SequenceNode {
			sources = merge.items
		}
		for _, source := range sources {
			if source.kind != yaml.MappingNode {
				b.fail(source.line, "<< must be followed by an alias of a mapping")
				continue
			}
			for _, f := range source.fields {
				if _, ok := lines[f.name]; !ok {
					lines[f.name] = f.line
					n.fields = append(n.fields, f)
				}
			}
		}
	}
}
