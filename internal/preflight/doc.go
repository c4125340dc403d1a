// Package preflight checks whether a node can run Fairlead, and whether a running Fairlead serves
// the node's Services. It asks the kernel and the API server, creates tables only in a network
// namespace of its own, and changes no settings. The kernel may load modules for these tables.
package preflight
