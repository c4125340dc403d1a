// Package controlplane runs a real Kubernetes control plane for tests and
// benchmarks: etcd, kube-apiserver and, where asked for, kube-controller-manager. It needs no
// root, network beyond the machine, or container; `make controlplane` builds
// the programs.
//
//	func TestMain(m *testing.M) {
//		cp, err := controlplane.New(context.Background(), controlplane.Options{})
//		…
//		code := m.Run()
//		cp.Close()
//		os.Exit(code)
//	}
//
// or, for one test, [Start]. Each control plane has a port, a folder and keys of
// its own, so that any number may run side by side.
//
// The API server is as a cluster's is: RBAC decides what users may do, Services
// get addresses of both families, Service accounts get tokens, watches go
// through its cache. What a node or a scheduler would do is left to the test,
// which creates Nodes, and Pods that name their node, and writes their status.
// Pods need no Service account to exist.
//
// The programs end with the control plane's Close and, by the kernel, with the
// test's process however that ends. The folder of a process that could not
// remove it is removed by the next that starts a control plane.
package controlplane
