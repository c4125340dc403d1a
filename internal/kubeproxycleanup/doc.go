// Package kubeproxycleanup removes what kube-proxy has left in the kernel of a network
// namespace, in each of its modes and without its programs: iptables, ipset and ipvsadm are not
// needed. It does not change rules, chains, sets and virtual servers of other programs, even in
// the same tables.
package kubeproxycleanup
