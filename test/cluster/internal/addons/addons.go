// Package addons installs what a cluster needs beside the control plane and the nodes: the Service
// proxy and the DNS server.
package addons

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"text/template"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"fairlead.io/fairlead/test/cluster/internal/images"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

//go:embed coredns.yaml
var corednsManifest string

//go:embed kube-proxy.yaml
var kubeProxyManifest string

// All returns the objects of a cluster.
func All(cluster *topology.Cluster) ([]*unstructured.Unstructured, error) {
	objects, err := decode(corednsManifest)
	if err != nil {
		return nil, fmt.Errorf("CoreDNS: %w", err)
	}
	var proxy []*unstructured.Unstructured
	switch cluster.Proxy {
	case topology.Fairlead:
		proxy, err = fairlead(cluster)
	case topology.KubeProxy:
		proxy, err = kubeProxy(cluster)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cluster.Proxy, err)
	}
	return append(proxy, objects...), nil
}

func kubeProxy(cluster *topology.Cluster) ([]*unstructured.Unstructured, error) {
	t, err := template.New("").Option("missingkey=error").Parse(kubeProxyManifest)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = t.Execute(&b, map[string]string{
		"PodCIDRs": topology.Join(topology.PodCIDRs()), "Mode": cluster.Mode, "APIServer": topology.APIServer().String(), "Image": images.KubeProxy,
	})
	if err != nil {
		return nil, err
	}
	return decode(b.String())
}

// decode returns the objects of a stream of YAML documents.
func decode(text string) ([]*unstructured.Unstructured, error) {
	var objects []*unstructured.Unstructured
	for document := range strings.SplitSeq(text, "\n---\n") {
		object := &unstructured.Unstructured{}
		if err := yaml.UnmarshalStrict([]byte(document), &object.Object); err != nil {
			return nil, fmt.Errorf("%w:\n%s", err, document)
		}
		if len(object.Object) > 0 {
			objects = append(objects, object)
		}
	}
	return objects, nil
}

// Apply creates objects, or changes them if they exist. A new API server may not have created the
// namespace kube-system yet, so Apply tries again until ctx ends.
func Apply(ctx context.Context, client dynamic.Interface, objects []*unstructured.Unstructured) error {
	for _, object := range objects {
		// The plural of all kinds here follows the usual rule.
		resource, _ := meta.UnsafeGuessKindToResource(object.GroupVersionKind())
		namespaced := client.Resource(resource).Namespace(object.GetNamespace())
		apply := condition{object.GetKind() + " " + object.GetName(), func() (string, error) {
			_, err := namespaced.Apply(ctx, object.GetName(), object, metav1.ApplyOptions{FieldManager: "fairlead-cluster", Force: true})
			if err != nil && !apierrors.IsNotFound(err) {
				return "", errors.Join(errPermanent, err)
			}
			return "", err
		}}
		if err := apply.wait(ctx); err != nil {
			return fmt.Errorf("apply %s: %w", apply.name, err)
		}
	}
	return nil
}
