package nft

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRuleComments checks that the comment of each function that builds rules shows them in
// nft syntax, exactly as in the golden listings. A line with only "…" represents more rules
// like the previous one.
func TestRuleComments(t *testing.T) {
	t.Parallel()
	listed := map[string]bool{"…": true}
	for _, file := range []string{"ruleset-1.1.3.nft", "ruleset-translator-1.1.3.nft", "balancing-1.1.3.nft"} {
		text, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			listed[strings.TrimSpace(line)] = true
		}
	}
	// The listings use Options without VirtualNetworks.
	listed["ip daddr & 255.0.0.0 == 250.0.0.0 drop"] = true
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	functions := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || !buildsRules(f) {
				continue
			}
			functions++
			lines := codeLines(f.Doc)
			if len(lines) == 0 {
				t.Errorf("%s: the comment of %s has no rule in nft syntax", name, f.Name.Name)
			}
			for _, line := range lines {
				if !listed[line] {
					t.Errorf("%s: the comment of %s has a line that no golden listing contains:\n%s", name, f.Name.Name, line)
				}
			}
		}
	}
	if functions == 0 {
		t.Error("no function builds rules")
	}
}

// buildsRules reports whether a function returns rules or chains that were not passed to it.
func buildsRules(f *ast.FuncDecl) bool {
	if f.Type.Results == nil || returnsNil(f) {
		return false
	}
	for _, param := range f.Type.Params.List {
		if _, variadic := param.Type.(*ast.Ellipsis); variadic {
			return false
		}
	}
	results := f.Type.Results.List
	if last, ok := results[len(results)-1].Type.(*ast.Ident); ok && last.Name == "error" {
		return false // it looks rules up
	}
	for _, result := range results {
		typ := result.Type
		if list, ok := typ.(*ast.ArrayType); ok {
			typ = list.Elt
		}
		if name, ok := typ.(*ast.Ident); ok && (name.Name == "rule" || name.Name == "chain") {
			return true
		}
	}
	return false
}

// returnsNil reports whether the body of a function is only "return nil".
func returnsNil(f *ast.FuncDecl) bool {
	if len(f.Body.List) != 1 {
		return false
	}
	ret, ok := f.Body.List[0].(*ast.ReturnStmt)
	if !ok || len(ret.Results) != 1 {
		return false
	}
	name, ok := ret.Results[0].(*ast.Ident)
	return ok && name.Name == "nil"
}

// codeLines returns the lines of a comment's code blocks without indentation.
func codeLines(doc *ast.CommentGroup) []string {
	if doc == nil {
		return nil
	}
	var lines []string
	for _, comment := range doc.List {
		if code, ok := strings.CutPrefix(comment.Text, "//\t"); ok {
			lines = append(lines, strings.TrimSpace(code))
		}
	}
	return lines
}
