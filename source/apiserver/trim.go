package apiserver

import (
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"fairlead.io/fairlead/kube"
)

// The labels and annotations that somebody reads. All others are let go.
func keptLabels() []string {
	return []string{
		kube.LabelServiceProxyName,
		corev1.IsHeadlessService,
		discoveryv1.LabelServiceName,
		corev1.LabelTopologyZone,
	}
}

func keptAnnotations() []string {
	return []string{
		// When the pod or the Service changed that the slice was written for, if
		// that was after the program started.
		corev1.EndpointsLastChangeTriggerTime,
		kube.AnnotationIPVSScheduler,
	}
}

// maxInterned is the number of different strings that are shared. Node names and
// zones are far fewer, but in the life of a cluster many come and go.
const maxInterned = 1 << 14

// trimmer lets go of what nobody reads, and has equal strings share their memory:
// of 100,000 endpoints on 100 nodes each would come with a node's name of its own.
// What it leaves is shared between objects and must not be changed.
type trimmer struct {
	labels, annotations []string
	// since is when the program started: what triggered a slice before says
	// nothing about how long changes take.
	since time.Time

	mu sync.Mutex
	// texts holds strings, and pointers and hints hold what objects point to. What
	// is held must never lie within an object: it would keep the whole object, or
	// the page of a list that it is in.
	texts    map[string]string
	pointers map[string]*string
	hints    map[hint]*discoveryv1.EndpointHints
	yes, no  bool
}

// hint is the value of topology hints that name at most one zone and one node, as
// most do.
type hint struct {
	zone, node       string
	hasZone, hasNode bool
}

func newTrimmer() *trimmer {
	return &trimmer{
		labels: keptLabels(), annotations: keptAnnotations(), since: time.Now(),
		texts: map[string]string{}, pointers: map[string]*string{}, hints: map[hint]*discoveryv1.EndpointHints{},
		yes: true,
	}
}

func (t *trimmer) meta(m *metav1.ObjectMeta) {
	*m = metav1.ObjectMeta{
		Name: m.Name, Namespace: t.text(m.Namespace), UID: m.UID, ResourceVersion: m.ResourceVersion,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp,
		Labels: only(m.Labels, t.labels), Annotations: only(m.Annotations, t.annotations),
	}
}

func only(from map[string]string, keys []string) map[string]string {
	var out map[string]string
	for _, key := range keys {
		value, ok := from[key]
		if !ok {
			continue
		}
		if out == nil {
			out = make(map[string]string, 1)
		}
		out[key] = value
	}
	return out
}

func (t *trimmer) service(svc *corev1.Service) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.meta(&svc.ObjectMeta)
	svc.TypeMeta = metav1.TypeMeta{}
	svc.Spec.Selector = nil
	svc.Status.Conditions = nil
}

func (t *trimmer) endpointSlice(slice *discoveryv1.EndpointSlice) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.meta(&slice.ObjectMeta)
	slice.TypeMeta = metav1.TypeMeta{}
	if at, err := time.Parse(time.RFC3339Nano, slice.Annotations[corev1.EndpointsLastChangeTriggerTime]); err != nil || at.Before(t.since) {
		slice.Annotations = nil
	}
	// The decoder leaves up to as much room again behind the last element.
	if cap(slice.Endpoints) > len(slice.Endpoints) {
		slice.Endpoints = exact(slice.Endpoints)
	}
	for i := range slice.Endpoints {
		ep := &slice.Endpoints[i]
		ep.Hostname, ep.TargetRef, ep.DeprecatedTopology = nil, nil, nil
		ep.NodeName, ep.Zone = t.string(ep.NodeName), t.string(ep.Zone)
		c := &ep.Conditions
		c.Ready, c.Serving, c.Terminating = t.bool(c.Ready), t.bool(c.Serving), t.bool(c.Terminating)
		ep.Hints = t.hint(ep.Hints)
	}
	for i := range slice.Ports {
		port := &slice.Ports[i]
		port.Name, port.AppProtocol = t.string(port.Name), nil
	}
}

func (t *trimmer) node(node *corev1.Node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.meta(&node.ObjectMeta)
	*node = corev1.Node{
		ObjectMeta: node.ObjectMeta,
		Spec:       corev1.NodeSpec{PodCIDR: node.Spec.PodCIDR, PodCIDRs: node.Spec.PodCIDRs, Taints: node.Spec.Taints},
		Status:     corev1.NodeStatus{Addresses: node.Status.Addresses},
	}
}

func (t *trimmer) serviceCIDR(cidr *networkingv1.ServiceCIDR) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.meta(&cidr.ObjectMeta)
	*cidr = networkingv1.ServiceCIDR{ObjectMeta: cidr.ObjectMeta, Spec: cidr.Spec, Status: cidr.Status}
}

// exact returns a copy with no more room than the allocator gives.
func exact[T any](s []T) []T { return append(make([]T, 0, len(s)), s...) }

// text returns the string with the memory of an equal one.
func (t *trimmer) text(s string) string {
	shared, ok := t.texts[s]
	if !ok {
		if len(t.texts) >= maxInterned {
			clear(t.texts) // those in use stay where they are used
		}
		shared = strings.Clone(s) // s may be a piece of something larger
		t.texts[shared] = shared
	}
	return shared
}

// string returns a pointer to an equal string.
func (t *trimmer) string(s *string) *string {
	if s == nil {
		return nil
	}
	shared, ok := t.pointers[*s]
	if !ok {
		if len(t.pointers) >= maxInterned {
			clear(t.pointers)
		}
		text := t.text(*s)
		shared = &text
		t.pointers[text] = shared
	}
	return shared
}

func (t *trimmer) bool(b *bool) *bool {
	switch {
	case b == nil:
		return nil
	case *b:
		return &t.yes
	default:
		return &t.no
	}
}

func (t *trimmer) hint(h *discoveryv1.EndpointHints) *discoveryv1.EndpointHints {
	if h == nil || len(h.ForZones) > 1 || len(h.ForNodes) > 1 {
		return h
	}
	var key hint
	if len(h.ForZones) == 1 {
		key.zone, key.hasZone = t.text(h.ForZones[0].Name), true
	}
	if len(h.ForNodes) == 1 {
		key.node, key.hasNode = t.text(h.ForNodes[0].Name), true
	}
	shared, ok := t.hints[key]
	if !ok {
		if len(t.hints) >= maxInterned {
			clear(t.hints)
		}
		shared = t.newHints(h)
		t.hints[key] = shared
	}
	return shared
}

// newHints returns a copy of hints that shares nothing with the object they are of.
func (t *trimmer) newHints(h *discoveryv1.EndpointHints) *discoveryv1.EndpointHints {
	c := &discoveryv1.EndpointHints{}
	for _, zone := range h.ForZones {
		c.ForZones = append(c.ForZones, discoveryv1.ForZone{Name: t.text(zone.Name)})
	}
	for _, node := range h.ForNodes {
		c.ForNodes = append(c.ForNodes, discoveryv1.ForNode{Name: t.text(node.Name)})
	}
	return c
}

// list trims the objects of a page.
func (t *trimmer) list(page runtime.Object) {
	switch page := page.(type) {
	case *corev1.ServiceList:
		each(page.Items, t.service)
	case *discoveryv1.EndpointSliceList:
		each(page.Items, t.endpointSlice)
	case *corev1.NodeList:
		each(page.Items, t.node)
	case *networkingv1.ServiceCIDRList:
		each(page.Items, t.serviceCIDR)
	}
}

func each[T any](items []T, do func(*T)) {
	for i := range items {
		do(&items[i])
	}
}
