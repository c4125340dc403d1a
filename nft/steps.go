package nft

import (
	"iter"
	"slices"
)

// steps splits a batch that is too large for one commit into several of some size
// elements each, to be carried out in this order:
//
//  1. What is added, or changed, besides classes, and the ports of endpoints. Slots
//     that no class draws yet, their IDs, and source ranges that no class looks for
//     are seen by nobody. A slot that is in use changes from one endpoint to another
//     by itself.
//  2. The classes. This is when a Service appears, grows, shrinks or goes: its
//     endpoints are all there. A Service with very many frontends does so one
//     frontend after the other, but each of them in one commit.
//  3. What is removed, and ports that no endpoint has. Nobody looks for it any more.
//
// So a Service is complete as soon as it can be seen, and if a step fails, what the
// earlier ones have left is garbage that the next Replace removes.
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
// them, and slots before the size of their list, so the sets are in reverse order.
func (s *stepper) ahead() bool {
	for i := range s.whole.tables {
		e := &s.whole.tables[i]
		if more, _ := e.ports.split(); !s.ports(i, more) {
			return false
		}
		for set, elements := range e.addRanges {
			replaced := keysOf(e.delRanges[set])
			for _, el := range elements {
				ok := s.into(i, func(step *tableEdit) {
					if replaced[string(el.Key)] {
						step.deleteRange(set, element{Key: el.Key})
					}
					step.insertRange(set, el)
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

// classes makes the steps that have the classes, and what is counted with them.
// What is there on account of several frontends comes before the first of them,
// and goes after the last.
func (s *stepper) classes() bool {
	for i := range s.whole.tables {
		e := &s.whole.tables[i]
		if !s.shared(i, func(n int) bool { return n > 0 }) {
			return false
		}
		for _, f := range e.byFrontend() {
			if !s.into(i, func(step *tableEdit) { step.append(f) }) {
				return false
			}
		}
		if !s.shared(i, func(n int) bool { return n < 0 }) {
			return false
		}
	}
	return true
}

// shared makes steps of the counts of branches and addresses that are chosen.
func (s *stepper) shared(i int, chosen func(n int) bool) bool {
	e := &s.whole.tables[i]
	for b, n := range e.branches {
		if chosen(n) && !s.into(i, func(step *tableEdit) { step.countBranch(b, n) }) {
			return false
		}
	}
	for set, counts := range e.addrs {
		for addr, n := range counts {
			var in inAddrSets
			in[set] = true
			if chosen(n) && !s.into(i, func(step *tableEdit) { step.addrs.add(addr, in, n) }) {
				return false
			}
		}
	}
	return true
}

// ports makes steps of the counts of ports.
func (s *stepper) ports(i int, counts portCounts) bool {
	for port, n := range counts {
		if !s.into(i, func(step *tableEdit) { step.addPort(port, n) }) {
			return false
		}
	}
	return true
}

// classEdit is what is done to one frontend in the sets with its classes.
type classEdit struct{ del, add [classSets][]element }

// byFrontend returns the changes of classes, those of each frontend together.
func (e *tableEdit) byFrontend() []*classEdit {
	var all []*classEdit
	byKey := map[string]*classEdit{}
	of := func(el element) *classEdit {
		c, ok := byKey[string(el.Key)]
		if !ok {
			c = &classEdit{}
			byKey[string(el.Key)] = c
			all = append(all, c)
		}
		return c
	}
	for set := range classSets {
		for _, el := range e.del[set] {
			c := of(el)
			c.del[set] = append(c.del[set], el)
		}
		for _, el := range e.add[set] {
			c := of(el)
			c.add[set] = append(c.add[set], el)
		}
	}
	return all
}

func (e *tableEdit) append(c *classEdit) {
	for set := range classSets {
		for _, el := range c.del[set] {
			e.delete(set, el)
		}
		for _, el := range c.add[set] {
			e.insert(set, el)
		}
	}
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
		for set, elements := range e.delRanges {
			replaced := keysOf(e.addRanges[set])
			for _, el := range elements {
				if replaced[string(el.Key)] {
					continue
				}
				if !s.into(i, func(step *tableEdit) { step.deleteRange(set, el) }) {
					return false
				}
			}
		}
		if _, less := e.ports.split(); !s.ports(i, less) {
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
