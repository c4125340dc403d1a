package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// podGracePeriod is how long a deleted pod lives after the kernel knows that it is to
// go. A cluster gives it 30 seconds.
const podGracePeriod = 200 * time.Millisecond

// outsideRequests is how many requests go to the node port of each of the
// node's addresses.
const outsideRequests = 20

// scenario is what the demo does and prints.
type scenario struct {
	*cluster
	out      io.Writer
	requests int

	load           *load
	serviceAddrs   []netip.Addr   // of the Service backend
	previousCounts map[string]int // requests by back end in the step before
	outsideCount   int            // requests from outside
	problems       []string
}

func (s *scenario) print(format string, args ...any) {
	_, _ = fmt.Fprintln(s.out, strings.TrimRight(fmt.Sprintf(format, args...), " "))
}

// reportProblem notes that something is not as it must be, and prints it.
func (s *scenario) reportProblem(format string, args ...any) {
	problem := fmt.Sprintf(format, args...)
	s.problems = append(s.problems, problem)
	s.print("  WRONG: %s", problem)
}

// run does everything. It returns errProblems if something was not as it must be,
// and another error if it could not go on.
func (s *scenario) run(ctx context.Context) error {
	if err := s.printCluster(ctx); err != nil {
		return err
	}
	loadCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.load = s.startLoad(loadCtx)
	for _, step := range []func(context.Context) error{s.countBaseline, s.deleteBackend, s.addBackends, s.addNodePort} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return s.printSummary(ctx, s.load.stop())
}

// printCluster prints what there is.
func (s *scenario) printCluster(ctx context.Context) error {
	s.print("Fairlead demo: a node with %d pods, each a network namespace, and 2 Services.", len(s.pods))
	s.print("\n  %-11s %-12s %-17s %s", "pod", "IPv4", "IPv6", "what runs in it")
	for _, p := range s.pods {
		s.print("  %-11s %-12s %-17s %s", p.Name, p.IPv4, p.IPv6, p.description)
	}
	node := s.net.Node
	s.print("  %-11s %-12s %-17s %s", "the node", node.IPv4, node.IPv6, s.opts.fairlead+" "+strings.Join(s.command[:2], " "))

	s.print("\n  %-11s %-43s endpoints", "Service", "addresses, by DNS from frontend-1")
	for _, service := range []string{backendApp, redisApp} {
		addrs, err := s.resolve(ctx, service)
		if err != nil {
			return err
		}
		if service == backendApp {
			s.serviceAddrs = addrs
		}
		s.print("  %-11s %-43s %s", service, joinAddrs(addrs), podNames(s.podsOf(service)))
	}
	s.print("\nThe front ends ask for http://%s, by name and over a new connection each time, at random by IPv4", backendApp)
	s.print("or IPv6. The back end that gets a request counts it in Redis, by way of the other Service.")
	return nil
}

func (s *scenario) resolve(ctx context.Context, service string) ([]netip.Addr, error) {
	return s.resolver(s.podsOf(frontendApp)[0].Host).lookup(ctx, service)
}

// countBaseline counts requests before anything changes.
func (s *scenario) countBaseline(ctx context.Context) error {
	s.print("\n1. Three back ends: who answers %d requests?", s.requests)
	return s.countRequests(ctx, time.Time{})
}

// deleteBackend deletes a back end, as a cluster does: first the Service must do
// without it, and a moment later it ends.
func (s *scenario) deleteBackend(ctx context.Context) error {
	p := s.podsOf(backendApp)[1]
	s.print("\n2. %s is deleted, while requests go on.", p.Name)
	s.printTimingHeader()
	c, err := s.changeAndWait(ctx, p.Name+" gone", func() error { return s.deleteManifest(p) })
	if err != nil {
		return fmt.Errorf("delete %s: %w", p.Name, err)
	}
	select {
	case <-time.After(podGracePeriod):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := s.removePod(p); err != nil {
		return fmt.Errorf("delete %s: %w", p.Name, err)
	}
	return s.countRequests(ctx, c.Time)
}

// addBackends adds back ends.
func (s *scenario) addBackends(ctx context.Context) error {
	added := []string{"backend-4", "backend-5"}
	s.print("\n3. %s are added, while requests go on.", strings.Join(added, " and "))
	s.printTimingHeader()
	var last logLine
	for _, name := range added {
		p, err := s.addPod(ctx, backendApp, name)
		if err == nil {
			last, err = s.changeAndWait(ctx, name+" there", func() error { return s.createManifest(p) })
		}
		if err != nil {
			return fmt.Errorf("add %s: %w", name, err)
		}
	}
	return s.countRequests(ctx, last.Time)
}

// addNodePort adds a Service of type NodePort, for clients outside of the cluster.
func (s *scenario) addNodePort(ctx context.Context) error {
	s.print("\n4. The Service %s is added, of type NodePort: the back ends for clients outside.", publicService)
	text, err := os.ReadFile(filepath.Join(s.opts.services, publicService+".yaml"))
	if err != nil {
		return err
	}
	n := s.log.commitCount()
	if err := s.writeManifest("service-"+publicService, text); err != nil {
		return err
	}
	if _, err := s.log.waitCommit(ctx, s.fairlead, n); err != nil {
		return err
	}
	port := s.log.nodePort("default/" + publicService)
	client := &http.Client{
		Timeout: requestTimeout,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				to, err := netip.ParseAddrPort(address)
				if err != nil {
					return nil, err
				}
				return s.net.Outside.Dial(ctx, network, to)
			},
		},
	}
	for _, addr := range s.net.Node.Addrs() {
		url := fmt.Sprintf("http://%s/", netip.AddrPortFrom(addr, port))
		pods, answered := map[string]bool{}, 0
		for range outsideRequests {
			r := get(ctx, client, url)
			if r.err != nil {
				s.reportProblem("a request from outside failed: %v", r.err)
				break
			}
			s.outsideCount++
			pods[r.pod] = true
			answered++
		}
		s.print("   %-30s from outside: %d requests, answered by %d back ends", url, answered, len(pods))
	}
	return nil
}

const timingRow = "   %-16s %19s %21s"

func (s *scenario) printTimingHeader() {
	s.print(timingRow, "in the kernel", "since file changed", "since syncer had it")
}

// changeAndWait makes a change, waits until the kernel has it, and prints how long
// that took.
func (s *scenario) changeAndWait(ctx context.Context, what string, change func() error) (logLine, error) {
	n, began := s.log.commitCount(), time.Now()
	if err := change(); err != nil {
		return logLine{}, err
	}
	c, err := s.log.waitCommit(ctx, s.fairlead, n)
	if err != nil {
		return logLine{}, err
	}
	s.print(timingRow, what, milliseconds(c.Time.Sub(began)), milliseconds(c.Latency))
	if c.Reason != "change" || c.Failed != 0 || c.Latency <= 0 || c.Changes != len(s.serviceAddrs) {
		s.reportProblem("fairlead's log says %+v: want one change for each of the Service's addresses", c)
	}
	return c, nil
}

// countRequests waits for requests that began at since or later, prints who answered
// them, and compares that with the pods there are now.
func (s *scenario) countRequests(ctx context.Context, since time.Time) error {
	requests, err := s.load.wait(ctx, since, s.requests)
	if err != nil {
		return err
	}
	counts := map[string]int{}
	failed, over6 := 0, 0
	for _, r := range requests {
		if r.err != nil {
			failed++
			continue
		}
		counts[r.pod]++
		if r.address.Is6() {
			over6++
		}
	}
	var live []string
	for _, p := range s.podsOf(backendApp) {
		live = append(live, p.Name)
	}
	all := slices.Compact(slices.Sorted(slices.Values(slices.Concat(live, slices.Collect(maps.Keys(counts)), slices.Collect(maps.Keys(s.previousCounts))))))

	s.print("")
	for _, name := range all {
		note := ""
		switch {
		case s.previousCounts == nil:
		case !slices.Contains(live, name):
			note = "  deleted"
		case s.previousCounts[name] == 0:
			note = "  new"
		default:
			note = "  before: " + percent(s.previousCounts[name], s.requests)
		}
		share := float64(counts[name]) / float64(s.requests)
		s.print("   %-11s %5d  %5s  %-26s%s", name, counts[name], percent(counts[name], s.requests),
			strings.Repeat("█", int(math.Round(share*barWidth))), note)
	}
	s.print("   %d requests, %d of them over IPv6; %d failed", len(requests), over6, failed)
	for _, name := range all {
		switch isLive := slices.Contains(live, name); {
		case isLive && counts[name] == 0:
			s.reportProblem("%s got no request", name)
		case !isLive && counts[name] > 0:
			s.reportProblem("%s got requests that began after the kernel knew it was gone", name)
		}
	}
	s.previousCounts = counts
	return nil
}

// barWidth is the length of a bar that stands for everything.
const barWidth = 50

func percent(n, of int) string { return fmt.Sprintf("%.0f %%", 100*float64(n)/float64(of)) }

func milliseconds(d time.Duration) string {
	return strconv.FormatFloat(float64(d)/float64(time.Millisecond), 'f', 2, 64) + " ms"
}

func joinAddrs(addrs []netip.Addr) string {
	texts := make([]string, 0, len(addrs))
	for _, addr := range addrs {
		texts = append(texts, addr.String())
	}
	return strings.Join(texts, ", ")
}

func podNames(pods []*pod) string {
	texts := make([]string, 0, len(pods))
	for _, p := range pods {
		texts = append(texts, p.Name)
	}
	return strings.Join(texts, ", ")
}

// printSummary looks at everything that happened, and prints the verdict.
func (s *scenario) printSummary(ctx context.Context, requests []request) error {
	s.print("\nAfter all:")
	const shown = 5
	failed := 0
	elsewhere := map[netip.Addr]int{}
	for _, r := range requests {
		if r.err != nil {
			if failed++; failed <= shown {
				s.reportProblem("a request from %s failed: %v", r.from, r.err)
			}
			continue
		}
		if !slices.Contains(s.serviceAddrs, r.address) {
			elsewhere[r.address]++
		}
	}
	s.print("   %d requests in all, through every change: %d failed", len(requests), failed)
	if failed > shown {
		s.reportProblem("%d requests failed", failed)
	}
	addrs, err := s.resolve(ctx, backendApp)
	if err != nil {
		return err
	}
	s.print("   the address of %s is what it was: %s", backendApp, joinAddrs(addrs))
	if !slices.Equal(addrs, s.serviceAddrs) || len(elsewhere) > 0 {
		s.reportProblem("the address of %s was %s, and requests went to %v", backendApp, joinAddrs(s.serviceAddrs), elsewhere)
	}
	hits, err := s.redisCount(ctx)
	if err != nil {
		return err
	}
	s.print("   Redis has counted %s, %d of them from outside", hits, s.outsideCount)
	if failed == 0 && hits != strconv.Itoa(len(requests)+s.outsideCount) {
		s.reportProblem("Redis has counted %s requests, the front ends %d and the host outside %d", hits, len(requests), s.outsideCount)
	}
	for _, line := range s.log.problemLines() {
		s.reportProblem("fairlead says: %s", line)
	}
	select {
	case <-s.fairlead.done:
		s.reportProblem("fairlead has ended: %v", s.fairlead.err)
	default:
	}
	s.print("   \"since syncer had it\" is from the change handed to fairlead's syncer to the kernel's acknowledgement, as")
	s.print("   fairlead logs it; \"since file changed\" is from just before a pod's YAML file was renamed into place, or")
	s.print("   removed, to the same, with 2 ms in it for which fairlead waits for more files to change.")
	if len(s.problems) > 0 {
		s.print("\nFAILED: %s", strings.Join(s.problems, "\n        "))
		return errProblems
	}
	s.print("\nOK: back ends came and went, the Service stayed, and none of %d requests failed.", len(requests))
	return nil
}

// redisCount returns what the back ends have counted.
func (s *scenario) redisCount(ctx context.Context) (string, error) {
	conn, err := s.resolver(s.podsOf(frontendApp)[0].Host).dial(ctx, "tcp", fmt.Sprintf("%s:%d", redisApp, redisPort))
	if err != nil {
		return "", err
	}
	return redisCommand(ctx, conn, "GET", requestCounter)
}

// printKeepHelp says what there is to look at with -keep.
func (c *cluster) printKeepHelp(out io.Writer) {
	in := func(host, command string) string {
		return fmt.Sprintf("ip netns exec %s-%s %s", c.opts.name, host, command)
	}
	look := "  the rules            " + in("node", "nft list table ip fairlead")
	if c.opts.mode == modeIPVS {
		look = "  the virtual servers  " + in("node", "ipvsadm -Ln") + "\n" +
			"  the rules            " + in("node", "nft list table ip fairlead-ipvs")
	}
	_, _ = fmt.Fprintf(out, `
It all keeps running, until Ctrl-C. To look around:

%s
  a request            %s
  a name               %s
  what is counted      %s
  delete a back end    rm %s
  what fairlead logs   tail -f %s
  ip not installed?    nsenter --net=/run/netns/%s-node ...
`,
		look,
		in("frontend-1", "curl http://"+backendApp),
		in("frontend-1", "getent ahosts "+backendApp),
		in("frontend-1", "redis-cli -h "+redisApp+" get "+requestCounter),
		c.manifestFile("backend-1"), c.logFile(), c.opts.name)
}
