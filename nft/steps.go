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
		s := stepper{size: size, batch: b, yield: yield}
		if s.beforeClasses() && s.emit() && s.classSteps() && s.emit() && s.afterClasses() {
			s.emit()
		}
	}
}

// stepper makes the steps of a batch. Its methods return false when nobody wants
// another step.
type stepper struct {
	size  int
	batch *batch
	step  *batch // that is being filled, or nil
	yield func(*batch) bool
}

// emit hands over the step that is being filled, if there is any.
func (s *stepper) emit() bool {
	if s.step == nil {
		return true
	}
	step := s.step
	s.step = nil
	return s.yield(step)
}

// addTo calls change with the edit of the i-th table in the step that is being
// filled.
func (s *stepper) addTo(i int, change func(*tableDiff)) bool {
	if s.step == nil {
		s.step = &batch{}
		for i := range s.step.tables {
			s.step.tables[i].table = s.batch.tables[i].table
		}
	}
	change(&s.step.tables[i])
	return s.step.elements() < s.size || s.emit()
}

// beforeClasses makes the steps before the classes. IDs come before slots that refer to
// them, and slots before the size of their list, so the sets are in reverse order.
func (s *stepper) beforeClasses() bool {
	for i := range s.batch.tables {
		e := &s.batch.tables[i]
		if more, _ := e.ports.split(); !s.portSteps(i, more) {
			return false
		}
		for set, elements := range e.addRanges {
			replaced := keySet(e.delRanges[set])
			for _, el := range elements {
				ok := s.addTo(i, func(step *tableDiff) {
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
			if set < numClassSets {
				break
			}
			replaced := keySet(e.del[set])
			for _, el := range elements {
				ok := s.addTo(i, func(step *tableDiff) {
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

// classSteps makes the steps that have the classes, and what is counted with them.
// What is there on account of several frontends comes before the first of them,
// and goes after the last.
func (s *stepper) classSteps() bool {
	for i := range s.batch.tables {
		e := &s.batch.tables[i]
		if !s.sharedCounts(i, func(n int) bool { return n > 0 }) {
			return false
		}
		for _, f := range e.classDiffsByFrontend() {
			if !s.addTo(i, func(step *tableDiff) { step.appendClassDiff(f) }) {
				return false
			}
		}
		if !s.sharedCounts(i, func(n int) bool { return n < 0 }) {
			return false
		}
	}
	return true
}

// sharedCounts makes steps of the counts of branches and addresses that are chosen.
func (s *stepper) sharedCounts(i int, chosen func(n int) bool) bool {
	e := &s.batch.tables[i]
	for b, n := range e.verdictElements {
		if chosen(n) && !s.addTo(i, func(step *tableDiff) { step.countVerdictElement(b, n) }) {
			return false
		}
	}
	for set, counts := range e.addrs {
		for addr, n := range counts {
			var in addrSetMembership
			in[set] = true
			if chosen(n) && !s.addTo(i, func(step *tableDiff) { step.addrs.add(addr, in, n) }) {
				return false
			}
		}
	}
	return true
}

// portSteps makes steps of the counts of ports.
func (s *stepper) portSteps(i int, counts portCounts) bool {
	for port, n := range counts {
		if !s.addTo(i, func(step *tableDiff) { step.addPort(port, n) }) {
			return false
		}
	}
	return true
}

// classDiff is what is done to one frontend in the sets with its classes.
type classDiff struct{ del, add [numClassSets][]element }

// classDiffsByFrontend returns the changes of classes, those of each frontend together.
func (e *tableDiff) classDiffsByFrontend() []*classDiff {
	var all []*classDiff
	byKey := map[string]*classDiff{}
	of := func(el element) *classDiff {
		c, ok := byKey[string(el.Key)]
		if !ok {
			c = &classDiff{}
			byKey[string(el.Key)] = c
			all = append(all, c)
		}
		return c
	}
	for set := range numClassSets {
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

func (e *tableDiff) appendClassDiff(c *classDiff) {
	for set := range numClassSets {
		for _, el := range c.del[set] {
			e.delete(set, el)
		}
		for _, el := range c.add[set] {
			e.insert(set, el)
		}
	}
}

// afterClasses makes the steps after the classes.
func (s *stepper) afterClasses() bool {
	for i := range s.batch.tables {
		e := &s.batch.tables[i]
		for set, elements := range e.del {
			if set < numClassSets {
				continue
			}
			replaced := keySet(e.add[set])
			for _, el := range elements {
				if replaced[string(el.Key)] {
					continue
				}
				if !s.addTo(i, func(step *tableDiff) { step.delete(set, el) }) {
					return false
				}
			}
		}
		for set, elements := range e.delRanges {
			replaced := keySet(e.addRanges[set])
			for _, el := range elements {
				if replaced[string(el.Key)] {
					continue
				}
				if !s.addTo(i, func(step *tableDiff) { step.deleteRange(set, el) }) {
					return false
				}
			}
		}
		if _, less := e.ports.split(); !s.portSteps(i, less) {
			return false
		}
	}
	return true
}

func keySet(elements []element) map[string]bool {
	keys := make(map[string]bool, len(elements))
	for _, e := range elements {
		keys[string(e.Key)] = true
	}
	return keys
}
