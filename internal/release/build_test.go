package main

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
)

// copyCheckout copies the source files of the repository to dir.
func copyCheckout(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(repository, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(repository, path)
		if err != nil {
			return err
		}
		if slices.Contains([]string{".git", ".cache", "bin"}, relative) {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		target := filepath.Join(dir, relative)
		switch {
		case entry.IsDir():
			return os.MkdirAll(target, 0o755)
		case !entry.Type().IsRegular():
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, content, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestReproducibleProgram builds the program in another directory, with the Makefile, and compares
// it with the program that the tests use. FAIRLEAD_EMPTY_BUILD_CACHE=1 compiles all packages
// again, which takes minutes; by default, Go reuses packages that do not depend on the directory.
func TestReproducibleProgram(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "another", "directory")
	copyCheckout(t, dir)
	program := filepath.Join("bin", "linux-"+runtime.GOARCH, "fairlead")
	cmd := exec.CommandContext(t.Context(), "make", "--no-print-directory", program, "VERSION=v1.2.3")
	cmd.Dir = dir
	if os.Getenv("FAIRLEAD_EMPTY_BUILD_CACHE") != "" {
		cmd.Env = append(os.Environ(), "GOCACHE="+filepath.Join(t.TempDir(), "cache"))
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make %s: %v\n%s", program, err, out)
	}
	want, err := os.ReadFile(hostProgram)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, program))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("two builds in different directories differ: %d and %d bytes", len(want), len(got))
	}
	if root, err := filepath.Abs(repository); err != nil || bytes.Contains(want, []byte(root)) || bytes.Contains(got, []byte(dir)) {
		t.Errorf("the program contains the directory of its build (%v)", err)
	}
}
