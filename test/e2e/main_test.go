//go:build e2e

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"fairlead.io/fairlead/test/controlplane"
)

// moduleRoot is the root directory of the module.
const moduleRoot = "../.."

// sharedCluster is the cluster that most scenarios share.
var sharedCluster *cluster

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			fmt.Fprintln(os.Stderr, "the end-to-end tests create and program network namespaces: run them as root")
			return 1
		}
		var err error
		sharedCluster, err = newCluster(context.Background(), controlplane.Options{ControllerManager: true})
		if err == nil {
			err = sharedCluster.start(context.Background())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, errors.Join(err, sharedCluster.close()))
			return 1
		}
		code := m.Run()
		if err := sharedCluster.close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return code
	}())
}

// buildFairlead builds the program like `make build`.
func buildFairlead(ctx context.Context, dir string) (path string, err error) {
	path = filepath.Join(dir, "fairlead")
	command := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./cmd/fairlead")
	command.Dir = moduleRoot
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := command.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build fairlead: %w\n%s", err, out)
	}
	return path, nil
}
