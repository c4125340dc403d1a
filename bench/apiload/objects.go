package apiload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/test/controlplane"
)

const (
	namespace   = "bench"
	servicePort = 80
	podPort     = 8080
	appLabel    = "app"
	// nodeImages is the number of images that a kubelet reports by default.
	nodeImages = 50
)

func serviceCIDR() netip.Prefix { return netip.MustParsePrefix("172.16.0.0/12") }
func clusterCIDR() netip.Prefix { return netip.MustParsePrefix("10.0.0.0/9") }

// cluster writes objects to a control plane.
type cluster struct {
	options Options
	cp      *controlplane.ControlPlane
	core    *rest.RESTClient
	slices  *rest.RESTClient

	pods     int // number of Pods so far
	services int // number of Services so far
	// endpoints has the names of the Pods of each changed Service.
	endpoints map[int][]string
}

func newCluster(o Options, cp *controlplane.ControlPlane) (*cluster, error) {
	core, err := cp.Client(corev1.SchemeGroupVersion, corev1.AddToScheme)
	if err != nil {
		return nil, err
	}
	slices, err := cp.Client(discoveryv1.SchemeGroupVersion, discoveryv1.AddToScheme)
	if err != nil {
		return nil, err
	}
	return &cluster{options: o, cp: cp, core: core, slices: slices, endpoints: map[int][]string{}}, nil
}

func nodeName(i int) string    { return fmt.Sprintf("node-%d", i) }
func serviceName(i int) string { return fmt.Sprintf("service-%d", i) }
func podName(i int) string     { return fmt.Sprintf("pod-%d", i) }

func addrAt(p netip.Prefix, n int) string {
	b := p.Addr().As4()
	a := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	a += uint32(n) + 10 //nolint:mnd // the first addresses have other owners
	return netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)}).String()
}

// newNode returns a Node as a kubelet registers it.
func newNode(i int) *corev1.Node {
	name := nodeName(i)
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			corev1.LabelHostname: name, corev1.LabelTopologyZone: fmt.Sprintf("zone-%d", i%3), corev1.LabelTopologyRegion: "region", //nolint:mnd // three zones
			corev1.LabelOSStable: "linux", corev1.LabelArchStable: "amd64", corev1.LabelInstanceTypeStable: "large",
		}},
		Spec: corev1.NodeSpec{PodCIDR: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256), PodCIDRs: []string{fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)}}, //nolint:mnd // bytes
	}
}

// nodeStatus returns the status that a kubelet reports.
func nodeStatus(i int, now metav1.Time) corev1.NodeStatus {
	quantities := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("16"), corev1.ResourceMemory: resource.MustParse("64Gi"),
		corev1.ResourcePods: resource.MustParse("110"), corev1.ResourceEphemeralStorage: resource.MustParse("100Gi"),
	}
	s := corev1.NodeStatus{
		Capacity: quantities, Allocatable: quantities,
		Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: addrAt(netip.MustParsePrefix("192.168.0.0/16"), i)}, {Type: corev1.NodeHostName, Address: nodeName(i)},
		},
		NodeInfo: corev1.NodeSystemInfo{
			MachineID: "0123456789abcdef0123456789abcdef", KernelVersion: "6.12.0", OSImage: "Debian GNU/Linux 13", ContainerRuntimeVersion: "containerd://2.1.0",
			KubeletVersion: "v1.37.2", OperatingSystem: "linux", Architecture: "amd64",
		},
	}
	for _, t := range []corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure, corev1.NodeReady} {
		status := corev1.ConditionFalse
		if t == corev1.NodeReady {
			status = corev1.ConditionTrue
		}
		s.Conditions = append(s.Conditions, corev1.NodeCondition{
			Type: t, Status: status, LastHeartbeatTime: now, LastTransitionTime: now, Reason: "KubeletReport", Message: "kubelet reports this condition",
		})
	}
	for n := range nodeImages {
		image := fmt.Sprintf("registry.example.com/team/application-%d", n)
		s.Images = append(s.Images, corev1.ContainerImage{
			Names: []string{image + "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", image + ":v1.2.3"}, SizeBytes: 1 << 27, //nolint:mnd // bytes
		})
	}
	return s
}

func (c *cluster) newPod(i, service int) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: podName(i), Labels: map[string]string{appLabel: serviceName(service)}},
		Spec: corev1.PodSpec{
			NodeName:   nodeName(i % c.options.Nodes),
			Containers: []corev1.Container{{Name: "main", Image: "registry.example.com/team/application:v1.2.3"}},
		},
	}
}

func podStatus(i int) corev1.PodStatus {
	ip := addrAt(clusterCIDR(), i)
	return corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}},
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
	}
}

func newService(i int) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: serviceName(i), Labels: map[string]string{appLabel: serviceName(i)}},
		Spec: corev1.ServiceSpec{
			ClusterIP: addrAt(serviceCIDR(), i), Selector: map[string]string{appLabel: serviceName(i)},
			Ports: []corev1.ServicePort{{Name: "http", Port: servicePort, TargetPort: intstr.FromInt32(podPort)}},
		},
	}
}

// load creates all objects and waits for the EndpointSlices. The first object of each kind is
// created with the API; the others are copies of it in etcd, with the same fields.
func (c *cluster) load(ctx context.Context) error {
	if err := c.core.Post().Resource("namespaces").Body(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}).Do(ctx).Error(); err != nil {
		return fmt.Errorf("create namespace %s: %w", namespace, err)
	}
	if err := c.loadNodes(ctx); err != nil {
		return fmt.Errorf("create Nodes: %w", err)
	}
	for i := range c.options.Services {
		for range c.options.Endpoints {
			c.endpoints[i] = append(c.endpoints[i], podName(c.pods))
			c.pods++
		}
	}
	pod, err := c.createPod(ctx, 0, 0)
	if err != nil {
		return fmt.Errorf("create a Pod: %w", err)
	}
	service := newService(0)
	if err := c.core.Post().Namespace(namespace).Resource("services").Body(service).Do(ctx).Into(service); err != nil {
		return fmt.Errorf("create a Service: %w", err)
	}
	if err := c.storePods(ctx, pod); err != nil {
		return fmt.Errorf("store Pods: %w", err)
	}
	c.services = c.options.Services
	if err := c.storeServices(ctx, service); err != nil {
		return fmt.Errorf("store Services: %w", err)
	}
	// The objects of one transaction have the same resource version, and watches that begin
	// meanwhile miss some of them. A restart makes all programs list the objects.
	if err := c.cp.StopAPIServer(); err != nil {
		return err
	}
	if err := c.cp.StartAPIServer(ctx); err != nil {
		return err
	}
	return c.waitSlices(ctx, c.options.Services, c.options.Services*c.options.Endpoints)
}

func (c *cluster) loadNodes(ctx context.Context) error {
	for i := range c.options.Nodes {
		node := newNode(i)
		if err := c.core.Post().Resource("nodes").Body(node).Do(ctx).Into(node); err != nil {
			return err
		}
		if err := c.heartbeat(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// heartbeat updates the status of a Node, which a kubelet does every five minutes.
func (c *cluster) heartbeat(ctx context.Context, i int) error {
	body, err := json.Marshal(map[string]any{"status": nodeStatus(i, metav1.NewTime(time.Now()))})
	if err != nil {
		return err
	}
	return c.core.Patch(types.StrategicMergePatchType).Resource("nodes").Name(nodeName(i)).SubResource("status").Body(body).Do(ctx).Error()
}

// label changes a label of a Node.
func (c *cluster) label(ctx context.Context, i int, value string) error {
	body := fmt.Appendf(nil, `{"metadata":{"labels":{"example.com/pool":%q}}}`, value)
	return c.core.Patch(types.StrategicMergePatchType).Resource("nodes").Name(nodeName(i)).Body(body).Do(ctx).Error()
}

// createPod creates a Pod that becomes ready.
func (c *cluster) createPod(ctx context.Context, i, service int) (*corev1.Pod, error) {
	pod := c.newPod(i, service)
	if err := c.core.Post().Namespace(namespace).Resource("pods").Body(pod).Do(ctx).Into(pod); err != nil {
		return nil, err
	}
	pod.Status = podStatus(i)
	return pod, c.core.Put().Namespace(namespace).Resource("pods").Name(pod.Name).SubResource("status").Body(pod).Do(ctx).Into(pod)
}

func (c *cluster) storePods(ctx context.Context, first *corev1.Pod) error {
	return c.store(ctx, "/registry/pods/"+namespace+"/", 1, c.pods, func(i int) (string, runtime.Object) {
		pod, want := first.DeepCopy(), c.newPod(i, i/c.options.Endpoints)
		pod.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
		pod.Name, pod.UID, pod.Labels, pod.Spec.NodeName = want.Name, uuid.NewUUID(), want.Labels, want.Spec.NodeName
		pod.Status.PodIP, pod.Status.PodIPs, pod.ResourceVersion = podStatus(i).PodIP, podStatus(i).PodIPs, ""
		return pod.Name, pod
	})
}

func (c *cluster) storeServices(ctx context.Context, first *corev1.Service) error {
	// Without its IPAddress, the API server would report the Service later.
	err := c.store(ctx, "/registry/ipaddresses/", 1, c.options.Services, func(i int) (string, runtime.Object) {
		ip := newService(i).Spec.ClusterIP
		return ip, &networkingv1.IPAddress{
			TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "IPAddress"},
			ObjectMeta: metav1.ObjectMeta{Name: ip, UID: uuid.NewUUID(), CreationTimestamp: metav1.NewTime(time.Now()), Labels: map[string]string{
				networkingv1.LabelIPAddressFamily: "IPv4", networkingv1.LabelManagedBy: "ipallocator.k8s.io",
			}},
			Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: namespace, Name: serviceName(i)}},
		}
	})
	if err != nil {
		return err
	}
	return c.store(ctx, "/registry/services/specs/"+namespace+"/", 1, c.options.Services, func(i int) (string, runtime.Object) {
		service, want := first.DeepCopy(), newService(i)
		service.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}
		service.Name, service.UID, service.Labels, service.ResourceVersion = want.Name, uuid.NewUUID(), want.Labels, ""
		service.Spec.ClusterIP, service.Spec.ClusterIPs, service.Spec.Selector = want.Spec.ClusterIP, []string{want.Spec.ClusterIP}, want.Spec.Selector
		return service.Name, service
	})
}

// store writes the objects from the index first to the index end to etcd.
func (c *cluster) store(ctx context.Context, prefix string, first, end int, object func(i int) (name string, o runtime.Object)) error {
	const batch = 1000
	for begin := first; begin < end; begin += batch {
		values := map[string][]byte{}
		for i := begin; i < min(begin+batch, end); i++ {
			name, o := object(i)
			data, err := json.Marshal(o)
			if err != nil {
				return err
			}
			values[prefix+name] = data
		}
		if err := c.cp.Store(ctx, values); err != nil {
			return err
		}
	}
	return nil
}

// waitSlices waits until there are so many EndpointSlices and endpoints.
func (c *cluster) waitSlices(ctx context.Context, slices, want int) error {
	const period, limit = time.Second, 10 * time.Minute
	got := 0
	for end := time.Now().Add(limit); time.Now().Before(end); {
		list := &discoveryv1.EndpointSliceList{}
		// Version 0 reads from the API server's cache.
		err := c.slices.Get().Namespace(namespace).Resource("endpointslices").VersionedParams(&metav1.ListOptions{ResourceVersion: "0"}, metav1.ParameterCodec).Do(ctx).Into(list)
		if err != nil {
			return fmt.Errorf("list EndpointSlices: %w", err)
		}
		got = 0
		for i := range list.Items {
			got += len(list.Items[i].Endpoints)
		}
		if got == want && len(list.Items) >= slices {
			return nil
		}
		if err := sleep(ctx, period); err != nil {
			return err
		}
	}
	return fmt.Errorf("EndpointSlices have %d endpoints after %s, want %d", got, limit, want)
}

// deletePod deletes a Pod as a rolling update does: it terminates first, and is then removed.
func (c *cluster) deletePod(ctx context.Context, name string, pause func() error) error {
	const gracePeriod = 30
	for _, seconds := range []int64{gracePeriod, 0} {
		err := c.core.Delete().Namespace(namespace).Resource("pods").Name(name).Body(&metav1.DeleteOptions{GracePeriodSeconds: &seconds}).Do(ctx).Error()
		if err == nil {
			err = pause()
		}
		if err != nil {
			return fmt.Errorf("delete Pod %s: %w", name, err)
		}
	}
	return nil
}

// replaceEndpoint replaces a Pod of a Service as a rolling update does. pause waits until the
// EndpointSlice has changed.
func (c *cluster) replaceEndpoint(ctx context.Context, service int, pause func() error) error {
	if len(c.endpoints[service]) == 0 {
		return errors.New("replace an endpoint: the Service has none")
	}
	i := c.pods
	c.pods++
	if _, err := c.createPod(ctx, i, service); err != nil {
		return fmt.Errorf("create Pod %s: %w", podName(i), err)
	}
	if err := pause(); err != nil {
		return err
	}
	old := c.endpoints[service][0]
	c.endpoints[service] = append(c.endpoints[service][1:], podName(i))
	return c.deletePod(ctx, old, pause)
}

// setReady changes whether a Pod is ready.
func (c *cluster) setReady(ctx context.Context, name string, ready bool) error {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	body := fmt.Appendf(nil, `{"status":{"conditions":[{"type":"Ready","status":%q}]}}`, status)
	return c.core.Patch(types.StrategicMergePatchType).Namespace(namespace).Resource("pods").Name(name).SubResource("status").Body(body).Do(ctx).Error()
}

// createService creates a Service whose Pods exist, and returns its index.
func (c *cluster) createService(ctx context.Context) (int, error) {
	n := c.services
	c.services++
	for range c.options.Endpoints {
		i := c.pods
		c.pods++
		if _, err := c.createPod(ctx, i, n); err != nil {
			return 0, fmt.Errorf("create Pod %s: %w", podName(i), err)
		}
		c.endpoints[n] = append(c.endpoints[n], podName(i))
	}
	service := newService(n)
	if err := c.core.Post().Namespace(namespace).Resource("services").Body(service).Do(ctx).Error(); err != nil {
		return 0, fmt.Errorf("create Service %s: %w", service.Name, err)
	}
	return n, nil
}
