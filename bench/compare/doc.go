// Package compare measures Service proxies against each other: the modes of Fairlead and of
// kube-proxy, each as a separate program.
//
// Each system has its own node, in network namespaces of the same layout, and its own API server
// with the same objects. The API servers run in this process, or are real instances of etcd and
// kube-apiserver. A shared API server would deliver each change to all systems at the same time,
// so that they would compete for the processor; separate API servers are idle except when their
// system is measured. A change is made on one system after the other, in rotating order, before
// the next kind of change follows. Therefore other activity on the machine affects all systems
// equally, and no system takes processor time from another. Effects are measured with packets, see
// package testbed, and resources with /proc.
//
// kube-proxy waits one second between two syncs (minSyncPeriod). Changes for the measure
// "update-packet" are further apart, so kube-proxy never has to wait; under churn it does.
//
// Only ratios of results of the same run are meaningful. They come with confidence intervals.
package compare
