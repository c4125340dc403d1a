package control

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/node"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// inNewNetwork runs fn on a thread in a new network namespace. The thread ends with fn.
func inNewNetwork(fn func() error) error {
	done := make(chan error)
	go func() {
		// The thread stays locked, so it ends with the goroutine.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

// inNetworkOf runs fn on a thread in the network namespace of a process.
func inNetworkOf(pid int, fn func() error) error {
	return inNewNetwork(func() error {
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

// startNetwork starts a process in a network namespace of its own.
func startNetwork(t *testing.T) (int, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid, nil
}

// reachable checks that packets get to an address and back: nothing listens, so it refuses the
// connection.
func reachable(address netip.Addr) error {
	const timeout = 10 * time.Second
	conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(address, 1).String(), timeout)
	if err == nil {
		return errors.Join(errors.New("a connection, want none"), conn.Close())
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	return fmt.Errorf("%s: %w", address, err)
}

// TestNodesReachEachOther checks the network between nodes and the host of the control plane with
// packets, in both families. The second node is connected again, as after a reboot while the kernel
// still has its previous network namespace.
func TestNodesReachEachOther(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Fatal("needs root")
	}
	cluster := &topology.Cluster{Nodes: 3, Zones: 1}
	nodes := cluster.AllNodes()
	// The bridge exists as long as the thread in its network namespace.
	err := inNewNetwork(func() error {
		b, err := createNetwork()
		if err != nil {
			return err
		}
		for _, n := range nodes {
			pid, err := startNetwork(t)
			if err != nil {
				return err
			}
			if err := b.connect(n, pid); err != nil {
				return err
			}
			if n.Number == 2 {
				if pid, err = startNetwork(t); err != nil {
					return err
				}
				if err := b.connect(n, pid); err != nil {
					return err
				}
			}
			if err := inNetworkOf(pid, func() error { return node.ConfigureNetwork(t.Context(), cluster, n) }); err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
			if n.Number == 1 {
				continue
			}
			for i, address := range append(nodes[0].Addresses(), topology.Host()[0].Addr(), topology.Host()[1].Addr()) {
				if err := inNetworkOf(pid, func() error { return reachable(address) }); err != nil {
					return fmt.Errorf("%s: address %d: %w", n.Name, i, err)
				}
			}
		}
		for _, address := range nodes[2].Addresses() {
			if err := reachable(address); err != nil {
				return fmt.Errorf("host of the control plane: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
