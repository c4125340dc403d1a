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

// kind is a kind of object that is read.
type kind string

const (
	kindService       kind = "Service"
	kindPod           kind = "Pod"
	kindEndpointSlice kind = "EndpointSlice"
)

// listKind is only a wrapping: no object is of it.
const listKind = "List"

// id names an object.
type id struct {
	kind kind
	name types.NamespacedName
}

func (i id) String() string { return string(i.kind) + " " + i.name.String() }

// object is one object of a file. One of service, pod and slice is set, with
// the defaults that need no other object.
type object struct {
	id      id
	service *corev1.Service
	pod     *corev1.Pod
	slice   *discoveryv1.EndpointSlice

	// Where it comes from.
	file   string
	root   *node
	prefix string // of field paths: items[2] in a List, else empty
}

// line returns the line of a field.
func (o *object) line(field string) int { return o.root.lineOf(field) }

func (o *object) errorf(field, format string, args ...any) *Error {
	path := o.prefix
	if field != "" {
		path = join(o.prefix, field)
	}
	return &Error{File: o.file, Line: o.line(field), Field: path, Message: fmt.Sprintf(format, args...)}
}

// idle says why the object does nothing, if it lacks what people forget.
func (o *object) idle() *Error {
	switch {
	case o.pod != nil:
		status := &o.pod.Status
		// No selector selects a Pod without labels, and one that does not run yet,
		// or not any more, has no address to write down.
		if len(o.pod.Labels) > 0 && status.PodIP == "" && len(status.PodIPs) == 0 &&
			(status.Phase == "" || status.Phase == corev1.PodRunning) {
			return o.errorf("status.podIP", "missing: a Pod without an address is no endpoint of any Service: "+
				"write its address, or status.phase: Pending as long as it has none")
		}
	case o.slice != nil:
		if o.slice.Labels[discoveryv1.LabelServiceName] == "" {
			return o.errorf("metadata.labels", "%s is missing, so the slice belongs to no Service: add this label with the name of the Service",
				discoveryv1.LabelServiceName)
		}
	}
	return nil
}

// comparePlace orders objects by file and line.
func (o *object) comparePlace(p *object) int {
	return cmp.Or(strings.Compare(o.file, p.file), cmp.Compare(o.root.line, p.root.line), strings.Compare(o.prefix, p.prefix))
}

// parsed is what a file holds.
type parsed struct {
	objects []*object
	errs    []*Error
	// bad has the objects that could be named but not be read.
	bad map[id]bool
	// unknown is set if there is an object that could not even be named.
	unknown bool
	// idle has what is right, but does nothing.
	idle []*Error
	// ignored has the objects of kinds that are not read, as "Deployment in
	// line 12".
	ignored []string
}

// parse reads a file. It goes on after each error.
func parse(file string, data []byte) *parsed {
	p := &parser{file: file, parsed: &parsed{bad: map[id]bool{}}}
	for _, chunk := range split(data) {
		nodes, errs := trees(chunk)
		for _, n := range nodes {
			p.document(n, "", true)
		}
		for _, err := range errs {
			p.errs = append(p.errs, &Error{File: file, Line: err.line, Message: err.message})
			p.unknown = true
		}
	}
	slices.SortStableFunc(p.errs, (*Error).compare)
	return p.parsed
}

type parser struct {
	*parsed

	file string
}

// document reads one object. lists says whether it may be a List.
func (p *parser) document(n *node, prefix string, lists bool) {
	fail := func(line int, field, format string, args ...any) {
		p.errs = append(p.errs, &Error{File: p.file, Line: line, Field: field, Message: fmt.Sprintf(format, args...)})
		p.unknown = true
	}
	if n.kind != yaml.MappingNode {
		fail(n.line, prefix, "%s, want an object with apiVersion, kind and metadata", describe(n))
		return
	}
	apiVersion, name := n.text("apiVersion"), n.text("kind")
	switch {
	case name == "":
		fail(n.lineOf("kind"), join(prefix, "kind"), "missing: name the kind of object, such as Service")
		return
	case apiVersion == "":
		fail(n.lineOf("apiVersion"), join(prefix, "apiVersion"), "missing: write v1 for Service and Pod, discovery.k8s.io/v1 for EndpointSlice")
		return
	}
	group, _, ok := strings.Cut(apiVersion, "/")
	if !ok {
		group = ""
	}
	k := kindMeant(name)
	if k == "" || isForeignGroup(group) {
		p.ignored = append(p.ignored, fmt.Sprintf("%s in line %d", name, n.lineOf("kind")))
		return
	}
	want := "v1"
	if k == kindEndpointSlice {
		want = "discovery.k8s.io/v1"
	}
	// An object that is nearly of a kind that is read is one: to leave it out
	// would delete what it was before the slip.
	before := len(p.errs)
	report := func(field, format string, args ...any) {
		p.errs = append(p.errs, &Error{File: p.file, Line: n.lineOf(field), Field: join(prefix, field), Message: fmt.Sprintf(format, args...)})
	}
	if name != string(k) {
		report("kind", "%q is not a kind: did you mean %s?", name, k)
	}
	if apiVersion != want {
		report("apiVersion", "%q is not a version of %s that is read: use %s", apiVersion, k, want)
	}
	switch {
	case len(p.errs) > before && k == listKind:
		p.unknown = true
	case len(p.errs) > before:
		p.spoiled(id{k, nameIn(n)})
	case k == listKind:
		p.list(n, prefix, lists, fail)
	default:
		p.object(n, prefix, k)
	}
}

// kindMeant returns the kind that is read and that a name stands for, be it with
// a slip, or "" if there is none.
func kindMeant(name string) kind {
	lower := strings.ToLower(name)
	if lower == "job" || lower == "node" {
		return "" // Kubernetes' own, and near to Pod
	}
	best, bestDistance := kind(""), 3
	for _, k := range []kind{kindService, kindPod, kindEndpointSlice, listKind} {
		if d := distance(lower, strings.ToLower(string(k))); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// isForeignGroup reports whether the group is that of an API of somebody else,
// which may well have kinds of the same names, as Knative has a Service. The
// groups of Kubernetes have no dot or end in .k8s.io, and have no second kind of
// these names.
func isForeignGroup(group string) bool {
	return strings.Contains(group, ".") && !strings.HasSuffix(group, ".k8s.io") &&
		!strings.HasPrefix(group, "discovery.") && distance(group, "discovery.k8s.io") > 3
}

// nameIn returns the name of an object that cannot be decoded.
func nameIn(n *node) types.NamespacedName {
	return types.NamespacedName{
		Namespace: cmp.Or(n.get("metadata").text("namespace"), corev1.NamespaceDefault),
		Name:      n.get("metadata").text("name"),
	}
}

// spoiled notes that an object is there, but cannot be used.
func (p *parser) spoiled(i id) {
	if i.name.Name == "" {
		p.unknown = true
		return
	}
	p.bad[i] = true
}

func (p *parser) list(n *node, prefix string, lists bool, fail func(int, string, string, ...any)) {
	if !lists {
		fail(n.line, join(prefix, "kind"), "a List in a List: move its items up")
		return
	}
	for _, f := range n.fields {
		switch f.name {
		case "apiVersion", "kind", "metadata", "items":
		default:
			fail(f.line, f.name, "unknown field: remove it, or correct its name or its indentation")
		}
	}
	items := n.get("items")
	if items == nil || items.tag == "!!null" {
		return
	}
	if items.kind != yaml.SequenceNode {
		fail(n.lineOf("items"), "items", "%s, want a list: begin each item with \"- \"", describe(items))
		return
	}
	for i, item := range items.items {
		p.document(item, fmt.Sprintf("items[%d]", i), false)
	}
}

// object reads, completes and validates one object of a kind that is read.
func (p *parser) object(n *node, prefix string, k kind) {
	o := &object{file: p.file, root: n, prefix: prefix}
	before := len(p.errs)
	// Validators count paths from the object, people from the document.
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
		if err := o.idle(); err != nil {
			p.idle = append(p.idle, err)
		}
		return
	}
	if !ok {
		o.id.name = nameIn(n)
	}
	p.spoiled(o.id)
}
