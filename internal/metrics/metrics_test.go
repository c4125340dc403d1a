package metrics_test

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/sync"
)

// scrape returns the values of the metrics whose names start with one of the prefixes, except
// histogram buckets.
func statusCollector(t *testing.T, m *metrics.Metrics, prefixes ...string) map[string]string {
	t.Helper()
	response := httptest.NewRecorder()
	m.Handler().ServeHTTP(response, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	if response.Code != http.StatusOK {
		t.Fatalf("status %d, body %s", response.Code, response.Body)
	}
	values := map[string]string{}
	for line := range strings.Lines(response.Body.String()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if !strings.HasSuffix(name, "}") && strings.Contains(name, "{") {
			name += "}"
		}
		if value == "" {
			name, value, _ = strings.Cut(strings.TrimSpace(line), " ")
		}
		has := func(prefix string) bool { return strings.HasPrefix(name, prefix) }
		if slices.ContainsFunc(prefixes, has) && !strings.Contains(name, "_bucket{") {
			values[name] = value
		}
	}
	return values
}

func service(t *testing.T, key dataplane.Key, treatment dataplane.ServiceSpec) *dataplane.Service {
	t.Helper()
	addr := "192.0.2.1:80"
	if key.Family == dataplane.IPv6 {
		addr = "[2001:db8::1]:80"
	}
	if key.Kind == dataplane.NodePort {
		addr = "0.0.0.0:80"
	}
	s, err := dataplane.NewService(key, []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort(addr)}}, treatment)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func key(name string, family dataplane.Family, kind dataplane.Kind) dataplane.Key {
	return dataplane.Key{Namespace: "shop", Name: name, Family: family, Kind: kind}
}

func noStatus() sync.Status { return sync.Status{} }

func TestCommits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := metrics.New(metrics.Options{Status: noStatus})
		start := time.Now()
		commit := func(kind sync.Op, reason sync.Reason, families ...dataplane.Family) sync.Commit {
			c := sync.Commit{Op: kind, Reason: reason, Start: start, End: start.Add(2 * time.Second), OldestUpdate: start.Add(-time.Second)}
			for _, f := range families {
				c.Changes = append(c.Changes, dataplane.Change{New: service(t, key("web", f, 0), dataplane.ServiceSpec{})})
			}
			return c
		}
		atStart := commit(sync.OpReplace, sync.ReasonStart)
		atStart.FirstComplete, atStart.LastComplete = start.Add(500*time.Millisecond), start.Add(1500*time.Millisecond)
		m.OnCommit(atStart)
		m.OnCommit(commit(sync.OpApply, sync.ReasonChange, dataplane.IPv4))
		m.OnCommit(commit(sync.OpApply, sync.ReasonChange, dataplane.IPv4, dataplane.IPv6))
		partial := commit(sync.OpReplace, sync.ReasonRetry)
		partial.FirstComplete, partial.LastComplete = start.Add(time.Hour), start.Add(time.Hour) // ignored after the first commit
		partial.Failed = map[dataplane.Key]error{key("db", dataplane.IPv4, 0): errors.New("no")}
		m.OnCommit(partial)
		failure := commit(sync.OpReplace, sync.ReasonDrift)
		failure.Err = errors.New("no")
		m.OnCommit(failure)

		last := fmt.Sprintf("%g", float64(start.Add(2*time.Second).UnixMilli())/1000)
		want := map[string]string{
			`fairlead_commits_total{kind="replace",reason="start",result="success"}`: "1",
			`fairlead_commits_total{kind="apply",reason="change",result="success"}`:  "2",
			`fairlead_commits_total{kind="replace",reason="retry",result="partial"}`: "1",
			`fairlead_commits_total{kind="replace",reason="drift",result="failure"}`: "1",
			`fairlead_commit_duration_seconds_count{kind="apply"}`:                   "2",
			`fairlead_commit_duration_seconds_sum{kind="apply"}`:                     "4",
			`fairlead_commit_duration_seconds_count{kind="replace"}`:                 "3",
			`fairlead_commit_duration_seconds_sum{kind="replace"}`:                   "6",
			`fairlead_change_latency_seconds_count`:                                  "4",
			`fairlead_change_latency_seconds_sum`:                                    "12",
			`fairlead_first_programmed_seconds`:                                      "2",
			`fairlead_first_service_programmed_seconds`:                              "0.5",
			`fairlead_last_service_programmed_seconds`:                               "1.5",

			`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"}`:          "5",
			`kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv4"}`:            "10",
			`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"}`:          "4",
			`kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv6"}`:            "8",
			`kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"}`:     "3",
			`kubeproxy_sync_full_proxy_rules_duration_seconds_sum{ip_family="IPv4"}`:       "6",
			`kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv6"}`:     "3",
			`kubeproxy_sync_full_proxy_rules_duration_seconds_sum{ip_family="IPv6"}`:       "6",
			`kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family="IPv4"}`:  "2",
			`kubeproxy_sync_partial_proxy_rules_duration_seconds_sum{ip_family="IPv4"}`:    "4",
			`kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family="IPv6"}`:  "1",
			`kubeproxy_sync_partial_proxy_rules_duration_seconds_sum{ip_family="IPv6"}`:    "2",
			`kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family="IPv4"}`: "0",
			`kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family="IPv6"}`: "0",
			`kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv4"}`:    "2",
			`kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv6"}`:    "1",
			`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}`:          last,
			`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv6"}`:          last,
		}
		got := statusCollector(t, m, "fairlead_commit", "fairlead_change_", "fairlead_first", "fairlead_last", "kubeproxy_sync_proxy_rules_d",
			"kubeproxy_sync_full", "kubeproxy_sync_partial", "kubeproxy_sync_proxy_rules_nft", "kubeproxy_sync_proxy_rules_last_t")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

func TestStatus(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var status sync.Status
		m := metrics.New(metrics.Options{Status: func() sync.Status { return status }, Version: "v1", Mode: "nft"})
		check := func(want map[string]string) {
			t.Helper()
			got := statusCollector(t, m, "fairlead_services", "fairlead_dataplane", "fairlead_oldest", "fairlead_build")
			want[`fairlead_build_info{mode="nft",version="v1"}`] = "1"
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		}
		check(map[string]string{
			"fairlead_services": "0", `fairlead_services_failing{reason="error"}`: "0", `fairlead_services_failing{reason="unsupported"}`: "0",
			"fairlead_dataplane_failed": "0", "fairlead_oldest_change_age_seconds": "0",
		})
		status = sync.Status{
			Services: 7,
			Failing: map[dataplane.Key]error{
				key("a", 4, 0): errors.New("no"),
				key("b", 4, 0): fmt.Errorf("affinity: %w", dataplane.ErrUnsupported),
				key("c", 4, 0): fmt.Errorf("ranges: %w", dataplane.ErrUnsupported),
			},
			Err: errors.New("no"), PendingSince: time.Now().Add(-3 * time.Second),
		}
		check(map[string]string{
			"fairlead_services": "7", `fairlead_services_failing{reason="error"}`: "1", `fairlead_services_failing{reason="unsupported"}`: "2",
			"fairlead_dataplane_failed": "1", "fairlead_oldest_change_age_seconds": "3",
		})
	})
}

// TestChanges checks that changes are pending until a later call has succeeded.
func TestChanges(t *testing.T) {
	t.Parallel()
	var status sync.Status
	m := metrics.New(metrics.Options{Status: func() sync.Status { return status }})
	check := func(services, servicesPending, endpoints, endpointsPending string) {
		t.Helper()
		got := statusCollector(t, m, "kubeproxy_sync_proxy_rules_service_changes", "kubeproxy_sync_proxy_rules_endpoint_changes")
		want := map[string]string{
			"kubeproxy_sync_proxy_rules_service_changes_total": services, "kubeproxy_sync_proxy_rules_service_changes_pending": servicesPending,
			"kubeproxy_sync_proxy_rules_endpoint_changes_total": endpoints, "kubeproxy_sync_proxy_rules_endpoint_changes_pending": endpointsPending,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	check("0", "0", "0", "0")
	m.RecordObjectChanges(5, 5) // no effect on the kernel, so no call follows
	check("5", "0", "5", "0")
	m = metrics.New(metrics.Options{Status: func() sync.Status { return status }})
	m.RecordObjectChanges(5, 0)
	status.PendingSince = time.Now()
	check("5", "5", "0", "0")
	status.PendingSince = time.Time{}
	m.RecordObjectChanges(1, 0)
	status.PendingSince = time.Now()
	check("6", "1", "0", "0") // without the earlier changes, which no call followed

	m = metrics.New(metrics.Options{Status: func() sync.Status { return status }})
	m.RecordObjectChanges(2, 3)
	check("2", "2", "3", "3")
	status.CallSince = time.Now()
	m.RecordObjectChanges(1, 0)
	check("3", "3", "3", "3")
	m.OnCommit(sync.Commit{Err: errors.New("no")})
	check("3", "3", "3", "3")
	m.RecordObjectChanges(0, 10) // during the second attempt
	m.OnCommit(sync.Commit{})
	check("3", "0", "13", "10")
	m.OnCommit(sync.Commit{})
	check("3", "0", "13", "0")
}

// TestNetworkProgramming checks the time from an EndpointSlice's trigger to the end of the commit.
func TestNetworkProgramming(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		beforeStart := time.Now()
		time.Sleep(time.Hour)
		m := metrics.New(metrics.Options{Status: noStatus})
		commit := func(duration time.Duration, keys ...dataplane.Key) {
			c := sync.Commit{Op: sync.OpApply, Start: time.Now()}
			time.Sleep(duration)
			c.End = time.Now()
			for _, k := range keys {
				c.Changes = append(c.Changes, dataplane.Change{New: service(t, k, dataplane.ServiceSpec{})})
			}
			m.OnCommit(c)
		}
		check := func(count, sum string, family dataplane.Family) {
			t.Helper()
			const name = "kubeproxy_network_programming_duration_seconds_"
			label := `{ip_family="` + family.String() + `"}`
			got := statusCollector(t, m, name)
			if got[name+"count"+label] != count || got[name+"sum"+label] != sum {
				t.Errorf("%s: count %s, sum %s, want %s and %s", family, got[name+"count"+label], got[name+"sum"+label], count, sum)
			}
		}
		m.RecordTrigger("shop", "web", beforeStart)
		commit(0, key("web", dataplane.IPv4, 0))
		check("0", "0", dataplane.IPv4)

		at := time.Now()
		time.Sleep(3 * time.Second)
		m.RecordTrigger("shop", "web", at)
		commit(time.Second, key("web", dataplane.IPv4, 0), key("web", dataplane.IPv4, dataplane.NodePort))
		check("1", "4", dataplane.IPv4)
		check("0", "0", dataplane.IPv6)
		commit(time.Second, key("web", dataplane.IPv4, 0))
		check("1", "4", dataplane.IPv4)

		// A trigger that arrives during a call belongs to the next call.
		m.RecordTrigger("shop", "web", time.Now())
		go func() {
			time.Sleep(time.Second)
			m.RecordTrigger("shop", "web", time.Now())
		}()
		commit(2*time.Second, key("web", dataplane.IPv6, 0))
		check("1", "2", dataplane.IPv6)
		commit(0, key("web", dataplane.IPv6, 0))
		check("2", "3", dataplane.IPv6)
	})
}

// TestTriggersWithoutEffect checks that reverted changes are not observed, and that the triggers
// of a failing Service are observed once it succeeds, up to the limit.
func TestTriggersWithoutEffect(t *testing.T) {
	t.Parallel()
	web := key("web", dataplane.IPv4, 0)
	const duration = `kubeproxy_network_programming_duration_seconds_`
	tests := []struct {
		name  string
		steps func(m *metrics.Metrics, commit func(oldest time.Time, programmed, failed []dataplane.Key, err error))
		count string
		sum   string
	}{
		{"reverted and changed hours later", func(m *metrics.Metrics, commit func(time.Time, []dataplane.Key, []dataplane.Key, error)) {
			m.RecordTrigger("shop", "web", time.Now())
			time.Sleep(10 * time.Hour)
			queued := time.Now()
			m.RecordTrigger("shop", "web", time.Now())
			time.Sleep(time.Second)
			commit(queued, []dataplane.Key{web}, nil, nil)
		}, "1", "1"},
		{"reverted, with other commits in between", func(m *metrics.Metrics, commit func(time.Time, []dataplane.Key, []dataplane.Key, error)) {
			m.RecordTrigger("shop", "web", time.Now())
			time.Sleep(time.Hour)
			commit(time.Now(), []dataplane.Key{key("db", dataplane.IPv4, 0)}, nil, nil)
			commit(time.Time{}, []dataplane.Key{web}, nil, nil)
		}, "0", "0"},
		{"call fails once", func(m *metrics.Metrics, commit func(time.Time, []dataplane.Key, []dataplane.Key, error)) {
			queued := time.Now()
			m.RecordTrigger("shop", "web", queued)
			time.Sleep(time.Second)
			commit(queued, nil, nil, errors.New("no"))
			time.Sleep(time.Second)
			commit(queued, []dataplane.Key{web}, nil, nil)
		}, "1", "2"},
		{"Service fails while another succeeds", func(m *metrics.Metrics, commit func(time.Time, []dataplane.Key, []dataplane.Key, error)) {
			m.RecordTrigger("shop", "web", time.Now())
			time.Sleep(time.Second)
			commit(time.Now(), nil, []dataplane.Key{web}, nil)
			time.Sleep(time.Second)
			commit(time.Now(), []dataplane.Key{key("db", dataplane.IPv4, 0)}, nil, nil)
			time.Sleep(time.Second)
			commit(time.Now(), []dataplane.Key{web}, nil, nil)
		}, "1", "3"},
		{"Service fails many times and is deleted", func(m *metrics.Metrics, commit func(time.Time, []dataplane.Key, []dataplane.Key, error)) {
			for range 1000 {
				m.RecordTrigger("shop", "web", time.Now())
				commit(time.Now(), nil, []dataplane.Key{web}, nil)
			}
			m.RemoveService("shop", "web")
			commit(time.Now(), []dataplane.Key{web}, nil, nil)
		}, "0", "0"},
		{"Service fails many times and succeeds", func(m *metrics.Metrics, commit func(time.Time, []dataplane.Key, []dataplane.Key, error)) {
			for range 1000 {
				m.RecordTrigger("shop", "web", time.Now())
				commit(time.Now(), nil, []dataplane.Key{web}, nil)
			}
			time.Sleep(time.Second)
			commit(time.Now(), []dataplane.Key{web}, nil, nil)
		}, "16", "16"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var status sync.Status
				m := metrics.New(metrics.Options{Status: func() sync.Status { return status }})
				time.Sleep(time.Second)
				test.steps(m, func(oldest time.Time, programmed, failed []dataplane.Key, err error) {
					time.Sleep(time.Nanosecond)
					c := sync.Commit{Op: sync.OpApply, Start: time.Now(), End: time.Now(), OldestUpdate: oldest, Err: err}
					for _, k := range programmed {
						c.Changes = append(c.Changes, dataplane.Change{New: service(t, k, dataplane.ServiceSpec{})})
					}
					failing := maps.Clone(status.Failing)
					for _, k := range failed {
						c.Failed = map[dataplane.Key]error{k: errors.New("no")}
						failing = c.Failed
					}
					m.OnCommit(c)
					status.Failing = failing
				})
				got := statusCollector(t, m, duration)
				sum, _, _ := strings.Cut(got[duration+`sum{ip_family="IPv4"}`], ".")
				if count := got[duration+`count{ip_family="IPv4"}`]; count != test.count || sum != test.sum {
					t.Errorf("count %s, sum %s, want %s and %s", count, sum, test.count, test.sum)
				}
			})
		})
	}
}

func TestNoLocalEndpoints(t *testing.T) {
	t.Parallel()
	m := metrics.New(metrics.Options{Status: noStatus})
	some := []dataplane.Endpoint{{Addr: netip.MustParseAddrPort("192.0.2.9:80"), Local: true}}
	current := map[dataplane.Key]*dataplane.Service{}
	set := func(k dataplane.Key, treatment *dataplane.ServiceSpec) {
		change := dataplane.Change{Old: current[k]}
		if treatment != nil {
			change.New = service(t, k, *treatment)
		}
		current[k] = change.New
		m.OnCommit(sync.Commit{Changes: []dataplane.Change{change}})
	}
	check := func(wantInternal, wantExternal string) {
		t.Helper()
		const name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
		got := statusCollector(t, m, name)
		want := map[string]string{
			name + `{ip_family="IPv4",traffic_policy="internal"}`: wantInternal, name + `{ip_family="IPv6",traffic_policy="internal"}`: "0",
			name + `{ip_family="IPv4",traffic_policy="external"}`: wantExternal, name + `{ip_family="IPv6",traffic_policy="external"}`: "0",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	check("0", "0")
	set(key("a", 4, dataplane.ClusterIP), &dataplane.ServiceSpec{NoEndpointsVerdict: dataplane.Drop})
	check("1", "0")
	away := dataplane.ServiceSpec{ExternalTrafficPolicyLocal: true, NoEndpointsVerdict: dataplane.Drop, Endpoints: some}
	set(key("a", 4, dataplane.NodePort), &away)
	set(key("a", 4, dataplane.LoadBalancer), &away) // the same port
	check("1", "1")
	set(key("b", 4, dataplane.NodePort), &away)
	check("1", "2")
	set(key("b", 4, dataplane.NodePort), &dataplane.ServiceSpec{ExternalTrafficPolicyLocal: true}) // no endpoints
	check("1", "1")
	here := away
	here.LocalEndpoints = some
	set(key("a", 4, dataplane.NodePort), &here)
	check("1", "1")
	set(key("a", 4, dataplane.LoadBalancer), &here)
	check("1", "0")
	set(key("a", 4, dataplane.ClusterIP), nil)
	check("0", "0")
}

func TestCounters(t *testing.T) {
	t.Parallel()
	m := metrics.New(metrics.Options{Status: noStatus})
	m.RecordHealthResponse("/healthz", 503)
	m.RecordHealthResponse("/healthz", 503)
	m.RecordHealthResponse("/livez", 200)
	m.RecordProblem()
	m.RecordHealthCheckFailure()
	m.RecordReload(nil)
	m.RecordReload(errors.New("no"))
	want := map[string]string{
		`kubeproxy_proxy_healthz_total{code="200"}`: "0", `kubeproxy_proxy_healthz_total{code="503"}`: "2",
		`kubeproxy_proxy_livez_total{code="200"}`: "1", `kubeproxy_proxy_livez_total{code="503"}`: "0",
		"fairlead_service_problems_total": "1", "fairlead_health_check_node_port_failures_total": "1",
		`fairlead_config_reloads_total{result="success"}`: "1", `fairlead_config_reloads_total{result="failure"}`: "1",
		"fairlead_config_valid": "0",
	}
	got := statusCollector(t, m, "kubeproxy_proxy_", "fairlead_service_problems", "fairlead_health", "fairlead_config")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestSeparateRegistries checks that two Metrics in one process are independent, and that the
// metrics of the process are exported as well.
func TestSeparateRegistries(t *testing.T) {
	t.Parallel()
	process := prometheus.NewRegistry()
	process.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "process_open_fds"}))
	a := metrics.New(metrics.Options{Status: noStatus, Process: process, KubernetesVersion: "v1.37.2"})
	b := metrics.New(metrics.Options{Status: noStatus})
	a.RecordProblem()
	if got := statusCollector(t, b, "fairlead_service_problems_total"); !maps.Equal(got, map[string]string{"fairlead_service_problems_total": "0"}) {
		t.Errorf("metrics of b after a problem in a: %v", got)
	}
	if got := statusCollector(t, a, "process_open_fds"); len(got) != 1 {
		t.Errorf("metrics of the process: %v", got)
	}
	for name := range statusCollector(t, a, "kubernetes_build_info") {
		if !strings.Contains(name, `git_version="v1.37.2"`) || !strings.Contains(name, `major="1",minor="37"`) {
			t.Errorf("build info %s", name)
		}
	}
}

// TestConntrackScans checks the metrics of conntrack scans by family.
func TestConntrackScans(t *testing.T) {
	t.Parallel()
	m := metrics.New(metrics.Options{Status: func() sync.Status { return sync.Status{} }})
	m.RecordConntrackScan(dataplane.IPv4, 250*time.Millisecond, 3)
	m.RecordConntrackScan(dataplane.IPv4, 250*time.Millisecond, 4)
	want := map[string]string{
		`kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv4"}`:       "7",
		`kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv6"}`:       "0",
		`kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv4"}`: "2",
		`kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv6"}`: "0",
		`kubeproxy_conntrack_reconciler_sync_duration_seconds_sum{ip_family="IPv4"}`:   "0.5",
		`kubeproxy_conntrack_reconciler_sync_duration_seconds_sum{ip_family="IPv6"}`:   "0",
	}
	if diff := cmp.Diff(want, statusCollector(t, m, "kubeproxy_conntrack")); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
