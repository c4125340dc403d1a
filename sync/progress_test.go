package sync_test

import (
	"context"
	"errors"
	"iter"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/sync"

	"github.com/google/go-cmp/cmp"
)

// slowDataplane is a dataplane whose Replace takes one second for each Service and records their
// order.
type slowDataplane struct {
	dataplane.Dataplane
	order []string
	err   error // result of every Replace
	fail  string
}

func (d *slowDataplane) Replace(_ context.Context, _ dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	d.order = nil
	complete := 0
	failed := map[dataplane.Key]error{}
	for s := range services {
		d.order = append(d.order, s.Key.Service())
		time.Sleep(time.Second)
		if s.Key.Name == d.fail {
			failed[s.Key] = errors.New("refused")
		} else {
			complete++
		}
		progress(complete)
	}
	if len(failed) > 0 {
		return &dataplane.Error{Op: "replace", Failed: failed}
	}
	return d.err
}

func namedService(t *testing.T, namespace, name string, n byte) *dataplane.Service {
	t.Helper()
	s := *service(int(n), 1)
	s.Key.Namespace, s.Key.Name, s.Key.Port = namespace, name, ""
	return &s
}

// TestReplaceOrderAndProgress checks that prioritized Services come first and that all others
// follow in the order of their keys. The commit contains the times at which the first and the
// last were complete.
func TestReplaceOrderAndProgress(t *testing.T) {
	t.Parallel()
	var services []*dataplane.Service
	for i, name := range []string{"default/web", "kube-system/metrics", "apps/db", "zoo/lion", "kube-system/dns", "kube-system-2/x"} {
		namespace, name, _ := strings.Cut(name, "/")
		services = append(services, namedService(t, namespace, name, byte(i)))
	}
	inOrder := []string{"kube-system/dns", "kube-system/metrics", "apps/db", "default/web", "kube-system-2/x", "zoo/lion"}
	for name, tt := range map[string]struct {
		services    []*dataplane.Service
		dp          slowDataplane
		order       []string
		first, last time.Duration // since the start of the call; zero if not set
	}{
		"all succeed":        {services: services, order: inOrder, first: time.Second, last: 6 * time.Second},
		"no Services":        {},
		"the first fails":    {services: services, dp: slowDataplane{fail: "dns"}, order: inOrder, first: 2 * time.Second, last: 6 * time.Second},
		"the last fails":     {services: services, dp: slowDataplane{fail: "lion"}, order: inOrder, first: time.Second, last: 5 * time.Second},
		"the only one fails": {services: services[:1], dp: slowDataplane{fail: "web"}, order: []string{"default/web"}},
		"the call fails":     {services: services, dp: slowDataplane{err: errors.New("connection lost")}, order: inOrder},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				tt.dp.Dataplane = fake.New(fake.Options{})
				commits := make(chan sync.Commit, 1)
				s := sync.New(&tt.dp, sync.Options{
					Prioritize: func(k dataplane.Key) bool { return k.Namespace == "kube-system" },
					OnCommit:   func(c sync.Commit) { commits <- c },
				})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go func() { _ = s.Run(ctx) }()
				s.Update(upserts(tt.services...))
				s.FinishInitialList()
				c := <-commits
				if diff := cmp.Diff(tt.order, tt.dp.order); diff != "" {
					t.Errorf("order of Services (-want +got):\n%s", diff)
				}
				after := func(at time.Time) time.Duration {
					if at.IsZero() {
						return 0
					}
					return at.Sub(c.Start)
				}
				if first, last := after(c.FirstComplete), after(c.LastComplete); first != tt.first || last != tt.last {
					t.Errorf("first complete after %v, last after %v, want %v and %v", first, last, tt.first, tt.last)
				}
				cancel()
				synctest.Wait()
			})
		})
	}
}

// The log contains the progress of the initial commit.
func TestInitialCommitLogsProgress(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		if log := fx.newLog(); !strings.Contains(log, "reason=start") || !strings.Contains(log, "first_after=0s last_after=0s") {
			t.Errorf("log %q, want the initial commit with the times of the first and the last Service", log)
		}
	})
}

// A commit of Apply has no progress.
func TestApplyHasNoProgress(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.FinishInitialList()
		fx.waitSynced()
		fx.Update(upserts(service(1, 1)))
		commits := fx.waitSynced()
		if len(commits) != 1 || !commits[0].FirstComplete.IsZero() || !commits[0].LastComplete.IsZero() {
			t.Errorf("commits %+v, want one without completion times", commits)
		}
	})
}
