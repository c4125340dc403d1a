package main

import (
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manFolder is set by `make man`. The generator is a test, because the program does not contain the
// packages that write man pages.
var manFolder = flag.String("man", "", "folder for the man pages and the completions of shells")

// TestManPages writes a man page for each command, and the completions of shells.
func TestManPages(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	if *manFolder != "" {
		folder = *manFolder
	}
	man, completion := filepath.Join(folder, "man8"), filepath.Join(folder, "completion")
	if err := errors.Join(os.MkdirAll(man, 0o755), os.MkdirAll(completion, 0o755)); err != nil { //nolint:gosec // public files
		t.Fatal(err)
	}
	root := rootCommand(func(*slog.Logger) {})
	root.DisableAutoGenTag = true
	date := time.Unix(0, 0) // SOURCE_DATE_EPOCH takes precedence
	header := &doc.GenManHeader{Section: "8", Source: "Fairlead", Manual: "System Administration", Date: &date}
	if err := doc.GenManTree(root, header, man); err != nil {
		t.Fatal(err)
	}
	checkManPages(t, root, man)
	for name, write := range map[string]func(io.Writer) error{
		"fairlead":      func(w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"_fairlead":     root.GenZshCompletion,
		"fairlead.fish": func(w io.Writer) error { return root.GenFishCompletion(w, true) },
	} {
		f, err := os.Create(filepath.Join(completion, name))
		if err == nil {
			err = errors.Join(write(f), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// checkManPages checks that the page of each command contains its options and examples.
func checkManPages(t *testing.T, cmd *cobra.Command, folder string) {
	t.Helper()
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			checkManPages(t, sub, folder)
		}
	}
	page, err := os.ReadFile(filepath.Join(folder, strings.ReplaceAll(cmd.CommandPath(), " ", "-")+".8"))
	if err != nil {
		t.Error(err)
		return
	}
	wanted := []string{".TH", ".SH NAME", cmd.Short}
	if cmd.HasAvailableLocalFlags() {
		wanted = append(wanted, ".SH OPTIONS")
	}
	if cmd.HasExample() {
		wanted = append(wanted, ".SH EXAMPLE")
	}
	text := strings.ReplaceAll(string(page), `\`, "")
	for _, want := range wanted {
		if !strings.Contains(text, strings.ReplaceAll(want, `\`, "")) {
			t.Errorf("the page of %s does not contain %q", cmd.CommandPath(), want)
		}
	}
}
