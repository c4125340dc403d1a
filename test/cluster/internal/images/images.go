// Package images creates the container images of a cluster without a container engine and
// without a registry: from this machine's programs and the libraries that they load, and from
// the programs of build.sh. The images of Kubernetes' end-to-end tests get the names that the
// tests use.
package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Names of the images that are not Kubernetes' own.
const (
	Fairlead  = "docker.io/library/fairlead:latest"
	CoreDNS   = "docker.io/library/coredns:latest"
	KubeProxy = "docker.io/library/kube-proxy:latest"
)

// Programs are the directories of programs that images contain.
type Programs struct {
	// Dir has the programs of build.sh.
	Dir string
	// KubeProxy is the path of kube-proxy.
	KubeProxy string
}

// Write writes an archive with all images but Fairlead's, unless the archive is up to date. Names
// are the images that the end-to-end tests list (e2e.test --list-images).
func Write(ctx context.Context, archive string, programs Programs, names []string) error {
	definitions, err := define(programs, names)
	if err != nil {
		return err
	}
	want, err := fingerprint(definitions)
	if err != nil {
		return err
	}
	record := archive + ".built"
	if got, err := os.ReadFile(record); err == nil && string(got) == want {
		if _, err := os.Stat(archive); err == nil {
			return nil
		}
	}
	b := &builder{layers: map[*contents]v1.Layer{}}
	built := map[name.Reference]v1.Image{}
	for _, d := range definitions {
		if err := ctx.Err(); err != nil {
			return err
		}
		img, err := b.image(d)
		if err != nil {
			return fmt.Errorf("create image %s: %w", d.names[0], err)
		}
		for _, n := range d.names {
			ref, err := name.ParseReference(n)
			if err != nil {
				return err
			}
			built[ref] = img
		}
	}
	if err := replace(archive, func(w io.Writer) error { return tarball.MultiRefWrite(built, w) }); err != nil {
		return fmt.Errorf("write the images: %w", err)
	}
	return os.WriteFile(record, []byte(want), 0o600)
}

// WriteFairlead writes an archive with Fairlead's image for this machine, from the OCI layout that
// `make image` writes.
func WriteFairlead(archive, dir, architecture string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return fmt.Errorf("no image in %s: run make image: %w", dir, err)
	}
	img, err := find(index, architecture)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	ref, err := name.ParseReference(Fairlead)
	if err != nil {
		return err
	}
	return replace(archive, func(w io.Writer) error { return tarball.Write(ref, img, w) })
}

// find returns the image for an architecture in an index of indexes.
func find(index v1.ImageIndex, architecture string) (v1.Image, error) {
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range manifest.Manifests {
		switch {
		case d.MediaType.IsIndex():
			inner, err := index.ImageIndex(d.Digest)
			if err != nil {
				return nil, err
			}
			return find(inner, architecture)
		case d.Platform != nil && d.Platform.Architecture == architecture:
			return index.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("no image for %s", architecture)
}

// replace writes a file, or leaves the old one if write fails.
func replace(path string, write func(io.Writer) error) error {
	temporary, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	err = errors.Join(write(temporary), temporary.Close())
	if err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return nil
}

// builder creates images and keeps the layers that several images share.
type builder struct {
	layers map[*contents]v1.Layer
}

func (b *builder) image(d definition) (v1.Image, error) {
	img := empty.Image
	for _, c := range d.layers {
		layer, ok := b.layers[c]
		if !ok {
			data, err := c.tar()
			if err != nil {
				return nil, err
			}
			// Compression would cost more time than it saves on one machine.
			layer = static.NewLayer(data, types.DockerUncompressedLayer)
			b.layers[c] = layer
		}
		var err error
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			return nil, err
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", d.architecture, d.config
	return mutate.ConfigFile(img, file)
}

// fingerprint identifies the content of the images without reading the programs.
func fingerprint(definitions []definition) (string, error) {
	hash := sha256.New()
	for _, d := range definitions {
		_, _ = fmt.Fprintln(hash, d.names, d.architecture, d.config)
		for _, c := range d.layers {
			if err := c.fingerprint(hash); err != nil {
				return "", err
			}
		}
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// ParseList returns the image names in the output of e2e.test --list-images.
func ParseList(output string) []string {
	var names []string
	for line := range strings.Lines(output) {
		if line = strings.TrimSpace(line); strings.Contains(line, "/") && !strings.ContainsAny(line, " \t") {
			names = append(names, line)
		}
	}
	return names
}
