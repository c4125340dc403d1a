// Package debian unpacks packages of Debian releases, without installing them.
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

// Unpack creates the folder dir with the files of packages of a Debian release,
// such as "trixie", from the archives in this machine's apt sources. It does not
// follow dependencies; a package with a slash behind its name stands for the
// packages that it depends on. Progress and errors of apt go to standard error.
// See fetch.sh for the programs that it needs.
func Unpack(ctx context.Context, architecture, suite, dir string, packages ...string) error {
	cmd := exec.CommandContext(ctx, "bash", append([]string{"-c", script, "fetch.sh", "unpack", architecture, suite, dir}, packages...)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("get %s of Debian %s: %w", strings.Join(packages, ", "), suite, err)
	}
	return nil
}
