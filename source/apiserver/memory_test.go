package apiserver_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
)

// memoryProcessEnv has the path of a kubeconfig for the process that [BenchmarkMemory]
// measures.
const memoryProcessEnv = "FAIRLEAD_TEST_FOLLOW"

// usage has the memory usage of that process, in bytes.
type usage struct {
	First     time.Duration // time to the first Delta
	Peak      uint64        // maximum resident size
	PeakFirst uint64        // maximum resident size until the first Delta
	Resident  uint64        // resident size 3 s after the first Delta
	Heap      uint64        // live heap
	Services  int
}

// BenchmarkMemory measures a process with only a Source and a Tracker that follows 10,000
// Services with 10 endpoints each on 100 nodes. Creating the objects takes a minute or two.
func BenchmarkMemory(b *testing.B) {
	n := 10_000
	if testing.Short() {
		n = 100 // only check that it runs; creating thousands of objects takes minutes
	}
	createServices(b, n)
	kubeconfig := filepath.Join(b.TempDir(), "kubeconfig")
	if err := cluster.Kubeconfig(kubeconfig, "admin", "system:masters"); err != nil {
		b.Fatal(err)
	}
	for _, env := range [][]string{
		{},
		{"GOGC=50"},
		{"GOMEMLIMIT=100MiB"},
		{"KUBE_FEATURE_WatchListClient=false"},
		{"KUBE_FEATURE_WatchListClient=false", "GOGC=50"},
	} {
		b.Run(fmt.Sprintf("services=%d/%s", n, strings.Join(env, ",")), func(b *testing.B) {
			var got usage
			for b.Loop() {
				cmd := exec.CommandContext(b.Context(), os.Args[0])
				cmd.Env = append(append(os.Environ(), memoryProcessEnv+"="+kubeconfig), env...)
				cmd.Stderr = os.Stderr
				out, err := cmd.Output()
				if err != nil {
					b.Fatal(err)
				}
				if err := json.Unmarshal(out, &got); err != nil {
					b.Fatal(err)
				}
				if got.Services < n {
					b.Fatalf("got %d Services", got.Services)
				}
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(got.First.Seconds(), "s-first-delta")
			b.ReportMetric(float64(got.PeakFirst)/1e6, "MB-peak-list")
			b.ReportMetric(float64(got.Peak)/1e6, "MB-peak")
			b.ReportMetric(float64(got.Resident)/1e6, "MB-resident")
			b.ReportMetric(float64(got.Heap)/1e6, "MB-live-heap")
		})
	}
}

// runMemoryProcess is the measured process.
func runMemoryProcess() {
	err := func() error {
		config, err := apiserver.Config(os.Getenv(memoryProcessEnv), "")
		if err != nil {
			return err
		}
		source, err := apiserver.New(apiserver.Options{Config: config, NodeName: "node-7", Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		var got usage
		tracker := kube.NewTracker(kube.Options{NodeName: "node-7"})
		desired := map[string]any{}
		begin := time.Now()
		first := make(chan struct{})
		ended := make(chan error, 1)
		go func() {
			ended <- source.Run(ctx, func(d kube.Delta) {
				if got.First == 0 {
					got.First = time.Since(begin)
					got.PeakFirst = procStatus("VmHWM")
					got.Services = len(d.Services)
					defer close(first)
				}
				for key, svc := range tracker.Apply(d).Changes {
					desired[key.String()] = svc
				}
			})
		}()
		<-first
		time.Sleep(3 * time.Second)
		got.Peak, got.Resident = procStatus("VmHWM"), procStatus("VmRSS")
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		got.Heap = stats.HeapAlloc
		runtime.KeepAlive(desired)
		cancel()
		if err := <-ended; err != nil {
			return err
		}
		debug.FreeOSMemory()
		return json.NewEncoder(os.Stdout).Encode(got)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// procStatus returns a value of /proc/self/status in bytes.
func procStatus(name string) uint64 {
	text, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n * 1024
		}
	}
	return 0
}

// createServices creates Services and EndpointSlices like those of a real control plane.
func createServices(b *testing.B, n int) {
	b.Helper()
	config := cluster.Config()
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		b.Fatal(err)
	}
	ns := createNamespace(b, client)
	var group errgroup.Group
	group.SetLimit(16)
	for i := range n {
		group.Go(func() error {
			name := fmt.Sprintf("service-%d", i)
			svc := newService(name)
			svc.Labels = map[string]string{"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "Helm", "app.kubernetes.io/version": "1.2.3"}
			svc.Annotations = map[string]string{"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": ns}
			if _, err := client.CoreV1().Services(ns).Create(b.Context(), svc, metav1.CreateOptions{}); err != nil {
				return err
			}
			slice := newSlice(name+"-x7k2p", name)
			slice.Labels["endpointslice.kubernetes.io/managed-by"] = "endpointslice-controller.k8s.io"
			slice.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: time.Now().Format(time.RFC3339)}
			for e := range 10 {
				pod, yes, no := i*10+e, true, false
				node, zone := fmt.Sprintf("node-%d", pod%100), fmt.Sprintf("zone-%d", pod%3)
				slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
					Addresses: []string{fmt.Sprintf("10.%d.%d.%d", 100+pod>>16, pod>>8&0xff, pod&0xff)}, NodeName: &node, Zone: &zone,
					Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no},
					TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: ns, Name: fmt.Sprintf("%s-5d9c7b8f4d-%05d", name, e), UID: svc.UID},
				})
			}
			_, err := client.DiscoveryV1().EndpointSlices(ns).Create(b.Context(), slice, metav1.CreateOptions{})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		b.Fatal(err)
	}
}
