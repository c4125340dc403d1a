//go:build e2e

package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// Addresses of the program's HTTP servers, in deploy/config.yaml and by default.
const (
	healthzAddr = "127.0.0.1:10256"
	metricsAddr = "127.0.0.1:10249"
)

// fairlead is the program under test. It can be started and stopped repeatedly.
type fairlead struct {
	host    *nettest.Host
	binary  string
	args    []string
	logFile string // path; each start appends to it
	// kubeProxy is set if the program is kube-proxy, which needs all capabilities and does
	// not handle SIGTERM.
	kubeProxy bool

	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done is closed
}

// start starts the program on its host. The kernel kills it when the test process ends for
// any reason, see Pdeathsig in syscall.SysProcAttr. Pdeathsig depends on the thread that
// started the program, so that thread lives as long as the program.
func (f *fairlead) start() error {
	log, err := os.OpenFile(f.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	f.cmd = exec.Command(f.binary, f.args...)
	f.cmd.Stdout, f.cmd.Stderr = log, log
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	f.done = make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		defer log.Close()
		err := unix.Setns(f.host.Fd(), unix.CLONE_NEWNET)
		if err == nil && !f.kubeProxy {
			err = limitCapabilities()
		}
		if err == nil {
			err = f.cmd.Start()
		}
		started <- err
		if err == nil {
			f.err = f.cmd.Wait()
			close(f.done)
		}
	}()
	if err := <-started; err != nil {
		f.cmd = nil
		return fmt.Errorf("start fairlead: %w", err)
	}
	return nil
}

// limitCapabilities limits programs that this thread starts to the capabilities of
// deploy/daemonset.yaml: CAP_NET_ADMIN, without a way to get more.
func limitCapabilities() error {
	for c := uintptr(0); ; c++ {
		if c == unix.CAP_NET_ADMIN {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // no more capabilities
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// running reports whether the program is running.
func (f *fairlead) running() bool {
	if f.cmd == nil {
		return false
	}
	select {
	case <-f.done:
		return false
	default:
		return true
	}
}

// stop sends SIGTERM, as an operator does, and waits until the program has ended.
func (f *fairlead) stop() error {
	if err := f.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop fairlead: %w", err)
	}
	<-f.done
	if f.err != nil && !f.kubeProxy {
		return fmt.Errorf("fairlead exited: %w:\n%s", f.err, f.logTail())
	}
	return nil
}

// kill kills the program, if it is running.
func (f *fairlead) kill() error {
	if f.cmd == nil {
		return nil
	}
	if err := f.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill fairlead: %w", err)
	}
	<-f.done
	return nil
}

// pause stops the program, as on a machine that hangs, until resume.
func (f *fairlead) pause() error { return f.cmd.Process.Signal(syscall.SIGSTOP) }

func (f *fairlead) resume() error { return f.cmd.Process.Signal(syscall.SIGCONT) }

// waitReady waits until the program reports that the node is programmed.
func (f *fairlead) waitReady(ctx context.Context) error {
	return eventually(ctx, func(ctx context.Context) error {
		select {
		case <-f.done:
			return fmt.Errorf("fairlead exited: %w\n%s", f.err, f.logTail())
		default:
		}
		body, err := f.get(ctx, healthzAddr, "/healthz")
		// Like kube-proxy, Fairlead is healthy before it has programmed anything, but then it
		// reports no status.
		if err == nil && !f.kubeProxy && !bytes.Contains(body, []byte(`"status"`)) {
			err = fmt.Errorf("nothing is programmed yet: %s", body)
		}
		if err != nil {
			return fmt.Errorf("%w\n%s", err, f.logTail())
		}
		return nil
	})
}

// get sends a request to one of the program's HTTP servers, from its host.
func (f *fairlead) get(ctx context.Context, addr, path string) ([]byte, error) {
	status, body, err := httpGet(ctx, f.host, netip.MustParseAddrPort(addr), path)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%s: status %d: %s", path, status, body)
	}
	return body, err
}

// httpGet sends a GET request from a host.
func httpGet(ctx context.Context, from *nettest.Host, at netip.AddrPort, path string) (status int, body []byte, err error) {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return from.Dial(ctx, network, at)
		},
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at.String()+path, http.NoBody)
	if err != nil {
		return 0, nil, err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	body, err = io.ReadAll(response.Body)
	return response.StatusCode, body, err
}

// metric returns the sum of the series of a metric that have all of the labels. A label has
// the form name="value".
func (f *fairlead) metric(ctx context.Context, name string, labels ...string) (sum float64, err error) {
	body, err := f.get(ctx, metricsAddr, "/metrics")
	if err != nil {
		return 0, err
	}
lines:
	for line := range strings.Lines(string(body)) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if brace := strings.IndexByte(series, '{'); series != name && (brace < 0 || series[:brace] != name) {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(series, label) {
				continue lines
			}
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += v
	}
	return sum, nil
}

// residentMemory returns the peak and the current resident memory of the program in bytes.
func (f *fairlead) residentMemory() (peak, now int, err error) {
	const kB = 1024
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", f.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		for name, value := range map[string]*int{"VmHWM:": &peak, "VmRSS:": &now} {
			if len(fields) == 3 && fields[0] == name {
				n, err := strconv.Atoi(fields[1])
				if err != nil {
					return 0, 0, fmt.Errorf("parse the process status: %w", err)
				}
				*value = n * kB
			}
		}
	}
	if peak == 0 || now == 0 {
		return 0, 0, errors.New("the process status has no memory size")
	}
	return peak, now, nil
}

// logged reports whether a line of the log contains all of the parts.
func (f *fairlead) logged(parts ...string) (bool, error) {
	n, err := f.countLogged(parts...)
	return n > 0, err
}

// countLogged returns the number of lines of the log that contain all of the parts. The log
// includes earlier tests on the same node.
func (f *fairlead) countLogged(parts ...string) (n int, err error) {
	data, err := os.ReadFile(f.logFile)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			n++
		}
	}
	return n, nil
}

// logTail returns the last lines of the log.
func (f *fairlead) logTail() string {
	const lines = 30
	data, err := os.ReadFile(f.logFile)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
