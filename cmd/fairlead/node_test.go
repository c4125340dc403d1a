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

	"fairlead.io/fairlead/internal/nettest"
)

// runProgramEnv makes the test binary be the program, so that the race detector
// and the coverage see it as well.
const runProgramEnv = "FAIRLEAD_TEST_BE_THE_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(runProgramEnv) != "" {
		// The test holds the other end: the program ends with it, however it does.
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(3)
		}()
		main()
	}
	os.Exit(m.Run())
}

const (
	// testTimeout bounds what takes milliseconds on a machine that has nothing else to do.
	testTimeout = 15 * time.Second
	// connectTimeout bounds a connection that should succeed at once.
	connectTimeout = 500 * time.Millisecond

	podPort = 8080
)

// eventually returns when check does without error, and fails the test if that
// takes too long.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", testTimeout, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// testNode is a network whose node runs the program with a folder of manifests.
type testNode struct {
	*nettest.Network

	t       *testing.T
	folder  string
	client  *nettest.Host // a pod that is no endpoint
	pods    map[string]*nettest.Host
	program *process // the last that was started

	// executable is a link to this program under another name, or empty.
	executable string
}

// newTestNode makes a node with pods that serve TCP and UDP. Nothing in the folder
// mentions them yet.
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

// dnsAddress is where the program answers names.
func (n *testNode) dnsAddress() netip.AddrPort { return netip.AddrPortFrom(n.Node.IPv4, 53) }

// runArgs are the arguments of `fairlead run` for this node.
func (n *testNode) runArgs() []string {
	return []string{
		"run", "--mode=nft", "--manifests=" + n.folder, "--service-cidr=10.96.0.0/16,fd00:10:96::/112",
		"--cluster-cidr=" + n.PodCIDRs[0].String() + "," + n.PodCIDRs[1].String(),
		"--dns-listen=" + n.dnsAddress().String(), "--hostname-override=node", "--log-format=json",
	}
}

// writeFile puts a file into the folder, whole at once.
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

// writePods puts a file for each of the pods, ready ones with the label app=APP.
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

// serviceYAML is a Service of both families that selects the pods with the
// label app=NAME; last is the last byte of its addresses.
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

// serviceAddrs returns the addresses of a Service of serviceYAML, IPv4 first.
func serviceAddrs(last byte, port uint16) []netip.AddrPort {
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, last}), port),
		netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x10, 5: 0x96, 15: last}), port),
	}
}

// checkAnswers connects to addr until each of the hosts in want has answered, and
// several times more. It returns an error if a connection fails, another host
// answers, or one of them never does.
func checkAnswers(ctx context.Context, from *nettest.Host, network string, addr netip.AddrPort, want ...string) error {
	const least, most = 12, 300 // (2/3)^300 is 10^-53
	missing := slices.Clone(want)
	for i := 0; i < least || len(missing) > 0; i++ {
		if i == most {
			return fmt.Errorf("%s %s: never answered by %s", network, addr, missing)
		}
		answer, err := connect(ctx, from, network, addr)
		if err != nil {
			return err
		}
		if !slices.Contains(want, answer.Host) {
			return fmt.Errorf("%s %s: answered by %s, want %s", network, addr, answer.Host, want)
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

// awaitAnswers waits until the client's connections to each of the addresses,
// over TCP and UDP, are answered by all of the hosts in want and by no other.
func (n *testNode) awaitAnswers(addrs []netip.AddrPort, want ...string) {
	n.t.Helper()
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range addrs {
			eventually(n.t, func() error { return checkAnswers(n.t.Context(), n.client, network, addr, want...) })
		}
	}
}

// awaitRefused waits until connections to each of the addresses are refused.
func (n *testNode) awaitRefused(addrs []netip.AddrPort) {
	n.t.Helper()
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range addrs {
			eventually(n.t, func() error {
				answer, err := connect(n.t.Context(), n.client, network, addr)
				if errors.Is(err, nettest.ErrRefused) {
					return nil
				}
				return fmt.Errorf("%s %s: answer %+v, error %w; want a refusal", network, addr, answer, err)
			})
		}
	}
}

// keepConnecting opens one connection after another to each of the addresses
// until stop is called, and fails the test if one of them did not succeed.
func (n *testNode) keepConnecting(addrs []netip.AddrPort) (stop func()) {
	ctx, cancel := context.WithCancel(n.t.Context())
	var wg sync.WaitGroup
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range addrs {
			wg.Go(func() {
				succeeded := 0
				for ctx.Err() == nil {
					// A connection that has begun is to end.
					_, err := n.client.Connect(context.WithoutCancel(ctx), network, addr)
					if network == nettest.UDP && errors.Is(err, nettest.ErrTimeout) {
						// An endpoint that was leaving has answered when its flow was
						// forgotten. Who asks again gets another.
						_, err = n.client.Connect(context.WithoutCancel(ctx), network, addr)
					}
					if err != nil {
						n.t.Errorf("connection %d of those that went on all the time: %v", succeeded+1, err)
						return
					}
					succeeded++
					time.Sleep(time.Millisecond) // leave the machine to others, too
				}
				if succeeded == 0 {
					n.t.Errorf("%s %s: not one connection was made", network, addr)
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

// lookup resolves a name as a program in the pod would.
func (n *testNode) lookup(network, name string) ([]netip.Addr, error) {
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return n.client.Dial(ctx, network, n.dnsAddress())
	}}
	// The final dot keeps this machine's own search list out.
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

// command runs a program on the node that must succeed, and returns what it prints.
func (n *testNode) command(name string, args ...string) string {
	n.t.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(n.t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.Node.Do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		n.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, &out)
	}
	return out.String()
}

// ruleset returns the words of all that nft lists, in an order of their own, as
// the kernel lists elements in no particular one.
func (n *testNode) ruleset() []string {
	n.t.Helper()
	words := strings.FieldsFunc(n.nft("-s", "list", "ruleset"), func(r rune) bool { return strings.ContainsRune(" \t\n,", r) })
	slices.Sort(words)
	return words
}

// generation returns the number of commits that the node's ruleset has seen. Package
// nftables cannot read it by a file descriptor above 1023, as it waits by select(2).
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
	n.t.Fatalf("no generation: %v", attrs.Err())
	return 0
}

// run starts `fairlead run` on the node and waits until it has programmed it.
func (n *testNode) run() {
	n.t.Helper()
	n.program = n.start(nil, n.runArgs()...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
}

// stop ends `fairlead run` as an init system does.
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
		n.t.Errorf("after SIGTERM the program did nothing for %s", idle)
	}
}

// runOnce runs the program on the node until it ends by itself.
func (n *testNode) runOnce(attributes *syscall.SysProcAttr, args ...string) (code int, stderr string) {
	n.t.Helper()
	p := n.start(attributes, args...)
	return p.wait(), p.log.String()
}

// process is the program, running on a node.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	log   *logBuffer
	ended chan struct{}
}

// start starts the program on the node. It ends at the latest with the test.
func (n *testNode) start(attributes *syscall.SysProcAttr, args ...string) *process {
	n.t.Helper()
	p := &process{t: n.t, log: &logBuffer{}, ended: make(chan struct{})}
	p.cmd = exec.CommandContext(n.t.Context(), cmp.Or(n.executable, "/proc/self/exe"), args...)
	// The race detector makes each process sleep for a second at its end.
	p.cmd.Env = []string{runProgramEnv + "=1", "GORACE=atexit_sleep_ms=0"}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = attributes
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = testTimeout // then it is killed
	if _, err := p.cmd.StdinPipe(); err != nil {
		n.t.Fatal(err)
	}
	if err := n.Node.Do(p.cmd.Start); err != nil {
		n.t.Fatalf("start the program: %v", err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // the exit code says it
	}()
	n.t.Cleanup(func() {
		if code := p.wait(); n.t.Failed() {
			n.t.Logf("fairlead %s: exit code %d, log:\n%s", strings.Join(args, " "), code, p.log.String())
		}
	})
	return p
}

// wait returns the exit code when the program has ended.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(2 * testTimeout):
		p.t.Fatal("the program does not end")
		return -1
	}
}

// waitIdle waits until the program has ended or gives up after a while. It returns
// for how long all of the program's threads slept meanwhile: unlike the time that
// passes, this does not grow when the machine is busy.
func (p *process) waitIdle() (idle time.Duration) {
	p.t.Helper()
	const interval = 10 * time.Millisecond
	for range 2 * testTimeout / interval {
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

// asleep reports whether all threads of a process wait for something other than the
// processor or the disk.
func asleep(pid int) bool {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid)) // the pattern is well formed
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		// proc(5): the state comes after the name, which is in parentheses.
		if _, state, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" ")); !bytes.HasPrefix(state, []byte("S")) {
			return false
		}
	}
	return len(stats) > 0
}

// awaitLog waits until the program has logged a record that match accepts.
func (p *process) awaitLog(match func(record) bool) {
	p.t.Helper()
	eventually(p.t, func() error {
		if slices.ContainsFunc(p.log.records(), match) {
			return nil
		}
		select {
		case <-p.ended:
			p.t.Fatalf("the program has ended with exit code %d; log:\n%s", p.cmd.ProcessState.ExitCode(), p.log.String())
		default:
		}
		return errors.New("not logged")
	})
}

// record is a line of the log in JSON.
type record struct{ Level, Msg, File, Error, Reason, Setting, What string }

// logBuffer collects what the program prints.
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
