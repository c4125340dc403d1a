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

// archive writes a cpio archive in the "newc" format, which the kernel unpacks as its initial
// file system (Documentation/driver-api/early-userspace/buffer-format.rst). All files belong
// to root. Parent directories are created as needed. The kernel accepts several complete
// archives one after the other.
//
// The archive is not compressed: under emulation, unpacking costs more than reading.
type archive struct {
	w       *bufio.Writer
	written int64 // bytes written
	inode   uint32
	names   map[string]bool // names of the entries
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), names: map[string]bool{}}
}

const (
	modeDir     = 0o040000
	modeFile    = 0o100000
	modeSymlink = 0o120000
)

// addHeader writes the header of an entry with size bytes of content, which must follow. It
// returns false if the archive already has an entry of that name.
func (a *archive) addHeader(name string, mode uint32, size int64) (added bool, err error) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	if name == "" || name == "." || a.names[name] {
		return false, nil
	}
	if size >= 1<<32 {
		return false, fmt.Errorf("%s has %d bytes, more than the archive format supports", name, size)
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

// writePadding pads to the next multiple of four bytes.
func (a *archive) writePadding() error {
	n, err := a.w.Write(make([]byte, -a.written&3))
	a.written += int64(n)
	return err
}

func (a *archive) writeContent(r io.Reader, size int64) error {
	n, err := io.Copy(a.w, r)
	a.written += n
	if err == nil && n != size {
		err = fmt.Errorf("read %d bytes, want %d", n, size)
	}
	return errors.Join(err, a.writePadding())
}

func (a *archive) addDir(name string) error {
	_, err := a.addHeader(name, modeDir|0o755, 0)
	return err
}

func (a *archive) addSymlink(name, target string) error {
	added, err := a.addHeader(name, modeSymlink|0o777, int64(len(target)))
	if err != nil || !added {
		return err
	}
	return a.writeContent(strings.NewReader(target), int64(len(target)))
}

func (a *archive) addText(name string, perm fs.FileMode, text string) error {
	added, err := a.addHeader(name, modeFile|uint32(perm.Perm()), int64(len(text)))
	if err != nil || !added {
		return err
	}
	return a.writeContent(strings.NewReader(text), int64(len(text)))
}

// addFile adds the file at the path host, following symbolic links, as name.
func (a *archive) addFile(name, host string) error {
	f, err := os.Open(host)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read-only
	info, err := f.Stat()
	if err != nil {
		return err
	}
	added, err := a.addHeader(name, modeFile|uint32(info.Mode().Perm()), info.Size())
	if err != nil || !added {
		return err
	}
	if err := a.writeContent(f, info.Size()); err != nil {
		return fmt.Errorf("read %s: %w", host, err)
	}
	return nil
}

// addTree adds the directory host as name. It omits the relative paths that skip reports,
// sockets and devices. Symbolic links stay links.
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
			// A file may disappear in the meantime, such as an editor's temporary file.
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

// close ends the archive. It does not close the underlying writer.
func (a *archive) close() error {
	return errors.Join(a.writeEntry("TRAILER!!!", 0, 0, 0), a.w.Flush())
}
