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

// grace is how long a deleted pod lives after the kernel knows that it is to
// go. A cluster gives it 30 seconds.
const grace = 200 * time.Millisecond

// outsideRequests is how many requests go to the node port of each of the
// node's addresses.
const outsideRequests = 20

// story is what the demo does and prints.
type story struct {
	*cluster
	out      io.Writer
	requests int

	load     *load
	address  []netip.Addr   // of the Service backend
	counts   map[string]int // requests by back end in the step before
	outside  int            // requests from outside
	problems []string
}

func (s *story) print(format string, args ...any) {
	_, _ = fmt.Fprintln(s.out, strings.TrimRight(fmt.Sprintf(format, args...), " "))
}

// off notes that something is not as it must be, and prints it.
func (s *story) off(format string, args ...any) {
	problem := fmt.Sprintf(format, args...)
	s.problems = append(s.problems, problem)
	s.print("  WRONG: %s", problem)
}

// tell does everything. It returns errOff if something was not as it must be,
// and another error if it could not go on.
func (s *story) tell(ctx context.Context) error {
	if err := s.introduce(ctx); err != nil {
		return err
	}
	loadCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.load = s.startLoad(loadCtx)
	for _, step := range []func(context.Context) error{s.spread, s.deleteOne, s.addTwo, s.open} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return s.judge(ctx, s.load.stop())
}

// introduce prints what there is.
func (s *story) introduce(ctx context.Context) error {
	s.print("Fairlead demo: a node with %d pods, each a network namespace, and 2 Services.", len(s.pods))
	s.print("\n  %-11s %-12s %-17s %s", "pod", "IPv4", "IPv6", "what runs in it")
	for _, p := range s.pods {
		s.print("  %-11s %-12s %-17s %s", p.Name, p.IPv4, p.IPv6, p.what)
	}
	node := s.net.Node
	s.print("  %-11s %-12s %-17s %s", "the node", node.IPv4, node.IPv6, s.opts.fairlead+" "+strings.Join(s.command[:2], " "))

	s.print("\n  %-11s %-43s endpoints", "Service", "addresses, by DNS from frontend-1")
	for _, service := range []string{backend, redis} {
		addrs, err := s.resolve(ctx, service)
		if err != nil {
			return err
		}
		if service == backend {
			s.address = addrs
		}
		s.print("  %-11s %-43s %s", service, join(addrs), names(s.of(service)))
	}
	s.print("\nThe front ends ask for http://%s, by name and over a new connection each time, at random by IPv4", backend)
	s.print("or IPv6. The back end that gets a request counts it in Redis, by way of the other Service.")
	return nil
}

func (s *story) resolve(ctx context.Context, service string) ([]netip.Addr, error) {
	return s.resolver(s.of(frontend)[0].Host).lookup(ctx, service)
}

// spread counts requests before anything changes.
func (s *story) spread(ctx context.Context) error {
	s.print("\n1. Three back ends: who answers %d requests?", s.requests)
	return s.count(ctx, time.Time{})
}

// deleteOne deletes a back end, as a cluster does: first the Service must do
// without it, and a moment later it ends.
func (s *story) deleteOne(ctx context.Context) error {
	p := s.of(backend)[1]
	s.print("\n2. %s is deleted, while requests go on.", p.Name)
	s.timingHead()
	c, err := s.commit(ctx, p.Name+" gone", func() error { return s.withdraw(p) })
	if err != nil {
		return fmt.Errorf("delete %s: %w", p.Name, err)
	}
	select {
	case <-time.After(grace):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := s.removePod(p); err != nil {
		return fmt.Errorf("delete %s: %w", p.Name, err)
	}
	return s.count(ctx, c.Time)
}

// addTwo adds back ends.
func (s *story) addTwo(ctx context.Context) error {
	added := []string{"backend-4", "backend-5"}
	s.print("\n3. %s are added, while requests go on.", strings.Join(added, " and "))
	s.timingHead()
	var last commit
	for _, name := range added {
		p, err := s.addPod(ctx, backend, name)
		if err == nil {
			last, err = s.commit(ctx, name+" there", func() error { return s.announce(p) })
		}
		if err != nil {
			return fmt.Errorf("add %s: %w", name, err)
		}
	}
	return s.count(ctx, last.Time)
}

// open adds a Service of type NodePort, for clients outside of the cluster.
func (s *story) open(ctx context.Context) error {
	s.print("\n4. The Service %s is added, of type NodePort: the back ends for clients outside.", public)
	text, err := os.ReadFile(filepath.Join(s.opts.services, public+".yaml"))
	if err != nil {
		return err
	}
	n := s.log.count()
	if err := s.writeManifest("service-"+public, text); err != nil {
		return err
	}
	if _, err := s.log.wait(ctx, s.fairlead, n); err != nil {
		return err
	}
	port := s.log.nodePort("default/" + public)
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
				s.off("a request from outside failed: %v", r.err)
				break
			}
			s.outside++
			pods[r.pod] = true
			answered++
		}
		s.print("   %-30s from outside: %d requests, answered by %d back ends", url, answered, len(pods))
	}
	return nil
}

const timingRow = "   %-16s %19s %21s"

func (s *story) timingHead() {
	s.print(timingRow, "in the kernel", "since file changed", "since syncer had it")
}

// commit makes a change, waits until the kernel has it, and prints how long
// that took.
func (s *story) commit(ctx context.Context, what string, change func() error) (commit, error) {
	n, began := s.log.count(), time.Now()
	if err := change(); err != nil {
		return commit{}, err
	}
	c, err := s.log.wait(ctx, s.fairlead, n)
	if err != nil {
		return commit{}, err
	}
	s.print(timingRow, what, milliseconds(c.Time.Sub(began)), milliseconds(c.Latency))
	if c.Reason != "change" || c.Failed != 0 || c.Latency <= 0 || c.Changes != len(s.address) {
		s.off("fairlead's log says %+v: want one change for each of the Service's addresses", c)
	}
	return c, nil
}

// count waits for requests that began at since or later, prints who answered
// them, and compares that with the pods there are now.
func (s *story) count(ctx context.Context, since time.Time) error {
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
	for _, p := range s.of(backend) {
		live = append(live, p.Name)
	}
	all := slices.Compact(slices.Sorted(slices.Values(slices.Concat(live, slices.Collect(maps.Keys(counts)), slices.Collect(maps.Keys(s.counts))))))

	s.print("")
	for _, name := range all {
		note := ""
		switch {
		case s.counts == nil:
		case !slices.Contains(live, name):
			note = "  deleted"
		case s.counts[name] == 0:
			note = "  new"
		default:
			note = "  before: " + percent(s.counts[name], s.requests)
		}
		share := float64(counts[name]) / float64(s.requests)
		s.print("   %-11s %5d  %5s  %-26s%s", name, counts[name], percent(counts[name], s.requests),
			strings.Repeat("█", int(math.Round(share*barWidth))), note)
	}
	s.print("   %d requests, %d of them over IPv6; %d failed", len(requests), over6, failed)
	for _, name := range all {
		switch isLive := slices.Contains(live, name); {
		case isLive && counts[name] == 0:
			s.off("%s got no request", name)
		case !isLive && counts[name] > 0:
			s.off("%s got requests that began after the kernel knew it was gone", name)
		}
	}
	s.counts = counts
	return nil
}

// barWidth is the length of a bar that stands for everything.
const barWidth = 50

func percent(n, of int) string { return fmt.Sprintf("%.0f %%", 100*float64(n)/float64(of)) }

func milliseconds(d time.Duration) string {
	return strconv.FormatFloat(float64(d)/float64(time.Millisecond), 'f', 2, 64) + " ms"
}

func join(addrs []netip.Addr) string {
	texts := make([]string, 0, len(addrs))
	for _, addr := range addrs {
		texts = append(texts, addr.String())
	}
	return strings.Join(texts, ", ")
}

func names(pods []*pod) string {
	texts := make([]string, 0, len(pods))
	for _, p := range pods {
		texts = append(texts, p.Name)
	}
	return strings.Join(texts, ", ")
}

// judge looks at everything that happened, and prints the verdict.
func (s *story) judge(ctx context.Context, requests []request) error {
	s.print("\nAfter all:")
	const shown = 5
	failed := 0
	elsewhere := map[netip.Addr]int{}
	for _, r := range requests {
		if r.err != nil {
			if failed++; failed <= shown {
				s.off("a request from %s failed: %v", r.from, r.err)
			}
			continue
		}
		if !slices.Contains(s.address, r.address) {
			elsewhere[r.address]++
		}
	}
	s.print("   %d requests in all, through every change: %d failed", len(requests), failed)
	if failed > shown {
		s.off("%d requests failed", failed)
	}
	addrs, err := s.resolve(ctx, backend)
	if err != nil {
		return err
	}
	s.print("   the address of %s is what it was: %s", backend, join(addrs))
	if !slices.Equal(addrs, s.address) || len(elsewhere) > 0 {
		s.off("the address of %s was %s, and requests went to %v", backend, join(s.address), elsewhere)
	}
	hits, err := s.hits(ctx)
	if err != nil {
		return err
	}
	s.print("   Redis has counted %s, %d of them from outside", hits, s.outside)
	if failed == 0 && hits != strconv.Itoa(len(requests)+s.outside) {
		s.off("Redis has counted %s requests, the front ends %d and the host outside %d", hits, len(requests), s.outside)
	}
	for _, line := range s.log.wrong() {
		s.off("fairlead says: %s", line)
	}
	select {
	case <-s.fairlead.done:
		s.off("fairlead has ended: %v", s.fairlead.err)
	default:
	}
	s.print("   \"since syncer had it\" is from the change handed to fairlead's syncer to the kernel's acknowledgement, as")
	s.print("   fairlead logs it; \"since file changed\" is from just before a pod's YAML file was renamed into place, or")
	s.print("   removed, to the same, with 2 ms in it for which fairlead waits for more files to change.")
	if len(s.problems) > 0 {
		s.print("\nFAILED: %s", strings.Join(s.problems, "\n        "))
		return errOff
	}
	s.print("\nOK: back ends came and went, the Service stayed, and none of %d requests failed.", len(requests))
	return nil
}

// hits returns what the back ends have counted.
func (s *story) hits(ctx context.Context) (string, error) {
	conn, err := s.resolver(s.of(frontend)[0].Host).dial(ctx, "tcp", fmt.Sprintf("%s:%d", redis, redisPort))
	if err != nil {
		return "", err
	}
	return ask(ctx, conn, "GET", counter)
}

// explain says what there is to look at with -keep.
func (c *cluster) explain(out io.Writer) {
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
		in("frontend-1", "curl http://"+backend),
		in("frontend-1", "getent ahosts "+backend),
		in("frontend-1", "redis-cli -h "+redis+" get "+counter),
		c.manifestFile("backend-1"), c.logFile(), c.opts.name)
}
