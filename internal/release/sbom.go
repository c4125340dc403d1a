package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"runtime/debug"
	"strings"
	"time"
)

// These types are the part of SPDX 2.3 that describes a program and the Go modules in it.
type (
	spdxDocument struct {
		Version       string             `json:"spdxVersion"`
		DataLicense   string             `json:"dataLicense"`
		ID            string             `json:"SPDXID"`
		Name          string             `json:"name"`
		Namespace     string             `json:"documentNamespace"`
		Creation      spdxCreation       `json:"creationInfo"`
		Packages      []spdxPackage      `json:"packages"`
		Relationships []spdxRelationship `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		ID               string         `json:"SPDXID"`
		Name             string         `json:"name"`
		Version          string         `json:"versionInfo"`
		DownloadLocation string         `json:"downloadLocation"`
		FilesAnalyzed    bool           `json:"filesAnalyzed"`
		LicenseConcluded string         `json:"licenseConcluded"`
		LicenseDeclared  string         `json:"licenseDeclared"`
		Copyright        string         `json:"copyrightText"`
		SourceInfo       string         `json:"sourceInfo,omitempty"`
		Checksums        []spdxChecksum `json:"checksums,omitempty"`
		References       []spdxRef      `json:"externalRefs"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	spdxRelationship struct {
		Element string `json:"spdxElementId"`
		Type    string `json:"relationshipType"`
		Related string `json:"relatedSpdxElement"`
	}
)

const noAssertion = "NOASSERTION"

// spdx returns the SBOM of a program. It lists the modules that the linker recorded, and Go's
// standard library.
func spdx(p *program, m metadata) ([]byte, error) {
	sum := sha256.Sum256(p.content)
	digest := hex.EncodeToString(sum[:])
	main := goPackage("SPDXRef-Package-fairlead", p.info.Main.Path, m.Version)
	main.LicenseDeclared = "Apache-2.0"
	main.Checksums = []spdxChecksum{{Algorithm: "SHA256", Value: digest}}
	d := spdxDocument{
		Version: "SPDX-2.3", DataLicense: "CC0-1.0", ID: "SPDXRef-DOCUMENT",
		Name:      fmt.Sprintf("fairlead-%s-%s-%s", m.Version, p.os, p.arch),
		Namespace: "https://fairlead.io/spdx/" + digest,
		Creation:  spdxCreation{Created: m.Created.Format(time.RFC3339), Creators: []string{"Tool: fairlead-release"}},
		Packages:  []spdxPackage{main, goPackage("SPDXRef-Package-stdlib", "stdlib", strings.TrimPrefix(p.info.GoVersion, "go"))},
		Relationships: []spdxRelationship{
			{Element: "SPDXRef-DOCUMENT", Type: "DESCRIBES", Related: main.ID},
			{Element: main.ID, Type: "DEPENDS_ON", Related: "SPDXRef-Package-stdlib"},
		},
	}
	for i, module := range p.info.Deps {
		used := module
		if module.Replace != nil {
			used = module.Replace
		}
		dependency := goPackage(fmt.Sprintf("SPDXRef-Package-%d", i+1), used.Path, used.Version)
		dependency.SourceInfo = sourceInfo(module, used)
		d.Packages = append(d.Packages, dependency)
		d.Relationships = append(d.Relationships, spdxRelationship{Element: main.ID, Type: "DEPENDS_ON", Related: dependency.ID})
	}
	text, err := json.MarshalIndent(d, "", "  ")
	return append(text, '\n'), err
}

// sourceInfo returns the checksum of the module in go.sum, and the module that it replaces.
func sourceInfo(module, used *debug.Module) string {
	var facts []string
	if used.Sum != "" {
		facts = append(facts, "go.sum "+used.Sum)
	}
	if used != module {
		facts = append(facts, "replaces "+module.Path+" "+module.Version)
	}
	return strings.Join(facts, ", ")
}

func goPackage(id, path, version string) spdxPackage {
	return spdxPackage{
		ID: id, Name: path, Version: version, DownloadLocation: noAssertion,
		LicenseConcluded: noAssertion, LicenseDeclared: noAssertion, Copyright: noAssertion,
		References: []spdxRef{{Category: "PACKAGE-MANAGER", Type: "purl", Locator: "pkg:golang/" + path + "@" + url.PathEscape(version)}},
	}
}
