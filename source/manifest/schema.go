package manifest

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	kjson "sigs.k8s.io/json"
)

// decode fills object from n strictly. It first compares the types of all fields with the
// tree, because the JSON decoder stops at the first wrong type and has no line numbers.
// Then Kubernetes' own strict decoder decodes the object, so that decode accepts no object
// which that decoder rejects.
func decode(n *node, object any, prefix string, report func(field, message string)) bool {
	c := typeChecker{report: report}
	c.check(n, reflect.TypeOf(object).Elem(), prefix)
	if c.failed {
		return false
	}
	data, err := json.Marshal(n.jsonValue())
	if err != nil {
		report(prefix, fmt.Sprintf("cannot be written as JSON: %v", err))
		return false
	}
	strict, err := kjson.UnmarshalStrict(data, object)
	if err != nil {
		strict = append(strict, err)
	}
	for _, err := range strict {
		report(prefix, err.Error())
	}
	return len(strict) == 0
}

// typeChecker compares a tree with a Go type.
type typeChecker struct {
	report func(field, message string)
	failed bool
}

func (c *typeChecker) fail(field, format string, args ...any) {
	c.failed = true
	c.report(field, fmt.Sprintf(format, args...))
}

func (c *typeChecker) check(n *node, t reflect.Type, path string) {
	if n.tag == "!!null" {
		return // null is equivalent to a missing field
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) {
		c.checkUnmarshaler(n, t, path)
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		c.checkStruct(n, t, path)
	case reflect.Map:
		if n.kind != yaml.MappingNode {
			c.fail(path, "%s, want a mapping of names to values: write each as \"name: value\" on a line of its own", describeNode(n))
			return
		}
		for _, f := range n.fields {
			c.check(f.value, t.Elem(), path+"["+f.name+"]")
		}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			c.checkScalar(n, path, "text", "!!str")
			return
		}
		if n.kind != yaml.SequenceNode {
			c.fail(path, "%s, want a list: begin each item with \"- \"", describeNode(n))
			return
		}
		for i, item := range n.items {
			c.check(item, t.Elem(), fmt.Sprintf("%s[%d]", path, i))
		}
	case reflect.String:
		// Kubernetes has no date type: dates are text.
		c.checkScalar(n, path, "text", "!!str", "!!timestamp")
	case reflect.Bool:
		c.checkScalar(n, path, "true or false", "!!bool")
	case reflect.Int, reflect.Int32, reflect.Int64:
		if c.checkScalar(n, path, "a whole number", "!!int") {
			if v, ok := n.scalarValue().(int64); !ok || reflect.Zero(t).OverflowInt(v) {
				c.fail(path, "%s is too large for this field: use a smaller number", n.value)
			}
		}
	case reflect.Float64:
		c.checkScalar(n, path, "a number", "!!int", "!!float")
	default:
	}
}

// checkUnmarshaler checks types that implement json.Unmarshaler.
func (c *typeChecker) checkUnmarshaler(n *node, t reflect.Type, path string) {
	switch t {
	case reflect.TypeFor[intstr.IntOrString]():
		if c.checkScalar(n, path, "a number or a name", "!!int", "!!str") && n.tag == "!!int" {
			if v, ok := n.scalarValue().(int64); !ok || v != int64(int32(v)) {
				c.fail(path, "%s is too large for this field: use a smaller number", n.value)
			}
		}
		return
	case reflect.TypeFor[metav1.Time](), reflect.TypeFor[metav1.MicroTime]():
		if !c.checkScalar(n, path, "a time", "!!str", "!!timestamp") {
			return
		}
	}
	data, err := json.Marshal(n.jsonValue())
	if err == nil {
		err = json.Unmarshal(data, reflect.New(t).Interface())
	}
	if err != nil {
		switch t {
		case reflect.TypeFor[metav1.Time](), reflect.TypeFor[metav1.MicroTime]():
			c.fail(path, "%q is not a time: write it as 2006-01-02T15:04:05Z", n.value)
		case reflect.TypeFor[resource.Quantity]():
			c.fail(path, "%s, want a quantity: write one such as 100m or 64Mi", describeNode(n))
		default:
			c.fail(path, "%s, which is not allowed here: %v", describeNode(n), err)
		}
	}
}

func (c *typeChecker) checkStruct(n *node, t reflect.Type, path string) {
	if n.kind != yaml.MappingNode {
		c.fail(path, "%s, want a mapping of fields: write each as \"name: value\" on a line of its own", describeNode(n))
		return
	}
	fields := jsonFields(t)
	for _, f := range n.fields {
		field, ok := fields[f.name]
		if !ok {
			c.fail(joinPath(path, f.name), "unknown field%s", suggestField(f.name, fields))
			continue
		}
		c.check(f.value, field, joinPath(path, f.name))
	}
}

// checkScalar reports whether n is a scalar with one of the tags.
func (c *typeChecker) checkScalar(n *node, path, want string, tags ...string) bool {
	if n.kind == yaml.ScalarNode && slices.Contains(tags, n.tag) {
		return true
	}
	if n.kind == yaml.ScalarNode && tags[0] == "!!str" {
		c.fail(path, "%s, want %s: write %q", describeNode(n), want, n.value)
		return false
	}
	fix := "write " + want
	if n.kind == yaml.ScalarNode && n.tag == "!!str" && want == "a whole number" && !strings.ContainsFunc(n.value, func(r rune) bool { return r < '0' || r > '9' }) {
		fix = "remove the quotation marks"
	}
	c.fail(path, "%s, want %s: %s", describeNode(n), want, fix)
	return false
}

func describeNode(n *node) string {
	switch n.kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	default:
	}
	switch n.tag {
	case "!!bool":
		return n.value + " is a boolean"
	case "!!int", "!!float":
		return n.value + " is a number"
	case "!!null":
		return "nothing"
	case "!!str":
		return fmt.Sprintf("%q is text", n.value)
	default:
		return fmt.Sprintf("%q is of the YAML type %s", n.value, n.tag)
	}
}

func joinPath(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// jsonFields returns the types of a struct's fields by JSON name.
func jsonFields(t reflect.Type) map[string]reflect.Type {
	fields := map[string]reflect.Type{}
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case f.Anonymous && name == "" || strings.Contains(options, "inline"):
			maps.Copy(fields, jsonFields(f.Type))
		case name != "":
			fields[name] = f.Type
		}
	}
	return fields
}

// suggestField returns a hint with the most similar field name, if any.
func suggestField(name string, fields map[string]reflect.Type) string {
	best, bestDistance := "", 3
	for field := range fields {
		d := editDistance(strings.ToLower(name), strings.ToLower(field))
		if d < bestDistance || (d == bestDistance && best != "" && field < best) {
			best, bestDistance = field, d
		}
	}
	if best == "" {
		return ": remove it, or correct its name or its indentation"
	}
	return fmt.Sprintf(": did you mean %s?", best)
}

// editDistance returns the Levenshtein distance of a and b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := min(row[j]+1, row[j+1]+1, diagonal)
			if a[i] != b[j] {
				next = min(row[j]+1, row[j+1]+1, diagonal+1)
			}
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
