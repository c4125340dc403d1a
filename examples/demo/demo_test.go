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

	"fairlead.io/fairlead/ipvs"

	"github.com/google/go-cmp/cmp"
)

// asProgram, in the environment, makes the test binary another program.
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

// runClient asks for http://backend as any program would, and prints the answer.
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

// demo is a run of the demo.
type demo struct {
	*exec.Cmd
	dir    string // with all files that it makes
	output *bufio.Reader
	printed,
	stderr bytes.Buffer
}

// startDemo starts the demo with few requests and the real fairlead, which
// later arguments may replace.
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

// waitForLine reads the output until a line holds the text.
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

// waitExit waits until the demo has ended, and returns its exit code.
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

// checkNothingLeft checks that no file and no process of the demo is left.
// Namespaces without a name go with the processes that hold them.
func (d *demo) checkNothingLeft(t *testing.T) {
	t.Helper()
	if files, err := os.ReadDir(d.dir); err != nil || len(files) > 0 {
		t.Errorf("left: files %v, error %v", files, err)
	}
	d.checkNoProcess(t)
}

// checkNoProcess waits until there is no process of the demo: one that the
// kernel is to kill takes a moment.
func (d *demo) checkNoProcess(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		processes := d.processes(t)
		if len(processes) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left: processes %v", processes)
			return
		}
	}
}

// processes returns the programs that run in the demo's folder or below.
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

// namespaces returns what has a name that begins with name.
func namespaces(t *testing.T, name string) []string {
	t.Helper()
	var found []string
	for _, dir := range []string{"/run/netns/", netnsConfig + "/"} {
		paths, err := filepath.Glob(dir + name + "-*")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			found = append(found, strings.Replace(path, "/"+name+"-", "/", 1))
		}
	}
	return found
}

// tableRow is a row of the tables that say who answered requests.
var tableRow = regexp.MustCompile(`(?m)^   (backend-\d) +(\d+) +\d+ %`)

// TestDemo runs all of it, with either kind of Redis.
func TestDemo(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		path string
		want string // runs in the pod redis
	}{
		"with redis-server":    {os.Getenv("PATH"), "redis-server"},
		"without redis-server": {t.TempDir(), "a small responder, as redis-server is not installed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath("redis-server"); err != nil {
				t.Fatalf("%v: test/deps.sh installs it", err)
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
				`(?m)^   backend-2 gone +\d+\.\d\d ms +\d+\.\d\d ms$`,
				`(?m)^   backend-4 there +\d+\.\d\d ms +\d+\.\d\d ms$`,
				`(?m)^   backend-5 there +\d+\.\d\d ms +\d+\.\d\d ms$`,
				`(?m)^   http://192\.0\.2\.1:3[0-2]\d{3}/ +from outside: 20 requests, answered by [1-4] back ends$`,
				`(?m)^   http://\[2001:db8::1\]:3[0-2]\d{3}/ +from outside: 20 requests, answered by [1-4] back ends$`,
				`(?m)^   Redis has counted \d+, 40 of them from outside$`,
				`(?m)^   \d+ requests in all, through every change: 0 failed$`,
				`(?m)^OK: .* none of \d+ requests failed\.$`,
			} {
				if !regexp.MustCompile(want).MatchString(text) {
					t.Errorf("the output has no match of %s", want)
				}
			}
			// Which back ends got requests, by table, and how many they were.
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
				t.Errorf("%d requests in tables, want %d; rows (-want +got):\n%s", sum, 3*60, diff)
			}
			if t.Failed() {
				t.Log(text)
			}
		})
	}
}

// TestFailures: the demo notices that something is wrong, says what, and leaves
// nothing.
func TestFailures(t *testing.T) {
	t.Parallel()
	script := func(text string) string {
		path := filepath.Join(t.TempDir(), "fairlead")
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	unserved := t.TempDir()
	for _, name := range []string{"backend.yaml", "redis.yaml", "public.yaml"} {
		text, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte("targetPort: 8080"), []byte("targetPort: 8081"))
		if err := os.WriteFile(filepath.Join(unserved, name), text, 0o644); err != nil {
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
				// Nobody can't get to the test's own folders.
				const nobody = 65534
				cmd.Path, cmd.Dir = "/proc/self/exe", "/"
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			},
			code: 1, stderr: "run it as root",
		},
		"no binary":       {args: []string{"-fairlead=bin/nothing"}, code: 1, stderr: "bin/nothing: no such file or directory: run `make build` first"},
		"other folder":    {args: []string{"-services=nothing"}, code: 1, stderr: "nothing/backend.yaml: no such file or directory: run the demo in the folder"},
		"an unknown mode": {args: []string{"-mode=iptables"}, code: 1, stderr: `want nft or ipvs, not "iptables"`},
		"few requests":    {args: []string{"-requests=3"}, code: 1, stderr: "use 50 or more"},
		"unknown flag":    {args: []string{"-forever"}, code: 2, stderr: "-forever"},
		"an argument":     {args: []string{"keep"}, code: 2, stderr: `unexpected argument "keep"`},
		"fairlead ends":   {args: []string{"-fairlead=" + script("echo no nf_tables >&2; exit 1")}, code: 1, stderr: "fairlead has ended: no nf_tables\nexit status 1"},
		"fairlead is odd": {args: []string{"-fairlead=" + script("echo odd >&2; exec "+fairleadBinary+` "$@"`)}, code: 1, stdout: "FAILED: fairlead says: odd"},
		"fairlead warns": {
			args: []string{"-fairlead=" + script(`echo '{"level":"WARN","msg":"odd"}' >&2; exec `+fairleadBinary+` "$@"`)},
			code: 1, stdout: `FAILED: fairlead says: {"level":"WARN","msg":"odd"}`,
		},
		"requests fail": {args: []string{"-services=" + unserved}, code: 1, stdout: "connection refused"},
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

// TestVM: where the kernel cannot run a mode, and only there, a virtual machine's does.
func TestVM(t *testing.T) {
	t.Parallel()
	cannot := options{mode: modeIPVS}.checkSupported()
	if cannot != nil && !errors.Is(cannot, ipvs.ErrNotSupported) {
		t.Fatal(cannot)
	}
	for mode, want := range map[string]bool{modeNFT: false, modeIPVS: cannot != nil} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, nil, "-mode="+mode, "-vm=echo there; exit 7")
			code := d.waitExit(t)
			there := code == 7 && d.printed.String() == "there\n" && strings.Contains(d.stderr.String(), fmt.Sprint(cannot))
			here := code == 0 && strings.Contains(d.printed.String(), "OK:")
			if there != want || here == want {
				t.Errorf("exit code %d, want a virtual machine: %t\n%s%s", code, want, &d.printed, &d.stderr)
			}
			d.checkNothingLeft(t)
		})
	}
}

// TestSignals: whatever ends the demo, nothing is left.
func TestSignals(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		after string
		end   func(*demo) error
		want  int
	}{
		"SIGINT at the start":           {"pod ", signalTo(syscall.SIGINT), 128 + 2},
		"SIGINT under load":             {"1. ", signalTo(syscall.SIGINT), 128 + 2},
		"SIGTERM while a back end goes": {"2. ", signalTo(syscall.SIGTERM), 128 + 15},
		"SIGHUP while two come":         {"3. ", signalTo(syscall.SIGHUP), 128 + 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// So many that it is not done before.
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
	t.Run("nobody reads its output", func(t *testing.T) {
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
			t.Errorf("it ended with %v, want exit code %d; %s", err, 128+13, &d.stderr)
		}
		d.checkNothingLeft(t)
	})
}

func signalTo(s syscall.Signal) func(*demo) error {
	return func(d *demo) error { return d.Process.Signal(s) }
}

// TestKeep: what -keep says to do works, and Ctrl-C removes everything. After
// SIGKILL, the next run does.
func TestKeep(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("demo-test-%d", os.Getpid())
	t.Cleanup(func() {
		if left := namespaces(t, name); len(left) > 0 {
			t.Errorf("left: %v", left)
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

	// Others do not disturb it.
	second := startDemo(t, nil, "-keep", "-name="+name)
	if code := second.waitExit(t); code != 1 || !strings.Contains(second.stderr.String(), "another demo with -keep is running under the name "+name) {
		t.Errorf("a second one exits with %d: %s", code, &second.stderr)
	}
	third := startDemo(t, nil, "-name="+name)
	if code := third.waitExit(t); code != 0 {
		t.Errorf("one without -keep exits with %d: %s", code, &third.stderr)
	}
	if diff := cmp.Diff(want, namespaces(t, name)); diff != "" {
		t.Errorf("namespaces later (-want +got):\n%s", diff)
	}

	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	first.waitExit(t)
	first.checkNoProcess(t)
	if len(namespaces(t, name)) == 0 {
		t.Error("SIGKILL has left no names: the next step shows nothing")
	}
	startInFolder := func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "TMPDIR="+first.dir) }
	fourth := startDemo(t, startInFolder, "-name="+name)
	if code := fourth.waitExit(t); code != 0 {
		t.Errorf("the next one exits with %d: %s", code, &fourth.stderr)
	}
	first.checkNothingLeft(t)
	if left := namespaces(t, name); len(left) > 0 {
		t.Errorf("the next one has left %v", left)
	}

	last := keep()
	if err := last.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := last.waitExit(t); code != 0 {
		t.Errorf("Ctrl-C makes it exit with %d: %s", code, &last.stderr)
	}
	last.checkNothingLeft(t)
}

// TestResponder: what it answers to each line or command, byte by byte.
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
			t.Fatalf("%q is answered %q, error %v, want %q", step.send, got, err, step.want)
		}
	}
}
