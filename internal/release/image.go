package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Paths in the image. kubeProxyPath is where the DaemonSets of kubeadm and kind start
// kube-proxy.
const (
	programPath   = "/fairlead"
	kubeProxyPath = "/usr/local/bin/kube-proxy"
)

// spdxMediaType is the media type of an SBOM, and the type of the artifact that contains it.
const spdxMediaType = "application/spdx+json"

// metadata describes the programs of a release.
type metadata struct {
	Version  string
	Revision string
	Source   string // may be empty
	Created  time.Time
}

// labels returns the labels that the OCI image specification defines.
func (m metadata) labels() map[string]string {
	labels := map[string]string{
		"org.opencontainers.image.title":       "fairlead",
		"org.opencontainers.image.description": "Implements Kubernetes Services on a node; replaces kube-proxy",
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.version":     m.Version,
		"org.opencontainers.image.created":     m.Created.Format(time.RFC3339),
	}
	if m.Revision != "" {
		labels["org.opencontainers.image.revision"] = m.Revision
	}
	if m.Source != "" {
		labels["org.opencontainers.image.source"] = m.Source
	}
	return labels
}

// program is a binary of the node agent.
type program struct {
	content []byte
	info    *debug.BuildInfo
	os      string
	arch    string
}

func readProgram(path string) (*program, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	info, err := buildinfo.Read(bytes.NewReader(content))
	if err != nil {
		return nil, fmt.Errorf("%s: read the build information: %w", path, err)
	}
	p := &program{content: content, info: info}
	for _, s := range info.Settings {
		switch {
		case s.Key == "GOOS":
			p.os = s.Value
		case s.Key == "GOARCH":
			p.arch = s.Value
		case s.Key == "CGO_ENABLED" && s.Value != "0":
			return nil, fmt.Errorf("%s: built with CGO_ENABLED=%s: want a static program, CGO_ENABLED=0", path, s.Value)
		}
	}
	if p.os != "linux" || p.arch == "" {
		return nil, fmt.Errorf("%s: built for GOOS=%s GOARCH=%s, want linux", path, p.os, p.arch)
	}
	return p, nil
}

// writeLayout creates an OCI image layout. Its index.json lists the index of the images, with
// the version as its name, and the SBOMs, which refer to their images.
func writeLayout(dir string, m metadata, paths []string) error {
	images := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	top := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var programs []*program
	for _, path := range paths {
		p, err := readProgram(path)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(programs, func(other *program) bool { return other.arch == p.arch }) {
			return fmt.Errorf("%s: second program for %s", path, p.arch)
		}
		programs = append(programs, p)
	}
	slices.SortFunc(programs, func(a, b *program) int { return cmp.Compare(a.arch, b.arch) })
	var sboms []mutate.IndexAddendum
	for _, p := range programs {
		img, err := p.image(m)
		if err != nil {
			return fmt.Errorf("image for %s: %w", p.arch, err)
		}
		images = mutate.AppendManifests(images, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: p.os, Architecture: p.arch}},
		})
		sbom, err := sbomArtifact(img, p, m)
		if err != nil {
			return fmt.Errorf("SBOM for %s: %w", p.arch, err)
		}
		sboms = append(sboms, mutate.IndexAddendum{Add: sbom, Descriptor: v1.Descriptor{ArtifactType: spdxMediaType}})
	}
	annotated, ok := mutate.Annotations(images, m.labels()).(v1.ImageIndex)
	if !ok {
		return errors.New("annotate the index: not an index")
	}
	top = mutate.AppendManifests(top, mutate.IndexAddendum{
		Add: annotated, Descriptor: v1.Descriptor{Annotations: map[string]string{"org.opencontainers.image.ref.name": m.Version}},
	})
	top = mutate.AppendManifests(top, sboms...)
	// The layout of an earlier build may contain other blobs.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	_, err := layout.Write(dir, top)
	return err
}

// image returns an image that contains only the program.
func (p *program) image(m metadata) (v1.Image, error) {
	files, err := p.layer(m.Created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.DefaultCompression), tarball.WithCompressedCaching,
	)
	if err != nil {
		return nil, err
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.Append(base, mutate.Addendum{
		Layer: layer, History: v1.History{Created: v1.Time{Time: m.Created}, CreatedBy: "fairlead " + m.Version},
	})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = p.os, p.arch, v1.Time{Time: m.Created}
	config.Config = v1.Config{Entrypoint: []string{programPath}, WorkingDir: "/", Labels: m.labels()}
	return mutate.ConfigFile(img, config)
}

// layer returns the file system of the image as a tar archive.
func (p *program) layer(created time.Time) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeReg, Name: "fairlead", Mode: 0o755, Size: int64(len(p.content))},
		{Typeflag: tar.TypeDir, Name: "usr/", Mode: 0o755},
		{Typeflag: tar.TypeDir, Name: "usr/local/", Mode: 0o755},
		{Typeflag: tar.TypeDir, Name: "usr/local/bin/", Mode: 0o755},
		{Typeflag: tar.TypeSymlink, Name: kubeProxyPath[1:], Linkname: programPath, Mode: 0o777},
	} {
		h.ModTime, h.Format = created, tar.FormatUSTAR
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(p.content); err != nil {
				return nil, err
			}
		}
	}
	return b.Bytes(), w.Close()
}

// sbomArtifact returns a manifest that contains the program's SBOM and refers to the image.
func sbomArtifact(img v1.Image, p *program, m metadata) (v1.Image, error) {
	digest, err := img.Digest()
	if err != nil {
		return nil, err
	}
	size, err := img.Size()
	if err != nil {
		return nil, err
	}
	text, err := spdx(p, m)
	if err != nil {
		return nil, err
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), spdxMediaType)
	artifact, err := mutate.Append(base, mutate.Addendum{Layer: static.NewLayer(text, spdxMediaType)})
	if err != nil {
		return nil, err
	}
	subject, ok := mutate.Subject(artifact, v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: digest, Size: size}).(v1.Image)
	if !ok {
		return nil, errors.New("set the subject: not an image")
	}
	return subject, nil
}
