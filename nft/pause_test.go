package nft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"golang.org/x/sys/unix"
)

const otherTableCommit = "add table inet others\nadd chain inet others c"

// subscribed reports whether the kernel lists the watch's socket as a subscriber of nftables
// notifications.
func subscribed(t *testing.T, d *Dataplane, ns *nettest.Namespace) bool {
	t.Helper()
	d.watch.mu.Lock()
	port := strconv.Itoa(int(d.watch.conn.PID()))
	d.watch.mu.Unlock()
	var member bool
	err := ns.Do(func() error {
		f, err := os.Open("/proc/thread-self/net/netlink")
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		sockets := bufio.NewScanner(f)
		for sockets.Scan() { // sk Eth Pid Groups …
			fields := strings.Fields(sockets.Text())
			if len(fields) < 4 || fields[1] != strconv.Itoa(unix.NETLINK_NETFILTER) || fields[2] != port {
				continue
			}
			groups, err := strconv.ParseUint(fields[3], 16, 32)
			if err != nil {
				return err
			}
			member = groups&(1<<(unix.NFNLGRP_NFTABLES-1)) != 0
			return sockets.Err()
		}
		return fmt.Errorf("socket of the watch not found: %w", sockets.Err())
	})
	if err != nil {
		t.Fatal(err)
	}
	return member
}

func wantSubscribed(t *testing.T, d *Dataplane, ns *nettest.Namespace) {
	t.Helper()
	if !subscribed(t, d, ns) {
		t.Fatal("the watch is not subscribed")
	}
}

func wantDrift(t *testing.T, d *Dataplane) {
	t.Helper()
	select {
	case <-d.Drift():
	case <-time.After(5 * time.Second):
		t.Fatal("no drift was reported")
	}
}

// wantRepairedByOneReplace waits for drift. It checks that one Replace repairs the tables and
// that the watch still works.
func wantRepairedByOneReplace(t *testing.T, d *Dataplane, ns *nettest.Namespace, services []*dataplane.Service) {
	t.Helper()
	wantDrift(t, d)
	wantSubscribed(t, d, ns)
	mustReplace(t, d, nodeWithAllSettings(), services...)
	wantNoDrift(t, d)
	wantState(t, d, services...)
	wantWorkingWatch(t, d, ns)
}

// wantWorkingWatch checks that a change of our tables by another process is reported as
// drift, and a change of other tables is not.
func wantWorkingWatch(t *testing.T, d *Dataplane, ns *nettest.Namespace) {
	t.Helper()
	wantSubscribed(t, d, ns)
	runNFT(t, ns, nftBinaries(t)["1.1.3"], "add table inet more\ndelete table inet more")
	wantNoDrift(t, d)
	runNFT(t, ns, nftBinaries(t)["1.1.3"], "add table ip fairlead\nadd chain ip fairlead extra")
	wantDrift(t, d)
	drainNotifications(t, d)
}

// withAndWithoutTranslator runs a test with and without a Translator.
func withAndWithoutTranslator(t *testing.T, test func(t *testing.T, d *Dataplane, ns *nettest.Namespace)) {
	t.Helper()
	for name, translator := range map[string][]Translator{"endpoints": nil, "translator": {virtualServers{}}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, ns := newDataplane(t, translator...)
			d.transactionSize = 6 // many commits and steps
			test(t, d, ns)
		})
	}
}

// TestNotificationsPausedDuringCreation checks whether the watch is subscribed while tables
// are created, and while they are changed.
func TestNotificationsPausedDuringCreation(t *testing.T) {
	t.Parallel()
	withAndWithoutTranslator(t, func(t *testing.T, d *Dataplane, ns *nettest.Namespace) {
		services := sampleServices(t)
		calls := 0
		replaceAndCheck := func(paused bool, services []*dataplane.Service) {
			t.Helper()
			err := d.Replace(t.Context(), nodeWithAllSettings(), slices.Values(services), func(int) {
				if calls++; subscribed(t, d, ns) == paused {
					t.Errorf("the watch is subscribed: %t", !paused)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			wantNoDrift(t, d)
		}
		replaceAndCheck(true, services)
		wantState(t, d, services...)
		replaceAndCheck(false, services[1:])
		replaceAndCheck(false, services)
		if calls < 10 {
			t.Errorf("checked the subscription only %d times", calls)
		}
		wantWorkingWatch(t, d, ns)
		runNFT(t, ns, nftBinaries(t)["1.1.3"], "delete table ip fairlead")
		wantDrift(t, d)
		drainNotifications(t, d)
		replaceAndCheck(false, services) // one of the tables exists
		runNFT(t, ns, nftBinaries(t)["1.1.3"], "delete table ip fairlead\ndelete table ip6 fairlead")
		wantDrift(t, d)
		drainNotifications(t, d)
		replaceAndCheck(true, services)
		wantWorkingWatch(t, d, ns)
	})
}

// TestConcurrentCommitsDetected makes another process commit before each of the commits that
// create the tables, and after the last one.
func TestConcurrentCommitsDetected(t *testing.T) {
	t.Parallel()
	services := sampleServices(t)
	replaceWith := func(t *testing.T, d *Dataplane, ns *nettest.Namespace, at int) (commits int) {
		t.Helper()
		d.flush = func() error {
			if commits == at {
				runNFT(t, ns, nftBinaries(t)["1.1.3"], otherTableCommit)
			}
			commits++
			return d.conn.Flush()
		}
		mustReplace(t, d, nodeWithAllSettings(), services...)
		d.flush = d.conn.Flush
		return commits
	}
	withAndWithoutTranslator(t, func(t *testing.T, d *Dataplane, ns *nettest.Namespace) {
		commits := replaceWith(t, d, ns, -1)
		wantNoDrift(t, d)
		for at := range commits {
			runNFT(t, ns, nftBinaries(t)["1.1.3"], "flush ruleset")
			drainNotifications(t, d)
			replaceWith(t, d, ns, at)
			wantDrift(t, d)
			mustReplace(t, d, nodeWithAllSettings(), services...)
			wantNoDrift(t, d)
		}
		if commits < 10 {
			t.Errorf("tested only %d commits", commits)
		}
		wantState(t, d, services...)
		wantWorkingWatch(t, d, ns)
	})
}

// TestConcurrentChangeDuringCreation makes another process change our tables, and other
// tables, while ours are being created.
func TestConcurrentChangeDuringCreation(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"rules are deleted":      "flush chain ip fairlead filter-forward",
		"a Service is added":     "add element ip fairlead services { 10.96.7.7 . tcp . 80 : 0:1 }",
		"a rule is added":        "insert rule ip fairlead nat-prerouting counter accept",
		"another table is added": otherTableCommit,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			services := sampleServices(t)
			edit := func(t *testing.T, ns *nettest.Namespace) { runNFT(t, ns, nftBinaries(t)["1.1.3"], script) }
			t.Run("at the start", func(t *testing.T) {
				t.Parallel()
				d, ns := newDataplane(t)
				err := d.Replace(t.Context(), nodeWithAllSettings(), func(yield func(*dataplane.Service) bool) {
					edit(t, ns)
					for s := range slices.Values(services) {
						if !yield(s) {
							return
						}
					}
				}, nil)
				if err != nil {
					t.Fatal(err)
				}
				wantRepairedByOneReplace(t, d, ns, services)
			})
			t.Run("at the end", func(t *testing.T) {
				t.Parallel()
				d, ns := newDataplane(t)
				err := d.Replace(t.Context(), nodeWithAllSettings(), slices.Values(services), func(complete int) {
					if complete == len(services) {
						edit(t, ns)
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				wantRepairedByOneReplace(t, d, ns, services)
			})
		})
	}
}

// TestNotificationsResumedAfterFailure makes the creation of the tables fail before its end.
func TestNotificationsResumedAfterFailure(t *testing.T) {
	t.Parallel()
	errPanic := errors.New("panic")
	for name, end := range map[string]func(t *testing.T, d *Dataplane, during func()) error{
		"canceled": func(t *testing.T, d *Dataplane, during func()) error {
			t.Helper()
			ctx, cancel := context.WithCancel(t.Context())
			return d.Replace(ctx, nodeWithAllSettings(), slices.Values(sampleServices(t)), func(int) {
				during()
				cancel()
			})
		},
		"first commit rejected": func(t *testing.T, d *Dataplane, during func()) error {
			t.Helper()
			d.flush = func() error {
				during()
				deleteInTransaction(d, d.missingSet())
				return d.conn.Flush()
			}
			return d.Replace(t.Context(), nodeWithAllSettings(), slices.Values(sampleServices(t)), nil)
		},
		"later commit rejected": func(t *testing.T, d *Dataplane, during func()) error {
			t.Helper()
			return d.Replace(t.Context(), nodeWithAllSettings(), slices.Values(sampleServices(t)), func(int) {
				during()
				d.flush = func() error {
					deleteInTransaction(d, d.missingSet())
					return d.conn.Flush()
				}
			})
		},
		"panic": func(t *testing.T, d *Dataplane, during func()) (err error) {
			t.Helper()
			defer func() {
				if recover() != nil {
					err = errPanic
				}
			}()
			return d.Replace(t.Context(), nodeWithAllSettings(), slices.Values(sampleServices(t)), func(int) {
				during()
				panic(errPanic)
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, others := range []bool{false, true} {
				withAndWithoutTranslator(t, func(t *testing.T, d *Dataplane, ns *nettest.Namespace) {
					ended := 0
					err := end(t, d, func() {
						if subscribed(t, d, ns) {
							t.Error("the watch is subscribed")
						}
						if ended++; others && ended == 1 {
							runNFT(t, ns, nftBinaries(t)["1.1.3"], otherTableCommit)
						}
					})
					d.flush = d.conn.Flush
					if err == nil || ended == 0 {
						t.Fatalf("Replace did not fail: %v", err)
					}
					wantSubscribed(t, d, ns)
					if others {
						wantDrift(t, d)
					}
					wantNoDrift(t, d)
					mustReplace(t, d, nodeWithAllSettings(), sampleServices(t)...)
					wantNoDrift(t, d)
					wantWorkingWatch(t, d, ns)
				})
			}
		})
	}
}

// TestFailedCommitsNotCounted makes the kernel reject each of the commits that create the
// tables in turn, and then drops the acknowledgment of each.
func TestFailedCommitsNotCounted(t *testing.T) {
	t.Parallel()
	services := sampleServices(t)
	withAndWithoutTranslator(t, func(t *testing.T, d *Dataplane, ns *nettest.Namespace) {
		commits := 0
		replaceWith := func(at int, f fault) error {
			commits = 0
			d.flush = func() error {
				commits++
				if commits-1 != at {
					return d.conn.Flush()
				}
				if f == rejectElement {
					deleteInTransaction(d, d.tables[0].services)
					return d.conn.Flush()
				}
				if err := d.conn.Flush(); err != nil {
					t.Error(err)
				}
				return errAckLost
			}
			err := d.Replace(t.Context(), nodeWithAllSettings(), slices.Values(services), nil)
			d.flush = d.conn.Flush
			return err
		}
		if err := replaceWith(-1, noFault); err != nil || commits < 10 {
			t.Fatalf("%d commits: %v", commits, err)
		}
		for at, all := 0, commits; at < all; at++ {
			for _, f := range []fault{rejectElement, loseAck} {
				runNFT(t, ns, nftBinaries(t)["1.1.3"], "flush ruleset")
				drainNotifications(t, d)
				err := replaceWith(at, f)
				if commits <= at {
					t.Fatalf("fault %d at commit %d of %d was not injected", f, at, commits)
				}
				if f == loseAck {
					wantDrift(t, d)
				}
				wantNoDrift(t, d)
				if t.Failed() {
					t.Fatalf("fault %d at commit %d of %d: %v", f, at, all, err)
				}
			}
		}
		mustReplace(t, d, nodeWithAllSettings(), services...)
		wantWorkingWatch(t, d, ns)
	})
}

// TestRandomCommitsCounted creates tables with all kinds of Services, in commits of different
// sizes, some of which are rejected.
func TestRandomCommitsCounted(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		withAndWithoutTranslator(t, func(t *testing.T, d *Dataplane, ns *nettest.Namespace) {
			random := rand.New(rand.NewPCG(seed, 27))
			for range 12 {
				runNFT(t, ns, nftBinaries(t)["1.1.3"], "flush ruleset")
				drainNotifications(t, d)
				services := overlappingServices(t, random, 14)
				d.transactionSize = []int{3, 12, 40, transactionSize}[random.IntN(4)]
				failing := random.IntN(30)
				d.flush = func() error {
					if failing--; failing == 0 {
						deleteInTransaction(d, d.tables[0].services)
					}
					return d.conn.Flush()
				}
				paused := false
				err := d.Replace(t.Context(), randomNode(random), slices.Values(services), func(int) { paused = d.pause != nil })
				if _, keyed := errors.AsType[*dataplane.Error](err); err != nil && !keyed && failing > 0 {
					t.Fatal(err)
				}
				if !paused && failing > 0 && len(services) > 0 {
					t.Error("notifications were not paused while the tables were created")
				}
				wantNoDrift(t, d)
			}
		})
	}
}

// TestWatchSocketLost closes the watch's socket before and during the creation of the tables.
func TestWatchSocketLost(t *testing.T) {
	t.Parallel()
	services := sampleServices(t)
	open := func(t *testing.T) *Dataplane {
		t.Helper()
		ns := nettest.NamespaceT(t)
		d, err := Open(Options{NetNS: ns.Fd()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = d.Close()
		})
		return d
	}
	closing := func(d *Dataplane) iter.Seq[*dataplane.Service] {
		return func(yield func(*dataplane.Service) bool) {
			d.watch.mu.Lock()
			_ = d.watch.conn.Close()
			d.watch.mu.Unlock()
			slices.Values(services)(yield)
		}
	}
	t.Run("before Replace", func(t *testing.T) {
		t.Parallel()
		d := open(t)
		d.watch.mu.Lock()
		_ = d.watch.conn.Close()
		d.watch.mu.Unlock()
		wantDrift(t, d) // the watch has a new socket
		drainNotifications(t, d)
		mustReplace(t, d, nodeWithAllSettings(), services...)
		wantNoDrift(t, d)
		wantState(t, d, services...)
	})
	t.Run("during Replace", func(t *testing.T) {
		t.Parallel()
		d := open(t)
		for range 2 {
			err := d.Replace(t.Context(), nodeWithAllSettings(), closing(d), nil)
			// The watch may or may not have a new socket by the end of the Replace.
			if err != nil && !strings.Contains(err.Error(), "subscribe") {
				t.Errorf("error %v, want nil or an error about the subscription", err)
			}
			if _, keyed := errors.AsType[*dataplane.Error](err); keyed {
				t.Errorf("error %v is for single Services, want an error for the whole call", err)
			}
		}
		wantDrift(t, d)
		drainNotifications(t, d)
		mustReplace(t, d, nodeWithAllSettings(), services...)
		wantNoDrift(t, d)
		wantState(t, d, services...)
	})
}

// TestLostAckIsConflict drops the acknowledgment of a commit, while another process commits.
// The commit must not be retried in halves: the halves would change nothing, and their number
// would match the number of both earlier commits, which would hide the other process's
// commit.
func TestLostAckIsConflict(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	services := []*dataplane.Service{
		service(t, "a", []dataplane.Frontend{frontend(1)}, endpoints(1)),
		service(t, "b", []dataplane.Frontend{frontend(2)}, endpoints(2)),
	}
	var generations []uint32
	d.flush = func() error {
		if err := d.conn.Flush(); err != nil {
			t.Error(err)
		}
		var err error
		if len(generations) == 3 { // after both tables and the class
			runNFT(t, ns, nftBinaries(t)["1.1.3"], "add table inet others")
			err = errAckLost
		}
		generations = append(generations, generation(t, d))
		return err
	}
	err := d.Replace(t.Context(), nodeWithAllSettings(), slices.Values(services), nil)
	d.flush = d.conn.Flush
	if !errors.Is(err, dataplane.ErrConflict) || !errors.Is(err, errAckLost) {
		t.Errorf("error %v, want the commit's error, wrapped as a conflict", err)
	}
	if want := []uint32{3, 5, 6, 8}; !slices.Equal(generations, want) {
		t.Fatalf("generations %d, want %d", generations, want)
	}
	wantRepairedByOneReplace(t, d, ns, services)
}

// TestConflictAfterRepair checks that a commit by another process between the repair of the
// structure and the first Service is a conflict.
func TestConflictAfterRepair(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	commits := 0
	d.flush = func() error {
		err := d.conn.Flush()
		if commits++; commits == len(d.tables) {
			runNFT(t, ns, "nft", "flush ruleset")
		}
		return err
	}
	one := service(t, "one", []dataplane.Frontend{frontend(1)}, endpoints(1))
	err := d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values([]*dataplane.Service{one}), nil)
	if !errors.Is(err, dataplane.ErrConflict) {
		t.Errorf("Replace returned %v, want a conflict", err)
	}
	mustReplace(t, d, nodeWithPodCIDRs(), one)
	wantState(t, d, one)
}
