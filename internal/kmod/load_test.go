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

// fakeHost is a host's files by path, with the folder of modules called M.
type fakeHost map[string]string

// ipvsHost has IPVS's modules as Debian has them, with another purpose for libcrc32c.
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

// fakeKernel is a kernel that notes the names of files and the contents of images that it
// is given, with the parameters.
type fakeKernel struct {
	calls         []string
	finitErr      error // what finit_module answers always
	compressedErr error // what finit_module answers to compressed files
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
		"a module without dependencies": {
			load:  []string{"dummy"},
			calls: []string{"dummy.ko"},
		},
		"parameters": {
			load:  []string{"dummy numdummies=0 x=1"},
			calls: []string{"dummy.ko numdummies=0 x=1"},
		},
		"first what a module needs, once, and before that its softdeps": {
			load:  []string{"ip_vs", "ip_vs_rr", "dummy", "dummy"},
			calls: append(slices.Clip(ipVS), "ip_vs_rr.ko", "dummy.ko"),
		},
		"parameters are for the module, not for what it needs": {
			load:  []string{"crc32c_slow x=1"},
			calls: []string{"hash.ko", "crc32c_slow.ko x=1"},
		},
		"dashes are underscores": {
			load:  []string{"crc32c_fast", "ip-vs-rr"},
			host:  fakeHost{"M/modules.softdep": ""},
			calls: []string{"crc32c-fast.ko", "nf_defrag.ko", "libcrc32c.ko", "nf_conntrack.ko", "ip_vs.ko", "ip_vs_rr.ko"},
		},
		"a softdep that fails, as it is for another processor": {
			load:  []string{"libcrc32c"},
			fake:  fakeKernel{moduleErrs: map[string]error{"crc32c_fast": unix.ENODEV}},
			calls: crc,
		},
		"a softdep that is built in": {
			load:  []string{"libcrc32c"},
			host:  fakeHost{"M/modules.builtin": "kernel/crypto/crc32c.ko\n"},
			calls: []string{"libcrc32c.ko"},
		},
		"a softdep that there is not": {
			load:  []string{"libcrc32c"},
			host:  fakeHost{"M/modules.alias": ""},
			calls: []string{"libcrc32c.ko"},
		},
		"softdeps in a circle": {
			load:  []string{"dummy"},
			host:  fakeHost{"M/modules.softdep": "softdep dummy pre: hash\nsoftdep hash pre: dummy\n"},
			calls: []string{"hash.ko", "dummy.ko"},
		},
		"built in": {
			load: []string{"br_netfilter", "sch_dash"},
		},
		"built in, and the folder of modules is not there": {
			host: fakeHost{"M/modules.dep": "", "sys/module/dummy/parameters/numdummies": "1"},
			load: []string{"dummy"},
		},
		"loaded before, and the folder of modules is not there": {
			host: fakeHost{"M/modules.dep": "", "sys/module/dummy/initstate": "live\n", "sys/module/ip_vs/initstate": "live\n"},
			load: []string{"dummy numdummies=0", "ip-vs"},
		},
		"what it needs is loaded": {
			host: fakeHost{
				"sys/module/nf_conntrack/initstate": "live\n", "sys/module/nf_defrag/initstate": "live\n",
				"sys/module/libcrc32c/initstate": "live\n",
			},
			load:  []string{"ip_vs"},
			calls: []string{"ip_vs.ko"},
		},
		"somebody else is loading it: the kernel waits for that": {
			host:  fakeHost{"sys/module/dummy/initstate": "coming\n"},
			fake:  fakeKernel{moduleErrs: map[string]error{"dummy": unix.EEXIST}},
			load:  []string{"dummy"},
			calls: []string{"dummy.ko"},
		},
		"a kernel without finit_module": {
			fake:  fakeKernel{finitErr: unix.ENOSYS},
			load:  []string{"dummy numdummies=0"},
			calls: []string{"image of dummy numdummies=0"},
		},
		"the other files of depmod are not there": {
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
					t.Errorf("what the kernel was handed (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestCompressed(t *testing.T) {
	files := fakeHost{"M/modules.dep": "a.ko.gz:\nb.ko.xz:\nc.ko.zst:\n"}
	// What gzip, xz and zstd make of "the module", with the options that the kernel's
	// Makefile gives them.
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
		"the kernel decompresses":                      {fakeKernel{}, []string{"a.ko.gz x=1", "b.ko.xz", "c.ko.zst"}},
		"a kernel that does not know the flag":         {fakeKernel{compressedErr: unix.EINVAL}, inProgram},
		"a kernel that is built without decompression": {fakeKernel{compressedErr: unix.EOPNOTSUPP}, inProgram},
		"a kernel without finit_module":                {fakeKernel{finitErr: unix.ENOSYS}, inProgram},
	} {
		t.Run(name, func(t *testing.T) {
			k := test.fake
			l := loader{root: files.write(t, "lib/modules"), release: release, syscalls: &k}
			if err := l.load([]string{"a x=1", "b", "c"}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.calls, k.calls); diff != "" {
				t.Errorf("what the kernel was handed (-want +got):\n%s", diff)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	const (
		modulesPackage = "install the package with "
		kernelsPackage = "; install the modules of the package that this kernel is from"
	)
	refuseAll := func(err error) fakeKernel { return fakeKernel{finitErr: err} }
	for name, test := range map[string]struct {
		host fakeHost
		fake fakeKernel
		load []string
		want string // with the folder of modules called M
		is   error
	}{
		"no folder": {
			host: fakeHost{"M/modules.dep": ""},
			load: []string{"ip_vs", "dummy numdummies=0"},
			want: "load kernel modules ip_vs, dummy: the modules of Linux 6.1.0 are not in /lib/modules or /usr/lib/modules: " +
				modulesPackage + "this kernel's modules, or mount the host's /lib/modules into the container",
		},
		"not in the folder": {
			load: []string{"dummy", "ip_vs_mh"},
			want: "load kernel module ip_vs_mh: it is not in M: " +
				modulesPackage + "all of this kernel's modules, or mount the host's /lib/modules into the container",
		},
		"in the folder's list only": {
			host: fakeHost{"M/kernel/net/dummy.ko": ""},
			load: []string{"dummy"},
			want: "load kernel module dummy: open M/kernel/net/dummy.ko: no such file or directory",
			is:   fs.ErrNotExist,
		},
		"without CAP_SYS_MODULE, for all that are missing": {
			host: fakeHost{"sys/module/dummy/initstate": "live\n", "M/modules.softdep": ""},
			fake: fakeKernel{finitErr: unix.EPERM, unprivileged: true},
			load: []string{"dummy", "nf_defrag", "ip_vs x=1"},
			want: "load kernel module nf_defrag: M/kernel/net/nf_defrag.ko: finit_module: operation not permitted: " +
				"this needs CAP_SYS_MODULE; or load them on the host: modprobe -a nf_defrag ip_vs",
			is: unix.EPERM,
		},
		"privileged, but lockdown or others forbid it": {
			fake: refuseAll(unix.EPERM),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: operation not permitted: " +
				"there is CAP_SYS_MODULE, but lockdown, a security module, seccomp or a user namespace forbids it; " +
				"load them on the host: modprobe -a dummy",
			is: unix.EPERM,
		},
		"SELinux": {
			fake: refuseAll(unix.EACCES),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: permission denied: " +
				"there is CAP_SYS_MODULE, but lockdown, a security module, seccomp or a user namespace forbids it; " +
				"load them on the host: modprobe -a dummy",
			is: unix.EACCES,
		},
		"the host loads no modules any more": {
			host: fakeHost{"proc/sys/kernel/modules_disabled": "1\n"},
			fake: fakeKernel{finitErr: unix.EPERM, unprivileged: true},
			load: []string{"dummy", "hash"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: operation not permitted: " +
				"the host has forbidden to load modules until it is booted again (sysctl kernel.modules_disabled); " +
				"have it load them before, in /etc/modules-load.d: dummy hash",
			is: unix.EPERM,
		},
		"not signed": {
			fake: refuseAll(unix.EKEYREJECTED),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: key was rejected by service: " +
				"the kernel takes modules only with the signature of a key that it has" + kernelsPackage,
			is: unix.EKEYREJECTED,
		},
		"of another kernel": {
			fake: refuseAll(unix.ENOEXEC),
			load: []string{"dummy"},
			want: "load kernel module dummy: M/kernel/net/dummy.ko: finit_module: exec format error: " +
				"the module does not fit the kernel, whose log says why (dmesg)" + kernelsPackage,
			is: unix.ENOEXEC,
		},
		"what it needs fails": {
			host: fakeHost{"M/modules.softdep": ""},
			fake: fakeKernel{moduleErrs: map[string]error{"libcrc32c": unix.ENOMEM}},
			load: []string{"ip_vs"},
			want: "load kernel module ip_vs: nf_conntrack, which it needs: libcrc32c, which it needs: " +
				"M/kernel/lib/libcrc32c.ko: finit_module: cannot allocate memory: the kernel's log may say why (dmesg)",
			is: unix.ENOMEM,
		},
		"what should be loaded before has failed, and therefore it fails": {
			host: fakeHost{"M/modules.alias": ""},
			fake: fakeKernel{moduleErrs: map[string]error{"libcrc32c": unix.EIO}},
			load: []string{"libcrc32c"},
			want: "load kernel module libcrc32c: M/kernel/lib/libcrc32c.ko: finit_module: input/output error " +
				"(crc32c, which should be loaded before, was not: it is not in M: " + modulesPackage +
				"all of this kernel's modules, or mount the host's /lib/modules into the container): " +
				"the kernel's log may say why (dmesg)",
			is: unix.EIO,
		},
		"a compression that nobody knows": {
			host: fakeHost{"M/modules.dep": "a.ko.br:", "M/a.ko.br": "x"},
			fake: fakeKernel{compressedErr: unix.EINVAL},
			load: []string{"a"},
			want: "load kernel module a: read M/a.ko.br: .br is none of the compressions .gz, .xz and .zst",
		},
		"gzip that is none": {
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
				t.Errorf("the error is not %v", test.is)
			}
		})
	}
}
