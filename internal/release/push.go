package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// push copies the images of a layout to a tag, and the SBOMs beside it. It returns the reference
// of the index by digest.
func push(ctx context.Context, dir, reference, user, password string) (string, error) {
	tag, err := name.NewTag(reference, name.StrictValidation)
	if err != nil {
		return "", err
	}
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return "", err
	}
	manifest, err := top.IndexManifest()
	if err != nil {
		return "", err
	}
	options := []remote.Option{remote.WithContext(ctx)}
	if user != "" {
		options = append(options, remote.WithAuth(&authn.Basic{Username: user, Password: password}))
	}
	var digest v1.Hash
	for _, d := range manifest.Manifests {
		if d.MediaType.IsIndex() {
			index, err := top.ImageIndex(d.Digest)
			if err != nil {
				return "", err
			}
			if err := remote.WriteIndex(tag, index, options...); err != nil {
				return "", err
			}
			digest = d.Digest
		}
	}
	if digest == (v1.Hash{}) {
		return "", errors.New("the layout has no index of images: run make image")
	}
	for _, d := range manifest.Manifests {
		if d.ArtifactType != spdxMediaType {
			continue
		}
		sbom, err := top.Image(d.Digest)
		if err != nil {
			return "", err
		}
		if err := remote.Write(tag.Digest(d.Digest.String()), sbom, options...); err != nil {
			return "", fmt.Errorf("SBOM %s: %w", d.Digest, err)
		}
	}
	return tag.Digest(digest.String()).String(), nil
}
