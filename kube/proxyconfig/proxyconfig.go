// Package proxyconfig decodes kube-proxy's configuration file, a KubeProxyConfiguration
// (kubeproxy.config.k8s.io/v1alpha1).
package proxyconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/kube-proxy/config/v1alpha1"
	kubejson "sigs.k8s.io/json"
)

// Kind is the kind of the document.
const Kind = "KubeProxyConfiguration"

// Decode returns the fields of a document by path, for example "ipvs.scheduler", with their
// values in the form of flags. It omits fields that are empty, zero or false, because kube-proxy
// treats them as not set. The error names the field if there is one.
func Decode(content []byte) (map[string]string, error) {
	var document map[string]any
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	if err := decoder.Decode(&document); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var second any
	if err := decoder.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one document: keep only the " + Kind)
	}
	if got, want := document["apiVersion"], v1alpha1.SchemeGroupVersion.String(); got != want {
		return nil, fmt.Errorf("apiVersion: got %v, want %s", quoteOrNone(got), want)
	}
	if got := document["kind"]; got != Kind {
		return nil, fmt.Errorf("kind: got %v, want %s", quoteOrNone(got), Kind)
	}
	asJSON, err := json.Marshal(document)
	if err != nil {
		return nil, err
	}
	// Only the types are checked. The document contains the fields that are set.
	var typed v1alpha1.KubeProxyConfiguration
	strict, err := kubejson.UnmarshalStrict(asJSON, &typed)
	if err := errors.Join(append(strict, err)...); err != nil {
		return nil, err
	}
	delete(document, "apiVersion")
	delete(document, "kind")
	return flatten("", document), nil
}

func quoteOrNone(value any) string {
	if value == nil {
		return "nothing"
	}
	return fmt.Sprintf("%q", fmt.Sprint(value))
}

// flatten returns the fields of a part of the document, whose path is given.
func flatten(path string, document map[string]any) map[string]string {
	found := map[string]string{}
	for name, value := range document {
		if path != "" {
			name = path + "." + name
		}
		switch value := value.(type) {
		case map[string]any:
			maps.Copy(found, flatten(name, value))
		case []any:
			var elements []string
			for _, element := range value {
				elements = append(elements, fmt.Sprint(element))
			}
			found[name] = strings.Join(elements, ",")
		case nil:
		default:
			found[name] = fmt.Sprint(value)
		}
		switch found[name] {
		case "", "0", "0s", "false":
			delete(found, name)
		}
	}
	return found
}

// Fields returns the paths of all fields of a KubeProxyConfiguration.
func Fields() []string { return fieldPaths("", reflect.TypeFor[v1alpha1.KubeProxyConfiguration]()) }

func fieldPaths(path string, of reflect.Type) []string {
	var paths []string
	for field := range of.Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if name == "" { // the embedded TypeMeta
			continue
		}
		if path != "" {
			name = path + "." + name
		}
		if field.Type.Kind() == reflect.Struct && strings.HasSuffix(field.Type.Name(), "Configuration") {
			paths = append(paths, fieldPaths(name, field.Type)...)
			continue
		}
		paths = append(paths, name)
	}
	return paths
}
