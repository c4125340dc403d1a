package manifest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// kind is a kind of object that is supported.
type kind string

const (
	kindService       kind = "Service"
	kindPod           kind = "Pod"
	kindEndpointSlice kind = "EndpointSlice"
)

// kindList wraps objects of other kinds.
const kindList = "List"

// objectID identifies an object.
type objectID struct {
	kind kind
	name types.NamespacedName
}

func (i objectID) String() string { return string(i.kind) + " " + i.name.String() }

// object is one object of a file. One of service, pod and slice is set, with all defaults
// that do not depend on other objects.
type object struct {
	id      objectID
	service *corev1.Service
	pod     *corev1.Pod
	slice   *discoveryv1.EndpointSlice

	// The position in the file.
	file        string
	root        *node
	fieldPrefix string // prefix of field paths: items[2] in a List, else empty
}

// line returns the line of a field.
func (o *object) line(field string) int { return o.root.lineOf(field) }

func (o *object) errorf(field, format string, args ...any) *Error {
	path := o.fieldPrefix
	if field != "" {
		path = joinPath(o.fieldPrefix, field)
	}
	return &Error{File: o.file, Line: o.line(field), Field: path, Message: fmt.Sprintf(format, args...)}
}

// ineffective returns a warning if the object is valid but has no effect.
func (o *object) ineffective() *Error {
	switch {
	case o.pod != nil:
		status := &o.pod.Status
		// No selector matches a Pod without labels. A Pod that is not running has no
		// address.
		if len(o.pod.Labels) > 0 && status.PodIP == "" && len(status.PodIPs) == 0 &&
			(status.Phase == "" || status.Phase == corev1.PodRunning) {
			return o.errorf("status.podIP", "missing: a Pod without an address is not an endpoint: "+
				"write its address, or status.phase: Pending until it has one")
		}
	case o.slice != nil:
		if o.slice.Labels[discoveryv1.LabelServiceName] == "" {
			return o.errorf("metadata.labels", "label %s is missing: set it to the name of the Service",
				discoveryv1.LabelServiceName)
		}
	}
	return nil
}

// comparePosition orders objects by file and line.
func (o *object) comparePosition(p *object) int {
	return cmp.Or(strings.Compare(o.file, p.file), cmp.Compare(o.root.line, p.root.line), strings.Compare(o.fieldPrefix, p.fieldPrefix))
}

// parsedFile has the result of parsing a file.
type parsedFile struct {
	objects []*object
	errs    []*Error
	// invalid has the identified objects with errors.
	invalid map[objectID]bool
	// unidentified is set if an object could not be identified.
	unidentified bool
	// warnings has the warnings about valid objects without effect.
	warnings []*Error
	// skipped has the objects of unsupported kinds, such as "Deployment in line 12".
	skipped []string
}

// parseFile parses a file. It continues after each error.
func parseFile(file string, data []byte) *parsedFile {
	p := &parser{file: file, parsedFile: &parsedFile{invalid: map[objectID]bool{}}}
	for _, chunk := range splitDocuments(data) {
		nodes, errs := parseTrees(chunk)
		for _, n := range nodes {
			p.parseDocument(n, "", true)
		}
		for _, err := range errs {
			p.errs = append(p.errs, &Error{File: file, Line: err.line, Message: err.message})
			p.unidentified = true
		}
	}
	slices.SortStableFunc(p.errs, (*Error).compare)
	return p.parsedFile
}

type parser struct {
	*parsedFile

	file string
}

// parseDocument parses one object. lists reports whether it may be a List.
func (p *parser) parseDocument(n *node, prefix string, lists bool) {
	fail := func(line int, field, format string, args ...any) {
		p.errs = append(p.errs, &Error{File: p.file, Line: line, Field: field, Message: fmt.Sprintf(format, args...)})
		p.unidentified = true
	}
	if n.kind != yaml.MappingNode {
		fail(n.line, prefix, "%s, want an object with apiVersion, kind and metadata", describeNode(n))
		return
	}
	apiVersion, name := n.fieldText("apiVersion"), n.fieldText("kind")
	switch {
	case name == "":
		fail(n.lineOf("kind"), joinPath(prefix, "kind"), "missing: name the kind of object, such as Service")
		return
	case apiVersion == "":
		fail(n.lineOf("apiVersion"), joinPath(prefix, "apiVersion"), "missing: write v1 for Service and Pod, discovery.k8s.io/v1 for EndpointSlice")
		return
	}
	group, _, ok := strings.Cut(apiVersion, "/")
	if !ok {
		group = ""
	}
	k := closestKind(name)
	if k == "" || isThirdPartyGroup(group) {
		p.skipped = append(p.skipped, fmt.Sprintf("%s in line %d", name, n.lineOf("kind")))
		return
	}
	want := "v1"
	if k == kindEndpointSlice {
		want = "discovery.k8s.io/v1"
	}
	// A misspelled kind is an error: skipping the object would delete its last valid version.
	before := len(p.errs)
	report := func(field, format string, args ...any) {
		p.errs = append(p.errs, &Error{File: p.file, Line: n.lineOf(field), Field: joinPath(prefix, field), Message: fmt.Sprintf(format, args...)})
	}
	if name != string(k) {
		report("kind", "%q is not a kind: did you mean %s?", name, k)
	}
	if apiVersion != want {
		report("apiVersion", "%q is not a supported version of %s: use %s", apiVersion, k, want)
	}
	switch {
	case len(p.errs) > before && k == kindList:
		p.unidentified = true
	case len(p.errs) > before:
		p.markInvalid(objectID{k, metadataName(n)})
	case k == kindList:
		p.parseList(n, prefix, lists, fail)
	default:
		p.parseObject(n, prefix, k)
	}
}

// closestKind returns the supported kind that name spells, possibly with a typo, or "".
func closestKind(name string) kind {
	lower := strings.ToLower(name)
	if lower == "job" || lower == "node" {
		return "" // kinds of Kubernetes whose names are similar to Pod
	}
	best, bestDistance := kind(""), 3
	for _, k := range []kind{kindService, kindPod, kindEndpointSlice, kindList} {
		if d := editDistance(lower, strings.ToLower(string(k))); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// isThirdPartyGroup reports whether an API group is not Kubernetes' own. Third-party groups
// may have kinds of the same names, such as Knative's Service. Groups of Kubernetes have no
// dot or end in .k8s.io; they have no second kind of these names.
func isThirdPartyGroup(group string) bool {
	return strings.Contains(group, ".") && !strings.HasSuffix(group, ".k8s.io") &&
		!strings.HasPrefix(group, "discovery.") && editDistance(group, "discovery.k8s.io") > 3
}

// metadataName returns the name of an object that cannot be decoded.
func metadataName(n *node) types.NamespacedName {
	return types.NamespacedName{
		Namespace: cmp.Or(n.field("metadata").fieldText("namespace"), corev1.NamespaceDefault),
		Name:      n.field("metadata").fieldText("name"),
	}
}

// markInvalid records that the file has the object, but with errors.
func (p *parser) markInvalid(i objectID) {
	if i.name.Name == "" {
		p.unidentified = true
		return
	}
	p.invalid[i] = true
}

func (p *parser) parseList(n *node, prefix string, lists bool, fail func(int, string, string, ...any)) {
	if !lists {
		fail(n.line, joinPath(prefix, "kind"), "a List must not contain a List: move its items up")
		return
	}
	for _, f := range n.fields {
		switch f.name {
		case "apiVersion", "kind", "metadata", "items":
		default:
			fail(f.line, f.name, "unknown field: remove it, or correct its name or its indentation")
		}
	}
	items := n.field("items")
	if items == nil || items.tag == "!!null" {
		return
	}
	if items.kind != yaml.SequenceNode {
		fail(n.lineOf("items"), "items", "%s, want a list: begin each item with \"- \"", describeNode(items))
		return
	}
	for i, item := range items.items {
		p.parseDocument(item, fmt.Sprintf("items[%d]", i), false)
	}
}

// parseObject decodes, defaults and validates an object.
func (p *parser) parseObject(n *node, prefix string, k kind) {
	o := &object{file: p.file, root: n, fieldPrefix: prefix}
	before := len(p.errs)
	// Validators report paths relative to the object, errorf relative to the document.
	report := func(field, message string) { p.errs = append(p.errs, o.errorf(field, "%s", message)) }
	var ok bool
	switch k {
	case kindService:
		o.service = &corev1.Service{}
		if ok = decode(n, o.service, "", report); ok {
			defaultService(o.service)
			validateService(o.service, report)
			o.id.name = types.NamespacedName{Namespace: o.service.Namespace, Name: o.service.Name}
		}
	case kindPod:
		o.pod = &corev1.Pod{}
		if ok = decode(n, o.pod, "", report); ok {
			defaultNamespace(&o.pod.ObjectMeta)
			validatePod(o.pod, report)
			o.id.name = types.NamespacedName{Namespace: o.pod.Namespace, Name: o.pod.Name}
		}
	case kindEndpointSlice:
		o.slice = &discoveryv1.EndpointSlice{}
		if ok = decode(n, o.slice, "", report); ok {
			defaultEndpointSlice(o.slice)
			validateEndpointSlice(o.slice, report)
			o.id.name = types.NamespacedName{Namespace: o.slice.Namespace, Name: o.slice.Name}
		}
	}
	o.id.kind = k
	if len(p.errs) == before {
		p.objects = append(p.objects, o)
		if err := o.ineffective(); err != nil {
			p.warnings = append(p.warnings, err)
		}
		return
	}
	if !ok {
		o.id.name = metadataName(n)
	}
	p.markInvalid(o.id)
}
