package kmod

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// syscalls are the system calls that load modules. Tests replace them.
type syscalls interface {
	// finitModule is finit_module(2), initModule is init_module(2).
	finitModule(fd int, parameters string, flags int) error
	initModule(image []byte, parameters string) error
	// hasSysModule reports whether the caller has CAP_SYS_MODULE.
	hasSysModule() bool
}

// linuxSyscalls calls the running kernel.
type linuxSyscalls struct{}

func (linuxSyscalls) finitModule(fd int, parameters string, flags int) error {
	return unix.FinitModule(fd, parameters, flags)
}

func (linuxSyscalls) initModule(image []byte, parameters string) error {
	return unix.InitModule(image, parameters)
}

func (linuxSyscalls) hasSysModule() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	return unix.Capget(&header, &sets[0]) == nil && sets[0].Effective&(1<<unix.CAP_SYS_MODULE) != 0
}

// insertModule passes the file of a module to the kernel. It is not an error if the module is
// loaded already.
func insertModule(k syscalls, path, parameters string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read from
	compressed, flags := filepath.Ext(path) != ".ko", 0
	if compressed {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	err = os.NewSyscallError("finit_module", k.finitModule(int(f.Fd()), parameters, flags))
	// Linux before 5.17 does not know the flag. Later kernels may be built without
	// decompression, or for another compression.
	notDecompressed := compressed && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP))
	if notDecompressed || errors.Is(err, unix.ENOSYS) {
		image, errRead := readModule(f)
		if errRead != nil {
			return fmt.Errorf("read %s: %w", path, errRead)
		}
		err = os.NewSyscallError("init_module", k.initModule(image, parameters))
	}
	if err == nil || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return fmt.Errorf("%s: %w", path, err)
}

// readModule reads a module and decompresses it according to the file's extension.
func readModule(f *os.File) ([]byte, error) {
	switch extension := filepath.Ext(f.Name()); extension {
	case ".ko":
		return io.ReadAll(f)
	case ".gz":
		r, err := gzip.NewReader(f)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	case ".xz":
		r, err := xz.NewReader(f)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	case ".zst":
		r, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	default:
		return nil, fmt.Errorf("unsupported compression %s: want .gz, .xz or .zst", extension)
	}
}
