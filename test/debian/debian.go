// Package debian unpacks packages of Debian releases without installing them.
package debian

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

//go:embed fetch.sh
var script string

// Unpack creates the directory dir with the files of packages of a Debian release, such as
// "trixie". The packages come from the archives in this machine's apt sources. Unpack does
// not follow dependencies, but a package name with a trailing slash selects the packages that
// it depends on. Progress and errors of apt go to standard error. See fetch.sh for the
// required programs.
func Unpack(ctx context.Context, architecture, suite, dir string, packages ...string) error {
	cmd := exec.CommandContext(ctx, "bash", append([]string{"-c", script, "fetch.sh", "unpack", architecture, suite, dir}, packages...)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("get %s of Debian %s: %w", strings.Join(packages, ", "), suite, err)
	}
	return nil
}
