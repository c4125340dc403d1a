// Package cgroup creates control groups in all hierarchies of the machine, of version 1 and 2. A
// process that joins such a group and then creates a cgroup namespace sees only the group, so the
// containers of a cluster are all below one group of the machine.
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Hierarchy is a mounted hierarchy.
type Hierarchy struct {
	// Version is 1 or 2.
	Version int
	// MountPoint is the directory that the hierarchy is mounted on.
	MountPoint string
	// Options are the mount options that select the hierarchy of version 1, such as cpu,cpuacct
	// or name=systemd.
	Options string
	// Own is the directory of this process's group.
	Own string
}

// Hierarchies returns the hierarchies that are mounted for this process.
func Hierarchies() ([]Hierarchy, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	return parse(string(mounts), string(groups)), nil
}

// parse combines /proc/self/mountinfo, which has the mount points, with /proc/self/cgroup, which
// has the group of each hierarchy. See proc(5) and cgroups(7).
func parse(mounts, groups string) []Hierarchy {
	own := map[string]string{} // by the controllers; empty for version 2
	for line := range strings.Lines(groups) {
		if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); len(parts) == 3 {
			own[parts[1]] = parts[2]
		}
	}
	var hierarchies []Hierarchy
	for line := range strings.Lines(mounts) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		fields, super := strings.Fields(before), strings.Fields(after)
		const rootField, mountPointField, superFields = 3, 4, 3
		if len(fields) <= mountPointField || len(super) < superFields {
			continue
		}
		h := Hierarchy{MountPoint: fields[mountPointField]}
		switch super[0] {
		case "cgroup2":
			h.Version = 2
		case "cgroup":
			h.Version = 1
			h.Options = controllers(super[2])
		default:
			continue
		}
		group, ok := own[h.Options]
		// The mount may show only a part of the hierarchy, and the group may be outside of it.
		relative, err := filepath.Rel(fields[rootField], group)
		if !ok || err != nil || strings.HasPrefix(relative, "..") {
			continue
		}
		h.Own = filepath.Join(h.MountPoint, relative)
		if !slices.ContainsFunc(hierarchies, func(o Hierarchy) bool { return o.Version == h.Version && o.Options == h.Options }) {
			hierarchies = append(hierarchies, h)
		}
	}
	return hierarchies
}

// controllers removes the mount options that do not select a hierarchy.
func controllers(options string) string {
	names := slices.DeleteFunc(strings.Split(options, ","), func(o string) bool {
		return slices.Contains([]string{"rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode"}, o) ||
			strings.HasPrefix(o, "release_agent=")
	})
	return strings.Join(names, ",")
}

// parent returns the directory for new groups. In version 2, a group with processes cannot have
// controllers in its children, except the root.
func (h Hierarchy) parent() string {
	if h.Version == 2 {
		return h.MountPoint
	}
	return h.Own
}

// Group is a group with one name in all hierarchies.
type Group struct {
	name        string
	hierarchies []Hierarchy
}

// Create creates a group. An existing group of this name is used.
func Create(name string) (*Group, error) {
	hierarchies, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	g := &Group{name: name, hierarchies: hierarchies}
	// Beside hierarchies of version 1, version 2 has only the controllers that they lack.
	var required []string
	if !slices.ContainsFunc(hierarchies, func(h Hierarchy) bool { return h.Version == 1 }) {
		required = []string{"cpu", "cpuset", "memory", "pids"} // kubelet needs them
	}
	for _, h := range hierarchies {
		if err := h.create(name, required); err != nil {
			return nil, errors.Join(fmt.Errorf("create cgroup %s: %w", h.dir(name), err), g.Remove())
		}
	}
	return g, nil
}

func (h Hierarchy) dir(name string) string { return filepath.Join(h.parent(), name) }

// create creates a group. In version 2, required are the controllers that it must have.
func (h Hierarchy) create(name string, required []string) error {
	dir := h.dir(name)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if h.Version == 2 {
		return enableControllers(h.parent(), required)
	}
	// A new group of the controller cpuset accepts processes only if it has processors and memory.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(bytes.TrimSpace(value)) > 0 {
			continue
		}
		if err == nil {
			value, err = os.ReadFile(filepath.Join(h.parent(), file))
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), value, 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// enableControllers makes all controllers of a group of version 2 available to its children, and
// fails if a required one is not available.
func enableControllers(dir string, required []string) error {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	names := strings.Fields(string(available))
	for _, name := range required {
		if !slices.Contains(names, name) {
			return fmt.Errorf("the controller %s is not available in %s: run in a group that has it, for example with "+
				"`systemd-run --scope -p Delegate=yes`", name, dir)
		}
	}
	for _, name := range names {
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0)
		if err != nil && slices.Contains(required, name) {
			return fmt.Errorf("enable the controller %s for children of %s: %w", name, dir, err)
		}
	}
	return nil
}

// Lines describes the group for namespaces.sh, one line for each hierarchy: version, mount
// options or a dash, mount point, and the directory of the group.
func (g *Group) Lines() string {
	var b strings.Builder
	for _, h := range g.hierarchies {
		options := h.Options
		if options == "" {
			options = "-"
		}
		fmt.Fprintln(&b, h.Version, options, h.MountPoint, h.dir(g.name))
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// Remove removes the group and all groups below it, which must not contain processes. Groups that
// do not exist are not an error.
func (g *Group) Remove() error {
	var errs []error
	for _, h := range g.hierarchies {
		errs = append(errs, removeAll(h.dir(g.name)))
	}
	return errors.Join(errs...)
}

// Find returns the group of a name that an earlier process has created.
func Find(name string) (*Group, error) {
	hierarchies, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	return &Group{name: name, hierarchies: hierarchies}, nil
}

// removeAll removes a directory of groups, the innermost first. Files of the kernel cannot be
// removed and do not need to be.
func removeAll(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Reverse(dirs)
	for _, path := range dirs {
		if err := remove(path); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", path, err)
		}
	}
	return nil
}

// remove removes an empty group. The kernel needs a moment until the last process that was killed
// has left.
func remove(dir string) error {
	const tries, wait = 100, 50 * time.Millisecond
	var err error
	for range tries {
		if err = unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(wait)
	}
	return err
}
