// Package conntracksettings applies kube-proxy's settings of connection tracking to the kernel:
// the maximum number of entries, the size of the hash table, timeouts, and the liberal check of
// TCP sequence numbers.
//
// The timeouts belong to the network namespace of the process. The maximum and the hash table
// belong to the host, and only processes in the initial network namespace can change them.
package conntracksettings
