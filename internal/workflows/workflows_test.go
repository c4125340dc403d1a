// Package workflows contains only tests of the GitHub workflows: they check references to make
// targets and pinned actions, which GitHub would report only after a push.
package workflows_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const root = "../.."

type step struct {
	Uses string `yaml:"uses"`
	Run  string `yaml:"run"`
}

type workflow struct {
	Permissions map[string]string `yaml:"permissions"`
	Jobs        map[string]struct {
		Strategy struct {
			Matrix map[string][]string `yaml:"matrix"`
		} `yaml:"strategy"`
		Steps []step `yaml:"steps"`
	} `yaml:"jobs"`
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func readYAML(t *testing.T, path string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(read(t, path)), into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// glob returns the paths that match a pattern, relative to the root of the repository.
func glob(t *testing.T, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(root, pattern))
	if err != nil || len(paths) == 0 {
		t.Fatalf("%s: %d files, error %v", pattern, len(paths), err)
	}
	for i, path := range paths {
		if paths[i], err = filepath.Rel(root, path); err != nil {
			t.Fatal(err)
		}
	}
	return paths
}

// makeTargets returns the targets of the make commands in a script.
func makeTargets(script string) []string {
	var targets []string
	for _, match := range regexp.MustCompile(`(?m)^make ([^\s]+)`).FindAllStringSubmatch(script, -1) {
		targets = append(targets, match[1])
	}
	return targets
}

// targetsOf returns the make targets that a workflow runs, including those from a matrix.
func targetsOf(w workflow) []string {
	var targets []string
	for _, job := range w.Jobs {
		for _, s := range job.Steps {
			for _, target := range makeTargets(s.Run) {
				if !strings.HasPrefix(target, "${{") {
					targets = append(targets, target)
				}
			}
			for key, values := range job.Strategy.Matrix {
				if strings.Contains(s.Run, "make ${{ matrix."+key+" }}") {
					targets = append(targets, values...)
				}
			}
		}
	}
	return targets
}

func TestWorkflows(t *testing.T) {
	t.Parallel()
	makefile := read(t, "Makefile")
	pinned := regexp.MustCompile(`^[\w.-]+/[\w./-]+@[0-9a-f]{40}$`)
	var called []string
	for _, path := range glob(t, ".github/workflows/*.yml") {
		var w workflow
		readYAML(t, path, &w)
		if len(w.Jobs) == 0 {
			t.Errorf("%s: no jobs", path)
		}
		if w.Permissions["contents"] != "read" || len(w.Permissions) != 1 {
			t.Errorf("%s: got permissions %v, want only contents: read", path, w.Permissions)
		}
		for name, job := range w.Jobs {
			for _, s := range job.Steps {
				if s.Uses != "" && !pinned.MatchString(s.Uses) {
					t.Errorf("%s: job %s uses %s: pin it to a commit of 40 hexadecimal digits", path, name, s.Uses)
				}
			}
		}
		for _, target := range targetsOf(w) {
			if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(target) + `:`).MatchString(makefile) {
				t.Errorf("%s: no target %s in the Makefile", path, target)
			}
			called = append(called, target)
		}
	}
	want := makeTargets(read(t, ".ci/run"))
	if len(want) == 0 {
		t.Fatal(".ci/run runs no make target")
	}
	for _, target := range want {
		if !slices.Contains(called, target) {
			t.Errorf(".ci/run runs make %s, but no workflow does", target)
		}
	}
}

// TestDependabot checks that Dependabot updates every Go module.
func TestDependabot(t *testing.T) {
	t.Parallel()
	var config struct {
		Updates []struct {
			Ecosystem   string   `yaml:"package-ecosystem"`
			Directories []string `yaml:"directories"`
		} `yaml:"updates"`
	}
	readYAML(t, ".github/dependabot.yml", &config)
	var got, want []string
	for _, u := range config.Updates {
		if u.Ecosystem == "gomod" {
			got = append(got, u.Directories...)
		}
	}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && slices.Contains([]string{".git", ".cache", "testdata", "bin"}, entry.Name()) {
			return filepath.SkipDir
		}
		if entry.Name() == "go.mod" {
			dir, err := filepath.Rel(root, filepath.Dir(path))
			want = append(want, filepath.Join("/", dir))
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("gomod directories of .github/dependabot.yml are %v, want the directories of all modules: %v", got, want)
	}
}

// TestIssueForms checks requirements of GitHub: each issue form has a name, a description, and
// fields with unique IDs.
func TestIssueForms(t *testing.T) {
	t.Parallel()
	for _, path := range glob(t, ".github/ISSUE_TEMPLATE/*.yml") {
		if filepath.Base(path) == "config.yml" {
			continue
		}
		var form struct {
			Name        string `yaml:"name"`
			Description string `yaml:"description"`
			Body        []struct {
				Type string `yaml:"type"`
				ID   string `yaml:"id"`
			} `yaml:"body"`
		}
		readYAML(t, path, &form)
		if form.Name == "" || form.Description == "" || len(form.Body) == 0 {
			t.Errorf("%s: want a name, a description and a body", path)
		}
		ids := map[string]bool{}
		for _, field := range form.Body {
			if field.Type != "markdown" && (field.ID == "" || ids[field.ID]) {
				t.Errorf("%s: field of type %s has the ID %q, want a unique ID", path, field.Type, field.ID)
			}
			ids[field.ID] = true
		}
	}
}
