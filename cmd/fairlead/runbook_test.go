package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// runbookStep is a code block of a document after the comment <!-- step: NAME -->.
type runbookStep struct{ name, commands string }

// readRunbook returns the marked steps of a document in docs, in their order.
func readRunbook(t *testing.T, document string) []runbookStep {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", document))
	if err != nil {
		t.Fatal(err)
	}
	steps, err := parseRunbook(string(text))
	if err != nil {
		t.Fatalf("%s: %v", document, err)
	}
	return steps
}

// parseRunbook parses the text of a document. A marker must precede each block directly.
func parseRunbook(text string) ([]runbookStep, error) {
	var steps []runbookStep
	marker := regexp.MustCompile(`(?m)^ *<!-- step: (.*) -->\n`)
	block := regexp.MustCompile("^ *```sh\n((?s:.*?)) *```\n")
	for _, found := range marker.FindAllStringSubmatchIndex(text, -1) {
		name := text[found[2]:found[3]]
		commands := block.FindStringSubmatch(text[found[1]:])
		if commands == nil {
			return nil, fmt.Errorf("no block of type sh follows the marker of step %q", name)
		}
		steps = append(steps, runbookStep{name, commands[1]})
	}
	return steps, nil
}

func TestParseRunbook(t *testing.T) {
	t.Parallel()
	steps, err := parseRunbook("a\n   <!-- step: one two -->\n   ```sh\n   x\n   y\n   ```\n```sh\nignored\n```\n<!-- step: three -->\n```sh\nz\n```\n")
	if want := (runbookStep{"one two", "   x\n   y\n"}); err != nil || len(steps) != 2 || steps[0] != want || steps[1].commands != "z\n" {
		t.Errorf("steps %q, error %v", steps, err)
	}
	if _, err := parseRunbook("<!-- step: one -->\n\n```sh\nx\n```\n"); err == nil {
		t.Error("no error for a marker without a block")
	}
}
