package imports

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Linked is a package that a program links.
type Linked struct {
	Path    string   // its import path
	Imports []string // the import paths of the packages that it imports
}

// forbiddenPackage describes packages of other modules that a node agent must not link.
type forbiddenPackage struct {
	path   string // import path; the packages below it are forbidden too
	reason string
	// except lists packages that may import it, because the agent needs them.
	except []string
}

const (
	startsPrograms = "it starts programs, and the image contains none"
	onlyTests      = "only tests need it"
	onlyReports    = "only reports of benchmarks need it"
)

// terminalPackages returns the packages of Bubble Tea, which `fairlead top` uses, that import os/exec or image.
// They would start an editor or a pager, and show pictures; the agent does neither.
func terminalPackages() []string {
	return []string{
		"charm.land/bubbletea/v2", "github.com/charmbracelet/colorprofile", "github.com/charmbracelet/ultraviolet",
		"github.com/charmbracelet/x/ansi", "github.com/charmbracelet/x/ansi/kitty", "github.com/lucasb-eyer/go-colorful",
	}
}

// forbiddenPackages returns the packages of other modules and of the standard library that a node
// agent must not link.
func forbiddenPackages() []forbiddenPackage {
	return []forbiddenPackage{
		// client-go/rest imports the credential plugins of kubeconfig files (users[].user.exec)
		// unconditionally.
		{"os/exec", startsPrograms, append([]string{"k8s.io/client-go/plugin/pkg/client/auth/exec"}, terminalPackages()...)},
		{"testing", onlyTests, nil},
		{"net/http/httptest", onlyTests, nil},
		{"github.com/google/go-cmp", onlyTests, nil},
		{"github.com/pion", onlyTests, nil},
		{"k8s.io/client-go/testing", onlyTests, nil},
		{"k8s.io/apiserver", onlyTests, nil},
		{"sigs.k8s.io/controller-runtime", onlyTests, nil},
		{"gonum.org", onlyReports, nil},
		{"codeberg.org", onlyReports, nil},
		{"git.sr.ht", onlyReports, nil},
		{"github.com/ajstarks/svgo", onlyReports, nil},
		{"github.com/golang/freetype", onlyReports, nil},
		{"golang.org/x/image", onlyReports, nil},
		{"image", onlyReports, terminalPackages()},
	}
}

// CheckLinked checks the packages that a program for nodes links, including its own. It must not
// link test helpers of the table, other programs, packages below bench, examples and test, or
// packages of other modules that only these need. program is the folder of the program. The error
// has one line for each deviation, in the order of packages.
func (t *Table) CheckLinked(module, program string, packages []Linked) error {
	var errs []error
	for _, p := range packages {
		folder, ours := strings.CutPrefix(p.Path, module+"/")
		if reason := t.forbiddenOnNode(folder); ours && folder != program && reason != "" {
			errs = append(errs, fmt.Errorf("%s links %s: %s", program, folder, reason))
		}
		for _, path := range p.Imports {
			if reason := forbiddenLink(p.Path, path); reason != "" {
				errs = append(errs, fmt.Errorf("%s links %s, which imports %s: %s", program, p.Path, path, reason))
			}
		}
	}
	return errors.Join(errs...)
}

// forbiddenLink returns the reason why a program for nodes must not link a package of another
// module that importer imports, or an empty string.
func forbiddenLink(importer, path string) string {
	for _, f := range forbiddenPackages() {
		// Imports between forbidden packages are not separate deviations.
		if below(path, f.path) && !below(importer, f.path) && !slices.Contains(f.except, importer) {
			return f.reason
		}
	}
	if strings.HasSuffix(path, "/fake") {
		return onlyTests
	}
	return ""
}

// forbiddenOnNode returns the reason why a program for nodes must not link the package in this
// folder of the module, or an empty string.
func (t *Table) forbiddenOnNode(folder string) string {
	if r := t.rows[folder]; r != nil && r.testHelper {
		return "it is a test helper"
	}
	for _, parent := range []string{"bench", "cmd", "examples", "test"} {
		if below(folder, parent) {
			return "packages below " + parent + " must not run on nodes"
		}
	}
	return ""
}
