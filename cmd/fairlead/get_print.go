package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"k8s.io/client-go/util/jsonpath"
	"sigs.k8s.io/yaml"
)

// table is a result in columns.
type table struct {
	columns []string
	rows    []tableRow
}

// tableRow is a row of a table. key identifies the object that the row shows.
type tableRow struct {
	key   string
	cells []string
}

// outputFormats returns the values of --output.
func outputFormats() []string { return []string{"wide", "json", "yaml", "name", "jsonpath="} }

// objectPrinter prints the objects of `fairlead get` in one format, in the style of kubectl.
type objectPrinter interface {
	print(w io.Writer, r getResource, result *getResult) error
	// printChanges prints the objects that differ between two results.
	printChanges(w io.Writer, r getResource, before, after *getResult) error
}

func newObjectPrinter(o getOptions) (objectPrinter, error) {
	template, isTemplate := strings.CutPrefix(o.output, "jsonpath=")
	switch {
	case o.output == "" || o.output == "wide":
		return &tablePrinter{wide: o.output == "wide", headers: !o.noHeaders, events: o.watch && o.outputWatchEvents}, nil
	case o.output == "json":
		return encodingPrinter{encode: encodeJSON, separator: ""}, nil
	case o.output == "yaml":
		return encodingPrinter{encode: yaml.Marshal, separator: "---\n"}, nil
	case o.output == "name":
		return namePrinter{}, nil
	case isTemplate:
		return newJSONPathPrinter(template)
	default:
		return nil, fmt.Errorf("--output: unknown format %q: use %s", o.output, strings.Join(outputFormats(), ", "))
	}
}

// tablePrinter prints tables with the spacing of kubectl.
type tablePrinter struct {
	wide, headers, events bool
}

func (p *tablePrinter) print(w io.Writer, r getResource, result *getResult) error {
	t := r.table(result, p.wide)
	if len(t.rows) == 0 && !result.options.watch {
		return nil
	}
	return p.write(w, t, p.headers, func(tableRow) string { return "ADDED" })
}

func (p *tablePrinter) write(w io.Writer, t table, headers bool, event func(tableRow) string) error {
	const minWidth, tabWidth, padding = 6, 4, 3
	tabs := tabwriter.NewWriter(w, minWidth, tabWidth, padding, ' ', 0)
	line := func(first string, cells []string) {
		if p.events {
			cells = append([]string{first}, cells...)
		}
		_, _ = fmt.Fprintln(tabs, strings.Join(cells, "\t")) // Flush returns the error
	}
	if headers {
		line("EVENT", t.columns)
	}
	for _, row := range t.rows {
		line(event(row), row.cells)
	}
	return tabs.Flush()
}

func (p *tablePrinter) printChanges(w io.Writer, r getResource, before, after *getResult) error {
	old, current := r.table(before, p.wide), r.table(after, p.wide)
	changed := table{columns: current.columns}
	events := map[string]string{}
	byKey := func(t table) map[string]tableRow {
		rows := map[string]tableRow{}
		for _, row := range t.rows {
			rows[row.key] = row
		}
		return rows
	}
	oldRows, currentRows := byKey(old), byKey(current)
	for _, row := range current.rows {
		was, existed := oldRows[row.key]
		switch {
		case !existed:
			events[row.key] = "ADDED"
		case !slices.Equal(was.cells, row.cells):
			events[row.key] = "MODIFIED"
		default:
			continue
		}
		changed.rows = append(changed.rows, row)
	}
	for _, row := range old.rows {
		if _, exists := currentRows[row.key]; !exists && p.events {
			events[row.key] = "DELETED"
			changed.rows = append(changed.rows, row)
		}
	}
	return p.write(w, changed, false, func(row tableRow) string { return events[row.key] })
}

// objectList is a list in the form of Kubernetes.
type objectList struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Items      []any    `json:"items"`
	Warnings   []string `json:"warnings,omitempty"`
}

// document returns the object that the formats other than tables print: a list, or the object if
// one name selects a single object.
func (r getResource) document(result *getResult) any {
	objects := r.objects(result)
	if len(objects) == 1 && len(result.queries) == 1 && result.queries[0].name != "" {
		return objects[0]
	}
	if objects == nil {
		objects = []any{}
	}
	return objectList{APIVersion: getAPIVersion, Kind: "List", Items: objects, Warnings: result.kernel.Warnings}
}

func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	err := e.Encode(v)
	return b.Bytes(), err
}

// encodingPrinter prints complete documents.
type encodingPrinter struct {
	encode    func(any) ([]byte, error)
	separator string
}

func (p encodingPrinter) print(w io.Writer, r getResource, result *getResult) error {
	text, err := p.encode(r.document(result))
	if err == nil {
		_, err = w.Write(text)
	}
	return err
}

// printChanges prints each changed object as a document.
func (p encodingPrinter) printChanges(w io.Writer, r getResource, before, after *getResult) error {
	old, err := p.encodeAll(r.objects(before))
	if err != nil {
		return err
	}
	current, err := p.encodeAll(r.objects(after))
	if err != nil {
		return err
	}
	for _, text := range current {
		if slices.Contains(old, text) {
			continue
		}
		if _, err := io.WriteString(w, p.separator+text); err != nil {
			return err
		}
	}
	return nil
}

func (p encodingPrinter) encodeAll(objects []any) ([]string, error) {
	var texts []string
	for _, o := range objects {
		text, err := p.encode(o)
		if err != nil {
			return nil, err
		}
		texts = append(texts, string(text))
	}
	return texts, nil
}

// namePrinter prints names in the form RESOURCE/NAME.
type namePrinter struct{}

func (namePrinter) print(w io.Writer, r getResource, result *getResult) error {
	for _, name := range objectNames(r, result) {
		if _, err := fmt.Fprintln(w, name); err != nil {
			return err
		}
	}
	return nil
}

func (namePrinter) printChanges(w io.Writer, r getResource, before, after *getResult) error {
	old := objectNames(r, before)
	for _, name := range objectNames(r, after) {
		if slices.Contains(old, name) {
			continue
		}
		if _, err := fmt.Fprintln(w, name); err != nil {
			return err
		}
	}
	return nil
}

func objectNames(r getResource, result *getResult) []string {
	var names []string
	for _, o := range r.objects(result) {
		if named, ok := o.(interface{ objectName() string }); ok {
			names = append(names, named.objectName())
		}
	}
	return names
}

// newJSONPathPrinter returns a printer for a template of kubectl's format jsonpath.
func newJSONPathPrinter(template string) (objectPrinter, error) {
	if !strings.Contains(template, "{") {
		template = "{" + template + "}"
	}
	j := jsonpath.New("output").AllowMissingKeys(true)
	if err := j.Parse(template); err != nil {
		return nil, fmt.Errorf("--output: jsonpath template %s: %w", template, err)
	}
	return encodingPrinter{encode: func(v any) ([]byte, error) {
		// The template refers to the names of the JSON form.
		text, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		var data any
		if err := json.Unmarshal(text, &data); err != nil {
			return nil, err
		}
		var b bytes.Buffer
		if err := j.Execute(&b, data); err != nil {
			return nil, fmt.Errorf("--output: jsonpath template %s: %w", template, err)
		}
		return b.Bytes(), nil
	}}, nil
}
