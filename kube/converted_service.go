package kube

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ConvertedService is a Service in the form that a [Tracker] keeps. Services that differ only in
// their names, cluster IPs and node ports share the rest, so each of them takes about a fifth of the
// memory of the object.
type ConvertedService struct {
	name types.NamespacedName
	uid  types.UID
	// createdUnix is the creation time in seconds, the precision of the API.
	createdUnix int64
	// rest contains the other fields. Several Services may share it, so it must not be modified. It
	// contains all fields if whole is set.
	rest  *corev1.Service
	whole bool
	// clusterIPs contains the cluster IPs, separated by commas. It is empty if rest contains them.
	clusterIPs string
	// nodePorts contains the node ports in the order of spec.ports. It is empty if rest contains
	// them.
	nodePorts []int32
}

// newConvertedService returns a ConvertedService that keeps the object.
func newConvertedService(object *corev1.Service) *ConvertedService {
	return &ConvertedService{
		name: types.NamespacedName{Namespace: object.Namespace, Name: object.Name}, uid: object.UID,
		createdUnix: object.CreationTimestamp.Unix(), rest: object, whole: true,
	}
}

// Name returns the name of the Service.
func (c *ConvertedService) Name() types.NamespacedName { return c.name }

// UID returns the UID of the Service.
func (c *ConvertedService) UID() types.UID { return c.uid }

// expand returns the object, which must not be modified. It may use the memory of into. The object
// has no metadata that this package does not read. It is nil if c is nil.
func (c *ConvertedService) expand(into *corev1.Service) *corev1.Service {
	switch {
	case c == nil:
		return nil
	case c.whole:
		return c.rest
	}
	*into = *c.rest
	into.Namespace, into.Name, into.UID = c.name.Namespace, c.name.Name, c.uid
	if c.clusterIPs != "" {
		into.Spec.ClusterIPs = strings.Split(c.clusterIPs, ",")
		into.Spec.ClusterIP = into.Spec.ClusterIPs[0]
	}
	if len(c.nodePorts) > 0 {
		into.Spec.Ports = slices.Clone(into.Spec.Ports)
		for i, number := range c.nodePorts {
			into.Spec.Ports[i].NodePort = number
		}
	}
	return into
}

// portName returns the name of the i-th port.
func (c *ConvertedService) portName(i int) string { return c.rest.Spec.Ports[i].Name }

// maxSharedServices is the number of values that Services share. A cluster has far fewer
// combinations of port names, target ports and policies.
const maxSharedServices = 1 << 14

// ServiceConverter converts Services. It must not be used concurrently.
type ServiceConverter struct {
	// shared contains the values of ConvertedService.rest, by their encoding.
	shared map[string]*corev1.Service
	// object, ports and buffer are memory for Convert.
	object corev1.Service
	ports  []corev1.ServicePort
	buffer []byte
}

// NewServiceConverter returns a ServiceConverter.
func NewServiceConverter() *ServiceConverter {
	return &ServiceConverter{shared: map[string]*corev1.Service{}}
}

// Convert converts a Service. The result keeps strings and lists of the object, but not the object.
// The source must have removed the fields that differ between Services without being of interest.
func (s *ServiceConverter) Convert(object *corev1.Service) *ConvertedService {
	c := newConvertedService(object)
	c.whole = false
	rest := &s.object
	defer func() { s.object = corev1.Service{} }()
	*rest = *object
	rest.Namespace, rest.Name, rest.UID, rest.ResourceVersion = "", "", "", ""
	rest.CreationTimestamp, rest.DeletionTimestamp = metav1.Time{}, nil
	if ips := object.Spec.ClusterIPs; canJoin(ips) && ips[0] == object.Spec.ClusterIP {
		c.clusterIPs = strings.Join(ips, ",")
		rest.Spec.ClusterIP, rest.Spec.ClusterIPs = "", nil
	}
	if slices.ContainsFunc(object.Spec.Ports, func(p corev1.ServicePort) bool { return p.NodePort != 0 }) {
		c.nodePorts = make([]int32, 0, len(object.Spec.Ports))
		s.ports = append(s.ports[:0], object.Spec.Ports...)
		rest.Spec.Ports = s.ports
		for i := range s.ports {
			c.nodePorts = append(c.nodePorts, s.ports[i].NodePort)
			s.ports[i].NodePort = 0
		}
	}
	c.rest = s.share(rest)
	return c
}

// canJoin reports whether joining the cluster IPs with commas loses nothing.
func canJoin(ips []string) bool {
	return len(ips) > 0 && !slices.ContainsFunc(ips, func(ip string) bool { return ip == "" || strings.Contains(ip, ",") })
}

// share returns a copy of rest, or the copy of an earlier call with an equal value.
func (s *ServiceConverter) share(rest *corev1.Service) *corev1.Service {
	size := rest.Size()
	s.buffer = slices.Grow(s.buffer[:0], size)[:size]
	n, err := rest.MarshalToSizedBuffer(s.buffer)
	if shared, ok := s.shared[string(s.buffer[size-min(n, size):])]; ok && err == nil {
		return shared
	}
	shared := new(corev1.Service)
	*shared = *rest
	shared.Spec.Ports = slices.Clone(rest.Spec.Ports)
	if err == nil {
		if len(s.shared) >= maxSharedServices {
			clear(s.shared) // Services keep the values that they use
		}
		s.shared[string(s.buffer[size-n:])] = shared
	}
	if cap(s.buffer) > maxConverterBuffer {
		s.buffer = nil
	}
	return shared
}

// maxConverterBuffer is the largest buffer in bytes that is kept for the next Service.
const maxConverterBuffer = 64 << 10
