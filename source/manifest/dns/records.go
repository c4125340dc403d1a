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

// serviceRecords has the records of one Service. It is immutable.
type serviceRecords struct {
	// domain is the Service's fully qualified name, with the final dot.
	domain string
	// externalName is the target of a Service of type ExternalName, with the final dot.
	externalName string
	// addrs has the cluster IPs, or the endpoint addresses of a headless Service.
	addrs []netip.Addr
	// hosts has the endpoint addresses of a headless Service by label.
	hosts map[string][]netip.Addr
	// srv has the SRV records.
	srv map[srvKey][]srvRecord
	// reverse has the names of each address.
	reverse map[netip.Addr][]string
	// nonexistent means that the name does not exist although the Service does.
	nonexistent bool
}

// srvKey has the port and protocol labels of an SRV name, with underscores.
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

// newServiceRecords builds the records of a Service in the cluster domain from the Service
// and its EndpointSlices.
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
		// A Service may not have an address yet.
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
			// The API defines a nil Ready as ready.
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
	// A pod is in one slice per address family, and in more while slices are rebalanced.
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

// addSRV adds an SRV record unless the port has no name.
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

// sortUnique sorts addrs and removes duplicates.
func sortUnique(addrs []netip.Addr) []netip.Addr {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// hasProtocol reports whether there is an SRV record for the protocol.
func (r *serviceRecords) hasProtocol(protocol string) bool {
	for key := range r.srv {
		if key.protocol == protocol {
			return true
		}
	}
	return false
}
