package trace

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/inspect"
)

// NamedFrontend is a frontend with its Service.
type NamedFrontend struct {
	Namespace, Service, Port string
	Kind                     dataplane.Kind
	Frontend                 dataplane.Frontend
}

// Target is the destination that a user has given: a host and optionally a port and a protocol.
type Target struct {
	Host string
	// Port is a number or the name of a Service port. Protocol is 0 if it is not given.
	Port     string
	Protocol dataplane.Protocol
}

// ParseTarget parses TO[:PORT][/PROTOCOL].
func ParseTarget(text string) (Target, error) {
	var t Target
	rest := text
	if i := strings.LastIndexByte(rest, '/'); i >= 0 {
		for _, p := range []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP} {
			if strings.EqualFold(rest[i+1:], p.String()) {
				t.Protocol, rest = p, rest[:i]
				break
			}
		}
	}
	switch addr, err := netip.ParseAddr(rest); {
	case err == nil:
		t.Host = addr.String()
		return t, nil
	case strings.HasPrefix(rest, "["):
		host, port, ok := strings.Cut(rest[1:], "]")
		if !ok || port != "" && port[0] != ':' {
			return t, fmt.Errorf("destination %q: not an IPv6 address in brackets: use [ADDRESS]:PORT", text)
		}
		t.Host, t.Port = host, strings.TrimPrefix(port, ":")
	default:
		t.Host, t.Port, _ = strings.Cut(rest, ":")
	}
	if t.Host == "" {
		return t, fmt.Errorf("destination %q: no Service, host name or address: use TO[:PORT][/PROTOCOL]", text)
	}
	return t, nil
}

// Resolve returns the address and the protocol of the target. namespace is the namespace of
// Services without one. prefer is the family to use if the target has addresses of both.
func (t Target) Resolve(frontends []NamedFrontend, namespace string, prefer dataplane.Family) (netip.AddrPort, dataplane.Protocol, error) {
	host := t.Host
	switch strings.ToLower(host) {
	case "localhost":
		if host = "127.0.0.1"; prefer == dataplane.IPv6 {
			host = "::1"
		}
	case "ip6-localhost":
		host = "::1"
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return t.resolveAddr(addr.Unmap(), frontends)
	}
	return t.resolveService(frontends, namespace, prefer)
}

func (t Target) resolveAddr(addr netip.Addr, frontends []NamedFrontend) (netip.AddrPort, dataplane.Protocol, error) {
	var at []NamedFrontend
	for _, f := range frontends {
		if f.Frontend.Addr.Addr() == addr || f.Kind == dataplane.NodePort && t.Port == strconv.Itoa(int(f.Frontend.Addr.Port())) {
			at = append(at, f)
		}
	}
	if number, err := strconv.ParseUint(t.Port, 10, 16); err == nil && number > 0 {
		port := uint16(number)
		protocol := cmp.Or(t.Protocol, onlyProtocol(at, port), dataplane.TCP)
		return netip.AddrPortFrom(addr, port), protocol, nil
	}
	f, err := t.selectPort(at, "address "+addr.String())
	return netip.AddrPortFrom(addr, f.Frontend.Addr.Port()), f.Frontend.Protocol, err
}

// onlyProtocol returns the protocol of the frontends with a port if they have one protocol, or 0.
func onlyProtocol(frontends []NamedFrontend, port uint16) dataplane.Protocol {
	var protocol dataplane.Protocol
	for _, f := range frontends {
		if f.Frontend.Addr.Port() != port || f.Frontend.Protocol == protocol {
			continue
		}
		if protocol != 0 {
			return 0
		}
		protocol = f.Frontend.Protocol
	}
	return protocol
}

// ServiceName returns the namespace and name in NAME, NAMESPACE/NAME, NAME.NAMESPACE and
// NAME.NAMESPACE.svc.DOMAIN.
func (t Target) ServiceName(namespace string) (string, string) {
	if in, name, ok := strings.Cut(t.Host, "/"); ok {
		return in, name
	}
	labels := strings.Split(t.Host, ".")
	if len(labels) >= 2 {
		return labels[1], labels[0]
	}
	return namespace, t.Host
}

func (t Target) resolveService(frontends []NamedFrontend, namespace string, prefer dataplane.Family) (netip.AddrPort, dataplane.Protocol, error) {
	namespace, name := t.ServiceName(namespace)
	var of []NamedFrontend
	var here, elsewhere []string
	for _, f := range frontends {
		here, elsewhere = appendName(here, elsewhere, namespace, f)
		if f.Namespace == namespace && f.Service == name && f.Kind == dataplane.ClusterIP {
			of = append(of, f)
		}
	}
	if len(of) == 0 {
		text := fmt.Sprintf("destination %q: no Service %s/%s with a cluster IP", t.Host, namespace, name)
		nearest := inspect.Nearest(name, here)
		if nearest == "" {
			nearest = inspect.Nearest(namespace+"/"+name, elsewhere)
		}
		if nearest != "" {
			text += fmt.Sprintf(": did you mean %q?", nearest)
		}
		return netip.AddrPort{}, 0, &UnknownError{text}
	}
	if slices.ContainsFunc(of, func(f NamedFrontend) bool { return dataplane.FamilyOf(f.Frontend.Addr.Addr()) == prefer }) {
		of = slices.DeleteFunc(of, func(f NamedFrontend) bool { return dataplane.FamilyOf(f.Frontend.Addr.Addr()) != prefer })
	}
	if number, err := strconv.ParseUint(t.Port, 10, 16); err == nil && number > 0 {
		protocol := cmp.Or(t.Protocol, onlyProtocol(of, uint16(number)), dataplane.TCP)
		return netip.AddrPortFrom(of[0].Frontend.Addr.Addr(), uint16(number)), protocol, nil
	}
	f, err := t.selectPort(of, "Service "+namespace+"/"+name)
	return f.Frontend.Addr, f.Frontend.Protocol, err
}

func appendName(here, elsewhere []string, namespace string, f NamedFrontend) ([]string, []string) {
	if f.Namespace == namespace {
		here = append(here, f.Service)
	}
	return here, append(elsewhere, f.Namespace+"/"+f.Service)
}

// UnknownError reports a name that nothing has.
type UnknownError struct{ text string }

// Error names the object and the most similar one.
func (e *UnknownError) Error() string { return e.text }

// selectPort returns the frontend that the port and the protocol of the target select.
func (t Target) selectPort(frontends []NamedFrontend, of string) (NamedFrontend, error) {
	var matching []NamedFrontend
	var ports []string
	for _, f := range frontends {
		text := strconv.Itoa(int(f.Frontend.Addr.Port())) + "/" + f.Frontend.Protocol.String()
		if f.Port != "" {
			text = f.Port + " (" + text + ")"
		}
		ports = append(ports, text)
		if (t.Port == "" || t.Port == f.Port) && (t.Protocol == 0 || t.Protocol == f.Frontend.Protocol) {
			matching = append(matching, f)
		}
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	switch {
	case len(matching) == 1:
		return matching[0], nil
	case len(ports) == 0:
		return NamedFrontend{}, fmt.Errorf("%s: no port is given, and no Service has the address: use TO:PORT", of)
	case len(matching) == 0 && t.Port != "":
		return NamedFrontend{}, &UnknownError{fmt.Sprintf("%s: no port %q: use one of %s", of, t.Port, strings.Join(ports, ", "))}
	default:
		return NamedFrontend{}, fmt.Errorf("%s: several ports match: use TO:PORT with one of %s", of, strings.Join(ports, ", "))
	}
}
