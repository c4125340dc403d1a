package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// repository is the root of the main module.
const repository = "../.."

// hostProgram is the path of the program that the tests build for this machine. hostLayout is the
// path of a layout with its image.
var hostProgram, hostLayout string

func TestMain(m *testing.M) {
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "fairlead-release")
	if err == nil {
		defer os.RemoveAll(dir)
		hostProgram = filepath.Join(dir, "fairlead")
		build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -X main.version=v1.2.3", "-o", hostProgram, "./cmd/fairlead")
		build.Dir, build.Stdout, build.Stderr, build.Env = repository, os.Stderr, os.Stderr, append(os.Environ(), "CGO_ENABLED=0")
		err = build.Run()
	}
	if err == nil {
		hostLayout = filepath.Join(dir, "layout")
		err = writeLayout(hostLayout, testMetadata(), []string{hostProgram})
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "build the image:", err)
		return 1
	}
	return m.Run()
}

func testMetadata() metadata {
	return metadata{Version: "v1.2.3", Revision: "0123456789abcdef", Source: "https://example.com/fairlead", Created: time.Unix(1_700_000_000, 0).UTC()}
}

// readIndex returns the index of images in a layout, and the descriptors of the SBOMs.
func readIndex(t *testing.T, dir string) (v1.ImageIndex, []v1.Descriptor) {
	t.Helper()
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(top); err != nil {
		t.Fatal(err)
	}
	manifest, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	images, err := top.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return images, manifest.Manifests[1:]
}

// platformImage returns the image for an architecture.
func platformImage(t *testing.T, images v1.ImageIndex, arch string) v1.Image {
	t.Helper()
	manifest, err := images.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range manifest.Manifests {
		if d.Platform != nil && d.Platform.OS == "linux" && d.Platform.Architecture == arch {
			img, err := images.Image(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			return img
		}
	}
	t.Fatalf("no image for linux/%s in %+v", arch, manifest.Manifests)
	return nil
}

// readFiles returns the content of all files below dir.
func readFiles(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, dir)] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestReproducible checks that the same input leads to the same bytes.
func TestReproducible(t *testing.T) {
	t.Parallel()
	second := filepath.Join(t.TempDir(), "layout")
	if err := writeLayout(second, testMetadata(), []string{hostProgram}); err != nil {
		t.Fatal(err)
	}
	a, b := readFiles(t, hostLayout), readFiles(t, second)
	if len(a) != len(b) || len(a) < 6 {
		t.Fatalf("%d and %d files, want the same number", len(a), len(b))
	}
	for path, content := range a {
		if b[path] != content {
			t.Errorf("%s differs between two builds", path)
		}
	}
}

func TestImageConfig(t *testing.T) {
	t.Parallel()
	images, _ := readIndex(t, hostLayout)
	config, err := platformImage(t, images, runtime.GOARCH).ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(config.Config.Entrypoint, []string{programPath}) || config.Config.Cmd != nil || config.Config.User != "" {
		t.Errorf("config %+v, want only the entry point %s", config.Config, programPath)
	}
	for label, want := range map[string]string{"version": "v1.2.3", "revision": "0123456789abcdef", "source": "https://example.com/fairlead", "created": "2023-11-14T22:13:20Z"} {
		if got := config.Config.Labels["org.opencontainers.image."+label]; got != want {
			t.Errorf("label %s: got %q, want %q", label, got, want)
		}
	}
}

// TestSBOM checks that the SBOM names the modules that `go version -m` prints.
func TestSBOM(t *testing.T) {
	t.Parallel()
	images, sboms := readIndex(t, hostLayout)
	if len(sboms) != 1 || sboms[0].ArtifactType != spdxMediaType {
		t.Fatalf("artifacts %+v, want one SBOM", sboms)
	}
	path, err := layout.FromPath(hostLayout)
	if err != nil {
		t.Fatal(err)
	}
	artifact, err := path.Image(sboms[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := artifact.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := platformImage(t, images, runtime.GOARCH).Digest()
	if err != nil {
		t.Fatal(err)
	}
	if manifest.Subject == nil || manifest.Subject.Digest != digest {
		t.Errorf("subject %+v, want the image %s", manifest.Subject, digest)
	}
	text, err := path.Bytes(manifest.Layers[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	var document spdxDocument
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&document); err != nil {
		t.Fatal(err)
	}
	var got []string
	ids := map[string]bool{document.ID: true}
	for _, p := range document.Packages {
		if ids[p.ID] {
			t.Errorf("second package with the ID %s", p.ID)
		}
		ids[p.ID] = true
		got = append(got, p.Name+" "+p.Version)
	}
	for _, r := range document.Relationships {
		if !ids[r.Element] || !ids[r.Related] {
			t.Errorf("relationship %+v: unknown ID", r)
		}
	}
	out, err := exec.CommandContext(t.Context(), "go", "version", "-m", hostProgram).Output()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"fairlead.io/fairlead v1.2.3", "stdlib " + strings.TrimPrefix(runtime.Version(), "go")}
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); len(fields) >= 3 && fields[0] == "dep" {
			want = append(want, fields[1]+" "+fields[2])
		}
	}
	if !slices.Equal(got, want) || len(want) < 10 {
		t.Errorf("packages:\n%q\nwant:\n%q", got, want)
	}
}

// TestPush pushes a layout to a registry, and reads the images and the SBOM from it.
func TestPush(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	repo := strings.TrimPrefix(server.URL, "http://") + "/test/fairlead"
	var out bytes.Buffer
	if err := run(t.Context(), []string{"push", "-layout=" + hostLayout, repo + ":v1.2.3"}, &out, os.Stderr); err != nil {
		t.Fatal(err)
	}
	images, _ := readIndex(t, hostLayout)
	want, err := images.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(out.String()); got != repo+"@"+want.String() {
		t.Errorf("output %s, want %s@%s", got, repo, want)
	}
	tag, err := name.NewTag(repo + ":v1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	pulled, err := remote.Index(tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(pulled); err != nil {
		t.Error(err)
	}
	digest, err := platformImage(t, pulled, runtime.GOARCH).Digest()
	if err != nil {
		t.Fatal(err)
	}
	reference, err := name.NewDigest(repo + "@" + digest.String())
	if err != nil {
		t.Fatal(err)
	}
	referrers, err := remote.Referrers(reference)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := referrers.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 || manifest.Manifests[0].ArtifactType != spdxMediaType {
		t.Errorf("referrers of the image: %+v, want one SBOM", manifest.Manifests)
	}
}

// TestBadInput checks the errors for programs that an image cannot contain.
func TestBadInput(t *testing.T) {
	t.Parallel()
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for want, programs := range map[string][]string{
		"read the build information": {script},
		"second program for":         {hostProgram, hostProgram},
		"no such file":               {"/does/not/exist"},
	} {
		dir := filepath.Join(t.TempDir(), "layout")
		if err := writeLayout(dir, testMetadata(), programs); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got error %v, want %q", programs, err, want)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%q: a layout was written", programs)
		}
	}
}

// runForeign runs the program of an image, with QEMU if it is for another architecture.
func runForeign(t *testing.T, img v1.Image, arch string) {
	t.Helper()
	dir := t.TempDir()
	files := mutate.Extract(img)
	defer files.Close()
	extract(t, files, dir)
	command := []string{filepath.Join(dir, programPath), "version"}
	if arch != runtime.GOARCH {
		name := arch
		if arch == "arm64" {
			name = "aarch64"
		}
		command = slices.Insert(command, 0, filepath.Join(repository, ".cache/qemu-user/usr/bin/qemu-"+name))
	}
	out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "fairlead ") {
		t.Errorf("%s on %s: %v\n%s", command, arch, err, out)
	}
}

// TestArchitectures checks the layout that `make image` has written, and runs its programs.
func TestArchitectures(t *testing.T) {
	t.Parallel()
	dir := os.Getenv("FAIRLEAD_IMAGE_LAYOUT")
	if dir == "" {
		t.Skip("FAIRLEAD_IMAGE_LAYOUT is not set: run make test-release")
	}
	images, sboms := readIndex(t, dir)
	architectures := strings.Fields(os.Getenv("FAIRLEAD_IMAGE_ARCHITECTURES"))
	manifest, err := images.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != len(architectures) || len(sboms) != len(architectures) || len(sboms) == 0 {
		t.Errorf("%d images and %d SBOMs, want those of %q", len(manifest.Manifests), len(sboms), architectures)
	}
	for _, arch := range architectures {
		config, err := platformImage(t, images, arch).ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if config.Architecture != arch {
			t.Errorf("image for %s has the architecture %s", arch, config.Architecture)
		}
		runForeign(t, platformImage(t, images, arch), arch)
	}
}
