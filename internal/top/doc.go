// Package top counts new connections by Service and endpoint on demand, and shows them
// in a terminal, as lines or as JSON.
//
// A [Monitor] listens to the kernel's events for new entries of the connection-tracking table, in
// every mode: the entry contains the frontend that the client connects to, and the endpoint that
// nftables or IPVS has selected. The names come from the kernel, so no agent needs to run. Without
// a Monitor, the kernel makes no events; see [conntrack.Events].
//
// An entry is a TCP or SCTP connection, or a UDP flow: datagrams between the same two addresses
// and ports, until none is sent for a while.
package top
