package imports_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/imports"
)

// TestAgentLinkedPackages checks that the node agent does not link packages that only tests and
// benchmarks need.
func TestAgentLinkedPackages(t *testing.T) {
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
	dependOnFolders(t, module.Dir)
	const agent = "cmd/fairlead"
	var linked []imports.Linked
	goList(t, module.Dir, func(d *json.Decoder) error {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); err != nil {
			return err
		}
		linked = append(linked, imports.Linked{Path: p.ImportPath, Imports: p.Imports})
		return nil
	}, "-deps", "-json=ImportPath,Imports", "./"+agent)
	if len(linked) == 0 || linked[len(linked)-1].Path != module.Path+"/"+agent {
		t.Fatalf("go list -deps returned %d packages, want %s as the last", len(linked), agent)
	}
	// The limits of inotify are shared by all programs of a user. A package that watches files must
	// work without: see its test TestReloaderWithoutInotify or TestRunWithoutInotify. client-go reads
	// certificates and tokens periodically, and the instance lock and the kubeconfig are not watched.
	watching := map[string]bool{module.Path + "/internal/config": true, module.Path + "/source/manifest": true}
	for _, p := range linked {
		if slices.Contains(p.Imports, "github.com/fsnotify/fsnotify") && !watching[p.Path] {
			t.Errorf("%s watches files: test that the agent works when no inotify instance is available", p.Path)
		}
	}
	if err := table.CheckLinked(module.Path, agent, linked); err != nil {
		t.Errorf("the node agent links forbidden packages; move the code that needs them to another program:\n%v", err)
	}
}

func TestCheckLinked(t *testing.T) {
	t.Parallel()
	table, err := imports.ParseTable(testTable)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		extra imports.Linked
		want  string // the single line of the error
	}{
		"no deviation":        {},
		"benchmark":           {extra: imports.Linked{Path: "m/bench"}, want: "cmd/x links bench: packages below bench must not run on nodes"},
		"part of a benchmark": {extra: imports.Linked{Path: "m/bench/report"}, want: "cmd/x links bench/report: packages below bench must not run on nodes"},
		"folder with a common prefix": {
			extra: imports.Linked{Path: "m/benches"},
		},
		"other module's folder": {
			extra: imports.Linked{Path: "example.com/bench"},
		},
		"example":       {extra: imports.Linked{Path: "m/examples/demo"}, want: "cmd/x links examples/demo: packages below examples must not run on nodes"},
		"test":          {extra: imports.Linked{Path: "m/test/e2e"}, want: "cmd/x links test/e2e: packages below test must not run on nodes"},
		"other program": {extra: imports.Linked{Path: "m/cmd/y"}, want: "cmd/x links cmd/y: packages below cmd must not run on nodes"},
		"test helper":   {extra: imports.Linked{Path: "m/fake"}, want: "cmd/x links fake: it is a test helper"},
		"os/exec": {
			extra: imports.Linked{Path: "m/kube", Imports: []string{"os/exec"}},
			want:  "cmd/x links m/kube, which imports os/exec: it starts programs, and the image contains none",
		},
		"os/exec of another module": {
			extra: imports.Linked{Path: "example.com/a", Imports: []string{"os/exec"}},
			want:  "cmd/x links example.com/a, which imports os/exec: it starts programs, and the image contains none",
		},
		"os/exec where it is allowed": {
			extra: imports.Linked{Path: "k8s.io/client-go/plugin/pkg/client/auth/exec", Imports: []string{"os/exec"}},
		},
		"testing": {
			extra: imports.Linked{Path: "m/kube", Imports: []string{"testing/synctest"}},
			want:  "cmd/x links m/kube, which imports testing/synctest: only tests need it",
		},
		"fake clients": {
			extra: imports.Linked{Path: "m/kube", Imports: []string{"k8s.io/client-go/kubernetes/fake"}},
			want:  "cmd/x links m/kube, which imports k8s.io/client-go/kubernetes/fake: only tests need it",
		},
		"charts": {
			extra: imports.Linked{Path: "m/kube", Imports: []string{"gonum.org/v1/plot/vg"}},
			want:  "cmd/x links m/kube, which imports gonum.org/v1/plot/vg: only reports of benchmarks need it",
		},
		"imports between forbidden packages": {
			extra: imports.Linked{Path: "gonum.org/v1/plot/vg", Imports: []string{"gonum.org/v1/plot/font"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			linked := []imports.Linked{
				{Path: "os/exec", Imports: []string{"os"}},
				{Path: "m/contract", Imports: []string{"slices"}},
				tc.extra,
				{Path: "m/cmd/x", Imports: []string{"m/contract", "github.com/spf13/cobra"}},
			}
			err := table.CheckLinked("m", "cmd/x", linked)
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("got %v, want no error", err)
			case tc.want != "" && (err == nil || strings.TrimSpace(err.Error()) != tc.want):
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
