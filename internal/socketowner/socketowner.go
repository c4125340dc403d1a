// Package socketowner finds the process that owns a socket, from /proc/net/netlink and
// /proc/PID/fd (proc(5)).
package socketowner

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Process identifies a process that has a socket open.
type Process struct {
	PID     int
	Command string // from /proc/PID/comm
}

// String formats the process as "process 123 (fairlead)".
func (p Process) String() string { return fmt.Sprintf("process %d (%s)", p.PID, p.Command) }

// ErrUnknown is returned if /proc shows no process for the socket, because the process is in
// another namespace, belongs to another user, or has just exited.
var ErrUnknown = errors.New("the socket belongs to a process that is not visible in /proc")

// ByNetlinkPort returns the process that has the netlink socket with this port ID open, in
// the network namespace of the calling thread. Protocol is one of unix.NETLINK_*. The error
// wraps [ErrUnknown] if /proc shows no process for the socket.
func ByNetlinkPort(protocol int, port uint32) (Process, error) {
	table, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		return Process{}, fmt.Errorf("list netlink sockets: %w", err)
	}
	inode, ok := findInode(table, protocol, port)
	if !ok {
		return Process{}, ErrUnknown
	}
	return byInode(inode)
}

// ByInode returns the process that has the socket with this inode open. The error wraps
// [ErrUnknown] if /proc shows no such process.
func ByInode(inode uint32) (Process, error) { return byInode(strconv.FormatUint(uint64(inode), 10)) }

// findInode returns the inode of a socket from the text of /proc/net/netlink. Its first
// columns are the kernel address, the protocol and the port; the last is the inode
// (net/netlink/af_netlink.c, netlink_native_seq_show).
func findInode(table []byte, protocol int, port uint32) (string, bool) {
	key := [2]string{strconv.Itoa(protocol), strconv.FormatUint(uint64(port), 10)}
	for lines := bufio.NewScanner(bytes.NewReader(table)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 3 && [2]string(fields[1:3]) == key {
			return fields[len(fields)-1], true
		}
	}
	return "", false
}

// byInode returns the process that has the socket with this inode open.
func byInode(inode string) (Process, error) {
	folders, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return Process{}, fmt.Errorf("list processes: %w", err)
	}
	for _, folder := range folders {
		descriptors, err := os.ReadDir(filepath.Join(folder, "fd"))
		if err != nil { // the process has exited or belongs to another user
			continue
		}
		if !hasDescriptor(folder, descriptors, "socket:["+inode+"]") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(folder))
		if err != nil {
			return Process{}, fmt.Errorf("read the process ID: %w", err)
		}
		command, err := os.ReadFile(filepath.Join(folder, "comm"))
		if err != nil {
			return Process{}, fmt.Errorf("%w: the process has just exited", ErrUnknown)
		}
		return Process{PID: pid, Command: string(bytes.TrimSpace(command))}, nil
	}
	return Process{}, ErrUnknown
}

// hasDescriptor reports whether one of a process's file descriptors links to target.
func hasDescriptor(folder string, descriptors []fs.DirEntry, target string) bool {
	for _, d := range descriptors {
		if link, err := os.Readlink(filepath.Join(folder, "fd", d.Name())); err == nil && link == target {
			return true
		}
	}
	return false
}
