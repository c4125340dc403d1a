package report

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
	"slices"
	"strconv"
	"strings"

	"fairlead.io/fairlead/internal/config"
)

// Agent describes the agent of the node. The zero Agent means that none runs.
type Agent struct {
	// Running is set if an agent runs. PID is 0 if the process is not visible. Description is the
	// description of the process that holds the instance lock.
	Running     bool
	PID         int
	Description string
	// Flags are the flags that are set, by name.
	Flags config.Flags
	// Config has the settings of the agent, or of this command if no agent runs. It is nil if they
	// are unknown, for the reason ConfigErr.
	Config    *config.Config
	ConfigErr error
}

var errNoAgent = errors.New("no Fairlead runs on this node, so its health, metrics, changes and events are missing")

// variables are the environment variables of the agent that are part of a report. All others may
// contain credentials.
func variables() []string {
	return []string{"GODEBUG", "GOGC", "GOMAXPROCS", "GOMEMLIMIT", "GOTRACEBACK", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "TZ"}
}

// Configuration returns the part with the settings of the agent: flags, some environment variables
// and the KubeProxyConfiguration. It contains the paths of kubeconfig files, never their contents.
func Configuration(a Agent) Part {
	return Part{Name: "configuration.json", Collect: func(context.Context) ([]byte, error) {
		values := map[string]any{"running": a.Running, "pid": a.PID, "description": a.Description, "flags": a.Flags}
		errs := []error{a.ConfigErr}
		if a.PID != 0 {
			environment, err := readEnvironment(a.PID)
			values["environment"] = environment
			errs = append(errs, err)
		}
		if c := a.Config; c != nil {
			configuration, err := c.Fields.Configz()
			values["configuration"] = configuration
			errs = append(errs, err)
			values["settings"] = map[string]any{
				"mode": c.Mode, "proxyMode": c.ProxyMode, "node": c.Tracker.NodeName, "manifests": c.Manifests, "serviceCIDRs": c.ServiceCIDRs,
				"dnsListen": c.DNSListen, "kubeconfig": c.API.Kubeconfig, "master": c.API.Master, "batchPeriod": c.API.BatchPeriod.String(),
				"massRemovalDelay": c.API.MassRemovalDelay.String(), "healthzAddress": c.HealthzAddress, "metricsAddress": c.MetricsAddress,
				"statusAddress": c.StatusAddress, "giveWayAfter": c.GiveWayAfter.String(), "ownTables": c.OwnTables, "flowOffload": c.FlowOffload, "serviceProxyName": c.Tracker.ServiceProxyName,
			}
			var warnings []string
			for _, w := range c.Warnings {
				warnings = append(warnings, w.Setting+": "+w.Reason)
			}
			values["warnings"] = warnings
		}
		text, err := marshal(values)
		return text, errors.Join(append(errs, err)...)
	}}
}

// readEnvironment returns the variables of a process that are part of a report.
func readEnvironment(pid int) (map[string]string, error) {
	content, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return nil, err
	}
	environment := map[string]string{}
	for entry := range bytes.SplitSeq(content, []byte{0}) {
		if name, value, ok := strings.Cut(string(entry), "="); ok && slices.Contains(variables(), name) {
			environment[name] = value
		}
	}
	return environment, nil
}

// Requests returns the parts that the running agent answers: health, metrics, configuration, and
// the status page's Services with problems, recent changes, events and refused packets.
func Requests(a Agent) []Part {
	if !a.Running {
		return []Part{{Name: "status.json", Collect: func(context.Context) ([]byte, error) { return nil, errNoAgent }}}
	}
	var parts []Part
	add := func(name, setting, path string, address func(*config.Config) string) {
		parts = append(parts, Part{Name: name, Collect: func(ctx context.Context) ([]byte, error) {
			switch {
			case a.Config == nil:
				return nil, errors.New("the address is unknown, because the settings of the agent are")
			case address(a.Config) == "":
				return nil, fmt.Errorf("--%s is empty", setting)
			}
			return get(ctx, address(a.Config), path)
		}})
	}
	healthz := func(c *config.Config) string { return c.HealthzAddress }
	metrics := func(c *config.Config) string { return c.MetricsAddress }
	status := func(c *config.Config) string { return c.StatusAddress }
	add("healthz.json", "healthz-bind-address", "/healthz", healthz)
	add("metrics.txt", "metrics-bind-address", "/metrics", metrics)
	add("configz.json", "metrics-bind-address", "/configz", metrics)
	add("statusz.txt", "metrics-bind-address", "/statusz", metrics)
	add("status.json", "status-address", "/api/status", status)
	add("changes.json", "status-address", "/api/changes", status)
	add("events.json", "status-address", "/api/events", status)
	add("refused-packets.json", "status-address", "/api/refused-packets", status)
	add("failing-services.json", "status-address", "/api/services?state=failing&limit=1000", status)
	add("problems.json", "status-address", "/api/services?state=problem&limit=1000", status)
	return parts
}

// get returns the body of a response of the agent. A status such as 503 for /healthz is an answer,
// too; another one than 200 precedes the body.
func get(ctx context.Context, address, path string) ([]byte, error) {
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	if addr.Addr().IsUnspecified() {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if addr.Addr().Is6() {
			loopback = netip.IPv6Loopback()
		}
		addr = netip.AddrPortFrom(loopback, addr.Port())
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr.String()+path, nil)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{}).DialContext} // without a proxy from the environment
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close() //nolint:errcheck // it was read
	body, err := io.ReadAll(io.LimitReader(response.Body, maxFileBytes))
	if response.StatusCode != http.StatusOK {
		body = append([]byte(response.Status+"\n"), body...)
		if response.StatusCode == http.StatusNotFound {
			err = errors.Join(err, fmt.Errorf("%s: %s: another program listens on the address", request.URL, response.Status))
		}
	}
	return body, err
}
