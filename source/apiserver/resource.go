package apiserver

import (
	"fmt"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"

	"fairlead.io/fairlead/kube"
)

// resource is the plural name of an API resource that the Source follows.
type resource string

const (
	services       resource = "services"
	endpointSlices resource = "endpointslices"
	nodes          resource = "nodes"
	serviceCIDRs   resource = "servicecidrs"
)

// groupVersion returns the API group and version of the resource.
func (res resource) groupVersion() schema.GroupVersion {
	switch res {
	case endpointSlices:
		return discoveryv1.SchemeGroupVersion
	case serviceCIDRs:
		return networkingv1.SchemeGroupVersion
	case services, nodes:
		return corev1.SchemeGroupVersion
	default:
		return corev1.SchemeGroupVersion
	}
}

// selection chooses the objects that this node needs.
type selection struct {
	nodeName, proxyName string
	// headless means that the server cannot leave out headless Services: Kubernetes knows the
	// field selector since 1.31. Package kube ignores these Services.
	headless atomic.Bool
}

// addSelectors adds selectors that leave out objects which this node does not need. The
// server reports an object that stops matching as deleted.
//
// The EndpointSlice controller copies the labels of a Service to its slices. Slices that a user
// writes may lack them, so the default proxy does not filter them by proxy.
func (s *selection) addSelectors(res resource, opts *metav1.ListOptions) {
	switch res {
	case services:
		opts.LabelSelector = "!" + kube.LabelServiceProxyName
		if s.proxyName != "" {
			opts.LabelSelector = kube.LabelServiceProxyName + "=" + s.proxyName
		}
		opts.FieldSelector = ""
		if !s.headless.Load() {
			opts.FieldSelector = "spec.clusterIP!=" + corev1.ClusterIPNone
		}
	case endpointSlices:
		opts.LabelSelector = "!" + corev1.IsHeadlessService
		if s.proxyName != "" {
			opts.LabelSelector += "," + kube.LabelServiceProxyName + "=" + s.proxyName
		}
	case nodes:
		opts.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, s.nodeName).String()
	case serviceCIDRs:
	}
}

// clients holds a REST client for each API group. A clientset would keep the types of all
// Kubernetes APIs in memory.
type clients map[schema.GroupVersion]*client

// client is a REST client with the serializer of its objects.
type client struct {
	*rest.RESTClient

	serializer runtime.NegotiatedSerializer
}

// newClients returns clients for the groups. They share a transport and a rate limiter.
func newClients(config *rest.Config, version string, groups ...schema.GroupVersion) (clients, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme, eventsv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register API types: %w", err)
		}
	}
	config = rest.CopyConfig(config)
	if config.UserAgent == "" {
		config.UserAgent = "fairlead"
		if version != "" {
			config.UserAgent += "/" + version
		}
	}
	if config.ContentType == "" {
		config.ContentType = protobuf
		config.AcceptContentTypes = protobuf + ",application/json"
	}
	if config.WarningHandler == nil && config.WarningHandlerWithContext == nil {
		config.WarningHandler = rest.NoWarnings{} // an operator can't act on deprecation warnings
	}
	if config.RateLimiter == nil && config.QPS >= 0 {
		qps, burst := config.QPS, config.Burst
		if qps == 0 {
			qps = rest.DefaultQPS
		}
		if burst == 0 {
			burst = rest.DefaultBurst
		}
		config.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(qps, burst)
	}
	http, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("create API server client: %w", err)
	}
	out := clients{}
	for _, group := range groups {
		config.GroupVersion = &group
		config.APIPath = "/apis"
		if group.Group == "" {
			config.APIPath = "/api"
		}
		config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
		restClient, err := rest.RESTClientForConfigAndClient(config, http)
		if err != nil {
			return nil, fmt.Errorf("create API server client: %w", err)
		}
		out[group] = &client{RESTClient: restClient, serializer: config.NegotiatedSerializer}
	}
	return out, nil
}
