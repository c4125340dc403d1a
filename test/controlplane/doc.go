// Package controlplane runs a real Kubernetes control plane for tests and benchmarks: etcd,
// kube-apiserver and optionally kube-controller-manager. It needs neither root, nor network
// access, nor containers. `make controlplane` builds the programs.
//
//	func TestMain(m *testing.M) {
//		cp, err := controlplane.New(context.Background(), controlplane.Options{})
//		…
//		code := m.Run()
//		cp.Close()
//		os.Exit(code)
//	}
//
// For a single test, use [Start]. Each control plane has its own port, directory and keys, so
// any number of them can run in parallel.
//
// The API server behaves as in a cluster: RBAC decides what users may do, Services get
// addresses of both families, Service accounts get tokens, and watches use its cache. The
// test does the work of nodes and of the scheduler: it creates Nodes, creates Pods with a
// node name, and writes their status. Pods need no existing Service account.
//
// The programs end with Close. The kernel also ends them when the test process ends for any
// reason. If a process could not remove its directory, the next process that starts a control
// plane removes it.
package controlplane
