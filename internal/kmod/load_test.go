package kmod

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const release = "6.1.0"

// fakeHost holds a host's files by path. M is the modules' directory.
type fakeHost map[string]string

// ipvsHost returns IPVS's modules as in Debian, but with other soft dependencies of libcrc32c.
func ipvsHost(changes fakeHost) fakeHost {
	h := fakeHost{
		"M/modules.dep": `kernel/lib/libcrc32c.ko:
kernel/crypto/crc32c-fast.ko:
kernel/crypto/crc32c_slow.ko: kernel/crypto/hash.ko
kernel/crypto/hash.ko:
kernel/net/nf_conntrack.ko: kernel/net/nf_defrag.ko kernel/lib/libcrc32c.ko
kernel/net/nf_defrag.ko:
kernel/net/ip_vs.ko: kernel/net/nf_conntrack.ko kernel/net/nf_defrag.ko kernel/lib/libcrc32c.ko
kernel/net/ip_vs_rr.ko: kernel/net/ip_vs.ko kernel/net/nf_conntrack.ko kernel/net/nf_defrag.ko kernel/lib/libcrc32c.ko
kernel/net/dummy.ko:
`,
		"M/modules.softdep": "# made by depmod\nsoftdep libcrc32c post: dummy pre: crc32c\n",
		"M/modules.alias":   "# made by depmod\nalias crypto-crc32c crc32c_slow\nalias crc32c crc32c_fast\nalias crc32c crc32c_slow\nalias pci:v*d* ip_vs\n",
		"M/modules.builtin": "kernel/net/bridge/br_netfilter.ko\nkernel/net/sch-dash.ko\n",
	}
	for line := range strings.Lines(h["M/modules.dep"]) {
		file, _, _ := strings.Cut(line, ":")
		h["M/"+file] = moduleName(file)
	}
	for path, text := range changes {
		if h[path] = text; text == "" {
			delete(h, path)
		}
	}
	return h
}

func (h fakeHost) write(t *testing.T, modules string) (root string) {
	t.Helper()
	root = t.TempDir()
	for path, text := range h {
		path = filepath.Join(root, strings.Replace(path, "M/", modules+"/"+release+"/", 1))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// fakeKernel records the names of files or the contents of images, with their parameters.
type fakeKernel struct {
	calls         []string
	finitErr      error // answer of finit_module
	compressedErr error // answer of finit_module to compressed files
	moduleErrs    map[string]error
	unprivileged  bool
}

func (f *fakeKernel) finitModule(fd int, parameters string, flags int) error {
	if f.finitErr != nil {
		return f.finitErr
	}
	if flags != 0 && f.compressedErr != nil {
		return f.compressedErr
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return err
	}
	file := filepath.Base(path)
	f.calls = append(f.calls, strings.TrimSpace(file+" "+parameters))
	return f.moduleErrs[moduleName(file)]
}

func (f *fakeKernel) initModule(image []byte, parameters string) error {
	f.calls = append(f.calls, strings.TrimSpace(fmt.Sprintf("image of %s %s", image, parameters)))
	return f.moduleErrs[string(image)]
}

func (f *fakeKernel) hasSysModule() bool { return !f.unprivileged }

func TestLoad(t *testing.T) {
	crc := []string{"crc32c-fast.ko", "hash.ko", "crc32c_slow.ko", "libcrc32c.ko"}
	ipVS := slices.Concat([]string{"nf_defrag.ko"}, crc, []string{"nf_conntrack.ko", "ip_vs.ko"})
	for name, test := range map[string]struct {
		host  fakeHost
		fake  fakeKernel
		load  []string
		calls []string
	}{
		"no dependencies": {
			load:  []string{"dummy"},
			calls: []string{"dummy.ko"},
		},
		"parameters": {
			load:  []string{"dummy numdummies=0 x=1"},
			calls: []string{"dummy.ko numdummies=0 x=1"},
		},
		"dependencies once, soft dependencies before them": {
			load:  []string{"ip_vs", "ip_vs_rr", "dummy", "dummy"},
			calls: append(slices.Clip(ipVS), "ip_vs_rr.ko", "dummy.ko"),
		},
		"parameters apply to the module, not to its dependencies": {
			load:  []string{"crc32c_slow x=1"},
			calls: []string{"hash.ko", "crc32c_slow.ko x=1"},
		},
		"dashes become underscores": {
			load:  []string{"crc32c_fast", "ip-vs-rr"},
			host:  fakeHost{"M/modules.softdep": ""},
			calls: []string{"crc32c-fast.ko", "nf_defrag.ko", "libcrc32c.ko", "nf_conntrack.ko", "ip_vs.ko", "ip_vs_rr.ko"},
		},
		"failing soft dependency, for another processor": {
			load:  []string{"libcrc32c"},
			fake:  fakeKernel{moduleErrs: map[string]error{"crc32c_fast": unix.ENODEV}},
			calls: crc,
		},
		"built-in soft dependency": {
			load:  []string{"libcrc32c"},
			host:  fakeHost{"M/modules.builtin": "kernel/crypto/crc32c.ko\n"},
			calls: []string{"libcrc32c.ko"},
		},
		"missing soft dependency": {
			load:  []string{"libcrc32c"},
			host:  fakeHost{"M/modules.alias": ""},
			calls: []string{"libcrc32c.ko"},
		},
		"circular soft dependencies": {
			load:  []string{"dummy"},
			host:  fakeHost{"M/modules.softdep": "softdep dummy pre: hash\nsoftdep hash pre: dummy\n"},
			calls: []string{"hash.ko", "dummy.ko"},
		},
		"built in": {
			load: []string{"br_netfilter", "sch_dash"},
		},
		"built in, without modules directory": {
			host: fakeHost{"M/modules.dep": "", "sys/module/dummy/parameters/numdummies": "1"},
			load: []string{"dummy"},
		},
		"already loaded, without modules directory": {
			host: fakeHost{"M/modules.dep": "", "sys/module/dummy/initstate": "live\n", "sys/module/ip_vs/initstate": "live\n"},
			load: []string{"dummy numdummies=0", "ip-vs"},
		},
		"dependencies already loaded": {
			host: fakeHost{
				"sys/module/nf_conntrack/initstate": "live\n", "sys/module/nf_defrag/initstate": "live\n",
				"sys/module/libcrc32c/initstate": "live\n",
			},
			load:  []string{"ip_vs"},
			calls: []string{"ip_vs.ko"},
		},
		"concurrent load: the kernel waits for it": {
			host:  fakeHost{"sys/module/dummy/initstate": "coming\n"},
			fake:  fakeKernel{moduleErrs: map[string]error{"dummy": unix.EEXIST}},
			load:  []string{"dummy"},
			calls: []string{"dummy.ko"},
		},
		"kernel without finit_module": {
			fake:  fakeKernel{finitErr: unix.ENOSYS},
			load:  []string{"dummy numdummies=0"},
			calls: []string{"image of dummy numdummies=0"},
		},
		"other depmod files missing": {
			host:  fakeHost{"M/modules.softdep": "", "M/modules.builtin": "", "M/modules.alias": ""},
			load:  []string{"libcrc32c", "dummy"},
			calls: []string{"libcrc32c.ko", "dummy.ko"},
		},
		"nothing": {},
	} {
		for _, modules := range []string{"lib/modules", "usr/lib/modules"} {
			t.Run(name+" in "+modules, func(t *testing.T) {
				k := test.fake
				l := loader{root: ipvsHost(test.host).write(t, modules), release: release, syscalls: &k}
				if err := l.load(test.load); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(test.calls, k.calls); diff != "" {
					t.Errorf("calls (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestCompressed(t *testing.T) {
	files := fakeHost{"M/modules.dep": "a.ko.gz:\nb.ko.xz:\nc.ko.zst:\n"}
	// The output of gzip, xz and zstd for "the module", with the options in the kernel's
	// Makefile.
	for file, contents := range map[string]string{
		"a.ko.gz":  "1f8b08000000000000032bc94855c8cd4f29cd490500e07ec3110a000000",
		"b.ko.xz":  "fd377a585a0000016922de360200210110000000a8708e86010009746865206d6f64756c65000000e07ec31100011e0aea6312149042990d010000000001595a",
		"c.ko.zst": "28b52ffd0468510000746865206d6f64756c65d447e9ed",
	} {
		data, err := hex.DecodeString(contents)
		if err != nil {
			t.Fatal(err)
		}
		files["M/"+file] = string(data)
	}
	inProgram := []string{"image of the module x=1", "image of the module", "image of the module"}
	for name, test := range map[string]struct {
		fake  fakeKernel
		calls []string
	}{
		"kernel with decompression":          {fakeKernel{}, []string{"a.ko.gz x=1", "b.ko.xz", "c.ko.zst"}},
		"kernel that does not know the flag": {fakeKernel{compressedErr: unix.EINVAL}, inProgram},
		"kernel built without decompression": {fakeKernel{compressedErr: unix.EOPNOTSUPP}, inProgram},
		"kernel without finit_module":        {fakeKernel{finitErr: unix.ENOSYS}, inProgram},
	} {
		t.Run(name, func(t *testing.T) {
			k := test.fake
			l := loader{root: files.write(t, "lib/modules"), release: release, syscalls: &k}
			if err := l.load([]string{"a x=1", "b", "c"}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.calls, k.calls); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	const (
		modulesPackage = "install the package with "
		kernelsPackage = "; install the modules from the kernel's package"
	)
	refuseAll := func(err error) fakeKernel { return fakeKernel{finitErr: err} }
	for name, test := range map[string]struct {
		host fakeHost
		fake fakeKernel
		load []string
		want string // M is the modules' directory
		is   error
	}{
		"no directory": {
			host: fakeHost{"M/modules.dep": ""},
			load: []string{"ip_vs", "dummy numdummies=0"},
			want: "load kernel modules ip_vs, dummy: the modules of Linux 6.1.0 are not in /lib/modules or /usr/lib/modules: " +
				modulesPackage + "this kernel's modules, or mount the host's /lib/modules into the container",
		},
		"not in the directory": {
			load: []string{"dummy", "ip_vs_mh"},
			want: "load kernel module ip_vs_mh: not found in M: " +
				modulesPackage + "all of this kernel's modules, or mount the host's /lib/modules into the container",
		},
		"only in modules.dep": {
			host: fakeHost{"M/kernel/net/dummy.ko": ""},
			load: []string{"dummy"},
			want: "load kernel module dummy: open M/kernel/net/dummy.ko: no such file or directory",
			is:   fs.ErrNotExist,
		},
		"without CAP_SYS_MODULE, for all missing modules": {
			host: fakeHost{"sys/module/dummy/initstate": "live\n", "M/modules.softdep": ""},
			fake: fakeKernel{finitErr: unix.EPERM, unprivileged: true},
			load: []string{"dummy", "nf_defrag", "ip_vs x=1"},
			want: "load kernel module nf_defrag: M/kernel/net/nf_defrag.ko: finit_module: operation not permitted: " +
				"CAP_SYS_MODULE is required; alternatively, load them on the host: modprobe -a nf_defrag ip_vs",
			is: unix.EPERM,
		},
		"with CAP_SYS_MODULE, denied by lockdown or others": {
			fake: refuseAll(unix.EPERM),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: operation not permitted: " +
				"the process has CAP_SYS_MODULE, but lockdown, a security module, seccomp or a user namespace denies it; " +
				"load them on the host: modprobe -a dummy",
			is: unix.EPERM,
		},
		"SELinux": {
			fake: refuseAll(unix.EACCES),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: permission denied: " +
				"the process has CAP_SYS_MODULE, but lockdown, a security module, seccomp or a user namespace denies it; " +
				"load them on the host: modprobe -a dummy",
			is: unix.EACCES,
		},
		"modules disabled on the host": {
			host: fakeHost{"proc/sys/kernel/modules_disabled": "1\n"},
			fake: fakeKernel{finitErr: unix.EPERM, unprivileged: true},
			load: []string{"dummy", "hash"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: operation not permitted: " +
				"the host does not load modules until the next boot (sysctl kernel.modules_disabled); " +
				"list them in /etc/modules-load.d and reboot: dummy hash",
			is: unix.EPERM,
		},
		"unsigned": {
			fake: refuseAll(unix.EKEYREJECTED),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: key was rejected by service: " +
				"the kernel accepts only modules signed with a trusted key" + kernelsPackage,
			is: unix.EKEYREJECTED,
		},
		"for another kernel": {
			fake: refuseAll(unix.ENOEXEC),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: exec format error: " +
				"the module does not match the kernel, see the kernel log (dmesg)" + kernelsPackage,
			is: unix.ENOEXEC,
		},
		"dependency fails": {
			host: fakeHost{"M/modules.softdep": ""},
			fake: fakeKernel{moduleErrs: map[string]error{"libcrc32c": unix.ENOMEM}},
			load: []string{"ip_vs"},
			want: "load kernel module ip_vs: dependency nf_conntrack: dependency libcrc32c: " +
				"M/kernel/lib/libcrc32c.ko: finit_module: cannot allocate memory: see the kernel log (dmesg)",
			is: unix.ENOMEM,
		},
		"fails after its soft dependency failed": {
			host: fakeHost{"M/modules.alias": ""},
			fake: fakeKernel{moduleErrs: map[string]error{"libcrc32c": unix.EIO}},
			load: []string{"libcrc32c"},
			want: "load kernel module libcrc32c: M/kernel/lib/libcrc32c.ko: finit_module: input/output error " +
				"(soft dependency crc32c was not loaded: not found in M: " + modulesPackage +
				"all of this kernel's modules, or mount the host's /lib/modules into the container): " +
				"see the kernel log (dmesg)",
			is: unix.EIO,
		},
		"unknown compression": {
			host: fakeHost{"M/modules.dep": "a.ko.br:", "M/a.ko.br": "x"},
			fake: fakeKernel{compressedErr: unix.EINVAL},
			load: []string{"a"},
			want: "load kernel module a: read M/a.ko.br: unsupported compression .br: want .gz, .xz or .zst",
		},
		"invalid gzip": {
			host: fakeHost{"M/modules.dep": "a.ko.gz:", "M/a.ko.gz": "this is not gzip"},
			fake: fakeKernel{compressedErr: unix.EINVAL},
			load: []string{"a"},
			want: "load kernel module a: read M/a.ko.gz: gzip: invalid header",
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := ipvsHost(test.host).write(t, "lib/modules")
			k := test.fake
			l := loader{root: root, release: release, syscalls: &k}
			err := l.load(test.load)
			if err == nil {
				t.Fatal("no error")
			}
			got := strings.ReplaceAll(err.Error(), filepath.Join(root, "lib/modules", release), "M")
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("the error does not wrap %v", test.is)
			}
		})
	}
}

// TestExists checks modules that are loaded, built in, in the modules' directory, or missing.
func TestExists(t *testing.T) {
	t.Parallel()
	host := ipvsHost(fakeHost{"sys/module/loaded/initstate": "live\n", "sys/module/loading/initstate": "coming\n"})
	l := loader{root: host.write(t, "lib/modules"), release: release, syscalls: &fakeKernel{}}
	for name, want := range map[string]bool{
		"loaded": true, "loading": false, "br_netfilter": true, "sch_dash": true, "ip_vs_rr": true, "ip_vs_mh": false,
	} {
		if got := l.exists(name); got != want {
			t.Errorf("%s exists: %t, want %t", name, got, want)
		}
	}
	l.root = t.TempDir()
	if l.exists("ip_vs_rr") {
		t.Error("ip_vs_rr exists without a modules' directory")
	}
}
