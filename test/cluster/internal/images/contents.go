package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// contents are the files of a layer.
type contents struct {
	files map[string]file // by path without the leading slash
}

// file is a file of the machine, a symbolic link, a directory or a text.
type file struct {
	source string // path on this machine
	link   string // target of a symbolic link
	text   string
	mode   os.FileMode
	dir    bool
}

func newContents() *contents { return &contents{files: map[string]file{}} }

func (c *contents) add(name string, f file) { c.files[strings.TrimPrefix(name, "/")] = f }

// program adds a program without its libraries.
func (c *contents) program(name, source string) { c.add(name, file{source: source, mode: 0o755}) }

func (c *contents) link(name, target string) { c.add(name, file{link: target}) }

func (c *contents) text(name, text string) { c.add(name, file{text: text, mode: 0o644}) }

func (c *contents) dirs(mode os.FileMode, paths ...string) {
	for _, p := range paths {
		c.add(p, file{dir: true, mode: mode})
	}
}

// library matches the paths in the output of ldd.
var library = regexp.MustCompile(`(/\S+\.so\S*) \(0x`)

// tool adds an installed program of this machine and the libraries that it loads.
func (c *contents) tool(target, name string) error {
	source, err := exec.LookPath(name)
	if err != nil {
		return fmt.Errorf("%w: run make deps", err)
	}
	c.program(target, source)
	// ldd fails for a static program.
	out, err := exec.Command("ldd", source).CombinedOutput() //nolint:noctx // ends at once
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("list the libraries of %s: %w", source, err)
	}
	for _, match := range library.FindAllStringSubmatch(string(out), -1) {
		c.program(match[1], match[1])
	}
	return nil
}

// tools adds programs of this machine to /usr/bin.
func (c *contents) tools(names ...string) error {
	for _, name := range names {
		if err := c.tool("usr/bin/"+name, name); err != nil {
			return err
		}
	}
	return nil
}

// fingerprint writes what identifies the contents: names, and the size and the time of files.
func (c *contents) fingerprint(w io.Writer) error {
	for _, name := range slices.Sorted(maps.Keys(c.files)) {
		f := c.files[name]
		_, _ = fmt.Fprintln(w, name, f)
		if f.source == "" {
			continue
		}
		info, err := os.Stat(f.source)
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintln(w, info.Size(), info.ModTime().UnixNano())
	}
	return nil
}

// tar returns the layer as an archive. Parent directories come first, with mode 0755 unless the
// contents have them.
func (c *contents) tar() ([]byte, error) {
	all := maps.Clone(c.files)
	for name := range c.files {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, ok := all[dir]; !ok {
				all[dir] = file{dir: true, mode: 0o755}
			}
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if err := all[name].write(w, name); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

func (f file) write(w *tar.Writer, name string) error {
	h := &tar.Header{Name: name, Mode: int64(f.mode.Perm())}
	if f.mode&os.ModeSticky != 0 {
		h.Mode |= 0o1000
	}
	switch {
	case f.dir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
		return w.WriteHeader(h)
	case f.link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		return w.WriteHeader(h)
	}
	data := []byte(f.text)
	if f.source != "" {
		var err error
		// The path may be a symbolic link, which the image does not contain.
		if data, err = os.ReadFile(filepath.Clean(f.source)); err != nil {
			return err
		}
	}
	h.Typeflag, h.Size = tar.TypeReg, int64(len(data))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
