package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// archive writes a cpio archive in the "newc" format that the kernel unpacks as
// its first file system (Documentation/driver-api/early-userspace/buffer-format.rst).
// All files belong to root. Folders above a file are made as needed. The kernel
// takes several archives one after the other, as long as each is complete.
//
// It is not compressed: under emulation to unpack costs more than to read.
type archive struct {
	w       *bufio.Writer
	written int64 // bytes written
	inode   uint32
	names   map[string]bool // names that are in the archive
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), names: map[string]bool{}}
}

const (
	modeDir     = 0o040000
	modeFile    = 0o100000
	modeSymlink = 0o120000
)

// addHeader writes the header of an entry whose content of size bytes follows, and
// reports false if an entry of that name is there already.
func (a *archive) addHeader(name string, mode uint32, size int64) (fresh bool, err error) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	if name == "" || name == "." || a.names[name] {
		return false, nil
	}
	if size >= 1<<32 {
		return false, fmt.Errorf("%s has %d bytes, more than the archive's format takes", name, size)
	}
	if parent := path.Dir(name); parent != "." {
		if err := a.addDir(parent); err != nil {
			return false, err
		}
	}
	a.names[name] = true
	a.inode++
	return true, a.writeEntry(name, a.inode, mode, size)
}

func (a *archive) writeEntry(name string, inode, mode uint32, size int64) error {
	n, err := fmt.Fprintf(a.w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	a.written += int64(n)
	return errors.Join(err, a.writePadding())
}

// writePadding fills up to the next multiple of four.
func (a *archive) writePadding() error {
	n, err := a.w.Write(make([]byte, -a.written&3))
	a.written += int64(n)
	return err
}

func (a *archive) writeContent(r io.Reader, size int64) error {
	n, err := io.Copy(a.w, r)
	a.written += n
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes, but %d were announced", n, size)
	}
	return errors.Join(err, a.writePadding())
}

func (a *archive) addDir(name string) error {
	_, err := a.addHeader(name, modeDir|0o755, 0)
	return err
}

func (a *archive) addSymlink(name, target string) error {
	fresh, err := a.addHeader(name, modeSymlink|0o777, int64(len(target)))
	if err != nil || !fresh {
		return err
	}
	return a.writeContent(strings.NewReader(target), int64(len(target)))
}

func (a *archive) addText(name string, perm fs.FileMode, text string) error {
	fresh, err := a.addHeader(name, modeFile|uint32(perm.Perm()), int64(len(text)))
	if err != nil || !fresh {
		return err
	}
	return a.writeContent(strings.NewReader(text), int64(len(text)))
}

// addFile adds the file at host, or that it is a symbolic link to, as name.
func (a *archive) addFile(name, host string) error {
	f, err := os.Open(host)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read from
	info, err := f.Stat()
	if err != nil {
		return err
	}
	fresh, err := a.addHeader(name, modeFile|uint32(info.Mode().Perm()), info.Size())
	if err != nil || !fresh {
		return err
	}
	if err := a.writeContent(f, info.Size()); err != nil {
		return fmt.Errorf("read %s: %w", host, err)
	}
	return nil
}

// addTree adds what is in the folder host as the folder name, but for the paths
// below host that skip says. Symbolic links stay links; sockets and devices are
// left out.
func (a *archive) addTree(name, host string, skip func(rel string) bool) error {
	return filepath.WalkDir(host, func(at string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(host, at)
		if err != nil {
			return err
		}
		if skip != nil && skip(rel) {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		into := path.Join(name, rel)
		switch entry.Type() {
		case 0:
			// A file may be gone again, like the temporary ones of editors.
			if err := a.addFile(into, at); !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		case fs.ModeDir:
			return a.addDir(into)
		case fs.ModeSymlink:
			target, err := os.Readlink(at)
			if err != nil {
				return err
			}
			return a.addSymlink(into, target)
		default:
			return nil
		}
	})
}

// close ends the archive; it leaves the writer below open.
func (a *archive) close() error {
	return errors.Join(a.writeEntry("TRAILER!!!", 0, 0, 0), a.w.Flush())
}
