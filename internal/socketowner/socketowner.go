// Package socketowner finds the process that a netlink socket belongs to, as /proc
// shows it (man 5 proc, /proc/net/netlink).
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

// Process is a process that has a socket open.
type Process struct {
	PID     int
	Command string // as in /proc/PID/comm
}

// String returns the process in words: "process 123 (fairlead)".
func (p Process) String() string { return fmt.Sprintf("process %d (%s)", p.PID, p.Command) }

// ErrUnknown is returned where /proc does not show the socket or its process: either is
// in another namespace, or belongs to another user.
var ErrUnknown = errors.New("the socket belongs to a process that this one cannot see")

// ByNetlinkPort returns the process that has the netlink socket with this port ID open,
// in the network namespace of the calling thread. Protocol is one of unix.NETLINK_*.
// The error wraps [ErrUnknown] if there is no process to be seen.
func ByNetlinkPort(protocol int, port uint32) (Process, error) {
	table, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		return Process{}, fmt.Errorf("list the netlink sockets: %w", err)
	}
	inode, ok := findInode(table, protocol, port)
	if !ok {
		return Process{}, ErrUnknown
	}
	return byInode(inode)
}

// findInode returns the inode of a socket in the text of /proc/net/netlink, whose
// columns begin with the kernel's address, the protocol and the port, and end with the
// inode (net/netlink/af_netlink.c, netlink_native_seq_show).
func findInode(table []byte, protocol int, port uint32) (string, bool) {
	wanted := [2]string{strconv.Itoa(protocol), strconv.FormatUint(uint64(port), 10)}
	for lines := bufio.NewScanner(bytes.NewReader(table)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 3 && [2]string(fields[1:3]) == wanted {
			return fields[len(fields)-1], true
		}
	}
	return "", false
}

// byInode returns the process that has the socket with this inode open.
func byInode(inode string) (Process, error) {
	folders, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return Process{}, fmt.Errorf("list the processes: %w", err)
	}
	for _, folder := range folders {
		descriptors, err := os.ReadDir(filepath.Join(folder, "fd"))
		if err != nil { // it has ended, or is another user's
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
			return Process{}, fmt.Errorf("%w: it has just ended", ErrUnknown)
		}
		return Process{PID: pid, Command: string(bytes.TrimSpace(command))}, nil
	}
	return Process{}, ErrUnknown
}

// hasDescriptor reports whether one of a process's descriptors refers to a target.
func hasDescriptor(folder string, descriptors []fs.DirEntry, target string) bool {
	for _, d := range descriptors {
		if link, err := os.Readlink(filepath.Join(folder, "fd", d.Name())); err == nil && link == target {
			return true
		}
	}
	return false
}
