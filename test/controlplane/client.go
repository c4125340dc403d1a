package controlplane

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// Client returns a client with all permissions for an API group. It uses protobuf and knows
// only the added types. A clientset, which knows all types, would make programs that run a
// control plane much larger.
func (cp *ControlPlane) Client(group schema.GroupVersion, add ...func(*runtime.Scheme) error) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	for _, types := range add {
		if err := types(scheme); err != nil {
			return nil, fmt.Errorf("register API types: %w", err)
		}
	}
	config := cp.Config()
	config.GroupVersion, config.APIPath = &group, "/apis"
	if group.Group == "" {
		config.APIPath = "/api"
	}
	config.ContentType = runtime.ContentTypeProtobuf
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientForConfigAndClient(config, cp.admin)
	if err != nil {
		return nil, fmt.Errorf("create a client for %s: %w", group, err)
	}
	return client, nil
}
