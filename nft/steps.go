package nft

import (
	"iter"
	"slices"
)

// steps splits a batch that is too large for one commit into batches of about size
// elements, which must be committed in this order:
//
//  1. All additions and changes except classes, and the ports of endpoints. No rule reads
//     slots that no class selects yet, the IDs of such slots, or source ranges that no class
//     looks up. A slot in use changes from one endpoint to another independently of other
//     slots.
//  2. The classes. With this step, a Service appears, grows, shrinks or disappears; all its
//     endpoints exist at this point. A Service with very many frontends changes one frontend
//     after another, but each frontend in a single commit.
//  3. All removals, and ports that no endpoint has any more. No rule reads the removed
//     elements.
//
// So a Service is complete as soon as packets can reach it. If a step fails, the earlier
// steps leave garbage, which the next Replace removes.
func (b *batch) steps(size int) iter.Seq[*batch] {
	return func(yield func(*batch) bool) {
		s := stepper{size: size, batch: b, yield: yield}
		if s.beforeClasses() && s.emit() && s.classSteps() && s.emit() && s.afterClasses() {
			s.emit()
		}
	}
}

// stepper makes the steps of a batch. Its methods return false if the consumer wants no
// more steps.
type stepper struct {
	size  int
	batch *batch
	step  *batch // the current step, or nil
	yield func(*batch) bool
}

// emit yields the current step, if there is one.
func (s *stepper) emit() bool {
	if s.step == nil {
		return true
	}
	step := s.step
	s.step = nil
	return s.yield(step)
}

// addTo calls change with the i-th table of the current step. It emits the step if it is
// full.
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

// beforeClasses makes the steps before the classes. It adds IDs before the slots that refer
// to them, and slots before the size of their list, so it visits the sets in reverse order.
func (s *stepper) beforeClasses() bool {
	for i := range s.batch.tables {
		e := &s.batch.tables[i]
		if added, _ := e.ports.split(); !s.portSteps(i, added) {
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

// classSteps makes the steps with the classes and the counts that belong to them. Positive
// counts of shared elements come before the first frontend, negative counts after the last
// one.
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

// sharedCounts makes steps of the counts of verdict elements and addresses for which
// include returns true.
func (s *stepper) sharedCounts(i int, include func(n int) bool) bool {
	e := &s.batch.tables[i]
	for b, n := range e.verdictElements {
		if include(n) && !s.addTo(i, func(step *tableDiff) { step.countVerdictElement(b, n) }) {
			return false
		}
	}
	for set, counts := range e.addrs {
		for addr, n := range counts {
			var in addrSetMembership
			in[set] = true
			if include(n) && !s.addTo(i, func(step *tableDiff) { step.addrs.add(addr, in, n) }) {
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

// classDiff contains the changes of one frontend in the sets with classes.
type classDiff struct{ del, add [numClassSets][]element }

// classDiffsByFrontend returns the changes of classes, grouped by frontend.
func (e *tableDiff) classDiffsByFrontend() []*classDiff {
	var all []*classDiff
	byKey := map[string]*classDiff{}
	diffFor := func(el element) *classDiff {
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
			c := diffFor(el)
			c.del[set] = append(c.del[set], el)
		}
		for _, el := range e.add[set] {
			c := diffFor(el)
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
		if _, removed := e.ports.split(); !s.portSteps(i, removed) {
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
