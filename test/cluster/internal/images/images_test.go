package images

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func TestImage(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	base, extra := newContents(), newContents()
	base.program("usr/bin/program", program)
	base.dirs(0o777|os.ModeSticky, "tmp")
	base.link("bin/program", "/usr/bin/program")
	extra.text("etc/text", "text")
	b := &builder{layers: map[*contents]v1.Layer{}}
	img, err := b.image(definition{
		names: []string{"a"}, layers: []*contents{base, extra}, architecture: "amd64", config: v1.Config{Entrypoint: []string{"/bin/program"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "images.tar")
	ref, err := name.ParseReference("registry.k8s.io/test:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := replace(archive, func(w io.Writer) error { return tarball.Write(ref, img, w) }); err != nil {
		t.Fatal(err)
	}
	read, err := tarball.ImageFromPath(archive, nil)
	if err != nil {
		t.Fatal(err)
	}
	config, err := read.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Architecture != "amd64" || !slices.Equal(config.Config.Entrypoint, []string{"/bin/program"}) {
		t.Errorf("configuration %+v", config)
	}
	want := [][]string{
		{"bin/ drwxr-xr-x", "bin/program Lrwxrwxrwx /usr/bin/program", "tmp/ dtrwxrwxrwx", "usr/ drwxr-xr-x", "usr/bin/ drwxr-xr-x", "usr/bin/program -rwxr-xr-x content"},
		{"etc/ drwxr-xr-x", "etc/text -rw-r--r-- text"},
	}
	if diff := cmp.Diff(want, layers(t, read)); diff != "" {
		t.Errorf("layers (-want +got):\n%s", diff)
	}
}

// layers lists the files of each layer.
func layers(t *testing.T, img v1.Image) [][]string {
	t.Helper()
	all, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var lists [][]string
	for _, layer := range all {
		content, err := layer.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for r := tar.NewReader(content); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			text := h.Name + " " + h.FileInfo().Mode().String()
			data, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			if rest := h.Linkname + string(data); rest != "" {
				text += " " + rest
			}
			list = append(list, text)
		}
		lists = append(lists, list)
	}
	return lists
}

func TestToolHasItsLibraries(t *testing.T) {
	t.Parallel()
	c := newContents()
	if err := c.tools("sh"); err != nil {
		t.Fatal(err)
	}
	if _, ok := c.files["usr/bin/sh"]; !ok || len(c.files) < 2 {
		t.Errorf("files %v, want sh and its libraries", c.files)
	}
	if err := c.tools("no-such-program"); err == nil {
		t.Error("no error for a program that is not installed")
	}
}

func TestParseList(t *testing.T) {
	t.Parallel()
	got := ParseList("I1130 log line with a/path\n registry.k8s.io/pause:3.10 \n\ngcr.io/a/b:1\n")
	if diff := cmp.Diff([]string{"registry.k8s.io/pause:3.10", "gcr.io/a/b:1"}, got); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}
