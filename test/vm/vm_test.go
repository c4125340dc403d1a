package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseArgs(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		args []string
		want options
	}{
		"program with the default time limit": {
			args: []string{"run", "-kernel=6.1", "sh", "-c", "exit 1"},
			want: options{kernel: "6.1", limit: 30 * time.Minute, modprobe: true, command: []string{"sh", "-c", "exit 1"}},
		},
		"test binary with a time limit": {
			args: []string{"run", "-limit=1s", "/tmp/nft.test", "-test.v=true", "-test.timeout=5m0s"},
			want: options{
				kernel: "6.12", limit: 5*time.Minute + testGrace, modprobe: true,
				command: []string{"/tmp/nft.test", "-test.v=true", "-test.timeout=5m0s"},
			},
		},
		"test binary without a time limit": {
			args: []string{"run", "-limit=1s", "/tmp/nft.test", "-test.timeout=0s"},
			want: options{kernel: "6.12", limit: time.Second, modprobe: true, command: []string{"/tmp/nft.test", "-test.timeout=0s"}},
		},
		"clock of this machine": {
			args: []string{"run", "-clock=host", "true"},
			want: options{kernel: "6.12", clock: clockHost, limit: 30 * time.Minute, modprobe: true, command: []string{"true"}},
		},
		"all flags": {
			args: []string{"run", "-accel=kvm", "-modprobe=false", "-env=A,B", "-with=/c,d", "-append=quiet", "-log=/tmp/log", "true"},
			want: options{
				kernel: "6.12", accel: "kvm", clock: clockHost, limit: 30 * time.Minute, extraEnv: []string{"A", "B"}, extraFiles: []string{"/c", "d"}, kernelArgs: "quiet", log: "/tmp/log",
				command: []string{"true"},
			},
		},
		"other architecture": {
			args: []string{"run", "-arch=s390x", "true"},
			want: options{arch: "s390x", kernel: "6.1", limit: 30 * time.Minute, modprobe: true, command: []string{"true"}},
		},
		"shell": {
			args: []string{"shell"},
			want: options{kernel: "6.12", clock: clockHost, limit: 365 * 24 * time.Hour, modprobe: true, shell: true, command: []string{}},
		},
		"shell with a program": {
			args: []string{"shell", "bin/demo", "-keep"},
			want: options{kernel: "6.12", clock: clockHost, limit: 365 * 24 * time.Hour, modprobe: true, shell: true, command: []string{"bin/demo", "-keep"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if test.want.arch == "" {
				test.want.arch = "amd64"
			}
			test.want.cpus, test.want.memory, test.want.bootLimit = 1, 3072, 3*time.Minute
			if test.want.clock == "" {
				test.want.clock = clockOwn
			}
			if test.want.accel == "" {
				test.want.accel = "tcg"
			}
			got, err := parseArgs(test.args, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&test.want, got, cmp.AllowUnexported(options{})); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestParseArgsErrors(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"no arguments":                {nil, "usage: vm run"},
		"unknown command":             {[]string{"walk"}, "usage: vm run"},
		"no program":                  {[]string{"run", "-kernel=6.1"}, "usage: vm run"},
		"unknown kernel":              {[]string{"run", "-kernel=5.10", "true"}, "-kernel=5.10: want one of 6.1, 6.12"},
		"unknown architecture":        {[]string{"run", "-arch=vax", "true"}, "-arch=vax: want one of amd64, arm64, ppc64le, s390x"},
		"kernel of another release":   {[]string{"run", "-arch=s390x", "-kernel=6.12", "true"}, "-kernel=6.12: want one of 6.1"},
		"other processor":             {[]string{"run", "-arch=s390x", "-accel=kvm", "true"}, "-accel=kvm: want -arch=amd64"},
		"unknown accelerator":         {[]string{"run", "-accel=xen", "true"}, "-accel=xen: want tcg or kvm"},
		"unknown clock":               {[]string{"run", "-clock=sun", "true"}, "-clock=sun: want own or host"},
		"own clock without emulation": {[]string{"run", "-clock=own", "-accel=kvm", "true"}, "-clock=own: want -accel=tcg"},
		"output file":                 {[]string{"run", "/a.test", "-test.cpuprofile=x"}, "-test.cpuprofile: cannot copy files"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := parseArgs(test.args, io.Discard)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

// TestRunScript checks with a real shell that quoting preserves all arguments.
func TestRunScript(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "it's here")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	command := []string{"/bin/sh", "-c", `pwd; printf '%s|' "$QUOTED" "$@"`, "sh", "", "two words", "$HOME `x` \\", "it's"}
	out, err := exec.CommandContext(t.Context(), "sh", "-c", runScript(dir, []string{`QUOTED=a "b" 'c' $d=e`}, command)).CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	want := dir + "\n" + `a "b" 'c' $d=e||two words|$HOME ` + "`x`" + ` \|it's|`
	if diff := cmp.Diff(want, string(out)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	o := &options{extraEnv: []string{"CHOSEN"}}
	got := o.environment([]string{"PATH=/here", "HOME=/home/me", "GOTRACEBACK=all", "GOPATH=/go", "FAIRLEAD_X=1", "CHOSEN=a=b", "OTHER="})
	want := []string{
		"HOME=/root", "USER=root", "LANG=C.UTF-8", "PATH=/usr/bin:/usr/sbin",
		"GOTRACEBACK=all", "FAIRLEAD_X=1", "CHOSEN=a=b",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestParseLdd(t *testing.T) {
	t.Parallel()
	got := parseLdd("\tlinux-vdso.so.1 (0x00007ffd)\n\tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f4c)\n" +
		"\t/lib64/ld-linux-x86-64.so.2 (0x00007f4d)\n")
	want := []string{"/lib/x86_64-linux-gnu/libmnl.so.0", "/lib64/ld-linux-x86-64.so.2"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestIncludeModule(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{
		"kernel/net/netfilter/ipvs/ip_vs.ko":         true,
		"kernel/net/sctp/sctp.ko.xz":                 true,
		"kernel/lib/libcrc32c.ko":                    true,
		"kernel/drivers/net/dummy.ko":                true,
		"kernel/drivers/net/wireguard/wireguard.ko":  true,
		"kernel/drivers/net/ethernet/intel/e1000.ko": false,
		"kernel/fs/xfs/xfs.ko":                       false,
		"kernel/network/x.ko":                        false,
	} {
		if got := includeModule(moduleRules, path); got != want {
			t.Errorf("%s: %t, want %t", path, got, want)
		}
	}
}

// TestArchive reads an archive with an independent parser.
func TestArchive(t *testing.T) {
	t.Parallel()
	host := writeTree(t, map[string]string{"a": "one", "skipped": "x", "sub/b": "twelve bytes", "sub/skipped/c": "y"})
	if err := os.Symlink("../a", filepath.Join(host, "sub", "link")); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	a := newArchive(&b)
	for _, err := range []error{
		a.addSymlink("/bin", "usr/bin"),
		a.addText("/etc/odd", 0o600, "seven b"),
		a.addText("/etc/odd", 0o600, "ignored"),
		a.addTree("/deep/down", host, func(rel string) bool { return filepath.Base(rel) == "skipped" }),
		a.addFile("/linked", filepath.Join(host, "sub", "link")),
		a.close(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []archiveEntry{
		{"bin", modeSymlink | 0o777, "usr/bin"},
		{"etc", modeDir | 0o755, ""},
		{"etc/odd", modeFile | 0o600, "seven b"},
		{"deep", modeDir | 0o755, ""},
		{"deep/down", modeDir | 0o755, ""},
		{"deep/down/a", modeFile | 0o755, "one"},
		{"deep/down/sub", modeDir | 0o755, ""},
		{"deep/down/sub/b", modeFile | 0o755, "twelve bytes"},
		{"deep/down/sub/link", modeSymlink | 0o777, "../a"},
		{"linked", modeFile | 0o755, "one"},
		{"TRAILER!!!", 0, ""},
	}
	if diff := cmp.Diff(want, readArchive(t, b.Bytes()), cmp.AllowUnexported(archiveEntry{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestCheckoutWithoutClusters checks that the files of a running cluster do not get into an archive:
// its logs grow while they are read.
func TestCheckoutWithoutClusters(t *testing.T) {
	t.Parallel()
	root := writeTree(t, map[string]string{
		"go.mod": "module m", "bin/fairlead": "program", "bin/fairlead-cluster": "program", ".git/config": "", ".cache/vm/kernel": "",
		"bin/cluster-state/log/kubelet.log": "line", "bin/cluster-image.tar": "image", "bin/conformance/output.log": "line",
	})
	var b bytes.Buffer
	a := newArchive(&b)
	if err := errors.Join(addCheckout(a, root), a.close()); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range readArchive(t, b.Bytes()) {
		if name, inside := strings.CutPrefix("/"+e.name, root+"/"); inside && e.mode&modeFile == modeFile {
			got = append(got, name)
		}
	}
	if diff := cmp.Diff([]string{"bin/fairlead", "bin/fairlead-cluster", "go.mod"}, got); diff != "" {
		t.Errorf("files of the checkout (-want +got):\n%s", diff)
	}
}

// writeTree creates files with the given content in a temporary directory and returns its path.
func writeTree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		at := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

type archiveEntry struct {
	name string
	mode uint32
	text string
}

// readArchive parses an archive according to cpio(5).
func readArchive(t *testing.T, archive []byte) []archiveEntry {
	t.Helper()
	var all []archiveEntry
	for at := 0; at < len(archive); {
		header := archive[at : at+110]
		field := func(n int) int {
			var v int
			for _, c := range header[6+8*n : 14+8*n] {
				v = v<<4 | strings.IndexByte("0123456789ABCDEF", c)
			}
			return v
		}
		if magic := string(header[:6]); magic != "070701" {
			t.Fatalf("the entry at offset %d begins with %q", at, magic)
		}
		mode, size, nameSize := field(1), field(6), field(11)
		name := archive[at+110 : at+110+nameSize]
		if name[nameSize-1] != 0 {
			t.Fatalf("the name %q is not terminated", name)
		}
		at = (at + 110 + nameSize + 3) &^ 3
		all = append(all, archiveEntry{string(name[:nameSize-1]), uint32(mode), string(archive[at : at+size])})
		at = (at + size + 3) &^ 3
	}
	return all
}

func TestKernelLog(t *testing.T) {
	t.Parallel()
	var copied strings.Builder
	panics := 0
	l := &kernelLog{tee: &copied, onPanic: func() { panics++ }}
	text := "[ 0.1] Linux\r\n" + strings.Repeat("[ 1.0] more\r\n", 5000) + "[ 2.0] WARNING: CPU: 0 PID: 1 at net/x.c\r\n" +
		"[ 3.0] Kernel panic - not syncing: a\r\n[ 4.0] Kernel panic - not syncing: b\r\n[ 5.0] no line feed"
	l.read(strings.NewReader(text))
	if copied.String() != text {
		t.Errorf("copied %d bytes, want %d", copied.Len(), len(text))
	}
	if panics != 1 || !l.sawPanic {
		t.Errorf("onPanic was called %d times, sawPanic is %t; want one call", panics, l.sawPanic)
	}
	if diff := cmp.Diff([]string{"[ 2.0] WARNING: CPU: 0 PID: 1 at net/x.c"}, l.warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
	lines := strings.Split(l.tail(), "\n")
	if len(lines) != shownLogLines || lines[shownLogLines-1] != "[ 5.0] no line feed" || strings.Contains(l.tail(), "\r") {
		t.Errorf("tail has %d lines, the last is %q", len(lines), lines[len(lines)-1])
	}
	if len(l.lines) > maxLogLines {
		t.Errorf("kept %d lines, want at most %d", len(l.lines), maxLogLines)
	}
}

// TestEnsure checks that ensure creates each directory once, also after a failure and after a
// killed process.
func TestEnsure(t *testing.T) {
	t.Parallel()
	c := cache{dir: t.TempDir()}
	// A killed process has left this directory.
	if err := os.MkdirAll(filepath.Join(c.dir, "linux-6.1-aa.new", "root"), 0o755); err != nil {
		t.Fatal(err)
	}
	made := 0
	ensure := func(name string, fail bool) error {
		return c.ensure(filepath.Join(c.dir, name), func(work string) error {
			made++
			if err := os.Mkdir(filepath.Join(work, "root"), 0o755); err != nil {
				return err // the directory is not empty
			}
			if fail {
				return os.ErrDeadlineExceeded
			}
			return nil
		})
	}
	for _, step := range []struct {
		name string
		fail bool
		made int
		want []string
	}{
		{"linux-6.1-aa", true, 1, nil},
		{"linux-6.1-aa", false, 2, []string{"linux-6.1-aa"}},
		{"linux-6.1-aa", false, 2, []string{"linux-6.1-aa"}},
		{"linux-6.12-bb", false, 3, []string{"linux-6.1-aa", "linux-6.12-bb"}},
		{"linux-6.1-cc", false, 4, []string{"linux-6.1-aa", "linux-6.1-cc", "linux-6.12-bb"}},
	} {
		if err := ensure(step.name, step.fail); (err != nil) != step.fail {
			t.Fatalf("%s: %v", step.name, err)
		}
		found, err := filepath.Glob(filepath.Join(c.dir, "*-*"))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range found {
			names = append(names, filepath.Base(f))
		}
		if diff := cmp.Diff(step.want, names); diff != "" || made != step.made {
			t.Fatalf("after %s: fill was called %d times, want %d; directories (-want +got):\n%s", step.name, made, step.made, diff)
		}
	}
}
