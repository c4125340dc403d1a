package manifest

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The default node port range of the API server (--service-node-port-range). The static band at
// its start is for ports requested in files. It is allocated from only when no other port is
// free (KEP-3668), so that a new file rarely requests an allocated port.
const (
	firstNodePort  = 30000
	nodePortCount  = 32767 - firstNodePort + 1
	staticBandSize = 86
)

// nodePort is a node port number of one protocol. Only one Service can have it.
type nodePort struct {
	protocol corev1.Protocol
	number   int32
}

func (n nodePort) String() string { return fmt.Sprintf("%d/%s", n.number, n.protocol) }

// nodePortAllocator allocates node ports and records which Service has which port.
type nodePortAllocator struct {
	owners map[nodePort]types.NamespacedName
	// protocolsPerNumber counts the protocols in which each number is in use.
	protocolsPerNumber map[int32]int
	// used counts the numbers of the range that are in use.
	used int
}

func newNodePortAllocator() *nodePortAllocator {
	return &nodePortAllocator{owners: map[nodePort]types.NamespacedName{}, protocolsPerNumber: map[int32]int{}}
}

// allocate assigns the port to the Service. It reports false and the owner if another
// Service has it.
func (p *nodePortAllocator) allocate(port nodePort, name types.NamespacedName) (types.NamespacedName, bool) {
	if owner, ok := p.owners[port]; ok {
		return owner, owner == name
	}
	p.owners[port] = name
	if p.protocolsPerNumber[port.number]++; p.protocolsPerNumber[port.number] == 1 && inNodePortRange(port.number) {
		p.used++
	}
	return name, true
}

// release frees the port if the Service has it.
func (p *nodePortAllocator) release(port nodePort, name types.NamespacedName) {
	if owner, ok := p.owners[port]; !ok || owner != name {
		return
	}
	delete(p.owners, port)
	if p.protocolsPerNumber[port.number]--; p.protocolsPerNumber[port.number] == 0 {
		delete(p.protocolsPerNumber, port.number)
		if inNodePortRange(port.number) {
			p.used--
		}
	}
}

// allocateNext allocates a port whose number is free in all protocols: the one derived from
// the Service's name and the port number or, if that is in use, the next free one. It
// reports false if all numbers are in use.
func (p *nodePortAllocator) allocateNext(name types.NamespacedName, key portKey) (nodePort, bool) {
	if p.used >= nodePortCount {
		return nodePort{}, false
	}
	// The hash omits the protocol, so that a port has the same number in all protocols.
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", name, key.port))
	const count = nodePortCount - staticBandSize
	start := binary.BigEndian.Uint64(sum[:]) % count
	for i := range uint64(nodePortCount) {
		// First the dynamic band, from start and wrapping around, then the static band.
		number := firstNodePort + int32(i-count) //nolint:gosec // not used where it wraps
		if i < count {
			number = firstNodePort + staticBandSize + int32((start+i)%count) //nolint:gosec // less than 2768
		}
		if p.protocolsPerNumber[number] == 0 {
			port := nodePort{key.protocol, number}
			p.allocate(port, name)
			return port, true
		}
	}
	return nodePort{}, false
}

func inNodePortRange(number int32) bool {
	return number >= firstNodePort && number < firstNodePort+nodePortCount
}

// portKey identifies the purpose of a node port: a Service port by protocol and number, as
// in the API server. The port number is 0 for the health check.
type portKey struct {
	protocol corev1.Protocol
	port     int32
}

// nodePortRequest is a Service's need for a node port.
type nodePortRequest struct {
	key   portKey
	field string
	// requested is the number specified in the file, or 0.
	requested int32
}

func (req nodePortRequest) requestedPort() nodePort { return nodePort{req.key.protocol, req.requested} }

// nodePortAllocation is an allocated node port and its purpose.
type nodePortAllocation struct {
	key  portKey
	port nodePort
}

// unloggedPort is an allocated node port that has not been logged.
type unloggedPort struct {
	service types.NamespacedName
	nodePortAllocation
}

// nodePortRequests returns the node ports that the Service needs according to the API
// server's rules: in the order of the Service's ports, then the port for health checks.
func nodePortRequests(svc *corev1.Service) []nodePortRequest {
	if !hasNodePorts(svc) {
		return nil
	}
	spec := &svc.Spec
	var requests []nodePortRequest
	all := spec.Type != corev1.ServiceTypeLoadBalancer || spec.AllocateLoadBalancerNodePorts == nil || *spec.AllocateLoadBalancerNodePorts
	for i := range spec.Ports {
		port := &spec.Ports[i]
		if all || port.NodePort != 0 {
			requests = append(requests, nodePortRequest{portKey{port.Protocol, port.Port}, fmt.Sprintf("spec.ports[%d].nodePort", i), port.NodePort})
		}
	}
	if needsHealthCheck(svc) {
		requests = append(requests, nodePortRequest{portKey{corev1.ProtocolTCP, 0}, "spec.healthCheckNodePort", spec.HealthCheckNodePort})
	}
	return requests
}

func hasNodePorts(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeNodePort || svc.Spec.Type == corev1.ServiceTypeLoadBalancer
}

// needsHealthCheck reports whether the Service needs a health-check node port.
func needsHealthCheck(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// setNodePorts sets the allocated node ports in a Service.
func setNodePorts(svc *corev1.Service, allocs []nodePortAllocation) {
	for _, alloc := range allocs {
		if alloc.key.port == 0 {
			svc.Spec.HealthCheckNodePort = alloc.port.number
			continue
		}
		for i := range svc.Spec.Ports {
			if port := &svc.Spec.Ports[i]; port.Protocol == alloc.key.protocol && port.Port == alloc.key.port {
				port.NodePort = alloc.port.number
			}
		}
	}
}
