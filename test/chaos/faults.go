package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"fairlead.io/fairlead/bench/system"
)

// fault describes a fault and the connection losses that it may cause. New connections may
// fail and open ones may break only during a disturbance.
type fault struct {
	name string
	// maxStaleness bounds how long a removed endpoint may get connections.
	maxStaleness time.Duration
	// disturbs is set if the fault inevitably loses connections, see recorder.disturb. With
	// keepsOpen, open connections must survive nevertheless.
	disturbs, keepsOpen bool
	// maxOutage bounds how long connections may fail because of one disturbance. 0 means that
	// only repairTime bounds it.
	maxOutage time.Duration
	// crashesFairlead is set if the fault ends Fairlead in a way that only
	// agent.restartOnExit notices.
	crashesFairlead bool
	// noChanges is set if the API cannot be written.
	noChanges bool
	// require returns why the fault is unavailable here, or "". Nil means that it is always
	// available.
	require func(*testbed) string
	// inject injects the fault repeatedly until ctx is done.
	inject func(*testbed, context.Context) error
}

func (f fault) unavailable(t *testbed) string {
	if f.require == nil {
		return ""
	}
	return f.require(t)
}

// Bounds of the delay until a removed endpoint gets no connections, on a busy machine:
// updateDelay while Fairlead is running, restartDelay while it restarts.
const (
	updateDelay  = 2 * time.Second
	restartDelay = 5 * time.Second
)

// ipvsOutage bounds how long connections fail on a busy machine after another program has
// deleted all virtual servers.
const ipvsOutage = time.Second

// faults returns all faults in the order of their injection.
func faults() []fault {
	return []fault{
		{name: "none", maxStaleness: updateDelay, inject: func(*testbed, context.Context) error { return nil }},
		{name: "kill -9", maxStaleness: restartDelay, inject: repeatEvery(2*time.Second, (*testbed).killAgent)},
		{name: "restart", maxStaleness: restartDelay, inject: repeatEvery(2*time.Second, (*testbed).restartAgent)},
		{name: "upgrade and downgrade", maxStaleness: restartDelay, require: (*testbed).requireOtherBinary, inject: (*testbed).changeVersions},
		{name: "hang", maxStaleness: restartDelay, inject: repeatEvery(3*time.Second, (*testbed).hangAgent)},
		{name: "second instance", maxStaleness: restartDelay, inject: repeatEvery(4*time.Second, (*testbed).runSecondInstance)},
		{name: "edits by hand", maxStaleness: updateDelay, require: requireNFT, inject: (*testbed).applyManualEdits},
		{name: "table deleted", maxStaleness: restartDelay, disturbs: true, require: requireNFT, inject: repeatEvery(3*time.Second, disturbWithNFT("delete table ip %[1]s\ndelete table ip6 %[1]s"))},
		{name: "chain deleted", maxStaleness: restartDelay, disturbs: true, require: requireNFT, inject: repeatEvery(3*time.Second, disturbWithNFT("flush chain ip %[1]s nat-prerouting\ndelete chain ip %[1]s nat-prerouting"))},
		{name: "ruleset flushed", maxStaleness: restartDelay, disturbs: true, require: requireNFT, inject: repeatEvery(3*time.Second, disturbWithNFT("flush ruleset"))},
		{name: "ruleset flushed in a loop", maxStaleness: restartDelay, disturbs: true, require: requireNFT, inject: repeatEvery(4*time.Second, (*testbed).flushRepeatedly)},
		{name: "kube-proxy beside it", maxStaleness: 2 * restartDelay, disturbs: true, maxOutage: ipvsOutage, require: (*testbed).requireKubeProxy, inject: (*testbed).runKubeProxy},
		{name: "kube-proxy flushes IPVS", maxStaleness: 2 * restartDelay, disturbs: true, maxOutage: ipvsOutage, require: (*testbed).requireKubeProxyAndIPVS, inject: repeatEvery(3*time.Second, (*testbed).cleanUpKubeProxy)},
		{name: "API server away", maxStaleness: updateDelay, inject: (*testbed).stopAPI},
		{name: "restart while the API server is away", maxStaleness: restartDelay, inject: (*testbed).restartWithoutAPI},
		{name: "too little memory", maxStaleness: 2 * restartDelay, crashesFairlead: true, require: requireMemoryLimit, inject: (*testbed).limitMemory},
		{name: "connection tracking full", maxStaleness: 2 * restartDelay, disturbs: true, keepsOpen: true, require: (*testbed).requireConntrackLimit, inject: (*testbed).fillConntrack},
		{name: "session affinity full", maxStaleness: updateDelay, require: (*testbed).requireAffinityMaps, inject: (*testbed).floodAffinity},
		{name: "clock jumps", maxStaleness: restartDelay, require: (*testbed).requireOwnClock, inject: (*testbed).jumpClock},
	}
}

// repeatEvery returns an inject function that calls do once per period.
func repeatEvery(period time.Duration, do func(*testbed, context.Context) error) func(*testbed, context.Context) error {
	return func(t *testbed, ctx context.Context) error {
		for ctx.Err() == nil {
			if err := do(t, ctx); err != nil && ctx.Err() == nil {
				return err
			}
			sleep(ctx, period)
		}
		return nil
	}
}

// sleep waits for d or until ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// withoutCancel returns a context for processes that outlive the fault.
func withoutCancel(ctx context.Context) context.Context { return context.WithoutCancel(ctx) }

func (t *testbed) killAgent(ctx context.Context) error {
	if err := t.agent.kill(); err != nil {
		return err
	}
	return t.agent.start(withoutCancel(ctx))
}

func (t *testbed) restartAgent(ctx context.Context) error {
	if err := t.agent.stop(); err != nil {
		return err
	}
	return t.agent.start(withoutCancel(ctx))
}

// changeVersions restarts the agent alternately with two versions that define sets
// differently and have different schemas.
func (t *testbed) changeVersions(ctx context.Context) error {
	other := t.fairlead
	other.Binary = t.options.other
	for ctx.Err() == nil {
		for _, version := range []system.Fairlead{other, t.fairlead} {
			t.agent.setSystem(version)
			if err := t.restartAgent(ctx); err != nil {
				return err
			}
			sleep(ctx, 2*time.Second)
		}
	}
	return nil
}

func (t *testbed) requireOtherBinary() string {
	if _, err := exec.LookPath(t.options.other); err != nil {
		return "no other version at " + t.options.other
	}
	return ""
}

// hangAgent stops the agent for a second, as on a node that swaps.
func (t *testbed) hangAgent(ctx context.Context) error {
	if err := t.agent.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	sleep(ctx, time.Second)
	return t.agent.signal(syscall.SIGCONT)
}

// runSecondInstance starts a second instance of the program and then ends the first with
// SIGTERM or SIGKILL, as in a rolling update.
func (t *testbed) runSecondInstance(ctx context.Context) error {
	if err := t.secondAgent.start(withoutCancel(ctx)); err != nil {
		return err
	}
	sleep(ctx, 2*time.Second)
	end := (*agent).kill
	if t.secondAgent.pid()%2 == 0 {
		end = (*agent).stop
	}
	if err := end(t.agent); err != nil {
		return err
	}
	t.agent, t.secondAgent = t.secondAgent, t.agent
	return nil
}

// tableName returns the name of Fairlead's tables.
func (t *testbed) tableName() string {
	if t.options.mode == system.ModeIPVS {
		return "fairlead-ipvs"
	}
	return "fairlead"
}

// nft runs an nft script on the node.
func (t *testbed) nft(script string) error {
	cmd := exec.Command("nft", "-f", "-") //nolint:noctx // takes milliseconds
	cmd.Stdin = strings.NewReader(script + "\n")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := t.net.Node.Do(cmd.Run); err != nil {
		return fmt.Errorf("nft %s: %w: %s", script, err, strings.TrimSpace(out.String()))
	}
	return nil
}

// disturbWithNFT returns an inject function that runs an nft script once. The script may
// contain %[1]s for the name of the table.
func disturbWithNFT(script string) func(*testbed, context.Context) error {
	return func(t *testbed, _ context.Context) error {
		return t.recorder.disturb(func() error {
			text := script
			if strings.Contains(script, "%") {
				text = fmt.Sprintf(script, t.tableName())
			}
			return t.nft(text)
		})
	}
}

func (t *testbed) flushRepeatedly(ctx context.Context) error {
	return t.recorder.disturb(func() error {
		for end := time.Now().Add(3 * time.Second); time.Now().Before(end) && ctx.Err() == nil; {
			if err := t.nft("flush ruleset"); err != nil {
				return err
			}
			sleep(ctx, 10*time.Millisecond)
		}
		return nil
	})
}

// manualEdits returns changes that a person may make to Fairlead's tables while debugging.
// They do not stop connections.
func manualEdits() []string {
	return []string{
		"insert rule ip %[1]s filter-forward tcp dport { 80, 443 } counter",
		"add rule ip %[1]s filter-forward tcp dport { 80, 443 } counter",
		"insert rule ip %[1]s nat-prerouting meta nftrace set 1",
		"add chain ip %[1]s mine\nadd rule ip %[1]s mine tcp dport { 1, 2, 3 } counter",
		"add chain ip %[1]s mine\nadd rule ip %[1]s mine counter\ninsert rule ip %[1]s filter-forward jump mine",
		"add chain ip %[1]s mine { type filter hook forward priority 10; policy accept; }\nadd rule ip %[1]s mine counter",
		"add chain ip %[1]s mine\nadd map ip %[1]s jumps { type inet_service : verdict; elements = { 4242 : jump mine }; }\ninsert rule ip %[1]s filter-forward tcp dport vmap @jumps",
		"add set ip %[1]s seen { type ipv4_addr; flags dynamic,timeout; size 1000; timeout 1m; }\ninsert rule ip %[1]s filter-forward update @seen { ip saddr }",
		"add counter ip %[1]s mine\ninsert rule ip %[1]s filter-forward counter name mine",
		"add chain ip %[1]s mine\nadd rule ip %[1]s mine tcp dport vmap { 4242 : return, 4243 : continue }",
		"add set ip %[1]s ports { type inet_service; elements = { 4242 }; }\ninsert rule ip %[1]s filter-forward tcp dport @ports counter",
		"insert rule ip %[1]s reject counter",
	}
}

// applyManualEdits applies one edit after the other.
func (t *testbed) applyManualEdits(ctx context.Context) error {
	edits := manualEdits()
	for i := 0; ctx.Err() == nil; i++ {
		for _, family := range []string{"ip", "ip6"} {
			script := strings.ReplaceAll(fmt.Sprintf(edits[i%len(edits)], t.tableName()), " ip "+t.tableName(), " "+family+" "+t.tableName())
			if family == "ip6" {
				script = strings.NewReplacer("ip saddr", "ip6 saddr", "ipv4_addr", "ipv6_addr").Replace(script)
			}
			// The names of added objects are unique, because the repair of the previous edit may
			// still be in progress. That repair may also make nft fail, as it would for a person.
			_ = t.nft(strings.ReplaceAll(script, "mine", fmt.Sprintf("mine-%d", i)))
		}
		sleep(ctx, 300*time.Millisecond)
	}
	return nil
}

func requireNFT(*testbed) string {
	if _, err := exec.LookPath("nft"); err != nil {
		return "nft is not installed"
	}
	return ""
}

func (t *testbed) kubeProxy() system.KubeProxy {
	return system.KubeProxy{Binary: t.options.kubeProxy, Mode: "nftables", Args: t.clusterCIDRFlag()}
}

func (t *testbed) requireKubeProxy() string {
	err := t.kubeProxy().Check(context.Background(), t.net.Node.Namespace)
	if e, ok := errors.AsType[*system.UnavailableError](err); ok {
		return e.Reason
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

func (t *testbed) requireKubeProxyAndIPVS() string {
	if t.options.mode != system.ModeIPVS {
		return "only the mode ipvs has virtual servers"
	}
	return t.requireKubeProxy()
}

// runKubeProxy runs kube-proxy in parallel with Fairlead, kills it, restarts Fairlead, and then
// cleans up after kube-proxy.
func (t *testbed) runKubeProxy(ctx context.Context) error {
	third := t.options.time / 3
	proxy := t.kubeProxy()
	// Fairlead uses kube-proxy's default ports for health checks and metrics.
	proxy.Args = append(proxy.Args, "--healthz-bind-address=127.0.0.1:11256", "--metrics-bind-address=127.0.0.1:11249")
	other := &agent{system: proxy, env: t.agent.env, recorder: &t.recorder}
	// At some time during its start, kube-proxy cleans up after its other modes.
	if err := t.disturbIfIPVS(func() error {
		err := other.start(withoutCancel(ctx))
		sleep(ctx, third)
		return err
	}); err != nil {
		return err
	}
	if err := errors.Join(other.kill(), t.restartAgent(ctx)); err != nil {
		return err
	}
	sleep(ctx, third)
	return t.cleanUpKubeProxy(ctx)
}

// cleanUpKubeProxy removes kube-proxy's rules. In the mode ipvs this disturbs connections,
// because kube-proxy also deletes all virtual servers of the node.
func (t *testbed) cleanUpKubeProxy(context.Context) error {
	return t.disturbIfIPVS(func() error {
		cleanup := exec.Command(t.options.kubeProxy, "--cleanup") //nolint:noctx // takes a second
		var out bytes.Buffer
		cleanup.Stdout, cleanup.Stderr = &out, &out
		if err := t.net.Node.Do(cleanup.Run); err != nil {
			return fmt.Errorf("kube-proxy --cleanup: %w: %s", err, out.String())
		}
		return nil
	})
}

// disturbIfIPVS runs fn, which deletes all virtual servers.
func (t *testbed) disturbIfIPVS(fn func() error) error {
	if t.options.mode != system.ModeIPVS {
		return fn()
	}
	return t.recorder.disturb(fn)
}

// stopAPI stops the API server for half of the time.
func (t *testbed) stopAPI(ctx context.Context) error {
	if err := t.api.stop(); err != nil {
		return err
	}
	sleep(ctx, t.options.time/2)
	return t.api.start(withoutCancel(ctx))
}

func (t *testbed) restartWithoutAPI(ctx context.Context) error {
	if err := t.api.stop(); err != nil {
		return err
	}
	err := t.killAgent(ctx)
	sleep(ctx, t.options.time/2)
	return errors.Join(err, t.api.start(withoutCancel(ctx)))
}

// newMemoryCgroup returns the directory of a new cgroup and the name of its file that limits
// memory. It uses the cgroup version that has the memory controller.
func newMemoryCgroup() (dir, limit string, err error) {
	if controllers, _ := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); bytes.Contains(controllers, []byte("memory")) {
		dir, err = os.MkdirTemp("/sys/fs/cgroup", "fairlead-chaos-")
		return dir, "memory.max", err
	}
	dir, err = os.MkdirTemp("/sys/fs/cgroup/memory", "fairlead-chaos-")
	return dir, "memory.limit_in_bytes", err
}

func requireMemoryLimit(*testbed) string {
	dir, limit, err := newMemoryCgroup()
	if err != nil {
		return "cannot create a memory cgroup"
	}
	defer os.Remove(dir) //nolint:errcheck // empty
	if _, err := os.Stat(filepath.Join(dir, limit)); err != nil {
		return "the cgroup has no memory limit"
	}
	return ""
}

// limitMemory repeatedly limits the agent to a third of the memory that it uses, which makes
// the kernel kill it.
func (t *testbed) limitMemory(ctx context.Context) error {
	dir, limit, err := newMemoryCgroup()
	if err != nil {
		return fmt.Errorf("create a cgroup: %w", err)
	}
	defer os.Remove(dir) //nolint:errcheck // empty by then
	usage, err := system.UsageOf(t.agent.pid())
	if err != nil {
		return err
	}
	write := func(name, value string) error {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
			return fmt.Errorf("limit memory: %w", err)
		}
		return nil
	}
	if err := write(limit, strconv.FormatInt(usage.Resident/3, 10)); err != nil {
		return err
	}
	for ctx.Err() == nil {
		// The process may have exited in the meantime; the next iteration limits its
		// successor.
		_ = write("cgroup.procs", strconv.Itoa(t.agent.pid()))
		sleep(ctx, 2*time.Second)
	}
	// The next process is not limited.
	return t.killAgent(withoutCancel(ctx))
}
