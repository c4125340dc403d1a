package imports_test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/imports"
)

// TestArchitecture checks the imports of this module against the table in ARCHITECTURE.md.
func TestArchitecture(t *testing.T) {
	t.Parallel()
	module := listModule(t)
	markdown, err := os.ReadFile(filepath.Join(module.Dir, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	table, err := imports.ParseTable(string(markdown))
	if err != nil {
		t.Fatalf("ARCHITECTURE.md: %v", err)
	}
	packages := listPackages(t, module)
	if err := table.Check(module.Path, packages); err != nil {
		t.Errorf("imports differ from ARCHITECTURE.md: fix the import, or change the table and give the reason in the commit:\n%v", err)
	}
}

type module struct{ Path, Dir string }

func listModule(t *testing.T) module {
	t.Helper()
	var m module
	goList(t, "", func(d *json.Decoder) error { return d.Decode(&m) }, "-m", "-json")
	return m
}

func listPackages(t *testing.T, m module) []imports.Package {
	t.Helper()
	dependOnFolders(t, m.Dir)
	var packages []imports.Package
	// -e tolerates packages with errors, which other checks report. The tag e2e selects
	// the files of test/e2e.
	goList(t, m.Dir, func(d *json.Decoder) error {
		var p struct {
			ImportPath                         string
			Imports, TestImports, XTestImports []string
		}
		if err := d.Decode(&p); err != nil {
			return err
		}
		packages = append(packages, imports.Package{
			Folder:      strings.TrimPrefix(p.ImportPath, m.Path+"/"),
			Imports:     p.Imports,
			TestImports: slices.Concat(p.TestImports, p.XTestImports),
		})
		return nil
	}, "-e", "-tags=e2e,ipvs", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	return packages
}

// dependOnFolders reads the folders below dir. Otherwise, go test reuses a cached result, because
// only go list, not the test itself, reads the files.
func dependOnFolders(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != dir && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// goList runs go list in dir and calls decode for each value it prints.
func goList(t *testing.T, dir string, decode func(*json.Decoder) error, args ...string) {
	t.Helper()
	list := exec.CommandContext(t.Context(), "go", append([]string{"list"}, args...)...)
	list.Dir = dir
	var stderr strings.Builder
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", list, err, stderr.String())
	}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		err := decode(d)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatalf("%v: %v", list, err)
		}
	}
}

const testTable = "# Title\n" +
	"## Other\n" +
	"| a | b | c |\n" +
	"|---|---|---|\n" +
	"| not | this | one |\n" +
	"## Packages\n" +
	"Words.\n" +
	"| folder | what lives there | may import |\n" +
	"|---|---|---|\n" +
	"| `contract` | the contract | standard library only |\n" +
	"| `fake` | test helper: an implementation | `contract`, standard library only |\n" +
	"| `kube` | objects | `contract`, k8s API types |\n" +
	"| `source/a`, `source/b` | sources | `kube`, k8s API types |\n" +
	"| `cmd/x` | the binary | all |\n" +
	"| `net` | test helper: networks | – |\n" +
	"| `test/cluster` | test helper: a cluster | k8s API types |\n"

// conformingPackages returns packages without deviations from the table.
func conformingPackages() map[string]*imports.Package {
	packages := map[string]*imports.Package{}
	for _, p := range []imports.Package{
		{
			Folder:      "contract",
			Imports:     []string{"slices", "net/netip"},
			TestImports: []string{"testing", "m/contract", "m/fake", "m/net", "github.com/google/go-cmp/cmp"},
		},
		{Folder: "fake", Imports: []string{"m/contract"}},
		{Folder: "kube", Imports: []string{"m/contract", "k8s.io/api/core/v1", "sigs.k8s.io/yaml"}},
		{Folder: "source/a", Imports: []string{"m/kube", "k8s.io/api/core/v1"}, TestImports: []string{"k8s.io/api/core/v1"}},
		{Folder: "source/b", Imports: []string{"m/kube"}},
		{Folder: "cmd/x", Imports: []string{"m/kube", "m/contract", "m/source/a", "m/net", "github.com/spf13/cobra"}},
		{Folder: "net", Imports: []string{"golang.org/x/sys/unix"}},
		{Folder: "test/cluster", Imports: []string{"k8s.io/client-go/rest"}},
	} {
		packages[p.Folder] = &p
	}
	return packages
}

func TestCheck(t *testing.T) {
	t.Parallel()
	type packages = map[string]*imports.Package
	for name, tc := range map[string]struct {
		change func(packages)
		want   string // part of the single line of the error
	}{
		"no deviation": {change: func(packages) {}},
		"package without a row": {
			func(p packages) { p["new"] = &imports.Package{Folder: "new"} },
			"new: a package without a row",
		},
		"package in the root without a row": {
			func(p packages) { p["."] = &imports.Package{Folder: "."} },
			".: a package without a row",
		},
		"row without a package": {
			func(p packages) { delete(p, "source/b") },
			"source/b: a row in the table without a package",
		},
		"import of a sibling": {
			func(p packages) { p["kube"].Imports = []string{"m/source/a"} },
			"kube imports m/source/a: not in the imports",
		},
		"import of a test helper outside tests": {
			func(p packages) { p["kube"].Imports = []string{"m/fake"} },
			"kube imports m/fake: not in the imports",
		},
		"import of a sibling in a test": {
			func(p packages) { p["contract"].TestImports = []string{"m/kube"} },
			"a test of contract imports m/kube: not in the imports",
		},
		"import of the package below a listed one": {
			func(p packages) { p["kube"].Imports = []string{"m/contract/deeper"} },
			"kube imports m/contract/deeper: not in the imports",
		},
		"other module in a row with standard library only": {
			func(p packages) { p["contract"].Imports = []string{"github.com/google/go-cmp/cmp"} },
			"contract imports github.com/google/go-cmp/cmp: its row says standard library only",
		},
		"Kubernetes in a row that does not allow it": {
			func(p packages) { p["net"].Imports = []string{"k8s.io/api/core/v1"} },
			"net imports k8s.io/api/core/v1: only kube, source, cmd, test and bench",
		},
		"Kubernetes' other domain": {
			func(p packages) { p["cmd/x"].Imports = []string{"sigs.k8s.io/yaml"} },
			"cmd/x imports sigs.k8s.io/yaml: only kube, source, cmd, test and bench",
		},
		"Kubernetes in a test": {
			func(p packages) { p["net"].TestImports = []string{"k8s.io/api/core/v1"} },
			"a test of net imports k8s.io/api/core/v1: only kube, source, cmd, test and bench",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parsed, err := imports.ParseTable(testTable)
			if err != nil {
				t.Fatal(err)
			}
			packages := conformingPackages()
			tc.change(packages)
			var list []imports.Package
			for _, p := range packages {
				list = append(list, *p)
			}
			err = parsed.Check("m", list)
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("got %v, want no error", err)
			case tc.want != "" && err == nil:
				t.Errorf("got no error, want %q", tc.want)
			case tc.want != "" && (!strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n")):
				t.Errorf("got %v, want one line with %q", err, tc.want)
			}
		})
	}
}

func TestCheckReportsAll(t *testing.T) {
	t.Parallel()
	parsed, err := imports.ParseTable(testTable)
	if err != nil {
		t.Fatal(err)
	}
	err = parsed.Check("m", []imports.Package{
		{Folder: "net"},
		{Folder: "kube", Imports: []string{"m/net", "m/fake", "m/contract"}},
		{Folder: "contract"},
	})
	if err == nil {
		t.Fatal("got no error")
	}
	want := []string{
		"kube imports m/net: not in the imports that its row allows",
		"kube imports m/fake: not in the imports that its row allows",
		"cmd/x: a row in the table without a package",
		"fake: a row in the table without a package",
		"source/a: a row in the table without a package",
		"source/b: a row in the table without a package",
		"test/cluster: a row in the table without a package",
	}
	if diff := cmp.Diff(want, strings.Split(err.Error(), "\n")); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
}

func TestParseTableInvalid(t *testing.T) {
	t.Parallel()
	const head = "## Packages\n| folder | what lives there | may import |\n|---|---|---|\n"
	for name, tc := range map[string]struct{ markdown, want string }{
		"empty document":               {"", "no table under"},
		"table under another heading":  {"## Else\n| folder | x | y |\n|---|---|---|\n| `a` | b | – |\n", "no table under"},
		"heading without rows":         {head, "no table under"},
		"missing column":               {head + "| `a` | – |\n", "line 4: 2 columns"},
		"folder without backquotes":    {head + "| a | b | – |\n", `line 4: folder "a"`},
		"half a pair of backquotes":    {head + "| `a | b | – |\n", "line 4: folder \"`a\""},
		"empty backquotes":             {head + "| `` | b | – |\n", "line 4: folder"},
		"two rows for one folder":      {head + "| `a` | b | – |\n| `a` | b | – |\n", "line 5: duplicate row for a"},
		"unknown word":                 {head + "| `a` | b | whatever |\n", `line 4: may import "whatever"`},
		"empty cell":                   {head + "| `a` | b | |\n", `line 4: may import ""`},
		"folder without a row":         {head + "| `a` | b | `c` |\n", "the row of a allows importing c, which has no row"},
		"Kubernetes in a wrong folder": {head + "| `nft` | b | k8s API types |\n", `line 4: "k8s API types" in the row of nft`},
		"folder with a common prefix":  {head + "| `sources` | b | k8s API types |\n", "in the row of sources"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := imports.ParseTable(tc.markdown)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}
