package dataplanetest

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// Explainer returns a function that predicts what a node does with a new connection, from the
// state that the kernel holds. netns is the file descriptor of the node's network namespace.
// Concurrent calls of the function must be possible.
type Explainer func(t testing.TB, netns int) func(Connection) ([]Outcome, error)

// Connection is a connection that a client is about to open.
type Connection struct {
	Protocol dataplane.Protocol
	// Source is zero for a connection of the node itself if the kernel selects the address.
	Source      netip.Addr
	Destination netip.AddrPort
	// InInterface is the node's interface on which the connection arrives. It is empty for
	// connections of the node itself.
	InInterface string
}

// Outcome is a possible result of a connection.
type Outcome struct {
	// Refused is set if no endpoint receives the connection. Verdict then says how.
	Refused bool
	Verdict dataplane.Verdict
	// Endpoint is the address that receives the connection: an endpoint, or the destination
	// itself if the node does not translate it.
	Endpoint    netip.AddrPort
	Masqueraded bool
	// Remembered is the time for which session affinity still selects the endpoint. It is 0 if
	// the client is not remembered.
	Remembered time.Duration
}

// explained compares explanations with results. A nil explained does nothing.
type explained struct {
	t       *testing.T
	open    Explainer
	explain func(Connection) ([]Outcome, error)
	node    *nettest.Host

	mu sync.Mutex
	// version is odd during a change of the dataplane. Explanations apply to one version.
	version  int
	outcomes map[explainedKey][]Outcome
	// compared counts the comparisons.
	compared int
}

type explainedKey struct {
	Connection
	version int
}

func newExplained(t *testing.T, s suite) *explained {
	t.Helper()
	e := &explained{t: t, open: s.explain, outcomes: map[explainedKey][]Outcome{}}
	t.Cleanup(func() { t.Logf("compared %d connections with their explanations", e.compared) })
	return e
}

func (e *explained) setNode(node *nettest.Host) {
	if e != nil {
		e.node, e.explain = node, e.open(e.t, node.Fd())
	}
}

func (e *explained) startChange() { e.changeVersion() }

func (e *explained) endChange() { e.changeVersion() }

func (e *explained) changeVersion() {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.version++
	clear(e.outcomes)
}

// onConnect explains a connection, and compares the explanation with the result unless the
// dataplane changes meanwhile.
func (e *explained) onConnect(a nettest.ConnectAttempt) func(nettest.Answer, error) {
	var p dataplane.Protocol
	for _, p = range protocols() {
		if networkName(p) == a.Network {
			break
		}
	}
	c := Connection{Protocol: p, Source: a.Source, Destination: a.To, InInterface: a.From.NodeInterface()}
	if a.From != e.node && c.InInterface == "" {
		return nil // not a host of this network
	}
	if !c.Source.IsValid() && a.From != e.node {
		c.Source = addrOf(a.From, dataplane.FamilyOf(a.To.Addr()))
	}
	e.mu.Lock()
	key, began := explainedKey{c, e.version}, time.Now()
	outcomes, known := e.outcomes[key]
	e.mu.Unlock()
	if key.version%2 != 0 {
		return nil
	}
	var err error
	explained := make(chan struct{})
	go func() {
		defer close(explained)
		if !known {
			if outcomes, err = e.explain(c); err == nil {
				e.store(key, outcomes)
			}
		}
	}()
	// The time limit of the connection is running. If the explanation takes longer, as on a busy
	// machine, it is computed while the client connects.
	select {
	case <-explained:
	case <-time.After(maxExplanationDelay):
	}
	return func(answer nettest.Answer, connectErr error) {
		<-explained
		forgotten := slices.ContainsFunc(outcomes, func(o Outcome) bool { return o.Remembered > 0 && time.Since(began) >= o.Remembered })
		if forgotten || !e.current(key.version) {
			return
		}
		if err != nil {
			e.t.Errorf("explain the connection from %s to %s/%s: %v", a.From.Name, a.To, p, err)
			return
		}
		e.mu.Lock()
		e.compared++
		e.mu.Unlock()
		if problem := e.compare(c, outcomes, answer, connectErr); problem != "" {
			e.t.Errorf("connection from %s to %s/%s: %s, explained as %+v", a.From.Name, a.To, p, problem, outcomes)
		}
	}
}

// maxExplanationDelay limits how long a connection waits for its explanation.
const maxExplanationDelay = 100 * time.Millisecond

// store keeps outcomes that apply until the dataplane changes.
func (e *explained) store(key explainedKey, outcomes []Outcome) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if key.version == e.version && !slices.ContainsFunc(outcomes, func(o Outcome) bool { return o.Remembered > 0 }) {
		e.outcomes[key] = outcomes
	}
}

// current reports whether the dataplane has not changed since a version.
func (e *explained) current(version int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.version == version
}

// compare returns the difference between the outcomes and the result of a connection.
func (e *explained) compare(c Connection, outcomes []Outcome, answer nettest.Answer, err error) string {
	fits := func(matches func(Outcome) bool) bool { return slices.ContainsFunc(outcomes, matches) }
	switch {
	case err == nil:
		fromNode := slices.Contains(e.node.Addrs(), answer.Source.Addr()) && c.Source.IsValid() && !slices.Contains(e.node.Addrs(), c.Source)
		unclear := !c.Source.IsValid() || slices.Contains(e.node.Addrs(), c.Source)
		if !fits(func(o Outcome) bool {
			return !o.Refused && o.Endpoint == answer.Endpoint && (unclear || o.Masqueraded == fromNode)
		}) {
			return fmt.Sprintf("reached %s, which saw the source %s", answer.Endpoint, answer.Source.Addr())
		}
	case errors.Is(err, nettest.ErrRefused):
		// Without translation, the destination itself can refuse the connection.
		if !fits(func(o Outcome) bool { return o.Refused && o.Verdict == dataplane.Reject || o.Endpoint == c.Destination }) {
			return "refused"
		}
	case errors.Is(err, nettest.ErrTimeout):
		if !fits(func(o Outcome) bool { return o.Refused && o.Verdict == dataplane.Drop || o.Endpoint == c.Destination }) {
			return "no answer"
		}
	case strings.Contains(err.Error(), "context canceled"):
	}
	return ""
}
