package dns

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// serviceRecords is all that DNS knows of one Service. It is never changed, only
// replaced.
type serviceRecords struct {
	// domain is the Service's full name, with the final dot.
	domain string
	// withExternalName is the name that a Service of type ExternalName stands for.
	externalName string
	// addrs are the cluster addresses, or those of the endpoints if headless.
	addrs []netip.Addr
	// hosts are the addresses of a headless Service's endpoints by label.
	hosts map[string][]netip.Addr
	// srv are the SRV records.
	srv map[srvKey][]srvRecord
	// reverse has the name for each address.
	reverse map[netip.Addr][]string
	// nonexistent says that the name does not exist although the Service does.
	nonexistent bool
}

// srvKey names a port in DNS: both labels with their underscores.
type srvKey struct{ port, protocol string }

// srvRecord is the variable part of an SRV record.
type srvRecord struct {
	port uint16
	// host is the label of an endpoint, or empty for the Service itself.
	host string
}

func (p srvRecord) compare(o srvRecord) int {
	return cmp.Or(strings.Compare(p.host, o.host), cmp.Compare(p.port, o.port))
}

// newServiceRecords derives the records of one Service in the cluster domain. The
// slices are the Service's.
func newServiceRecords(domain string, service *corev1.Service, slicesOf []*discoveryv1.EndpointSlice) *serviceRecords {
	r := &serviceRecords{
		domain:  service.Name + "." + service.Namespace + "." + labelService + "." + domain,
		hosts:   map[string][]netip.Addr{},
		srv:     map[srvKey][]srvRecord{},
		reverse: map[netip.Addr][]string{},
	}
	switch {
	case service.Spec.Type == corev1.ServiceTypeExternalName:
		if _, ok := dns.IsDomainName(service.Spec.ExternalName); ok {
			r.externalName = dns.Fqdn(service.Spec.ExternalName)
		}
		r.nonexistent = r.externalName == ""
	case service.Spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(service.Spec.ClusterIPs, corev1.ClusterIPNone):
		r.addEndpoints(slicesOf)
		r.nonexistent = len(r.addrs) == 0
	default:
		r.addClusterIPs(service)
	}
	return r
}

func (r *serviceRecords) addClusterIPs(service *corev1.Service) {
	ips := service.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{service.Spec.ClusterIP}
	}
	for _, ip := range ips {
		// A Service may still be without an address.
		if addr, err := netip.ParseAddr(ip); err == nil {
			r.addrs = append(r.addrs, addr)
			r.reverse[addr] = []string{r.domain}
		}
	}
	for _, port := range service.Spec.Ports {
		r.addSRV(port.Name, port.Protocol, srvRecord{port: uint16(port.Port)})
	}
}

func (r *serviceRecords) addEndpoints(slicesOf []*discoveryv1.EndpointSlice) {
	for _, slice := range slicesOf {
		if slice.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		for _, endpoint := range slice.Endpoints {
			// Readiness that is not said counts as ready, as the API has it.
			if ready := endpoint.Conditions.Ready; ready != nil && !*ready {
				continue
			}
			for _, address := range endpoint.Addresses {
				addr, err := netip.ParseAddr(address)
				if err != nil {
					continue
				}
				host := dashedAddr(addr)
				if endpoint.Hostname != nil && *endpoint.Hostname != "" {
					host = strings.ToLower(*endpoint.Hostname)
				}
				r.addEndpoint(host, addr, slice.Ports)
			}
		}
	}
	// A pod is in a slice for each address family, and in several while slices
	// are rearranged.
	r.addrs = sortUnique(r.addrs)
	for host, addrs := range r.hosts {
		r.hosts[host] = sortUnique(addrs)
	}
	for key, ports := range r.srv {
		slices.SortFunc(ports, srvRecord.compare)
		r.srv[key] = slices.Compact(ports)
	}
}

func (r *serviceRecords) addEndpoint(host string, addr netip.Addr, ports []discoveryv1.EndpointPort) {
	r.addrs = append(r.addrs, addr)
	r.hosts[host] = append(r.hosts[host], addr)
	if domain := host + "." + r.domain; !slices.Contains(r.reverse[addr], domain) {
		r.reverse[addr] = append(r.reverse[addr], domain)
	}
	for _, port := range ports {
		if port.Name == nil || port.Port == nil {
			continue
		}
		protocol := corev1.ProtocolTCP
		if port.Protocol != nil {
			protocol = *port.Protocol
		}
		r.addSRV(*port.Name, protocol, srvRecord{port: uint16(*port.Port), host: host})
	}
}

// addSRV adds an SRV record. Ports without a name have none.
func (r *serviceRecords) addSRV(portName string, protocol corev1.Protocol, record srvRecord) {
	if portName == "" {
		return
	}
	if protocol == "" {
		protocol = corev1.ProtocolTCP
	}
	key := srvKey{"_" + strings.ToLower(portName), "_" + strings.ToLower(string(protocol))}
	r.srv[key] = append(r.srv[key], record)
}

// sortUnique sorts addrs and removes doubles.
func sortUnique(addrs []netip.Addr) []netip.Addr {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// hasProtocol reports whether any SRV record is of that protocol.
func (r *serviceRecords) hasProtocol(protocol string) bool {
	for key := range r.srv {
		if key.protocol == protocol {
			return true
		}
	}
	return false
}
