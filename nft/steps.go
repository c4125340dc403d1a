package nft

import (
	"iter"
	"slices"
)

// steps splits a batch that is too large for one commit into several of some size
// elements each, to be carried out in this order:
//
//  1. What is added, or changed, besides classes, and the ports of endpoints. Slots that no class draws yet,
//     their IDs, and source ranges that no class looks for are seen by nobody. A
//     slot that is in use changes from one endpoint to another by itself.
//  2. The classes. This is when a Service appears, grows, shrinks or goes: its
//     endpoints are all there.
//  3. What is removed, and ports that no endpoint has. Nobody looks for it any more.
//
// So a Service is complete as soon as it can be seen, and if a step fails, what the
// earlier ones have left is garbage that the next Replace removes. The second step
// is not split: it has no more than three elements for each frontend.
func (b *batch) steps(size int) iter.Seq[*batch] {
	return func(yield func(*batch) bool) {
		s := stepper{size: size, whole: b, yield: yield}
		if s.ahead() && s.next() && s.classes() && s.next() && s.behind() {
			s.next()
		}
	}
}

// stepper makes the steps of a batch. Its methods return false when nobody wants
// another step.
type stepper struct {
	size  int
	whole *batch
	step  *batch // that is being filled, or nil
	yield func(*batch) bool
}

// next hands over the step that is being filled, if there is any.
func (s *stepper) next() bool {
	if s.step == nil {
		return true
	}
	step := s.step
	s.step = nil
	return s.yield(step)
}

// into calls change with the edit of the i-th table in the step that is being
// filled.
func (s *stepper) into(i int, change func(*tableEdit)) bool {
	if s.step == nil {
		s.step = &batch{}
		for i := range s.step.tables {
			s.step.tables[i].table = s.whole.tables[i].table
		}
	}
	change(&s.step.tables[i])
	return s.step.elements() < s.size || s.next()
}

// ahead makes the steps before the classes. IDs come before slots that refer to
// them, so the sets are in reverse order.
func (s *stepper) ahead() bool {
	for i := range s.whole.tables {
		e := &s.whole.tables[i]
		if more, _ := e.ports.split(); len(more) > 0 && !s.into(i, func(step *tableEdit) { step.ports = more }) {
			return false
		}
		for bits, elements := range e.addRanges {
			replaced := keysOf(e.delRanges[bits])
			for _, el := range elements {
				ok := s.into(i, func(step *tableEdit) {
					if replaced[string(el.Key)] {
						step.deleteRange(bits, element{Key: el.Key})
					}
					step.insertRange(bits, el)
				})
				if !ok {
					return false
				}
			}
		}
		for set, elements := range slices.Backward(e.add[:]) {
			if set < classSets {
				break
			}
			replaced := keysOf(e.del[set])
			for _, el := range elements {
				ok := s.into(i, func(step *tableEdit) {
					if replaced[string(el.Key)] {
						step.delete(set, element{Key: el.Key})
					}
					step.insert(set, el)
				})
				if !ok {
					return false
				}
			}
		}
	}
	return true
}

// classes makes the step that has the classes, and what is counted with them.
func (s *stepper) classes() bool {
	step := &batch{}
	for i := range s.whole.tables {
		e, to := &s.whole.tables[i], &step.tables[i]
		to.table, to.branches, to.addrs = e.table, e.branches, e.addrs
		for set := range classSets {
			to.del[set], to.add[set] = e.del[set], e.add[set]
			to.elements += len(e.del[set]) + len(e.add[set])
		}
	}
	s.step = step
	return true
}

// behind makes the steps after the classes.
func (s *stepper) behind() bool {
	for i := range s.whole.tables {
		e := &s.whole.tables[i]
		for set, elements := range e.del {
			if set < classSets {
				continue
			}
			replaced := keysOf(e.add[set])
			for _, el := range elements {
				if replaced[string(el.Key)] {
					continue
				}
				if !s.into(i, func(step *tableEdit) { step.delete(set, el) }) {
					return false
				}
			}
		}
		for bits, elements := range e.delRanges {
			replaced := keysOf(e.addRanges[bits])
			for _, el := range elements {
				if replaced[string(el.Key)] {
					continue
				}
				if !s.into(i, func(step *tableEdit) { step.deleteRange(bits, el) }) {
					return false
				}
			}
		}
		if _, less := e.ports.split(); len(less) > 0 && !s.into(i, func(step *tableEdit) { step.ports = less }) {
			return false
		}
	}
	return true
}

func keysOf(elements []element) map[string]bool {
	keys := make(map[string]bool, len(elements))
	for _, e := range elements {
		keys[string(e.Key)] = true
	}
	return keys
}
