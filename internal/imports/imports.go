// Package imports checks that the packages of a module import each other only as a table in its
// ARCHITECTURE.md allows. The table is under the heading "## Packages" and has three columns:
//
//	| folder | what lives there | may import |
//	|---|---|---|
//	| `dataplane` | the contract | standard library only |
//	| `source/a`, `source/b` | where objects come from | `kube`, k8s API types |
//	| `internal/nettest` | test helper: network namespaces | – |
//	| `cmd/fairlead` | the binary | all, k8s API types |
//
// The first column names folders of packages, in backquotes. The third column lists, separated by
// commas, what the files of these packages may import:
//
//   - a folder in backquotes: that package;
//   - all: every package of the module;
//   - –: no package of the module;
//   - standard library only: no other module;
//   - k8s API types: packages of k8s.io and sigs.k8s.io, which are forbidden otherwise. Only
//     packages below kube, source, cmd, test and bench may have this entry.
//
// If the second column starts with "test helper:", test files of every package may import the
// packages of the row. Test files may also import other modules, except Kubernetes' modules.
//
// The package also checks that a program for nodes does not link, even indirectly, packages that
// only tests and benchmarks need: see [Table.CheckLinked].
package imports

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
)

// Package is a package of the module and its imports.
type Package struct {
	// Folder is the path of the package below the module's root, "." for the root.
	Folder string
	// Imports are the import paths in the package's files, and TestImports those in its test files,
	// including the external test package.
	Imports, TestImports []string
}

// Table defines which package may import which.
type Table struct {
	rows map[string]*row // by folder
}

// row is the entry of a folder in the table.
type row struct {
	folders    []string // may be imported
	all        bool
	stdOnly    bool
	kubernetes bool
	testHelper bool
}

const (
	heading           = "## Packages"
	wordAll           = "all"
	wordNone          = "–"
	wordStdOnly       = "standard library only"
	wordK8s           = "k8s API types"
	helperPrefix      = "test helper:"
	columns           = 3
	kubernetesFolders = "kube, source, cmd, test and bench"
)

// ParseTable parses the table in a Markdown document.
func ParseTable(markdown string) (*Table, error) {
	t := &Table{rows: map[string]*row{}}
	line, headerLines := 0, 2 // the header row and the delimiter row
	inSection := false
	for text := range strings.Lines(markdown) {
		line++
		text = strings.TrimSpace(text)
		switch {
		case strings.HasPrefix(text, "## "):
			inSection = text == heading
		case !inSection || !strings.HasPrefix(text, "|"):
		case headerLines > 0:
			headerLines--
		default:
			if err := t.addRow(text); err != nil {
				return nil, fmt.Errorf("line %d: %w", line, err)
			}
		}
	}
	if len(t.rows) == 0 {
		return nil, fmt.Errorf("no table under the heading %q", heading)
	}
	for _, folder := range slices.Sorted(maps.Keys(t.rows)) {
		for _, to := range t.rows[folder].folders {
			if t.rows[to] == nil {
				return nil, fmt.Errorf("the row of %s allows importing %s, which has no row", folder, to)
			}
		}
	}
	return t, nil
}

func (t *Table) addRow(text string) error {
	cells := strings.Split(strings.Trim(text, "|"), "|")
	if len(cells) != columns {
		return fmt.Errorf("%d columns, want folder, what lives there, may import", len(cells))
	}
	r := &row{testHelper: strings.HasPrefix(strings.TrimSpace(cells[1]), helperPrefix)}
	for item := range cellItems(cells[2]) {
		folder, isFolder := unquote(item)
		switch {
		case isFolder:
			r.folders = append(r.folders, folder)
		case item == wordAll:
			r.all = true
		case item == wordStdOnly:
			r.stdOnly = true
		case item == wordK8s:
			r.kubernetes = true
		case item == wordNone:
		default:
			return fmt.Errorf("may import %q: want a folder in backquotes, %q, %q, %q or %q",
				item, wordAll, wordNone, wordStdOnly, wordK8s)
		}
	}
	for item := range cellItems(cells[0]) {
		folder, isFolder := unquote(item)
		if !isFolder {
			return fmt.Errorf("folder %q: want a folder in backquotes", item)
		}
		if t.rows[folder] != nil {
			return fmt.Errorf("duplicate row for %s", folder)
		}
		if r.kubernetes && !mayImportKubernetes(folder) {
			return fmt.Errorf("%q in the row of %s: only %s may import Kubernetes' packages", wordK8s, folder, kubernetesFolders)
		}
		t.rows[folder] = r
	}
	return nil
}

func cellItems(cell string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for item := range strings.SplitSeq(cell, ",") {
			if !yield(strings.TrimSpace(item)) {
				return
			}
		}
	}
}

func unquote(item string) (folder string, ok bool) {
	folder, ok = strings.CutPrefix(item, "`")
	if !ok {
		return "", false
	}
	folder, ok = strings.CutSuffix(folder, "`")
	return folder, ok && folder != ""
}

func mayImportKubernetes(folder string) bool {
	return slices.ContainsFunc([]string{"kube", "source", "cmd", "test", "bench"}, func(parent string) bool { return below(folder, parent) })
}

// below reports whether path is parent or lies below it.
func below(path, parent string) bool {
	return path == parent || strings.HasPrefix(path, parent+"/")
}

// Check compares all packages of the module with the table. Its error has one line for each
// deviation, in the order of folders: a package without a row, a row without a package, or an
// import that the row does not allow.
func (t *Table) Check(module string, packages []Package) error {
	var errs []error
	seen := map[string]bool{}
	for _, p := range slices.SortedFunc(slices.Values(packages), func(a, b Package) int {
		return cmp.Compare(a.Folder, b.Folder)
	}) {
		seen[p.Folder] = true
		r := t.rows[p.Folder]
		if r == nil {
			errs = append(errs, fmt.Errorf("%s: a package without a row in the table", p.Folder))
			continue
		}
		for _, path := range p.Imports {
			if reason := t.forbiddenImport(r, module, path, false); reason != "" {
				errs = append(errs, fmt.Errorf("%s imports %s: %s", p.Folder, path, reason))
			}
		}
		for _, path := range p.TestImports {
			// An external test imports the package that it tests.
			if path == module+"/"+p.Folder {
				continue
			}
			if reason := t.forbiddenImport(r, module, path, true); reason != "" {
				errs = append(errs, fmt.Errorf("a test of %s imports %s: %s", p.Folder, path, reason))
			}
		}
	}
	for _, folder := range slices.Sorted(maps.Keys(t.rows)) {
		if !seen[folder] {
			errs = append(errs, fmt.Errorf("%s: a row in the table without a package", folder))
		}
	}
	return errors.Join(errs...)
}

// forbiddenImport returns the reason why the row does not allow the import, or an empty string.
func (t *Table) forbiddenImport(r *row, module, path string, inTest bool) string {
	if folder, ok := strings.CutPrefix(path, module+"/"); ok {
		helper := inTest && t.rows[folder] != nil && t.rows[folder].testHelper
		if r.all || helper || slices.Contains(r.folders, folder) {
			return ""
		}
		return "not in the imports that its row allows"
	}
	domain, _, _ := strings.Cut(path, "/")
	switch {
	case domain == "k8s.io" || domain == "sigs.k8s.io":
		if r.kubernetes {
			return ""
		}
		return "only " + kubernetesFolders + " may import Kubernetes' packages, if their row allows it"
	case strings.Contains(domain, ".") && r.stdOnly && !inTest:
		// The first element of standard library paths contains no dot.
		return "its row says " + wordStdOnly
	}
	return ""
}
