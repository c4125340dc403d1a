package kube

// recorder records how convert finds the endpoints of a Service. A nil recorder records nothing.
type recorder struct {
	policy policy
	ports  []portFamily
	// slices contains the slices of the Service. otherFamily contains the slices of a family
	// that no port of the Service has.
	slices      []*endpointSlice
	otherFamily map[*endpointSlice]bool
	// used contains, by port and slice, the numbers of the slice's matching ports.
	used map[portName]map[*endpointSlice][]uint16
}

func newRecorder() *recorder {
	return &recorder{otherFamily: map[*endpointSlice]bool{}, used: map[portName]map[*endpointSlice][]uint16{}}
}

// skipSlice records that no port of the Service has the family of the slice.
func (r *recorder) skipSlice(slice *endpointSlice) {
	if r != nil {
		r.otherFamily[slice] = true
	}
}

// usePort records that a port of a slice matches a port of the Service.
func (r *recorder) usePort(slice *endpointSlice, p endpointPort, port *portFamily) {
	if r == nil {
		return
	}
	of := r.used[port.name()]
	if of == nil {
		of = map[*endpointSlice][]uint16{}
		r.used[port.name()] = of
	}
	of[slice] = append(of[slice], p.number)
}

// record records the results.
func (r *recorder) record(p policy, ports []portFamily, slices []*endpointSlice) {
	if r != nil {
		r.policy, r.ports, r.slices = p, ports, slices
	}
}
