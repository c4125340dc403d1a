package kmod

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Load loads modules and their dependencies, unless they are loaded or built in. Each argument
// is a name, optionally followed by parameters, as in /etc/modules: "ip_vs", "dummy
// numdummies=0".
//
// Load stops at the first error. The error names the cause and the fix for all modules that
// remain to be loaded, and wraps the kernel's errno.
//
// If all modules are loaded, Load needs no privilege. Otherwise it needs CAP_SYS_MODULE and
// the modules' directory, /lib/modules/RELEASE or /usr/lib/modules/RELEASE.
func Load(modules ...string) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Errorf("read the kernel's release: %w", os.NewSyscallError("uname", err))
	}
	l := loader{root: "/", release: unix.ByteSliceToString(name.Release[:]), syscalls: linuxSyscalls{}}
	return l.load(modules)
}

// Exists reports whether a module is loaded or built in, or can be loaded from the modules'
// directory.
func Exists(module string) bool {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return false
	}
	l := loader{root: "/", release: unix.ByteSliceToString(name.Release[:]), syscalls: linuxSyscalls{}}
	return l.exists(moduleName(module))
}

func (l *loader) exists(name string) bool {
	if l.isLoaded(name) {
		return true
	}
	dir, err := openModuleDir(l.root, l.release)
	return err == nil && (dir.builtIn[name] || dir.files[name] != "")
}

// loader loads modules into a kernel.
type loader struct {
	root     string // the directory that contains lib/modules, sys and proc
	release  string
	syscalls syscalls
}

func (l *loader) load(modules []string) error {
	type moduleParams struct{ name, parameters string }
	var missing []moduleParams
	var names []string
	for _, m := range modules {
		file, parameters, _ := strings.Cut(m, " ")
		if name := moduleName(file); !l.isLoaded(name) {
			missing = append(missing, moduleParams{name, parameters})
			names = append(names, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	dir, err := openModuleDir(l.root, l.release)
	if err != nil {
		return fmt.Errorf("load kernel modules %s: %w", strings.Join(names, ", "), err)
	}
	r := loadRun{loader: l, dir: dir, results: map[string]error{}}
	for i, m := range missing {
		if err := r.load(m.name, m.parameters); err != nil {
			return fmt.Errorf("load kernel module %s: %w%s", m.name, err, l.advice(err, names[i:]))
		}
	}
	return nil
}

// isLoaded reports whether /sys/module shows the module as built in or live. It does not show
// all built-in modules.
func (l *loader) isLoaded(name string) bool {
	dir := filepath.Join(l.root, "sys/module", name)
	if _, err := os.Stat(dir); err != nil {
		return false
	}
	state, err := os.ReadFile(filepath.Join(dir, "initstate"))
	return os.IsNotExist(err) || strings.TrimSpace(string(state)) == "live"
}

// loadRun is the state of one call of load.
type loadRun struct {
	*loader
	dir     *moduleDir
	results map[string]error // by module
}

func (r *loadRun) load(name, parameters string) error {
	if err, ok := r.results[name]; ok {
		return err
	}
	r.results[name] = nil // ends recursion of circular soft dependencies
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
		return fmt.Errorf("not found in %s: install the package with all of this kernel's modules, "+
			"or mount the host's /lib/modules into the container", r.dir.path)
	}
	// A soft dependency may fail: an alias may match several modules, some of them for other
	// processors.
	var softdepErr string
	for _, alias := range r.dir.softdeps[name] {
		targets, err := r.dir.resolveAlias(alias)
		if err != nil {
			return err
		}
		for _, target := range targets {
			if err := r.load(target, ""); err != nil && softdepErr == "" {
				softdepErr = fmt.Sprintf(" (soft dependency %s was not loaded: %s)", target, err)
			}
		}
	}
	for _, dependency := range r.dir.dependencies[name] {
		if err := r.load(dependency, ""); err != nil {
			return fmt.Errorf("dependency %s: %w", dependency, err)
		}
	}
	if err := insertModule(r.syscalls, filepath.Join(r.dir.path, file), parameters); err != nil {
		return fmt.Errorf("%w%s", err, softdepErr)
	}
	return nil
}
