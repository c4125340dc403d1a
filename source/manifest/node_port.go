package manifest

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The numbers that node ports are given from, as the API server does by default
// (--service-node-port-range). The first of them are for files to say, and are
// given only when there is no other (KEP-3668), so that a new file rarely says a
// number that a Service has been given.
const (
	firstNodePort  = 30000
	nodePortCount  = 32767 - firstNodePort + 1
	staticBandSize = 86
)

// nodePort is what only one Service can have.
type nodePort struct {
	protocol corev1.Protocol
	number   int32
}

func (n nodePort) String() string { return fmt.Sprintf("%d/%s", n.number, n.protocol) }

// nodePortAllocator knows who has which node port, and hands out free ones.
type nodePortAllocator struct {
	owners map[nodePort]types.NamespacedName
	// protocolsPerNumber counts the protocols in which each number is taken.
	protocolsPerNumber map[int32]int
	// used counts the numbers taken of those that can be given.
	used int
}

func newNodePortAllocator() *nodePortAllocator {
	return &nodePortAllocator{owners: map[nodePort]types.NamespacedName{}, protocolsPerNumber: map[int32]int{}}
}

// allocate gives the port to the Service. It reports false, and who has it, if it
// is another's.
func (p *nodePortAllocator) allocate(port nodePort, name types.NamespacedName) (types.NamespacedName, bool) {
	if holder, ok := p.owners[port]; ok {
		return holder, holder == name
	}
	p.owners[port] = name
	if p.protocolsPerNumber[port.number]++; p.protocolsPerNumber[port.number] == 1 && inNodePortRange(port.number) {
		p.used++
	}
	return name, true
}

// release takes the port back, if it is the Service's.
func (p *nodePortAllocator) release(port nodePort, name types.NamespacedName) {
	if holder, ok := p.owners[port]; !ok || holder != name {
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

// allocateNext claims a port for the Service whose number is free in all protocols: the
// one that the Service's name and the use say, or if that is taken the next free
// one after it. It reports false if there is none.
func (p *nodePortAllocator) allocateNext(name types.NamespacedName, use portKey) (nodePort, bool) {
	if p.used >= nodePortCount {
		return nodePort{}, false
	}
	// The protocol is not part of it: the port is the same in all, where it can be.
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", name, use.port))
	const count = nodePortCount - staticBandSize
	start := binary.BigEndian.Uint64(sum[:]) % count
	for i := range uint64(nodePortCount) {
		// The unreserved ones from start on and around, then the reserved ones.
		number := firstNodePort + int32(i-count) //nolint:gosec // not used where it wraps
		if i < count {
			number = firstNodePort + staticBandSize + int32((start+i)%count) //nolint:gosec // less than 2768
		}
		if p.protocolsPerNumber[number] == 0 {
			port := nodePort{use.protocol, number}
			p.allocate(port, name)
			return port, true
		}
	}
	return nodePort{}, false
}

func inNodePortRange(number int32) bool {
	return number >= firstNodePort && number < firstNodePort+nodePortCount
}

// portKey is what a Service has a node port for: one of its ports, by protocol
// and number, as the API server tells them apart. Health checks have the number
// 0.
type portKey struct {
	protocol corev1.Protocol
	port     int32
}

// nodePortRequest is a node port that a Service has to have.
type nodePortRequest struct {
	key   portKey
	field string
	// requested is the number that the file says, 0 if it does not.
	requested int32
}

func (w nodePortRequest) requestedPort() nodePort { return nodePort{w.key.protocol, w.requested} }

// nodePortAllocation is a node port that a Service has, and what for.
type nodePortAllocation struct {
	key  portKey
	port nodePort
}

// unloggedPort is a node port that no file says.
type unloggedPort struct {
	service types.NamespacedName
	nodePortAllocation
}

// nodePortRequests returns which node ports the Service needs, as the API server has
// it: in the order of the Service's ports, and then the one for health checks.
func nodePortRequests(svc *corev1.Service) []nodePortRequest {
	if !hasNodePorts(svc) {
		return nil
	}
	spec := &svc.Spec
	var wishes []nodePortRequest
	all := spec.Type != corev1.ServiceTypeLoadBalancer || spec.AllocateLoadBalancerNodePorts == nil || *spec.AllocateLoadBalancerNodePorts
	for i := range spec.Ports {
		port := &spec.Ports[i]
		if all || port.NodePort != 0 {
			wishes = append(wishes, nodePortRequest{portKey{port.Protocol, port.Port}, fmt.Sprintf("spec.ports[%d].nodePort", i), port.NodePort})
		}
	}
	if needsHealthCheck(svc) {
		wishes = append(wishes, nodePortRequest{portKey{corev1.ProtocolTCP, 0}, "spec.healthCheckNodePort", spec.HealthCheckNodePort})
	}
	return wishes
}

func hasNodePorts(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeNodePort || svc.Spec.Type == corev1.ServiceTypeLoadBalancer
}

// needsHealthCheck reports whether load balancers ask the nodes for endpoints.
func needsHealthCheck(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// setNodePorts writes node ports into a Service.
func setNodePorts(svc *corev1.Service, held []nodePortAllocation) {
	for _, h := range held {
		if h.key.port == 0 {
			svc.Spec.HealthCheckNodePort = h.port.number
			continue
		}
		for i := range svc.Spec.Ports {
			if port := &svc.Spec.Ports[i]; port.Protocol == h.key.protocol && port.Port == h.key.port {
				port.NodePort = h.port.number
			}
		}
	}
}
