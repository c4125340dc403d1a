package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// runProgramEnv makes the test binary run the program, so that the race detector and the coverage
// include it.
const runProgramEnv = "FAIRLEAD_TEST_BE_THE_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(runProgramEnv) != "" {
		// The test process holds the other end of the pipe, so the program exits with it.
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(3)
		}()
		main()
	}
	os.Exit(m.Run())
}

const (
	waitTimeout = agenttest.WaitTimeout
	// connectTimeout bounds connections that should succeed at once.
	connectTimeout = 500 * time.Millisecond

	podPort = 8080
)

// testNode is a network with a node that runs the program with a folder of manifests.
type testNode struct {
	*nettest.Network

	t       *testing.T
	folder  string
	client  *nettest.Host // a pod that is not an endpoint
	pods    map[string]*nettest.Host
	program *process // the process started last

	// executable is a link to the test binary under another name, or empty.
	executable string
	// environment contains additional variables of the program.
	environment []string
}

// newTestNode creates a node with pods that serve TCP and UDP. The folder of manifests is empty.
func newTestNode(t *testing.T, pods ...string) *testNode {
	t.Helper()
	n := &testNode{t: t, Network: nettest.NewT(t, nettest.Options{}), folder: t.TempDir(), pods: map[string]*nettest.Host{}}
	n.client = n.PodT(t, "client")
	for _, name := range pods {
		pod := n.PodT(t, name)
		pod.ServeT(t, nettest.TCP, podPort)
		pod.ServeT(t, nettest.UDP, podPort)
		n.pods[name] = pod
	}
	return n
}

// dnsAddress returns the address of the program's DNS server.
func (n *testNode) dnsAddress() netip.AddrPort { return netip.AddrPortFrom(n.Node.IPv4, 53) }

// runArgs returns the arguments of `fairlead run` for this node.
func (n *testNode) runArgs() []string {
	return []string{
		"run", "--mode=nft", "--manifests=" + n.folder, "--service-cidr=10.96.0.0/16,fd00:10:96::/112",
		"--cluster-cidr=" + n.PodCIDRs[0].String() + "," + n.PodCIDRs[1].String(),
		"--dns-listen=" + n.dnsAddress().String(), "--hostname-override=node", "--log-format=json",
		"--conntrack-max-per-core=0", // the maximum belongs to the host
	}
}

// writeFile writes a file of the folder atomically.
func (n *testNode) writeFile(name, text string) {
	n.t.Helper()
	hidden := filepath.Join(n.folder, "."+name)
	if err := os.WriteFile(hidden, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(hidden, filepath.Join(n.folder, name)); err != nil {
		n.t.Fatal(err)
	}
}

// removeFile removes a file from the folder.
func (n *testNode) removeFile(name string) {
	n.t.Helper()
	if err := os.Remove(filepath.Join(n.folder, name)); err != nil {
		n.t.Fatal(err)
	}
}

// writePods writes the manifests of ready pods with the label app=APP.
func (n *testNode) writePods(app string, names ...string) {
	n.t.Helper()
	for _, name := range names {
		n.writeFile("pod-"+name+".yaml", n.podYAML(app, name, true))
	}
}

func (n *testNode) podYAML(app, name string, ready bool) string {
	status := "False"
	if ready {
		status = "True"
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: %s
  labels: {app: %s}
spec:
  containers:
    - name: main
      image: example
      ports:
        - {name: web, containerPort: %d}
status:
  podIPs: [{ip: %s}, {ip: "%s"}]
  conditions: [{type: Ready, status: "%s"}]
`, name, app, podPort, n.pods[name].IPv4, n.pods[name].IPv6, status)
}

// serviceYAML returns a dual-stack Service that selects pods with the label app=NAME. last is the
// last byte of its addresses.
func serviceYAML(name string, last, port int) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata:
  name: %[1]s
spec:
  clusterIP: 10.96.0.%[2]d
  clusterIPs: [10.96.0.%[2]d, "fd00:10:96::%[2]x"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: %[1]s}
  ports:
    - {name: tcp, protocol: TCP, port: %[3]d, targetPort: web}
    - {name: udp, protocol: UDP, port: %[3]d, targetPort: %[4]d}
`, name, last, port, podPort)
}

// checkAnswers connects to addr until each host in want has answered, at least 12 times. It returns
// an error if a connection fails, another host answers, or a host in want never answers.
func checkAnswers(ctx context.Context, from *nettest.Host, network string, addr netip.AddrPort, want ...string) error {
	const least, most = 12, 300 // (2/3)^300 is 10^-53
	missing := slices.Clone(want)
	for i := 0; i < least || len(missing) > 0; i++ {
		if i == most {
			return fmt.Errorf("%s %s: no answer from %s", network, addr, missing)
		}
		answer, err := connect(ctx, from, network, addr)
		if err != nil {
			return err
		}
		if !slices.Contains(want, answer.Host) {
			return fmt.Errorf("%s %s: answer from %s, want %s", network, addr, answer.Host, want)
		}
		missing = slices.DeleteFunc(missing, func(name string) bool { return name == answer.Host })
	}
	return nil
}

func connect(ctx context.Context, from *nettest.Host, network string, addr netip.AddrPort) (nettest.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	return from.Connect(ctx, network, addr)
}

// awaitAnswers waits until all hosts in want and no others answer the client's TCP and UDP
// connections to each address.
func (n *testNode) awaitAnswers(addrs []netip.AddrPort, want ...string) {
	n.t.Helper()
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range addrs {
			agenttest.Eventually(n.t, func() error { return checkAnswers(n.t.Context(), n.client, network, addr, want...) })
		}
	}
}

// awaitRefused waits until connections to each address are refused.
func (n *testNode) awaitRefused(addrs []netip.AddrPort) {
	n.t.Helper()
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range addrs {
			agenttest.Eventually(n.t, func() error {
				answer, err := connect(n.t.Context(), n.client, network, addr)
				if errors.Is(err, nettest.ErrRefused) {
					return nil
				}
				return fmt.Errorf("%s %s: answer %+v, error %w; want connection refused", network, addr, answer, err)
			})
		}
	}
}

// keepConnecting opens one connection after another to each address until stop is called, and fails
// the test if one fails.
func (n *testNode) keepConnecting(addrs []netip.AddrPort) (stop func()) {
	ctx, cancel := context.WithCancel(n.t.Context())
	var wg sync.WaitGroup
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range addrs {
			wg.Go(func() {
				succeeded := 0
				for ctx.Err() == nil {
					// Complete a connection in progress after stop.
					_, err := n.client.Connect(context.WithoutCancel(ctx), network, addr)
					if network == nettest.UDP && errors.Is(err, nettest.ErrTimeout) {
						// The cleaner deleted the flow of a removed endpoint before the
						// answer. A retry reaches another endpoint.
						_, err = n.client.Connect(context.WithoutCancel(ctx), network, addr)
					}
					if err != nil {
						n.t.Errorf("continuous connection %d: %v", succeeded+1, err)
						return
					}
					succeeded++
					time.Sleep(time.Millisecond) // limit the CPU load
				}
				if succeeded == 0 {
					n.t.Errorf("%s %s: no connection was attempted", network, addr)
				}
			})
		}
	}
	stop = func() {
		cancel()
		wg.Wait()
	}
	n.t.Cleanup(stop)
	return stop
}

// lookup resolves a name from the client pod with the program's DNS server.
func (n *testNode) lookup(network, name string) ([]netip.Addr, error) {
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return n.client.Dial(ctx, network, n.dnsAddress())
	}}
	// The trailing dot disables the search list of this machine.
	addrs, err := resolver.LookupNetIP(n.t.Context(), network, name+".")
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, err
}

// nft runs the nft program on the node.
func (n *testNode) nft(args ...string) string {
	n.t.Helper()
	return n.command("nft", args...)
}

// command runs a program on the node and returns its output.
func (n *testNode) command(name string, args ...string) string {
	n.t.Helper()
	return agenttest.Command(n.t, n.Node, name, args...)
}

// ruleset returns the sorted words of nft's listing, because the kernel lists elements in no
// particular order.
func (n *testNode) ruleset() []string {
	n.t.Helper()
	words := strings.FieldsFunc(n.nft("-s", "list", "ruleset"), func(r rune) bool { return strings.ContainsRune(" \t\n,", r) })
	slices.Sort(words)
	return words
}

// generation returns the generation ID of the node's ruleset, which counts its commits. Package
// nftables cannot read it with a file descriptor above 1023, because it waits with select(2).
func (n *testNode) generation() uint32 {
	n.t.Helper()
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: n.Node.Fd()})
	if err != nil {
		n.t.Fatal(err)
	}
	defer conn.Close()
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, 4), // nfgenmsg
	})
	if err != nil || len(replies) != 1 {
		n.t.Fatalf("%d replies, error %v", len(replies), err)
	}
	attrs, err := netlink.NewAttributeDecoder(replies[0].Data[4:])
	if err != nil {
		n.t.Fatal(err)
	}
	attrs.ByteOrder = binary.BigEndian
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_GEN_ID {
			return attrs.Uint32()
		}
	}
	n.t.Fatalf("no generation ID: %v", attrs.Err())
	return 0
}

// run starts `fairlead run` on the node and waits for its first commit.
func (n *testNode) run(args ...string) {
	n.t.Helper()
	n.program = n.start(nil, append(n.runArgs(), args...)...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
}

// stop stops the program with SIGTERM and checks its exit.
func (n *testNode) stop() {
	n.t.Helper()
	if err := n.program.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		n.t.Fatal(err)
	}
	idle := n.program.waitIdle()
	if code := n.program.wait(); code != 0 {
		n.t.Fatalf("exit code %d after SIGTERM, want 0; log:\n%s", code, n.program.log.String())
	}
	if idle > 3*time.Second {
		n.t.Errorf("after SIGTERM, the program was idle for %s", idle)
	}
}

// runOnce runs the program on the node until it exits, and returns its exit code and output.
func (n *testNode) runOnce(attributes *syscall.SysProcAttr, args ...string) (code int, stderr string) {
	n.t.Helper()
	p := n.start(attributes, args...)
	return p.wait(), p.log.String()
}

// process is a process of the program on a node.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	log   *logBuffer
	ended chan struct{}
}

// start starts the program on the node. The process runs at most until the test ends.
func (n *testNode) start(attributes *syscall.SysProcAttr, args ...string) *process {
	n.t.Helper()
	p := &process{t: n.t, log: &logBuffer{}, ended: make(chan struct{})}
	p.cmd = exec.CommandContext(n.t.Context(), cmp.Or(n.executable, "/proc/self/exe"), args...)
	// The race detector makes each process sleep for a second at its end.
	p.cmd.Env = append([]string{runProgramEnv + "=1", "GORACE=atexit_sleep_ms=0"}, n.environment...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = attributes
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = waitTimeout // time from SIGTERM to SIGKILL
	if _, err := p.cmd.StdinPipe(); err != nil {
		n.t.Fatal(err)
	}
	if err := n.Node.Do(p.cmd.Start); err != nil {
		n.t.Fatalf("start the program: %v", err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // callers check the exit code
	}()
	n.t.Cleanup(func() {
		if code := p.wait(); n.t.Failed() {
			n.t.Logf("fairlead %s: exit code %d, log:\n%s", strings.Join(args, " "), code, p.log.String())
		}
	})
	return p
}

// wait waits until the program has exited and returns its exit code.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(2 * waitTimeout):
		p.t.Fatal("the program does not exit")
		return -1
	}
}

// waitIdle waits until the program has exited or a timeout has passed. It returns how long all
// threads of the program were asleep. Unlike elapsed time, this does not grow on a busy machine.
func (p *process) waitIdle() (idle time.Duration) {
	p.t.Helper()
	const interval = 10 * time.Millisecond
	for range 2 * waitTimeout / interval {
		select {
		case <-p.ended:
			return idle
		case <-time.After(interval):
		}
		if asleep(p.cmd.Process.Pid) {
			idle += interval
		}
	}
	return idle
}

// asleep reports whether all threads of a process are in interruptible sleep, which excludes waiting
// for a CPU or the disk.
func asleep(pid int) bool {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid)) // the pattern is well formed
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has exited
		}
		// The state follows the name in parentheses (proc(5)).
		if _, state, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" ")); !bytes.HasPrefix(state, []byte("S")) {
			return false
		}
	}
	return len(stats) > 0
}

// awaitLog waits for a log record that match accepts.
func (p *process) awaitLog(match func(record) bool) {
	p.t.Helper()
	agenttest.Eventually(p.t, func() error {
		if slices.ContainsFunc(p.log.records(), match) {
			return nil
		}
		select {
		case <-p.ended:
			p.t.Fatalf("the program has exited with code %d; log:\n%s", p.cmd.ProcessState.ExitCode(), p.log.String())
		default:
		}
		return errors.New("no matching log record")
	})
}

// record is a log line in JSON.
type record struct{ Level, Msg, File, Error, Reason, Setting, Settings, What string }

// logBuffer collects the output of the program.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logBuffer) records() []record {
	var records []record
	for line := range strings.Lines(l.String()) {
		var r record
		if json.Unmarshal([]byte(line), &r) == nil {
			records = append(records, r)
		}
	}
	return records
}
