package instance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// holdLockEnv names an environment variable with the address of a lock. It makes the test
// binary acquire the lock and hold it until a signal ends the process.
const holdLockEnv = "FAIRLEAD_TEST_HOLD_THE_LOCK"

func TestMain(m *testing.M) {
	if address := os.Getenv(holdLockEnv); address != "" {
		if _, err := TryAcquire(Options{Description: "the first", address: address}); err != nil {
			panic(err)
		}
		fmt.Println("held")
		select {}
	}
	os.Exit(m.Run())
}

// waitTimeout bounds operations that take milliseconds on an idle machine.
const waitTimeout = 20 * time.Second

func testAddress(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("@fairlead-%d-%s", os.Getpid(), t.Name())
}

// startHolder starts a process that holds the lock, optionally as another user.
func startHolder(t *testing.T, address string, uid ...uint32) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), holdLockEnv+"="+address)
	for _, id := range uid {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatalf("wait for the holder: %v", err)
	}
	return cmd
}

type acquireResult struct {
	lock *Lock
	err  error
}

// TestAcquireAfterHolderExits checks that a waiting instance acquires the lock when the
// holder exits for any reason.
func TestAcquireAfterHolderExits(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*exec.Cmd) error{
		"killed":             func(c *exec.Cmd) error { return c.Process.Kill() },
		"terminated":         func(c *exec.Cmd) error { return c.Process.Signal(unix.SIGTERM) },
		"stopped and killed": func(c *exec.Cmd) error { return errors.Join(c.Process.Signal(unix.SIGSTOP), c.Process.Kill()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := testAddress(t)
			holder := startHolder(t, address)
			waiting, result := make(chan Holder, 1), make(chan acquireResult, 1)
			go func() {
				lock, err := Acquire(t.Context(), Options{address: address, OnWaiting: func(h Holder) { waiting <- h }})
				result <- acquireResult{lock, err}
			}()
			if h := <-waiting; h.PID != holder.Process.Pid || h.Description != "the first" {
				t.Errorf("holder %+v, want PID %d with description %q", h, holder.Process.Pid, "the first")
			}
			select {
			case r := <-result:
				t.Fatalf("Acquire returned (error %v) while the other process holds the lock", r.err)
			case <-time.After(50 * time.Millisecond):
			}
			if err := end(holder); err != nil {
				t.Fatal(err)
			}
			select {
			case r := <-result:
				if r.err != nil {
					t.Fatal(r.err)
				}
				if err := r.lock.Release(); err != nil {
					t.Error(err)
				}
			case <-time.After(waitTimeout):
				t.Fatal("Acquire did not return after the holder exited")
			}
		})
	}
}

// TestMutualExclusion checks that of many waiting processes one at a time holds the lock,
// and that each acquires it.
func TestMutualExclusion(t *testing.T) {
	t.Parallel()
	address := testAddress(t)
	const instances = maxWaiters + 4
	var holding, maxHolding atomic.Int64
	results := make(chan error, instances)
	for range instances {
		go func() {
			lock, err := Acquire(t.Context(), Options{address: address})
			if err != nil {
				results <- err
				return
			}
			if n := holding.Add(1); n > 1 {
				maxHolding.Store(n)
			}
			time.Sleep(time.Millisecond)
			holding.Add(-1)
			results <- lock.Release()
		}()
	}
	for range instances {
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(waitTimeout):
			t.Fatal("not all instances acquired the lock")
		}
	}
	if n := maxHolding.Load(); n > 1 {
		t.Errorf("%d instances held the lock at the same time", n)
	}
}

func TestFindHolder(t *testing.T) {
	t.Parallel()
	opts := Options{Description: "version 1, mode nft", address: testAddress(t)}
	if h, err := opts.findHolder(t.Context()); h != nil || err != nil {
		t.Errorf("lock never acquired: holder %+v, error %v; want none", h, err)
	}
	lock, err := TryAcquire(opts)
	if err != nil {
		t.Fatal(err)
	}
	h, err := opts.findHolder(t.Context())
	if err != nil || h == nil || *h != (Holder{PID: os.Getpid(), Description: opts.Description}) {
		t.Errorf("holder %+v, error %v; want this process", h, err)
	}
	if want := fmt.Sprintf("PID %d, version 1, mode nft", os.Getpid()); h != nil && h.String() != want {
		t.Errorf("String() = %q, want %q", h, want)
	}
	if _, err := TryAcquire(opts); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("second TryAcquire: error %v, want EADDRINUSE", err)
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	// A child process that a parallel test starts at this moment has a copy of the listening
	// socket until its exec(2).
	for deadline := time.Now().Add(waitTimeout); ; time.Sleep(time.Millisecond) {
		h, err := opts.findHolder(t.Context())
		if h == nil && err == nil {
			return
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("lock released: holder %+v, error %v; want none", h, err)
		}
	}
}

// TestAcquireCanceled checks that Acquire returns when its context is canceled, and that it
// reports the PID of a holder stopped by SIGSTOP.
func TestAcquireCanceled(t *testing.T) {
	t.Parallel()
	address := testAddress(t)
	holder := startHolder(t, address)
	if err := holder.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := Acquire(ctx, Options{address: address, OnWaiting: func(h Holder) {
		if h.PID != holder.Process.Pid {
			t.Errorf("holder %+v, want PID %d", h, holder.Process.Pid)
		}
		cancel()
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
}

// TestOtherUser checks that Acquire fails at once if a process of another user holds the lock.
func TestOtherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root to start a process as another user")
	}
	address := testAddress(t)
	const nobody = 65534
	cmd := startHolder(t, address, nobody)
	_, err := Acquire(t.Context(), Options{address: address})
	if !errors.Is(err, ErrOtherUser) || !strings.Contains(err.Error(), fmt.Sprintf("PID %d, UID %d", cmd.Process.Pid, nobody)) {
		t.Errorf("error %v", err)
	}
}
