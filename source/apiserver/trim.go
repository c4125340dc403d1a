package apiserver

import (
	"maps"
	"slices"
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

// keptLabels returns the labels that Fairlead reads. All others are removed.
func keptLabels() []string {
	return []string{
		kube.LabelServiceProxyName,
		corev1.IsHeadlessService,
		discoveryv1.LabelServiceName,
		corev1.LabelTopologyZone,
	}
}

// keptAnnotations returns the annotations that Fairlead reads.
func keptAnnotations() []string {
	return []string{
		// The time of the pod or Service change that caused the slice to be written. It
		// is removed if it is before the start of the program.
		corev1.EndpointsLastChangeTriggerTime,
		kube.AnnotationBalancing,
		kube.AnnotationIPVSScheduler,
	}
}

// maxInterned is the number of strings that are shared. Node names and zones are far fewer,
// but many come and go in the lifetime of a cluster.
const maxInterned = 1 << 14

// trimmer removes the fields that Fairlead does not read and shares the memory of equal
// strings: each of 100,000 endpoints on 100 nodes would otherwise have its own copy of a
// node's name. Trimmed objects share memory and must not be modified.
type trimmer struct {
	keepsAll            bool // see Options.KeepAllFields
	discards            bool // trimmed EndpointSlices are converted and discarded
	labels, annotations []string
	// startedAt is when the program started. A trigger time before it says nothing about
	// how long Fairlead takes to apply changes.
	startedAt time.Time

	mu sync.Mutex
	// strings has the interned strings; pointers and hints have interned values that
	// objects point to. An interned value must not be part of an object: it would keep the
	// whole object, or the page of the list it came in, in memory.
	strings               map[string]string
	pointers              map[string]*string
	hints                 map[hintKey]*discoveryv1.EndpointHints
	trueValue, falseValue bool
}

// hintKey is the value of topology hints with at most one zone and one node, the usual
// case.
type hintKey struct {
	zone, node       string
	hasZone, hasNode bool
}

func newTrimmer() *trimmer {
	return &trimmer{
		labels: keptLabels(), annotations: keptAnnotations(), startedAt: time.Now(),
		strings: map[string]string{}, pointers: map[string]*string{}, hints: map[hintKey]*discoveryv1.EndpointHints{},
		trueValue: true,
	}
}

func (t *trimmer) trimMeta(m *metav1.ObjectMeta) {
	*m = metav1.ObjectMeta{
		Name: m.Name, Namespace: t.intern(m.Namespace), UID: m.UID, ResourceVersion: m.ResourceVersion,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp,
		Labels: selectKeys(m.Labels, t.labels), Annotations: selectKeys(m.Annotations, t.annotations),
	}
}

// selectKeys returns the entries of a map with the given keys. It may return the map itself: a
// map of a few entries takes as much memory as a map of one.
func selectKeys(from map[string]string, keys []string) map[string]string {
	const few = 8 // entries of a group (internal/runtime/maps)
	if len(from) <= few {
		maps.DeleteFunc(from, func(key, _ string) bool { return !slices.Contains(keys, key) })
		if len(from) == 0 {
			return nil
		}
		return from
	}
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

func (t *trimmer) trimService(svc *corev1.Service) {
	if t.keepsAll {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.trimMeta(&svc.ObjectMeta)
	svc.TypeMeta = metav1.TypeMeta{}
	svc.Spec.Selector = nil
	svc.Status.Conditions = nil
}

func (t *trimmer) trimEndpointSlice(slice *discoveryv1.EndpointSlice) {
	if t.keepsAll {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.trimMeta(&slice.ObjectMeta)
	slice.TypeMeta = metav1.TypeMeta{}
	if text := slice.Annotations[corev1.EndpointsLastChangeTriggerTime]; text == "" {
		slice.Annotations = nil
	} else if at, err := time.Parse(time.RFC3339Nano, text); err != nil || at.Before(t.startedAt) {
		slice.Annotations = nil
	}
	// The decoder leaves up to twice the needed capacity.
	if cap(slice.Endpoints) > len(slice.Endpoints) && !t.discards {
		slice.Endpoints = exactCopy(slice.Endpoints)
	}
	for i := range slice.Endpoints {
		ep := &slice.Endpoints[i]
		ep.Hostname, ep.TargetRef, ep.DeprecatedTopology = nil, nil, nil
		ep.NodeName, ep.Zone = t.internPointer(ep.NodeName), t.internPointer(ep.Zone)
		c := &ep.Conditions
		c.Ready, c.Serving, c.Terminating = t.internBool(c.Ready), t.internBool(c.Serving), t.internBool(c.Terminating)
		ep.Hints = t.internHints(ep.Hints)
	}
	for i := range slice.Ports {
		port := &slice.Ports[i]
		port.Name, port.AppProtocol = t.internPointer(port.Name), nil
	}
}

func (t *trimmer) trimNode(node *corev1.Node) {
	if t.keepsAll {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.trimMeta(&node.ObjectMeta)
	*node = corev1.Node{
		ObjectMeta: node.ObjectMeta,
		Spec:       corev1.NodeSpec{PodCIDR: node.Spec.PodCIDR, PodCIDRs: node.Spec.PodCIDRs, Taints: node.Spec.Taints},
		Status:     corev1.NodeStatus{Addresses: node.Status.Addresses},
	}
}

func (t *trimmer) trimServiceCIDR(cidr *networkingv1.ServiceCIDR) {
	if t.keepsAll {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.trimMeta(&cidr.ObjectMeta)
	*cidr = networkingv1.ServiceCIDR{ObjectMeta: cidr.ObjectMeta, Spec: cidr.Spec, Status: cidr.Status}
}

// exactCopy returns a copy with the smallest capacity that the allocator provides.
func exactCopy[T any](s []T) []T { return append(make([]T, 0, len(s)), s...) }

// intern returns an equal string that is shared.
func (t *trimmer) intern(s string) string {
	shared, ok := t.strings[s]
	if !ok {
		if len(t.strings) >= maxInterned {
			clear(t.strings) // objects keep the strings that they use
		}
		shared = strings.Clone(s) // s may be part of a larger string
		t.strings[shared] = shared
	}
	return shared
}

// internPointer returns a shared pointer to an equal string.
func (t *trimmer) internPointer(s *string) *string {
	if s == nil {
		return nil
	}
	shared, ok := t.pointers[*s]
	if !ok {
		if len(t.pointers) >= maxInterned {
			clear(t.pointers)
		}
		text := t.intern(*s)
		shared = &text
		t.pointers[text] = shared
	}
	return shared
}

func (t *trimmer) internBool(b *bool) *bool {
	switch {
	case b == nil:
		return nil
	case *b:
		return &t.trueValue
	default:
		return &t.falseValue
	}
}

func (t *trimmer) internHints(h *discoveryv1.EndpointHints) *discoveryv1.EndpointHints {
	if h == nil || len(h.ForZones) > 1 || len(h.ForNodes) > 1 {
		return h
	}
	var key hintKey
	if len(h.ForZones) == 1 {
		key.zone, key.hasZone = t.intern(h.ForZones[0].Name), true
	}
	if len(h.ForNodes) == 1 {
		key.node, key.hasNode = t.intern(h.ForNodes[0].Name), true
	}
	shared, ok := t.hints[key]
	if !ok {
		if len(t.hints) >= maxInterned {
			clear(t.hints)
		}
		shared = t.copyHints(h)
		t.hints[key] = shared
	}
	return shared
}

// copyHints returns a copy that shares no memory with the object of h.
func (t *trimmer) copyHints(h *discoveryv1.EndpointHints) *discoveryv1.EndpointHints {
	c := &discoveryv1.EndpointHints{}
	for _, zone := range h.ForZones {
		c.ForZones = append(c.ForZones, discoveryv1.ForZone{Name: t.intern(zone.Name)})
	}
	for _, node := range h.ForNodes {
		c.ForNodes = append(c.ForNodes, discoveryv1.ForNode{Name: t.intern(node.Name)})
	}
	return c
}

// trimPage trims the objects of a page of a list.
func (t *trimmer) trimPage(page runtime.Object) {
	switch page := page.(type) {
	case *corev1.ServiceList:
		forEach(page.Items, t.trimService)
	case *discoveryv1.EndpointSliceList:
		forEach(page.Items, t.trimEndpointSlice)
	case *corev1.NodeList:
		forEach(page.Items, t.trimNode)
	case *networkingv1.ServiceCIDRList:
		forEach(page.Items, t.trimServiceCIDR)
	}
}

func forEach[T any](items []T, do func(*T)) {
	for i := range items {
		do(&items[i])
	}
}
