package agent

import "syscall"

// descriptors divides the file descriptors of the process among the parts that
// clients and Services make open some. A quarter is left for the rest: netlink,
// the API server, files. Without the division, the clients of one part could keep
// the kubelet's probes from being answered.
type descriptors struct {
	// relayConnections is the number of connections; each takes six descriptors,
	// two sockets and two pipes. The others are numbers of sockets.
	relayConnections, relayListeners int
	healthCheckListeners             int
	// serverConnections is for each of the four servers: health, metrics,
	// health-check node ports and DNS.
	serverConnections int
}

// The most that a part gets where the process may open very many files.
const (
	maxRelayConnections  = 4096
	maxListeners         = 1 << 16 // all ports
	maxServerConnections = 256
)

// openFilesLimit returns how many files the process may have open
// (RLIMIT_NOFILE), zero if the kernel does not say.
func openFilesLimit() uint64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return limit.Cur
}

// divideDescriptors returns the shares of a process that may have so many files open.
func divideDescriptors(files uint64) descriptors {
	share := func(fraction, most uint64) int {
		return int(max(1, min(most, files/fraction))) //nolint:gosec // most is small
	}
	return descriptors{
		relayConnections:     share(16, maxRelayConnections), // 6/16 of all descriptors
		relayListeners:       share(8, maxListeners),
		healthCheckListeners: share(8, maxListeners),
		serverConnections:    share(32, maxServerConnections), // 4/32
	}
}
