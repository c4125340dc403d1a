// Package compare measures Service proxies against each other: Fairlead's modes and
// kube-proxy's, as the programs that they are.
//
// Each has a node of its own, in network namespaces that are laid out alike, and an
// API server of its own that serves the same objects: one in this process, or a real
// etcd and kube-apiserver. One of these for all would give each change to all at the
// same time, so that they compete for the processor; one for each, idle but for its
// turn, does not. A change is given to one
// after the other, in an order that rotates, and the next kind of change follows: so
// what else the machine does meanwhile hits all alike, and none takes the processor
// from another. What is measured is seen by packets, see package testbed, and by /proc.
//
// kube-proxy waits a second between two rounds of programming (minSyncPeriod). Changes
// for the measure "update-packet" are further apart than that, so its times are those of
// a kube-proxy that has nothing to wait for; under churn they are not.
//
// Figures of one run are only good for ratios, and these come with confidence
// intervals.
package compare
