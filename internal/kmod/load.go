package kmod

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Load loads modules with what they need, unless they are loaded or built in. Each
// is a name, with parameters behind it or not, as in /etc/modules: "ip_vs",
// "dummy numdummies=0".
//
// It stops at the first that cannot be loaded. The error says what is in the way and
// what to do about it, for all modules that are still missing; the kernel's own error
// number is in it.
//
// If all are loaded, Load needs no privilege; else CAP_SYS_MODULE, and the modules'
// folder, /lib/modules/RELEASE or /usr/lib/modules/RELEASE.
func Load(modules ...string) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Errorf("the kernel's release: %w", os.NewSyscallError("uname", err))
	}
	l := loader{root: "/", release: unix.ByteSliceToString(name.Release[:]), syscalls: linuxSyscalls{}}
	return l.load(modules)
}

// loader loads modules into a kernel.
type loader struct {
	root     string // the folder with lib/modules, sys and proc
	release  string
	syscalls syscalls
}

func (l *loader) load(modules []string) error {
	type wanted struct{ name, parameters string }
	var missing []wanted
	var names []string
	for _, m := range modules {
		file, parameters, _ := strings.Cut(m, " ")
		if name := moduleName(file); !l.isLoaded(name) {
			missing = append(missing, wanted{name, parameters})
			names = append(names, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	folder, err := openModuleDir(l.root, l.release)
	if err != nil {
		return fmt.Errorf("load kernel modules %s: %w", strings.Join(names, ", "), err)
	}
	r := loadRun{loader: l, dir: folder, results: map[string]error{}}
	for i, m := range missing {
		if err := r.load(m.name, m.parameters); err != nil {
			return fmt.Errorf("load kernel module %s: %w%s", m.name, err, l.advice(err, names[i:]))
		}
	}
	return nil
}

// isLoaded reports whether the kernel shows a module as built in, or as ready. It does
// not show all that are built in.
func (l *loader) isLoaded(name string) bool {
	folder := filepath.Join(l.root, "sys/module", name)
	if _, err := os.Stat(folder); err != nil {
		return false
	}
	state, err := os.ReadFile(filepath.Join(folder, "initstate"))
	return os.IsNotExist(err) || strings.TrimSpace(string(state)) == "live"
}

// loadRun is one call of load.
type loadRun struct {
	*loader
	dir     *moduleDir
	results map[string]error // by module
}

func (r *loadRun) load(name, parameters string) error {
	if err, tried := r.results[name]; tried {
		return err
	}
	r.results[name] = nil // also for softdeps that go in circles
	if r.dir.builtIn[name] || r.isLoaded(name) {
		return nil
	}
	err := r.loadFile(name, parameters)
	r.results[name] = err
	return err
}

func (r *loadRun) loadFile(name, parameters string) error {
	file, ok := r.dir.files[name]
	if !ok {
		return fmt.Errorf("it is not in %s: install the package with all of this kernel's modules, "+
			"or mount the host's /lib/modules into the container", r.dir.path)
	}
	// What softdeps name is loaded if it can be: there may be several modules for the
	// purpose, some of them for other processors.
	var before string
	for _, alias := range r.dir.softdeps[name] {
		targets, err := r.dir.resolveAlias(alias)
		if err != nil {
			return err
		}
		for _, target := range targets {
			if err := r.load(target, ""); err != nil && before == "" {
				before = fmt.Sprintf(" (%s, which should be loaded before, was not: %s)", target, err)
			}
		}
	}
	for _, other := range r.dir.dependencies[name] {
		if err := r.load(other, ""); err != nil {
			return fmt.Errorf("%s, which it needs: %w", other, err)
		}
	}
	if err := insertModule(r.syscalls, filepath.Join(r.dir.path, file), parameters); err != nil {
		return fmt.Errorf("%w%s", err, before)
	}
	return nil
}
