package preflight

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/conntracksettings"
	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/instance"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/otherproxy"
	"fairlead.io/fairlead/internal/scratchns"
)

// Options are the settings of `fairlead run` that the checks need.
type Options struct {
	// Mode is the name of the backend to run, and Values holds the values of its flags.
	Mode   string
	Values backend.Values
	// HealthzAddress and MetricsAddress are host:port, or empty for no server.
	HealthzAddress, MetricsAddress string
	Conntrack                      conntracksettings.Settings
	// FlowOffload checks for flowtables, which --flow-offload needs.
	FlowOffload bool
	PodNetwork  nodesettings.PodNetwork
	// API checks the API server. Nil means no API server.
	API func(context.Context, *Report)
}

// Run performs all checks in the network namespace of the calling thread, which the caller must
// have locked to its goroutine unless it is the process's namespace.
func Run(ctx context.Context, o Options) *Report {
	r := &Report{}
	c := checker{Report: r, options: o}
	c.checkKernel()
	c.checkCapabilities()
	c.checkModes(ctx)
	if o.FlowOffload {
		c.checkFlowOffload()
	}
	c.checkInstance(ctx)
	c.checkForwarding()
	c.checkNodeSettings()
	c.checkConntrack()
	c.checkOtherProxies()
	c.checkNetfilter()
	c.checkBPF()
	c.checkServer(ctx, "healthz", o.HealthzAddress)
	c.checkServer(ctx, "metrics", o.MetricsAddress)
	if o.API != nil {
		o.API(ctx, r)
	}
	return r
}

// checker performs the checks and adds their findings to the Report.
type checker struct {
	*Report

	options Options
	// holder is the running instance, nil without one.
	holder *instance.Holder
	// capabilities is the effective set of the process.
	capabilities uint64
}

// error adds a warning about a check that could not be performed.
func (c *checker) error(check string, err error) {
	fix := ""
	if c.capabilities&(1<<unix.CAP_NET_ADMIN) == 0 {
		fix = "run the command as root"
	}
	c.Add(check, Warning, fix, "not checked: %v", err)
}

func (c *checker) checkKernel() {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		c.error("kernel", err)
		return
	}
	c.Add("kernel", OK, "", "%s %s on %s", unix.ByteSliceToString(name.Sysname[:]), unix.ByteSliceToString(name.Release[:]),
		unix.ByteSliceToString(name.Machine[:]))
}

func (c *checker) checkCapabilities() {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		c.error("capabilities", err)
		return
	}
	c.capabilities = uint64(data[0].Effective) | uint64(data[1].Effective)<<32
	if c.has(unix.CAP_NET_ADMIN) {
		c.Add("capabilities", OK, "", "CAP_NET_ADMIN is effective, which programming Services needs")
	} else {
		c.Add("capabilities", Failed, "run the command as root, or add NET_ADMIN to securityContext.capabilities.add",
			"CAP_NET_ADMIN is missing: Services cannot be programmed and tables cannot be read")
	}
	var missing []string
	for _, capability := range []struct {
		number uint
		name   string
		use    string
	}{
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "to try the modes in a network namespace and to name eBPF programs"},
		{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "to name the processes that listen on ports"},
	} {
		if !c.has(capability.number) {
			missing = append(missing, capability.name+" ("+capability.use+")")
		}
	}
	if len(missing) > 0 {
		c.Add("capabilities", Info, "run the command as root on the node", "this command lacks %s; Fairlead itself does not need it", strings.Join(missing, " and "))
	}
}

func (c *checker) has(capability uint) bool { return c.capabilities&(1<<capability) != 0 }

// checkInstance finds the Fairlead that programs the node.
func (c *checker) checkInstance(ctx context.Context) {
	holder, err := instance.FindHolder(ctx)
	switch {
	case err != nil:
		c.Add("instance", Failed, "end that process", "no Fairlead can program this node: %v", err)
	case holder == nil:
		c.Add("instance", OK, "", "no Fairlead programs this node")
	default:
		c.holder = holder
		c.Add("instance", OK, "", "Fairlead programs this node (%s); another one would wait until it ends", holder)
	}
}

func (c *checker) checkNodeSettings() {
	problems, err := nodesettings.Check(c.options.PodNetwork)
	if err != nil {
		c.error("node-settings", err)
		return
	}
	for _, p := range problems {
		// These have a check of their own, with more details.
		if p.Kind == nodesettings.ForwardPolicy || p.Kind == nodesettings.IPForward {
			continue
		}
		c.Add(string(p.Kind), Warning, p.Fix, "%s (interface %s): %s", p.Setting, p.Interface, p.Consequence)
	}
}

func (c *checker) checkConntrack() {
	const check = "conntrack"
	usage, err := conntracksettings.ReadUsage()
	if err == nil && usage.Max > 0 && usage.Entries >= usage.Max/10*9 {
		c.Add(check, Failed, fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", usage.Max*2),
			"the table of connections has %d of %d entries: the kernel drops new connections when it is full", usage.Entries, usage.Max)
	}
	pending, err := c.options.Conntrack.Pending()
	if err != nil {
		c.Add(check, Info, "", "%v; the kernel loads it with the first rules", err)
		return
	}
	if len(pending) == 0 {
		c.Add(check, OK, "", "the kernel has the configured settings or larger ones")
	}
	for _, p := range pending {
		c.Add(check, Info, p.Command(), "%s is %d, configured is %d: fairlead run sets it, if it may write to /proc/sys", p.Name, p.Old, p.New)
	}
}

func (c *checker) checkOtherProxies() {
	const check = "other-proxy"
	scanner, err := otherproxy.NewScanner()
	if err != nil {
		c.error(check, err)
		return
	}
	rules, err := scanner.Scan()
	if closeErr := scanner.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		c.error(check, err)
	}
	for _, r := range rules {
		c.Add(check, Warning, "fairlead cleanup --kube-proxy, or kube-proxy --cleanup", "rules of %s: %s", r, r.Effect())
	}
	if err == nil && len(rules) == 0 {
		c.Add(check, OK, "", "no rules of kube-proxy in any mode")
	}
}

// checkModes programs an example in each mode, in a network namespace of its own.
func (c *checker) checkModes(ctx context.Context) {
	log := slog.New(slog.DiscardHandler)
	for _, b := range backend.All() {
		check := "mode-" + b.Name
		status, fix := Failed, "use another --mode, or a kernel with the missing feature"
		if b.Name != c.options.Mode {
			status, fix = Info, ""
		}
		var values backend.Values
		if b.Name == c.options.Mode {
			values = c.options.Values
		}
		err := programExample(ctx, b, backend.Options{Logger: log, Values: values})
		switch {
		case err == nil:
			c.Add(check, OK, "", "its tables and an example Service were programmed in a network namespace of its own")
		case isNamespaceError(err):
			if status == Failed {
				status, fix = Warning, "run the command as root on the node"
			}
			c.Add(check, status, fix, "not tried: %v", err)
		default:
			c.Add(check, status, fix, "does not work on this kernel: %v", err)
		}
	}
}

func isNamespaceError(err error) bool {
	_, ok := errors.AsType[*scratchns.Error](err)
	return ok
}

// checkFlowOffload creates a flowtable in a network namespace of its own.
func (c *checker) checkFlowOffload() {
	const check = "flow-offload"
	namespace, err := scratchns.New()
	if err != nil {
		c.Add(check, Warning, "run the command as root on the node", "not tried: %v", err)
		return
	}
	defer namespace.Close() //nolint:errcheck // nothing was written to it
	if err := flowoffload.Check(int(namespace.Fd())); err != nil {
		c.Add(check, Warning, "remove --flow-offload, or use a kernel with the missing feature", "connections would not be offloaded: %v", err)
		return
	}
	udp, err := flowoffload.OffloadsUDP()
	if err != nil {
		c.Add(check, Warning, "", "a flowtable was created, but the kernel's version is unknown: %v", err)
		return
	}
	c.Add(check, OK, "", "a flowtable was created in a network namespace of its own")
	if !udp {
		c.Add(check, Info, "", "only TCP connections would be offloaded: UDP requires Linux 6.4 or newer")
	}
}

// isFairlead reports whether a table belongs to Fairlead.
func isFairlead(table string) bool {
	return table == "fairlead" || slices.ContainsFunc([]string{"fairlead-"}, func(prefix string) bool { return strings.HasPrefix(table, prefix) })
}
