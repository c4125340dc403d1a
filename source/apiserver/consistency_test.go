package apiserver

import (
	"context"
	"testing"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/consistencydetector"
)

// TestConsistencyDetector checks that client-go's check of streamed lists, which panics if it finds a
// difference, finds none, and that the list is delivered.
//
//nolint:paralleltest // it changes a setting of the process
func TestConsistencyDetector(t *testing.T) {
	defer consistencydetector.SetDataConsistencyDetectionForWatchListEnabledForTest(true)()
	queue, trim := newDeltaQueue(), newTrimmer()
	for _, res := range []resource{services, nodes, serviceCIDRs} {
		queue.completeList(res)
	}
	s := newStore(endpointSlices, queue,
		func(q *deltaQueue) pendingChanges[deliveredSlice] { return q.endpointSlices }, trim.trimEndpointSlice, newSliceConverter("node-0"), nil)
	listed := make(chan struct{}, 1)
	reflector := cache.NewReflectorWithOptions(&cache.ListWatch{
		ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) {
			listed <- struct{}{}
			list := &discoveryv1.EndpointSliceList{Items: []discoveryv1.EndpointSlice{*decodedSlice(9)}}
			trim.trimPage(list)
			return list, nil
		},
		WatchFuncWithContext: func(context.Context, metav1.ListOptions) (watch.Interface, error) {
			w := watch.NewFakeWithChanSize(2, false)
			w.Add(decodedSlice(9))
			w.Action(watch.Bookmark, &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
				ResourceVersion: "8", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
			}})
			return w, nil
		},
	}, &discoveryv1.EndpointSlice{}, s, cache.ReflectorOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- reflector.ListAndWatchWithContext(ctx) }()
	<-queue.wake
	d, ok := queue.pop()
	for !ok {
		<-queue.wake
		d, ok = queue.pop()
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("the reflector ended: %v", err)
	}
	if len(d.ConvertedSlices) != 1 || d.ConvertedSlices[0].Name().Name != "web-1" {
		t.Errorf("delivered %v", d.ConvertedSlices)
	}
	select {
	case <-listed:
	default:
		t.Error("the check made no second list, so the test is void")
	}
}
