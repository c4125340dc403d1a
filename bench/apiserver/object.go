package apiserver

import (
	"encoding/json"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// Object is a Kubernetes object of a kind that a [Server] serves: *corev1.Service, *corev1.Node,
// *discoveryv1.EndpointSlice or *networkingv1.ServiceCIDR.
type Object interface {
	runtime.Object
	metav1.Object
	Marshal() ([]byte, error)
}

// resource identifies a kind of object in the API.
type resource struct {
	group, version, plural, kind string
}

func (r resource) typeMeta() metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: schema.GroupVersion{Group: r.group, Version: r.version}.String(), Kind: r.kind}
}

// resources returns all resources that a [Server] serves.
func resources() []resource {
	return []resource{
		{"", "v1", "services", "Service"},
		{"", "v1", "nodes", "Node"},
		{"discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"},
		{"networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR"},
	}
}

// newObject returns an empty object of the resource with its type metadata.
func (r resource) newObject() Object {
	switch r.kind {
	case "Service":
		return &corev1.Service{TypeMeta: r.typeMeta()}
	case "Node":
		return &corev1.Node{TypeMeta: r.typeMeta()}
	case "EndpointSlice":
		return &discoveryv1.EndpointSlice{TypeMeta: r.typeMeta()}
	default:
		return &networkingv1.ServiceCIDR{TypeMeta: r.typeMeta()}
	}
}

// resourceOf returns the resource of an object.
func resourceOf(o Object) (resource, error) {
	var kind string
	switch o.(type) {
	case *corev1.Service:
		kind = "Service"
	case *corev1.Node:
		kind = "Node"
	case *discoveryv1.EndpointSlice:
		kind = "EndpointSlice"
	case *networkingv1.ServiceCIDR:
		kind = "ServiceCIDR"
	}
	for _, r := range resources() {
		if r.kind == kind {
			return r, nil
		}
	}
	return resource{}, fmt.Errorf("unsupported object type %T", o)
}

// VersionSequence generates resource versions. Versions of one VersionSequence can be put into
// several Servers, into each of them in the order in which they were stamped. The zero value is
// ready to use. Its methods may be called concurrently.
type VersionSequence struct {
	last atomic.Uint64
}

// Version is an object with its resource version. It is immutable, except for the result of SentAt.
// Several Servers may share a Version and its encodings.
type Version struct {
	resource        resource
	name            types.NamespacedName
	resourceVersion uint64
	object          Object

	protobuf, json func() ([]byte, error)

	sentAt atomic.Pointer[time.Time]
}

// Stamp sets the next resource version on the object and returns it as a Version. The Version owns
// the object: the caller must no longer modify it.
func (c *VersionSequence) Stamp(o Object) (*Version, error) {
	r, err := resourceOf(o)
	if err != nil {
		return nil, err
	}
	v := &Version{
		resource: r, object: o, resourceVersion: c.last.Add(1),
		name: types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()},
	}
	o.SetResourceVersion(strconv.FormatUint(v.resourceVersion, 10))
	meta := r.typeMeta()
	o.GetObjectKind().SetGroupVersionKind(meta.GroupVersionKind())
	v.protobuf = sync.OnceValues(o.Marshal)
	v.json = sync.OnceValues(func() ([]byte, error) { return json.Marshal(o) })
	return v, nil
}

// ResourceVersion returns the resource version.
func (v *Version) ResourceVersion() uint64 { return v.resourceVersion }

// SentAt returns when a watch of any Server first began to send the version as an event, and false if
// none has.
func (v *Version) SentAt() (time.Time, bool) {
	if at := v.sentAt.Load(); at != nil {
		return *at, true
	}
	return time.Time{}, false
}

// fields returns the fields that field selectors support.
func (v *Version) fields() fields.Set {
	set := fields.Set{"metadata.name": v.name.Name, "metadata.namespace": v.name.Namespace}
	if s, ok := v.object.(*corev1.Service); ok {
		set["spec.clusterIP"] = s.Spec.ClusterIP
		set["spec.type"] = string(s.Spec.Type)
	}
	return set
}
