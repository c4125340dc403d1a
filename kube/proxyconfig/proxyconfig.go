// Package proxyconfig decodes kube-proxy's configuration file, a KubeProxyConfiguration
// (kubeproxy.config.k8s.io/v1alpha1), as kube-proxy does.
package proxyconfig

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	kubejson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Kind is the kind of the document.
const Kind = "KubeProxyConfiguration"

// Document is a decoded configuration file.
type Document struct {
	// Fields maps the paths of the fields, for example "ipvs.scheduler", to their values in the
	// form of flags. It omits empty fields, and fields that are zero or false unless kube-proxy
	// distinguishes these values from an unset field.
	Fields map[string]string
	// Ignored lists the parts of the file that kube-proxy ignores, sorted.
	Ignored []IgnoredPart
}

// IgnoredPart is a part of the file that kube-proxy ignores.
type IgnoredPart struct {
	// Name is the path of a field, or describes another part of the file.
	Name string
	// Reason says why the part is ignored and, if possible, what applies instead.
	Reason string
}

// Decode decodes the first YAML document of a configuration file. Like kube-proxy, it ignores
// unknown fields, all but the last value of a duplicate field, and further documents. The error
// names the field if there is one.
func Decode(content []byte) (Document, error) {
	asJSON, err := yaml.YAMLToJSON(content)
	if err != nil {
		return Document{}, err
	}
	var document map[string]any
	if err := kubejson.UnmarshalCaseSensitivePreserveInts(asJSON, &document); err != nil {
		return Document{}, errors.New("the file contains no mapping of fields to values")
	}
	if got, want := document["apiVersion"], v1alpha1.SchemeGroupVersion.String(); got != want {
		return Document{}, fmt.Errorf("apiVersion: got %v, want %s", quoteOrNone(got), want)
	}
	if got := document["kind"]; got != Kind {
		return Document{}, fmt.Errorf("kind: got %v, want %s", quoteOrNone(got), Kind)
	}
	// Only the names and types are checked. document contains the fields that are set.
	var typed v1alpha1.KubeProxyConfiguration
	strict, err := kubejson.UnmarshalStrict(asJSON, &typed)
	if err != nil {
		return Document{}, err
	}
	delete(document, "apiVersion")
	delete(document, "kind")
	fields := flatten("", document)
	ignored := removeUnknown(fields, strict)
	ignored = append(ignored, findRepetitions(content)...)
	slices.SortStableFunc(ignored, func(a, b IgnoredPart) int { return strings.Compare(a.Name, b.Name) })
	return Document{Fields: fields, Ignored: ignored}, nil
}

func quoteOrNone(value any) string {
	if value == nil {
		return "nothing"
	}
	return fmt.Sprintf("%q", fmt.Sprint(value))
}

// flatten returns the fields of a part of the document, whose path is given, without fields that
// kube-proxy treats as not set.
func flatten(path string, document map[string]any) map[string]string {
	types := fieldTypes()
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
		if isUnset(types[name], found[name]) {
			delete(found, name)
		}
	}
	return found
}

// isUnset reports whether kube-proxy treats the value of a field like an unset field. Its types
// have pointers where zero and false differ from unset.
func isUnset(fieldType reflect.Type, value string) bool {
	switch value {
	case "":
		return true
	case "0", "0s", "false":
		return fieldType == nil || fieldType.Kind() != reflect.Pointer
	}
	return false
}

// removeUnknown removes the fields that strict decoding has rejected, and returns them.
func removeUnknown(fields map[string]string, strict []error) []IgnoredPart {
	known := fieldTypes()
	for _, name := range Fields() {
		section, _, _ := strings.Cut(name, ".")
		known[section] = nil
	}
	var unknown []IgnoredPart
	for _, err := range strict {
		var field kubejson.FieldError
		if !errors.As(err, &field) || field.FieldPath() == "" {
			continue
		}
		path := field.FieldPath()
		maps.DeleteFunc(fields, func(name, _ string) bool { return name == path || strings.HasPrefix(name, path+".") })
		part := IgnoredPart{Name: path, Reason: "unknown field"}
		for name := range known {
			if strings.EqualFold(name, path) {
				part.Reason = "unknown field: write it as " + name
			}
		}
		unknown = append(unknown, part)
	}
	return unknown
}

// Fields returns the paths of all fields of a KubeProxyConfiguration, sorted.
func Fields() []string { return slices.Sorted(maps.Keys(fieldTypes())) }

// fieldTypes maps the paths of all fields of a KubeProxyConfiguration to their types.
func fieldTypes() map[string]reflect.Type {
	types := map[string]reflect.Type{}
	addFieldTypes(types, "", reflect.TypeFor[v1alpha1.KubeProxyConfiguration]())
	return types
}

func addFieldTypes(types map[string]reflect.Type, path string, section reflect.Type) {
	for field := range section.Fields() {
		if field.Type == reflect.TypeFor[metav1.TypeMeta]() {
			continue
		}
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		switch {
		case field.Anonymous:
			name = path
		case path != "":
			name = path + "." + name
		}
		// Structs that decode themselves are single values, for example durations.
		if field.Type.Kind() == reflect.Struct && !reflect.PointerTo(field.Type).Implements(reflect.TypeFor[json.Unmarshaler]()) {
			addFieldTypes(types, name, field.Type)
			continue
		}
		if !strings.HasSuffix(name, ".-") {
			types[name] = field.Type
		}
	}
}
