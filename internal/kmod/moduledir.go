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

// moduleDir is what depmod(8) wrote about the modules of a kernel. Modules are called
// by name, with underscores; their files' names may have dashes.
type moduleDir struct {
	path         string
	files        map[string]string   // below path
	dependencies map[string][]string // modules
	softdeps     map[string][]string // modules or aliases, to be loaded before
	builtIn      map[string]bool
}

// openModuleDir reads the folder of a kernel's modules.
func openModuleDir(root, release string) (*moduleDir, error) {
	places := []string{"/lib/modules", "/usr/lib/modules"}
	for _, place := range places {
		f := &moduleDir{
			path:         filepath.Join(root, place, release),
			files:        map[string]string{},
			dependencies: map[string][]string{},
			softdeps:     map[string][]string{},
			builtIn:      map[string]bool{},
		}
		err := f.read()
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return nil, fmt.Errorf("the modules of Linux %s are not in %s: install the package with this kernel's modules, "+
		"or mount the host's /lib/modules into the container", release, strings.Join(places, " or "))
}

// read fails with [fs.ErrNotExist] if there is no modules.dep; the other files need
// not be there.
func (f *moduleDir) read() error {
	// kernel/net/a.ko.xz: kernel/net/b.ko.xz kernel/lib/c.ko.xz
	dependencies, err := f.readFile("modules.dep")
	if err != nil {
		return err
	}
	for line := range strings.Lines(dependencies) {
		file, others, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		name := moduleName(file)
		f.files[name] = file
		for other := range strings.FieldsSeq(others) {
			f.dependencies[name] = append(f.dependencies[name], moduleName(other))
		}
	}
	// kernel/lib/d.ko
	builtIn, err := f.readOptional("modules.builtin")
	if err != nil {
		return err
	}
	for file := range strings.FieldsSeq(builtIn) {
		f.builtIn[moduleName(file)] = true
	}
	// softdep a pre: x y post: z
	softdeps, err := f.readOptional("modules.softdep")
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
				f.softdeps[name] = append(f.softdeps[name], moduleName(word))
			}
		}
	}
	return nil
}

// resolveAlias returns the modules that an alias stands for. What is no alias is a module.
// Patterns, with which devices ask for modules, are not matched.
func (f *moduleDir) resolveAlias(alias string) ([]string, error) {
	if f.files[alias] != "" || f.builtIn[alias] {
		return []string{alias}, nil
	}
	// alias x e
	aliases, err := f.readOptional("modules.alias")
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

func (f *moduleDir) readFile(file string) (string, error) {
	data, err := os.ReadFile(filepath.Join(f.path, file))
	return string(data), err
}

func (f *moduleDir) readOptional(file string) (string, error) {
	text, err := f.readFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return text, err
}

// moduleName returns the name of the module in a file, or that somebody has written
// with dashes: kernel/net/sched/sch-x.ko.xz is sch_x.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}
