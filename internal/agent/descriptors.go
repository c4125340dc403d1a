package agent

import "syscall"

// descriptors divides the file descriptors of the process among the components whose use
// depends on clients and Services, so that the clients of one component cannot block the
// kubelet's probes. A quarter remains for netlink, the API server and files.
type descriptors struct {
	// relayConnections is a number of connections. Each uses six descriptors: two sockets
	// and two pipes. All other fields are numbers of sockets.
	relayConnections, relayListeners int
	healthCheckListeners             int
	// serverConnections applies to each of the four servers: health, metrics, health-check
	// node ports and DNS. The status page gets an eighth of it.
	serverConnections int
}

// Maximum shares, for processes with a very high limit.
const (
	maxRelayConnections  = 4096
	maxListeners         = 1 << 16 // all ports
	maxServerConnections = 256
)

// openFilesLimit returns the maximum number of open files of the process (RLIMIT_NOFILE), or 0
// if it is unknown.
func openFilesLimit() uint64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return limit.Cur
}

// divideDescriptors returns the shares of a process with the given limit of open files.
func divideDescriptors(files uint64) descriptors {
	share := func(fraction, maxShare uint64) int {
		return int(max(1, min(maxShare, files/fraction))) //nolint:gosec // maxShare is small
	}
	return descriptors{
		relayConnections:     share(16, maxRelayConnections), // 6/16 of all descriptors
		relayListeners:       share(8, maxListeners),
		healthCheckListeners: share(8, maxListeners),
		serverConnections:    share(32, maxServerConnections), // 4/32
	}
}
