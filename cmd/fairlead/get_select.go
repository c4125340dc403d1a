package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/inspect"
)

// serviceQuery selects Services. Either name, addr or port is set; addr and port can both be set.
type serviceQuery struct {
	text string
	// namespace is empty for the namespace of the command.
	namespace, name, portName string
	addr                      netip.Addr
	port                      uint16
}

// parseServiceQuery parses NAME, NAMESPACE/NAME, NAME:PORTNAME, ADDRESS, ADDRESS:PORT or PORT.
func parseServiceQuery(text string) (serviceQuery, error) {
	q := serviceQuery{text: text}
	if addr, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil {
		q.addr = addr.Unmap()
		return q, nil
	}
	if addr, err := netip.ParseAddrPort(text); err == nil {
		q.addr, q.port = addr.Addr().Unmap(), addr.Port()
		return q, nil
	}
	if strings.Trim(text, "0123456789") == "" && text != "" {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			return q, fmt.Errorf("%q is not a port: use a number from 1 to 65535", text)
		}
		q.port = uint16(port)
		return q, nil
	}
	q.name, q.portName, _ = strings.Cut(text, ":")
	if namespace, name, ok := strings.Cut(q.name, "/"); ok {
		q.namespace, q.name = namespace, name
	}
	if q.name == "" || strings.Contains(q.name, "/") {
		return q, fmt.Errorf("%q is not a Service: use NAME, NAMESPACE/NAME, NAME:PORTNAME, ADDRESS, ADDRESS:PORT or PORT", text)
	}
	return q, nil
}

// allSelectAddresses reports whether there are arguments and all of them are addresses, ports or
// names with a namespace.
func allSelectAddresses(args []string) bool {
	return len(args) > 0 && !slices.ContainsFunc(args, func(arg string) bool {
		q, err := parseServiceQuery(arg)
		return err != nil || q.name != "" && q.namespace == ""
	})
}

// matches reports whether the query selects a frontend. The caller checks the namespace of the
// command.
func (q serviceQuery) matches(k *inspect.Kernel, f *inspect.Frontend) bool {
	if q.name != "" {
		namespace, name, port := f.Service()
		return name == q.name && (q.namespace == "" || q.namespace == namespace) && (q.portName == "" || q.portName == port)
	}
	return q.matchesFrontend(k, f) || slices.ContainsFunc(f.Endpoints, q.matchesEndpoint)
}

// matchesFrontend reports whether the query selects a frontend by its address or port.
func (q serviceQuery) matchesFrontend(k *inspect.Kernel, f *inspect.Frontend) bool {
	at := f.Frontend.Addr
	switch {
	case q.port != 0 && q.port != at.Port():
		return false
	case !q.addr.IsValid() || q.addr == at.Addr():
		return q.name == ""
	default:
		return at.Addr().IsUnspecified() && dataplane.FamilyOf(at.Addr()) == dataplane.FamilyOf(q.addr) && k.IsNodePortAddr(q.addr)
	}
}

// matchesEndpoint reports whether the query selects an endpoint by its address. A port alone
// selects frontends only.
func (q serviceQuery) matchesEndpoint(e inspect.Endpoint) bool {
	return q.addr.IsValid() && q.addr == e.Addr.Addr() && (q.port == 0 || q.port == e.Addr.Port())
}

// getResult is what `fairlead get` prints.
type getResult struct {
	kernel  *inspect.Kernel
	options getOptions
	queries []serviceQuery
	// objects is nil if the API server was not read.
	objects *serviceObjects
	// frontends are the selected frontends.
	frontends []*inspect.Frontend
}

// selectFrontends sets frontends.
func (r *getResult) selectFrontends() error {
	selector := labels.Everything()
	if r.options.selector != "" {
		var err error
		if selector, err = labels.Parse(r.options.selector); err != nil {
			return fmt.Errorf("--selector: %w", err)
		}
	}
	for i := range r.kernel.Frontends {
		f := &r.kernel.Frontends[i]
		if r.selects(f) && (selector.Empty() || selector.Matches(r.objects.labels(f))) {
			r.frontends = append(r.frontends, f)
		}
	}
	return nil
}

func (r *getResult) selects(f *inspect.Frontend) bool {
	namespace, _, _ := f.Service()
	selects := func(q serviceQuery) bool {
		inNamespace := r.options.allNamespaces || q.namespace != "" || namespace == r.options.namespace
		return inNamespace && q.matches(r.kernel, f)
	}
	if len(r.queries) == 0 {
		return r.options.allNamespaces || namespace == r.options.namespace
	}
	return slices.ContainsFunc(r.queries, selects)
}

// notFound returns an error for each query that selects nothing.
func (r *getResult) notFound() error {
	var errs []error
	for _, q := range r.queries {
		if !slices.ContainsFunc(r.frontends, func(f *inspect.Frontend) bool { return q.matches(r.kernel, f) }) {
			errs = append(errs, r.notFoundError(q))
		}
	}
	return errors.Join(errs...)
}

func (r *getResult) notFoundError(q serviceQuery) error {
	switch {
	case q.addr.IsValid():
		return fmt.Errorf("no frontend and no endpoint in the kernel has the address %s", q.text)
	case q.port != 0:
		return fmt.Errorf("no frontend in the kernel has the port %s", q.text)
	}
	namespace := q.namespace
	if namespace == "" && !r.options.allNamespaces {
		namespace = r.options.namespace
	}
	return r.kernel.NotFound(namespace, q.name, q.portName)
}
