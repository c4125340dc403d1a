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

	"fairlead.io/fairlead/internal/backend"
)

// podGracePeriod is the time between removing a pod from its Service and ending it. Kubernetes
// waits 30 seconds by default.
const podGracePeriod = 200 * time.Millisecond

// outsideRequests is the number of requests to the node port on each address of the node.
const outsideRequests = 20

// scenario runs the steps of the demo and prints their results.
type scenario struct {
	*cluster
	out      io.Writer
	requests int

	load           *load
	serviceAddrs   []netip.Addr   // of the Service backend
	previousCounts map[string]int // requests by back end in the previous step
	outsideCount   int            // successful requests from outside the cluster
	problems       []string
}

func (s *scenario) print(format string, args ...any) {
	_, _ = fmt.Fprintln(s.out, strings.TrimRight(fmt.Sprintf(format, args...), " "))
}

// reportProblem records and prints that something is wrong.
func (s *scenario) reportProblem(format string, args ...any) {
	problem := fmt.Sprintf(format, args...)
	s.problems = append(s.problems, problem)
	s.print("  WRONG: %s", problem)
}

// run runs all steps. It returns errProblems if something was wrong, and other errors if the
// scenario could not continue.
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

// printCluster prints the pods and Services.
func (s *scenario) printCluster(ctx context.Context) error {
	s.print("Fairlead demo: a node with %d pods, each a network namespace, and 2 Services.", len(s.pods))
	s.print("\n  %-11s %-12s %-17s %s", "pod", "IPv4", "IPv6", "program")
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
	s.print("\nThe front ends request http://%s by name, over a new connection each time, and randomly by IPv4", backendApp)
	s.print("or IPv6. The back end that receives a request counts it in Redis, through the other Service.")
	return nil
}

func (s *scenario) resolve(ctx context.Context, service string) ([]netip.Addr, error) {
	return s.resolver(s.podsOf(frontendApp)[0].Host).lookup(ctx, service)
}

// countBaseline counts requests before the first change.
func (s *scenario) countBaseline(ctx context.Context) error {
	s.print("\n1. Three back ends answer %d requests.", s.requests)
	return s.countRequests(ctx, time.Time{})
}

// deleteBackend deletes a back end as a cluster does: it removes the pod from the Service first,
// and ends the pod after the grace period.
func (s *scenario) deleteBackend(ctx context.Context) error {
	p := s.podsOf(backendApp)[1]
	s.print("\n2. Delete %s while requests continue.", p.Name)
	s.printTimingHeader()
	c, err := s.changeAndWait(ctx, p.Name+" deleted", func() error { return s.deleteManifest(p) })
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

// addBackends adds two back ends.
func (s *scenario) addBackends(ctx context.Context) error {
	added := []string{"backend-4", "backend-5"}
	s.print("\n3. Add %s while requests continue.", strings.Join(added, " and "))
	s.printTimingHeader()
	var last logLine
	for _, name := range added {
		p, err := s.addPod(ctx, backendApp, name)
		if err == nil {
			last, err = s.changeAndWait(ctx, name+" added", func() error { return s.createManifest(p) })
		}
		if err != nil {
			return fmt.Errorf("add %s: %w", name, err)
		}
	}
	return s.countRequests(ctx, last.Time)
}

// addNodePort adds a Service of type NodePort and sends requests to it from outside the cluster.
func (s *scenario) addNodePort(ctx context.Context) error {
	s.print("\n4. Add the Service %s of type NodePort, which serves clients outside the cluster.", publicService)
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

const timingRow = "   %-18s %19s %21s"

func (s *scenario) printTimingHeader() {
	s.print(timingRow, "in the kernel", "since file changed", "since syncer input")
}

// changeAndWait makes a change, waits until the kernel has it, and prints how long this took.
func (s *scenario) changeAndWait(ctx context.Context, description string, change func() error) (logLine, error) {
	n, began := s.log.commitCount(), time.Now()
	if err := change(); err != nil {
		return logLine{}, err
	}
	c, err := s.log.waitCommit(ctx, s.fairlead, n)
	if err != nil {
		return logLine{}, err
	}
	s.print(timingRow, description, milliseconds(c.Time.Sub(began)), milliseconds(c.Latency))
	if c.Reason != "change" || c.Failed != 0 || c.Latency <= 0 || c.Changes != len(s.serviceAddrs) {
		s.reportProblem("fairlead logged %+v, want one change for each address of the Service", c)
	}
	return c, nil
}

// countRequests waits for requests that started at or after since, prints how many each back end
// answered, and compares this with the existing pods.
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
			s.reportProblem("%s received no requests", name)
		case !isLive && counts[name] > 0:
			s.reportProblem("%s received requests that started after the kernel had removed it", name)
		}
	}
	s.previousCounts = counts
	return nil
}

// barWidth is the length of a bar for all requests.
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

// printSummary checks all requests and the final state, and prints the result.
func (s *scenario) printSummary(ctx context.Context, requests []request) error {
	s.print("\nSummary:")
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
	s.print("   %d requests in total, during all changes: %d failed", len(requests), failed)
	if failed > shown {
		s.reportProblem("%d requests failed", failed)
	}
	addrs, err := s.resolve(ctx, backendApp)
	if err != nil {
		return err
	}
	s.print("   the addresses of %s are unchanged: %s", backendApp, joinAddrs(addrs))
	if !slices.Equal(addrs, s.serviceAddrs) || len(elsewhere) > 0 {
		s.reportProblem("the addresses of %s were %s before, and requests went to %v", backendApp, joinAddrs(s.serviceAddrs), elsewhere)
	}
	hits, err := s.redisCount(ctx)
	if err != nil {
		return err
	}
	s.print("   Redis has counted %s requests, %d of them from outside", hits, s.outsideCount)
	if failed == 0 && hits != strconv.Itoa(len(requests)+s.outsideCount) {
		s.reportProblem("Redis has counted %s requests, but the front ends sent %d and the host outside %d", hits, len(requests), s.outsideCount)
	}
	for _, line := range s.log.problemLines() {
		s.reportProblem("fairlead logged: %s", line)
	}
	select {
	case <-s.fairlead.done:
		s.reportProblem("fairlead ended: %v", s.fairlead.err)
	default:
	}
	s.print("   \"since syncer input\" is the time from the change at the input of fairlead's syncer until the kernel's")
	s.print("   acknowledgement, as logged by fairlead. \"since file changed\" starts just before the pod's YAML file is")
	s.print("   renamed into place or removed, and includes 2 ms in which fairlead waits for more files to change.")
	if len(s.problems) > 0 {
		s.print("\nFAILED: %s", strings.Join(s.problems, "\n        "))
		return errProblems
	}
	s.print("\nOK: back ends were deleted and added, the Service stayed, and none of %d requests failed.", len(requests))
	return nil
}

// redisCount returns the number of requests that the back ends have counted.
func (s *scenario) redisCount(ctx context.Context) (string, error) {
	conn, err := s.resolver(s.podsOf(frontendApp)[0].Host).dial(ctx, "tcp", fmt.Sprintf("%s:%d", redisApp, redisPort))
	if err != nil {
		return "", err
	}
	return redisCommand(ctx, conn, "GET", requestCounter)
}

// printKeepHelp prints commands for inspection with -keep.
func (c *cluster) printKeepHelp(out io.Writer) {
	in := func(host, command string) string {
		return fmt.Sprintf("ip netns exec %s-%s %s", c.opts.name, host, command)
	}
	rules := "  nftables rules       " + in("node", "nft list table ip fairlead")
	if c.opts.mode == backend.IPVS {
		rules = "  virtual servers      " + in("node", "ipvsadm -Ln") + "\n" +
			"  nftables rules       " + in("node", "nft list table ip fairlead-ipvs")
	}
	_, _ = fmt.Fprintf(out, `
Everything keeps running until Ctrl-C. Commands for inspection:

%s
  request              %s
  name lookup          %s
  request count        %s
  delete a back end    rm %s
  fairlead's log       tail -f %s
  without ip           nsenter --net=/run/netns/%s-node ...
`,
		rules,
		in("frontend-1", "curl http://"+backendApp),
		in("frontend-1", "getent ahosts "+backendApp),
		in("frontend-1", "redis-cli -h "+redisApp+" get "+requestCounter),
		c.manifestFile("backend-1"), c.logFile(), c.opts.name)
}
