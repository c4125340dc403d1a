package kmod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// moduleDir is a parsed directory of kernel modules, written by depmod(8). Module names have
// underscores; file names may have dashes.
type moduleDir struct {
	path         string
	files        map[string]string   // relative to path
	dependencies map[string][]string // modules
	softdeps     map[string][]string // modules or aliases to load first
	builtIn      map[string]bool
}

// openModuleDir reads the directory of a kernel's modules.
func openModuleDir(root, release string) (*moduleDir, error) {
	parents := []string{"/lib/modules", "/usr/lib/modules"}
	for _, parent := range parents {
		d := &moduleDir{
			path:         filepath.Join(root, parent, release),
			files:        map[string]string{},
			dependencies: map[string][]string{},
			softdeps:     map[string][]string{},
			builtIn:      map[string]bool{},
		}
		err := d.read()
		if !errors.Is(err, fs.ErrNotExist) {
			return d, err
		}
	}
	return nil, fmt.Errorf("the modules of Linux %s are not in %s: install the package with this kernel's modules, "+
		"or mount the host's /lib/modules into the container", release, strings.Join(parents, " or "))
}

// read reads depmod's files. It returns [fs.ErrNotExist] if modules.dep is missing; the other
// files are optional.
func (d *moduleDir) read() error {
	// kernel/net/a.ko.xz: kernel/net/b.ko.xz kernel/lib/c.ko.xz
	dependencies, err := d.readFile("modules.dep")
	if err != nil {
		return err
	}
	for line := range strings.Lines(dependencies) {
		file, deps, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		name := moduleName(file)
		d.files[name] = file
		for dep := range strings.FieldsSeq(deps) {
			d.dependencies[name] = append(d.dependencies[name], moduleName(dep))
		}
	}
	// kernel/lib/d.ko
	builtIn, err := d.readOptional("modules.builtin")
	if err != nil {
		return err
	}
	for file := range strings.FieldsSeq(builtIn) {
		d.builtIn[moduleName(file)] = true
	}
	// softdep a pre: x y post: z
	softdeps, err := d.readOptional("modules.softdep")
	if err != nil {
		return err
	}
	for line := range strings.Lines(softdeps) {
		words := strings.Fields(line)
		if len(words) < 3 || words[0] != "softdep" {
			continue
		}
		name, before := moduleName(words[1]), false
		for _, word := range words[2:] {
			switch {
			case strings.HasSuffix(word, ":"):
				before = word == "pre:"
			case before:
				d.softdeps[name] = append(d.softdeps[name], moduleName(word))
			}
		}
	}
	return nil
}

// resolveAlias returns the modules of an alias, or the argument if it is a module. It does not
// match the patterns used for devices.
func (d *moduleDir) resolveAlias(alias string) ([]string, error) {
	if d.files[alias] != "" || d.builtIn[alias] {
		return []string{alias}, nil
	}
	// alias x e
	aliases, err := d.readOptional("modules.alias")
	if err != nil {
		return nil, err
	}
	var modules []string
	for line := range strings.Lines(aliases) {
		words := strings.Fields(line)
		if len(words) == 3 && words[0] == "alias" && moduleName(words[1]) == alias {
			modules = append(modules, moduleName(words[2]))
		}
	}
	if modules == nil {
		return []string{alias}, nil
	}
	return slices.Compact(modules), nil
}

func (d *moduleDir) readFile(file string) (string, error) {
	data, err := os.ReadFile(filepath.Join(d.path, file))
	return string(data), err
}

func (d *moduleDir) readOptional(file string) (string, error) {
	text, err := d.readFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return text, err
}

// moduleName returns the module name of a file, or of a name written with dashes: sch_x for
// kernel/net/sched/sch-x.ko.xz.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}
