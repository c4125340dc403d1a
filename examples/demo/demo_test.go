package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/ipvs"

	"github.com/google/go-cmp/cmp"
)

// asProgram is the environment variable that makes the test binary run another program.
const asProgram = "FAIRLEAD_TEST_AS"

// fairleadBinary is built by TestMain.
var fairleadBinary string

func TestMain(m *testing.M) {
	switch os.Getenv(asProgram) {
	case "demo":
		main()
	case "client":
		os.Exit(runClient())
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "demo-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dir) }()
		fairleadBinary = filepath.Join(dir, "fairlead")
		build := exec.Command("go", "build", "-buildvcs=false", "-o", fairleadBinary, "fairlead.io/fairlead/cmd/fairlead")
		if output, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build fairlead: %v\n%s", err, output)
			return 1
		}
		return m.Run()
	}())
}

// runClient requests http://backend like any other program, and prints the answer.
func runClient() int {
	resp, err := http.Get("http://" + backendApp)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// demo is a running demo.
type demo struct {
	*exec.Cmd
	dir    string // contains all files of the demo
	output *bufio.Reader
	printed,
	stderr bytes.Buffer
}

// startDemo starts the demo with few requests and the real fairlead. Arguments override these
// settings.
func startDemo(t *testing.T, adjust func(*exec.Cmd), args ...string) *demo {
	t.Helper()
	services, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{"-requests=60", "-fairlead=" + fairleadBinary, "-services=" + services}, args...)
	d := &demo{Cmd: exec.CommandContext(t.Context(), os.Args[0], args...), dir: t.TempDir()}
	d.Dir = d.dir
	d.Env = append(os.Environ(), asProgram+"=demo", "TMPDIR="+d.dir)
	d.Stderr = &d.stderr
	pipe, err := d.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	d.output = bufio.NewReader(io.TeeReader(pipe, &d.printed))
	if adjust != nil {
		adjust(d.Cmd)
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	return d
}

// waitForLine reads the output until a line contains the text.
func (d *demo) waitForLine(t *testing.T, text string) {
	t.Helper()
	for {
		line, err := d.output.ReadString('\n')
		if strings.Contains(line, text) {
			return
		}
		if err != nil {
			_ = d.Wait()
			t.Fatalf("the demo ended before it printed %q: %v\n%s%s", text, err, &d.printed, &d.stderr)
		}
	}
}

// waitExit waits until the demo has ended and returns its exit code.
func (d *demo) waitExit(t *testing.T) int {
	t.Helper()
	if _, err := io.Copy(io.Discard, d.output); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Errorf("read the output: %v", err)
	}
	if err := d.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return d.ProcessState.ExitCode()
}

// checkNothingLeft checks that the demo has left no files and no processes. Unnamed namespaces
// disappear with the processes that use them.
func (d *demo) checkNothingLeft(t *testing.T) {
	t.Helper()
	if files, err := os.ReadDir(d.dir); err != nil || len(files) > 0 {
		t.Errorf("the demo left files %v, error %v", files, err)
	}
	d.checkNoProcess(t)
}

// checkNoProcess waits until no process of the demo runs. The kernel may take a moment to kill
// processes.
func (d *demo) checkNoProcess(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		processes := d.processes(t)
		if len(processes) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("the demo left processes %v", processes)
			return
		}
	}
}

// processes returns the names of programs whose working directory is the demo's directory or
// below.
func (d *demo) processes(t *testing.T) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil || len(links) == 0 {
		t.Fatalf("no processes in /proc: %v", err)
	}
	var found []string
	for _, link := range links {
		if cwd, err := os.Readlink(link); err == nil && strings.HasPrefix(cwd, d.dir) {
			name, _ := os.ReadFile(filepath.Join(filepath.Dir(link), "comm"))
			found = append(found, strings.TrimSpace(string(name)))
		}
	}
	return slices.Sorted(slices.Values(found))
}

// namespaces returns the paths of namespaces and their configuration whose names start with name.
func namespaces(t *testing.T, name string) []string {
	t.Helper()
	var all []string
	for _, dir := range []string{"/run/netns/", netnsConfig + "/"} {
		paths, err := filepath.Glob(dir + name + "-*")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			all = append(all, strings.Replace(path, "/"+name+"-", "/", 1))
		}
	}
	return all
}

// tableRow matches a row of the tables of requests by back end.
var tableRow = regexp.MustCompile(`(?m)^   (backend-\d) +(\d+) +\d+ %`)

// TestDemo runs the complete demo, with and without redis-server.
func TestDemo(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		path string
		want string // description of the pod redis
	}{
		"with redis-server":    {os.Getenv("PATH"), "redis-server"},
		"without redis-server": {t.TempDir(), "a small responder, because redis-server is not installed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath("redis-server"); err != nil {
				t.Fatalf("%v: run test/deps.sh to install it", err)
			}
			d := startDemo(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "PATH="+tc.path) })
			if code := d.waitExit(t); code != 0 || d.stderr.Len() > 0 {
				t.Fatalf("exit code %d\n%s%s", code, &d.printed, &d.stderr)
			}
			d.checkNothingLeft(t)
			text := d.printed.String()
			for _, want := range []string{
				`(?m)^  redis +10\.\S+ +fd00:\S+ +` + tc.want,
				`(?m)^  backend +10\.96\.\d+\.\d+, fd00:10:96::\S+ +backend-1, backend-2, backend-3$`,
				`(?m)^   backend-2 deleted +\d+\.\d\d ms +\d+\.\d\d ms$`,
				`(?m)^   backend-4 added +\d+\.\d\d ms +\d+\.\d\d ms$`,
				`(?m)^   backend-5 added +\d+\.\d\d ms +\d+\.\d\d ms$`,
				`(?m)^   http://192\.0\.2\.1:3[0-2]\d{3}/ +from outside: 20 requests, answered by [1-4] back ends$`,
				`(?m)^   http://\[2001:db8::1\]:3[0-2]\d{3}/ +from outside: 20 requests, answered by [1-4] back ends$`,
				`(?m)^   Redis has counted \d+ requests, 40 of them from outside$`,
				`(?m)^   \d+ requests in total, during all changes: 0 failed$`,
				`(?m)^OK: .* none of \d+ requests failed\.$`,
			} {
				if !regexp.MustCompile(want).MatchString(text) {
					t.Errorf("the output does not match %s", want)
				}
			}
			// The back ends that received requests in each table, and the sum of the requests.
			var got []string
			sum := 0
			for _, row := range tableRow.FindAllStringSubmatch(text, -1) {
				n, err := strconv.Atoi(row[2])
				if err != nil {
					t.Fatal(err)
				}
				sum += n
				got = append(got, fmt.Sprint(row[1], " ", n > 0))
			}
			want := []string{
				"backend-1 true", "backend-2 true", "backend-3 true",
				"backend-1 true", "backend-2 false", "backend-3 true",
				"backend-1 true", "backend-3 true", "backend-4 true", "backend-5 true",
			}
			if diff := cmp.Diff(want, got); diff != "" || sum != 3*60 {
				t.Errorf("the tables show %d requests, want %d; rows (-want +got):\n%s", sum, 3*60, diff)
			}
			if t.Failed() {
				t.Log(text)
			}
		})
	}
}

// TestFailures checks that the demo detects and reports problems, and leaves nothing behind.
func TestFailures(t *testing.T) {
	t.Parallel()
	script := func(text string) string {
		path := filepath.Join(t.TempDir(), "fairlead")
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	wrongPort := t.TempDir()
	for _, name := range []string{"backend.yaml", "redis.yaml", "public.yaml"} {
		text, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte("targetPort: 8080"), []byte("targetPort: 8081"))
		if err := os.WriteFile(filepath.Join(wrongPort, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		args   []string
		adjust func(*exec.Cmd)
		code   int
		stdout string
		stderr string
	}{
		"not root": {
			adjust: func(cmd *exec.Cmd) {
				// An unprivileged user has no access to the test's directories.
				const nobody = 65534
				cmd.Path, cmd.Dir = "/proc/self/exe", "/"
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			},
			code: 1, stderr: "run it as root",
		},
		"no binary":       {args: []string{"-fairlead=bin/nothing"}, code: 1, stderr: "bin/nothing: no such file or directory: run `make build` first"},
		"other folder":    {args: []string{"-services=nothing"}, code: 1, stderr: "nothing/backend.yaml: no such file or directory: run the demo in the root of the repository"},
		"an unknown mode": {args: []string{"-mode=iptables"}, code: 1, stderr: `-mode: unknown mode "iptables": use nft or ipvs`},
		"few requests":    {args: []string{"-requests=3"}, code: 1, stderr: "use 50 or more"},
		"unknown flag":    {args: []string{"-forever"}, code: 2, stderr: "-forever"},
		"an argument":     {args: []string{"keep"}, code: 2, stderr: `unexpected argument "keep"`},
		"fairlead ends":   {args: []string{"-fairlead=" + script("echo no nf_tables >&2; exit 1")}, code: 1, stderr: "fairlead ended: no nf_tables\nexit status 1"},
		"fairlead prints": {args: []string{"-fairlead=" + script("echo odd >&2; exec "+fairleadBinary+` "$@"`)}, code: 1, stdout: "FAILED: fairlead logged: odd"},
		"fairlead warns": {
			args: []string{"-fairlead=" + script(`echo '{"level":"WARN","msg":"odd"}' >&2; exec `+fairleadBinary+` "$@"`)},
			code: 1, stdout: `FAILED: fairlead logged: {"level":"WARN","msg":"odd"}`,
		},
		"requests fail": {args: []string{"-services=" + wrongPort}, code: 1, stdout: "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, tc.adjust, tc.args...)
			if code := d.waitExit(t); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if !strings.Contains(d.printed.String(), tc.stdout) || !strings.Contains(d.stderr.String(), tc.stderr) || strings.Contains(d.printed.String(), "OK:") {
				t.Errorf("output %q, want %q and no OK;\nerrors %q, want %q", &d.printed, tc.stdout, &d.stderr, tc.stderr)
			}
			d.checkNothingLeft(t)
		})
	}
}

// TestVM checks that the demo runs in a virtual machine if, and only if, the kernel does not
// support the mode.
func TestVM(t *testing.T) {
	t.Parallel()
	supportErr := options{mode: backend.IPVS}.checkSupported()
	if supportErr != nil && !errors.Is(supportErr, ipvs.ErrNotSupported) {
		t.Fatal(supportErr)
	}
	for mode, want := range map[string]bool{backend.NFT: false, backend.IPVS: supportErr != nil} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, nil, "-mode="+mode, "-vm=echo in a VM; exit 7")
			code := d.waitExit(t)
			inVM := code == 7 && d.printed.String() == "in a VM\n" && strings.Contains(d.stderr.String(), fmt.Sprint(supportErr))
			onHost := code == 0 && strings.Contains(d.printed.String(), "OK:")
			if inVM != want || onHost == want {
				t.Errorf("exit code %d, want a virtual machine: %t\n%s%s", code, want, &d.printed, &d.stderr)
			}
			d.checkNothingLeft(t)
		})
	}
}

// TestSignals checks that the demo leaves nothing behind, whichever signal ends it.
func TestSignals(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		after string
		end   func(*demo) error
		want  int
	}{
		"SIGINT at the start":                 {"pod ", signalTo(syscall.SIGINT), 128 + 2},
		"SIGINT under load":                   {"1. ", signalTo(syscall.SIGINT), 128 + 2},
		"SIGTERM while a back end is deleted": {"2. ", signalTo(syscall.SIGTERM), 128 + 15},
		"SIGHUP while two are added":          {"3. ", signalTo(syscall.SIGHUP), 128 + 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// Enough requests that the demo does not finish before the signal.
			d := startDemo(t, nil, "-requests=200")
			d.waitForLine(t, tc.after)
			if got := d.processes(t); len(got) != 3 {
				t.Errorf("processes %v, want the demo, fairlead and redis-server", got)
			}
			if err := tc.end(d); err != nil {
				t.Error(err)
			}
			if code := d.waitExit(t); code != tc.want {
				t.Errorf("exit code %d, want %d; %s", code, tc.want, &d.stderr)
			}
			d.checkNothingLeft(t)
		})
	}
	t.Run("closed output pipe", func(t *testing.T) {
		t.Parallel()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		d := startDemo(t, func(cmd *exec.Cmd) { cmd.Stdout = w })
		if err := errors.Join(w.Close(), r.Close()); err != nil {
			t.Fatal(err)
		}
		if err := d.Wait(); d.ProcessState.ExitCode() != 128+13 {
			t.Errorf("the demo ended with %v, want exit code %d; %s", err, 128+13, &d.stderr)
		}
		d.checkNothingLeft(t)
	})
}

func signalTo(s syscall.Signal) func(*demo) error {
	return func(d *demo) error { return d.Process.Signal(s) }
}

// TestKeep checks that the commands printed with -keep work, and that Ctrl-C removes everything.
// After SIGKILL, the next run removes everything.
func TestKeep(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("demo-test-%d", os.Getpid())
	t.Cleanup(func() {
		if left := namespaces(t, name); len(left) > 0 {
			t.Errorf("names left behind: %v", left)
		}
	})
	keep := func() *demo {
		d := startDemo(t, nil, "-keep", "-name="+name)
		d.waitForLine(t, "until Ctrl-C")
		return d
	}

	first := keep()
	want := []string{
		"/run/netns/backend-1", "/run/netns/backend-3", "/run/netns/backend-4", "/run/netns/backend-5",
		"/run/netns/frontend-1", "/run/netns/frontend-2", "/run/netns/frontend-3",
		"/run/netns/node", "/run/netns/outside", "/run/netns/redis",
		"/etc/netns/backend-1", "/etc/netns/backend-3", "/etc/netns/backend-4", "/etc/netns/backend-5",
		"/etc/netns/frontend-1", "/etc/netns/frontend-2", "/etc/netns/frontend-3", "/etc/netns/redis",
	}
	if diff := cmp.Diff(want, namespaces(t, name)); diff != "" {
		t.Errorf("namespaces (-want +got):\n%s", diff)
	}
	curl := exec.CommandContext(t.Context(), "ip", "netns", "exec", name+"-frontend-1", os.Args[0])
	curl.Env = append(os.Environ(), asProgram+"=client")
	if output, err := curl.CombinedOutput(); err != nil || !strings.HasPrefix(string(output), "backend-") {
		t.Errorf("a request by name answered %q, error %v", output, err)
	}
	rules, err := exec.CommandContext(t.Context(), "ip", "netns", "exec", name+"-node", "nft", "list", "table", "ip", "fairlead").CombinedOutput()
	if err != nil || !strings.Contains(string(rules), "10.244.0.4") {
		t.Errorf("nft lists %q, error %v", rules, err)
	}

	// Other runs do not disturb the first.
	second := startDemo(t, nil, "-keep", "-name="+name)
	if code := second.waitExit(t); code != 1 || !strings.Contains(second.stderr.String(), "another demo with -keep is running under the name "+name) {
		t.Errorf("a second demo with -keep exits with %d, want 1: %s", code, &second.stderr)
	}
	third := startDemo(t, nil, "-name="+name)
	if code := third.waitExit(t); code != 0 {
		t.Errorf("a demo without -keep exits with %d: %s", code, &third.stderr)
	}
	if diff := cmp.Diff(want, namespaces(t, name)); diff != "" {
		t.Errorf("namespaces after other runs (-want +got):\n%s", diff)
	}

	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	first.waitExit(t)
	first.checkNoProcess(t)
	if len(namespaces(t, name)) == 0 {
		t.Error("SIGKILL left no names, so the test cannot check their removal")
	}
	startInFolder := func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "TMPDIR="+first.dir) }
	fourth := startDemo(t, startInFolder, "-name="+name)
	if code := fourth.waitExit(t); code != 0 {
		t.Errorf("the next demo exits with %d: %s", code, &fourth.stderr)
	}
	first.checkNothingLeft(t)
	if left := namespaces(t, name); len(left) > 0 {
		t.Errorf("the next demo left %v", left)
	}

	last := keep()
	if err := last.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := last.waitExit(t); code != 0 {
		t.Errorf("the demo exits with %d after Ctrl-C, want 0: %s", code, &last.stderr)
	}
	last.checkNothingLeft(t)
}

// TestResponder checks the responder's answers to lines and commands.
func TestResponder(t *testing.T) {
	t.Parallel()
	server, conn := net.Pipe()
	s := newStreamServer()
	s.track(server, func() { (&responder{values: map[string]string{}}).serveConn(server) })
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ send, want string }{
		{"PING\r\n", "+PONG\r\n"},
		{"*1\r\n$4\r\nping\r\n", "+PONG\r\n"},
		{"GET k\r\n", "$-1\r\n"},
		{"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\na b\r\n", "+OK\r\n"},
		{"GET k\r\n", "$3\r\na b\r\n"},
		{"INCR k\r\n", "-ERR value is not an integer or out of range\r\n"},
		{"INCR n\r\n", ":1\r\n"},
		{"INCR n\r\n", ":2\r\n"},
		{"GET n\r\n", "$1\r\n2\r\n"},
		{"\r\n", "-ERR this is the demo's responder, which knows PING, SET, GET and INCR, not []\r\n"},
		{"QUIT now\r\n", "-ERR this is the demo's responder, which knows PING, SET, GET and INCR, not [\"QUIT\" \"now\"]\r\n"},
	} {
		if _, err := io.WriteString(conn, step.send); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(step.want))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != step.want {
			t.Fatalf("answer to %q is %q, error %v; want %q", step.send, got, err, step.want)
		}
	}
}
