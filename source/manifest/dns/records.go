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

// records is all that DNS knows of one Service. It is never changed, only
// replaced.
type records struct {
	// domain is the Service's full name, with the final dot.
	domain string
	// target is the name that a Service of type ExternalName stands for.
	target string
	// addrs are the cluster addresses, or those of the endpoints if headless.
	addrs []netip.Addr
	// hosts are the addresses of a headless Service's endpoints by label.
	hosts map[string][]netip.Addr
	// ports are the SRV records.
	ports map[portKey][]portRecord
	// reverse has the name for each address.
	reverse map[netip.Addr][]string
	// absent says that the name does not exist although the Service does.
	absent bool
}

// portKey names a port in DNS: both labels with their underscores.
type portKey struct{ port, protocol string }

// portRecord is the variable part of an SRV record.
type portRecord struct {
	port uint16
	// host is the label of an endpoint, or empty for the Service itself.
	host string
}

func (p portRecord) compare(o portRecord) int {
	return cmp.Or(strings.Compare(p.host, o.host), cmp.Compare(p.port, o.port))
}

// newRecords derives the records of one Service in the cluster domain. The
// slices are the Service's.
func newRecords(domain string, service *corev1.Service, slicesOf []*discoveryv1.EndpointSlice) *records {
	r := &records{
		domain:  service.Name + "." + service.Namespace + "." + labelService + "." + domain,
		hosts:   map[string][]netip.Addr{},
		ports:   map[portKey][]portRecord{},
		reverse: map[netip.Addr][]string{},
	}
	switch {
	case service.Spec.Type == corev1.ServiceTypeExternalName:
		if _, ok := dns.IsDomainName(service.Spec.ExternalName); ok {
			r.target = dns.Fqdn(service.Spec.ExternalName)
		}
		r.absent = r.target == ""
	case service.Spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(service.Spec.ClusterIPs, corev1.ClusterIPNone):
		r.addEndpoints(slicesOf)
		r.absent = len(r.addrs) == 0
	default:
		r.addClusterIPs(service)
	}
	return r
}

func (r *records) addClusterIPs(service *corev1.Service) {
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
		r.addPort(port.Name, port.Protocol, portRecord{port: uint16(port.Port)})
	}
}

func (r *records) addEndpoints(slicesOf []*discoveryv1.EndpointSlice) {
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
				host := dashed(addr)
				if endpoint.Hostname != nil && *endpoint.Hostname != "" {
					host = strings.ToLower(*endpoint.Hostname)
				}
				r.addEndpoint(host, addr, slice.Ports)
			}
		}
	}
	// A pod is in a slice for each address family, and in several while slices
	// are rearranged.
	r.addrs = compact(r.addrs)
	for host, addrs := range r.hosts {
		r.hosts[host] = compact(addrs)
	}
	for key, ports := range r.ports {
		slices.SortFunc(ports, portRecord.compare)
		r.ports[key] = slices.Compact(ports)
	}
}

func (r *records) addEndpoint(host string, addr netip.Addr, ports []discoveryv1.EndpointPort) {
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
		r.addPort(*port.Name, protocol, portRecord{port: uint16(*port.Port), host: host})
	}
}

// addPort adds an SRV record. Ports without a name have none.
func (r *records) addPort(portName string, protocol corev1.Protocol, record portRecord) {
	if portName == "" {
		return
	}
	if protocol == "" {
		protocol = corev1.ProtocolTCP
	}
	key := portKey{"_" + strings.ToLower(portName), "_" + strings.ToLower(string(protocol))}
	r.ports[key] = append(r.ports[key], record)
}

// compact sorts addrs and removes doubles.
func compact(addrs []netip.Addr) []netip.Addr {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// hasProtocol reports whether any SRV record is of that protocol.
func (r *records) hasProtocol(protocol string) bool {
	for key := range r.ports {
		if key.protocol == protocol {
			return true
		}
	}
	return false
}
