package nft

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Packet is the first packet of a connection.
type Packet struct {
	Protocol            dataplane.Protocol
	Source, Destination netip.AddrPort
	// InInterface is the name of the interface on which the packet arrives. It is empty for a
	// packet that the node itself sends.
	InInterface string
}

// Host is the part of the node outside nftables that decides about a packet.
type Host interface {
	// IsLocal reports whether addr is an address of the node.
	IsLocal(addr netip.Addr) (bool, error)
	// Destinations returns the destinations of the IPVS virtual server at an address. ok is
	// false if the address has no virtual server.
	Destinations(p dataplane.Protocol, server netip.AddrPort, client netip.Addr) (b Balance, ok bool, err error)
}

// Balance contains the destinations of an IPVS virtual server that accept new connections of a
// client.
type Balance struct {
	Destinations []netip.AddrPort
	// Remembered is the destination that session affinity selects, or zero. Expires is the time
	// until the kernel forgets it.
	Remembered netip.AddrPort
	Expires    time.Duration
}

// Decision identifies what a [Step] decides.
type Decision string

// Decisions in the order in which rules usually make them.
const (
	DecideLoopback    Decision = "loopback"      // packets to loopback addresses
	DecideVirtual     Decision = "virtual"       // packets to the networks of virtual servers
	DecideFrontend    Decision = "frontend"      // the frontend of the destination
	DecideNoFrontend  Decision = "no-frontend"   // no frontend has the destination
	DecideSource      Decision = "source-ranges" // whether source ranges contain the client
	DecideList        Decision = "endpoint-list" // whether the client gets the cluster or the local list
	DecideAffinity    Decision = "affinity"      // the endpoint that the rules remember for the client
	DecideRefused     Decision = "refused"       // the connection is rejected or dropped
	DecideEndpoint    Decision = "endpoint"      // how an endpoint is selected, unless at random
	DecideBalancer    Decision = "balancer"      // the destinations of the virtual server
	DecideHairpin     Decision = "hairpin"       // whether a pod connects to itself
	DecideMasquerade  Decision = "masquerade"    // whether the source address is replaced
	DecideUnsupported Decision = "unsupported"   // a rule that Walk cannot evaluate
)

// Step is one decision of the rules about a packet.
type Step struct {
	Decision Decision `json:"decision"`
	// Chain and Rule identify the rule that decides. Rule counts from 1. Comment is the rule's
	// comment.
	Chain   string `json:"chain,omitempty"`
	Rule    int    `json:"rule,omitempty"`
	Comment string `json:"comment,omitempty"`
	// Text describes the decision in one sentence without a period.
	Text string `json:"text"`
}

// WalkVerdict is what finally happens to a connection.
type WalkVerdict string

// Verdicts.
const (
	Translated WalkVerdict = "translated" // to an endpoint
	Unchanged  WalkVerdict = "unchanged"  // no rule applies
	Rejected   WalkVerdict = "rejected"
	Dropped    WalkVerdict = "dropped"
)

// Outcome is a possible result for a connection. If rules select an endpoint at random or in turn,
// there is one Outcome for each endpoint.
type Outcome struct {
	Verdict WalkVerdict `json:"verdict"`
	// Endpoint is set if the Verdict is Translated. VirtualServer is the address of the IPVS
	// virtual server that has selected it, or zero.
	Endpoint      netip.AddrPort `json:"endpoint,omitzero"`
	VirtualServer netip.AddrPort `json:"virtualServer,omitzero"`
	// Masqueraded is set if the endpoint sees an address of the node as the source.
	Masqueraded bool `json:"masqueraded,omitempty"`
	// Counter is the name of the counter that counts the refused packet.
	Counter string `json:"counter,omitempty"`
}

// Walk is the path of a packet through the rules of a table.
type Walk struct {
	// Frontend is the frontend that the destination matches. It is zero if none does. Service is
	// [dataplane.Key.Service] of its owner, or the shortened name.
	Frontend dataplane.Frontend `json:"frontend,omitzero"`
	Service  string             `json:"service,omitempty"`
	// LocalList is set if the client gets [dataplane.ServiceSpec].LocalEndpoints.
	LocalList bool `json:"localList,omitempty"`
	// Affinity is the rest of the time for which the rules remember the client. Remembered is
	// the endpoint. Both are zero if the rules do not remember the client.
	Affinity   time.Duration  `json:"affinity,omitempty"`
	Remembered netip.AddrPort `json:"remembered,omitzero"`
	Steps      []Step         `json:"steps"`
	// Outcomes is sorted by endpoint.
	Outcomes []Outcome `json:"outcomes"`
}

// maxBranches limits the slots that one Walk follows. It is as large as an endpoint list.
const maxBranches = dataplane.MaxEndpoints

// WalkRendered evaluates the rules that Replace and Apply would program for these Services, on a
// packet. It needs no kernel. It evaluates rules without a Translator, and ignores a
// [dataplane.ServiceSpec].Scheduler that only a Translator supports.
func WalkRendered(host Host, p Packet, node dataplane.Node, services []*dataplane.Service) (*Walk, error) {
	t := Options{}.newTables(TableName)[familyIndex(dataplane.FamilyOf(p.Destination.Addr()))]
	return walk(t, renderRuleset(t, node, services), host, p)
}

// Walker evaluates the rules in the kernel. It is safe for concurrent use.
type Walker struct {
	opts Options

	mu   sync.Mutex
	conn *nftables.Conn
	// generation is the generation of the rules and elements in rulesets.
	generation uint32
	rulesets   [2]*kernelRuleset
}

// NewWalker returns a Walker. It changes nothing in the kernel. The error is as for [Open].
func NewWalker(opts Options) (*Walker, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(opts.NetNS), nftables.WithSockOptions(checkDescriptor))
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", explainError(err))
	}
	if err := probe(conn); err != nil {
		return nil, errors.Join(err, conn.CloseLasting())
	}
	return &Walker{opts: opts, conn: conn}, nil
}

// Close closes the connection to the kernel.
func (w *Walker) Close() error { return w.conn.CloseLasting() }

// Walk evaluates the rules on a packet. It reads only the rules and elements that the packet
// passes. It returns an error that wraps [ErrNoTable] if the table does not exist.
func (w *Walker) Walk(host Host, p Packet) (*Walk, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for attempt := 1; ; attempt++ {
		before, err := w.conn.GetGen()
		if err != nil {
			return nil, fmt.Errorf("read the nftables generation: %w", explainError(err))
		}
		if w.generation != before.ID {
			w.generation, w.rulesets = before.ID, [2]*kernelRuleset{}
		}
		result, walkErr := w.walk(host, p)
		after, err := w.conn.GetGen()
		if err != nil {
			return nil, fmt.Errorf("read the nftables generation: %w", explainError(err))
		}
		if before.ID == after.ID || attempt == readAttempts {
			return result, walkErr
		}
	}
}

// walk evaluates the rules of one generation, unless the rules change meanwhile.
func (w *Walker) walk(host Host, p Packet) (*Walk, error) {
	i := familyIndex(dataplane.FamilyOf(p.Destination.Addr()))
	if w.rulesets[i] == nil {
		t := w.opts.newTables(w.opts.tableName())[i]
		found, err := findTable(w.conn, t)
		if err != nil {
			return nil, err
		}
		if found == nil {
			return nil, fmt.Errorf("%w: %s", ErrNoTable, t)
		}
		w.rulesets[i] = newKernelRuleset(w.conn, t)
	}
	return walk(w.rulesets[i].table, w.rulesets[i], host, p)
}

// ErrNoTable is wrapped by the error of [Walker.Walk] if the table does not exist.
var ErrNoTable = errors.New("the table does not exist")

// packetRules is a source of rules and elements.
type packetRules interface {
	baseChains() ([]*nftables.Chain, error)
	rules(chain string) ([]rule, error)
	// find returns the element with a key, or the interval that contains it. The value of a
	// verdict map's element is in VerdictData.
	find(set string, key []byte) (element, bool, error)
}

// walk follows all branches of a packet's path.
func walk(t *table, r packetRules, host Host, p Packet) (*Walk, error) {
	base, err := r.baseChains()
	if err != nil {
		return nil, err
	}
	w := &Walk{}
	var choices []int
	for range maxBranches {
		b := &branch{table: t, ruleset: r, host: host, base: base, packet: p, choices: choices, walk: w, overlay: map[string]map[string]*element{}}
		if err := b.run(); err != nil {
			return nil, err
		}
		for _, s := range b.steps {
			if !slices.Contains(w.Steps, s) {
				w.Steps = append(w.Steps, s)
			}
		}
		if !slices.Contains(w.Outcomes, b.outcome) {
			w.Outcomes = append(w.Outcomes, b.outcome)
		}
		// Continue with the last choice that has another alternative. A branch makes fewer
		// choices than the one before if the affinity maps have changed meanwhile.
		choices = b.choices[:b.drawn]
		for len(choices) > 0 && choices[len(choices)-1]+1 >= b.alternatives[len(choices)-1] {
			choices = choices[:len(choices)-1]
		}
		if len(choices) == 0 {
			break
		}
		choices[len(choices)-1]++
	}
	slices.SortStableFunc(w.Outcomes, func(a, b Outcome) int {
		return cmp.Or(a.Endpoint.Compare(b.Endpoint), cmp.Compare(a.Verdict, b.Verdict))
	})
	return w, nil
}

// branch is one path of a packet, for one sequence of random choices.
type branch struct {
	table   *table
	ruleset packetRules
	host    Host
	base    []*nftables.Chain
	packet  Packet
	walk    *Walk
	// choices contains the random choices, and alternatives their numbers of alternatives. The
	// branch extends choices with zeros.
	choices, alternatives []int
	drawn                 int

	// The state of the packet and its connection.
	registers   [16 * 4]byte
	priority    [4]byte
	mark        [4]byte
	destination netip.AddrPort // after translation
	status      uint32
	in, out     string
	natDone     map[nftables.ChainHook]bool
	// overlay contains elements that rules have added or, if nil, deleted.
	overlay map[string]map[string]*element

	// The position: the hook, chain and rule that are evaluated.
	chain string
	rule  int
	note  string // the rule's comment

	// evaluated is the number of expressions that the branch has evaluated. A test limits it.
	evaluated int

	steps   []Step
	outcome Outcome
}

// verdict is the result of a rule or a chain.
type verdict int

const (
	verdictContinue verdict = iota
	verdictBreak            // the rule does not match
	verdictAccept
	verdictReturn
	verdictDrop
	verdictReject
	verdictJump
	verdictGoto
)

func (b *branch) step(d Decision, format string, args ...any) {
	b.steps = append(b.steps, Step{Decision: d, Chain: b.chain, Rule: b.rule, Comment: b.note, Text: fmt.Sprintf(format, args...)})
}

// run follows the packet through the hooks.
func (b *branch) run() error {
	b.destination, b.natDone = b.packet.Destination, map[nftables.ChainHook]bool{}
	b.in = b.packet.InInterface
	refused, err := b.runHooks()
	if err != nil || refused {
		return err
	}
	if b.destination != b.packet.Destination || b.outcome.VirtualServer.IsValid() {
		b.outcome.Verdict, b.outcome.Endpoint = Translated, b.destination
	} else {
		b.outcome.Verdict = Unchanged
	}
	return nil
}

func (b *branch) runHooks() (refused bool, err error) {
	prerouting, input := *nftables.ChainHookPrerouting, *nftables.ChainHookInput
	forward, output, postrouting := *nftables.ChainHookForward, *nftables.ChainHookOutput, *nftables.ChainHookPostrouting
	own := b.in == ""
	first := prerouting
	if own {
		first = output
	}
	if refused, err := b.runHook(first, own); refused || err != nil {
		return refused, err
	}
	if b.walk.Frontend == (dataplane.Frontend{}) && !slices.ContainsFunc(b.steps, func(s Step) bool { return s.Decision == DecideNoFrontend }) {
		b.chain, b.rule, b.note = "", 0, ""
		b.step(DecideNoFrontend, "no frontend has the destination %s/%s", b.packet.Destination, b.packet.Protocol)
	}
	local, err := b.host.IsLocal(b.destination.Addr())
	if err != nil {
		return false, err
	}
	balanced := own && b.outcome.VirtualServer.IsValid()
	if !own {
		if !local {
			if balanced, err = b.balance(); err != nil {
				return false, err
			}
		} else if refused, err := b.runHook(input, false); refused || err != nil {
			return refused, err
		} else if balanced, err = b.balance(); err != nil {
			return false, err
		}
		switch {
		case balanced: // IPVS sends the packet through the output hook
			if refused, err := b.runHook(output, false); refused || err != nil {
				return refused, err
			}
		case local:
			return false, nil
		default:
			if refused, err := b.runHook(forward, false); refused || err != nil {
				return refused, err
			}
		}
	}
	if refused, err := b.runHook(postrouting, false); refused || err != nil {
		return refused, err
	}
	if own && local && !balanced {
		b.in = "lo"
		for _, hook := range []nftables.ChainHook{prerouting, input} {
			if refused, err := b.runHook(hook, false); refused || err != nil {
				return refused, err
			}
		}
	}
	return false, nil
}

// balance lets IPVS select an endpoint.
func (b *branch) balance() (bool, error) {
	server, p := b.destination, b.packet.Protocol
	balance, ok, err := b.host.Destinations(p, server, b.packet.Source.Addr())
	if err != nil || !ok {
		return false, err
	}
	b.chain, b.rule, b.note = "", 0, ""
	switch destinations := balance.Destinations; {
	case balance.Remembered.IsValid():
		b.walk.Affinity, b.walk.Remembered = balance.Expires, balance.Remembered
		b.destination = balance.Remembered
		b.step(DecideAffinity, "session affinity: the virtual server %s/%s remembers %s for the client for another %s",
			server, p, balance.Remembered, balance.Expires)
	case len(destinations) == 0:
		b.step(DecideBalancer, "the virtual server %s/%s has no destination that accepts connections", server, p)
		return false, nil
	default:
		b.step(DecideBalancer, "IPVS selects one of %d destinations of the virtual server %s/%s", len(destinations), server, p)
		b.destination = destinations[b.draw(len(destinations))]
	}
	b.outcome.VirtualServer = server
	return true, nil
}

// draw returns the choice of this branch among n alternatives.
func (b *branch) draw(n int) int {
	if b.drawn == len(b.choices) {
		b.choices = append(b.choices, 0)
	}
	if b.drawn == len(b.alternatives) {
		b.alternatives = append(b.alternatives, n)
	}
	b.drawn++
	return b.choices[b.drawn-1]
}

// runHook evaluates the base chains of a hook by priority. IPVS handles the node's own packets in
// the output hook, behind the NAT chains.
func (b *branch) runHook(hook nftables.ChainHook, balance bool) (refused bool, err error) {
	var chains []*nftables.Chain
	for _, c := range b.base {
		if c.Hooknum != nil && *c.Hooknum == hook {
			chains = append(chains, c)
		}
	}
	slices.SortStableFunc(chains, func(a, b *nftables.Chain) int { return cmp.Compare(*a.Priority, *b.Priority) })
	manipulatesSource := hook == *nftables.ChainHookPostrouting
	for _, c := range chains {
		if c.Type == nftables.ChainTypeNAT && (b.natDone[hook] || !manipulatesSource && len(b.natDone) > 0) {
			continue
		}
		if balance && *c.Priority > *nftables.ChainPriorityNATDest+aheadOffset+2 {
			balance = false
			if _, err := b.balance(); err != nil {
				return false, err
			}
		}
		v, err := b.runChain(c.Name, 0)
		if err != nil {
			return false, err
		}
		switch v {
		case verdictDrop:
			b.outcome.Verdict = Dropped
			return true, nil
		case verdictReject:
			b.outcome.Verdict = Rejected
			return true, nil
		default: // the next chain decides
		}
	}
	b.natDone[hook] = true
	if balance {
		_, err = b.balance()
	}
	return false, err
}

// maxDepth is the kernel's limit of nested jumps (NFT_JUMP_STACK_SIZE).
const maxDepth = 16

// runChain evaluates a chain and the chains that it sends the packet to.
func (b *branch) runChain(name string, depth int) (verdict, error) {
	if depth > maxDepth {
		return 0, fmt.Errorf("chain %s: more than %d nested jumps", name, maxDepth)
	}
	for {
		rules, err := b.ruleset.rules(name)
		if err != nil {
			return 0, fmt.Errorf("read the rules of chain %s: %w", name, err)
		}
		next := ""
	rules:
		for i, r := range rules {
			b.chain, b.rule, b.note = name, i+1, r.comment
			v, to, err := b.runRule(r)
			if err != nil {
				return 0, fmt.Errorf("chain %s, rule %d: %w", name, i+1, err)
			}
			switch v {
			case verdictContinue, verdictBreak:
			case verdictGoto:
				next = to
				break rules
			case verdictJump:
				if v, err := b.runChain(to, depth+1); err != nil || v != verdictContinue {
					return v, err
				}
			case verdictReturn:
				return verdictContinue, nil
			case verdictAccept, verdictDrop, verdictReject:
				return v, nil
			}
		}
		if next == "" {
			b.leaveChain(name)
			return verdictContinue, nil
		}
		b.enterChain(next)
		name = next
	}
}

// runRule evaluates the expressions of a rule.
func (b *branch) runRule(r rule) (v verdict, chain string, err error) {
	for _, e := range r.exprs {
		b.evaluated++
		v, chain, err := b.eval(e)
		if err != nil || v != verdictContinue {
			return v, chain, err
		}
	}
	return verdictContinue, "", nil
}

// register returns the bytes of a register.
func (b *branch) register(n uint32) []byte {
	if n >= unix.NFT_REG32_00 {
		return b.registers[4*(n-unix.NFT_REG32_00):]
	}
	return b.registers[16*(n-unix.NFT_REG_1):]
}

// load stores data in a register and fills the last word with zeros.
func (b *branch) load(n uint32, data []byte) {
	to := b.register(n)
	clear(to[:min(len(to), (len(data)+3)/4*4)])
	copy(to, data)
}

// eval evaluates one expression.
func (b *branch) eval(e expr.Any) (verdict, string, error) {
	switch e := e.(type) {
	case *expr.Meta:
		return b.evalMeta(e)
	case *expr.Payload:
		data, ok := b.payload(e)
		if !ok {
			return verdictBreak, "", nil
		}
		b.load(e.DestRegister, data)
	case *expr.Immediate:
		b.load(e.Register, e.Data)
	case *expr.Bitwise:
		data := slices.Clone(b.register(e.SourceRegister)[:e.Len])
		for i := range data {
			data[i] = data[i]&e.Mask[i] ^ e.Xor[i]
		}
		b.load(e.DestRegister, data)
	case *expr.Cmp:
		equal := bytes.Equal(b.register(e.Register)[:len(e.Data)], e.Data)
		if equal != (e.Op == expr.CmpOpEq) {
			return verdictBreak, "", nil
		}
	case *expr.Ct:
		return b.evalCt(e)
	case *expr.Fib:
		addr := b.destination.Addr()
		if e.FlagSADDR {
			addr = b.packet.Source.Addr()
		}
		local, err := b.host.IsLocal(addr)
		if err != nil {
			return 0, "", err
		}
		typ := uint32(unix.RTN_UNICAST)
		if local {
			typ = unix.RTN_LOCAL
		}
		b.load(e.Register, binary.NativeEndian.AppendUint32(nil, typ))
	case *expr.Numgen:
		n := uint32(b.draw(int(e.Modulus))) //nolint:gosec // less than the modulus
		if e.Type == unix.NFT_NG_INCREMENTAL && e.Modulus > 1 {
			b.step(DecideEndpoint, "the rules select one endpoint after another, in turn")
		}
		b.load(e.Register, binary.NativeEndian.AppendUint32(nil, e.Offset+n))
	case *expr.Hash:
		return b.evalHash(e)
	case *expr.Lookup:
		return b.evalLookup(e)
	case *expr.Dynset:
		return b.evalDynset(e)
	case *expr.NAT:
		b.translate(e)
		return verdictAccept, "", nil
	case *expr.Masq:
		b.outcome.Masqueraded = true
		return verdictAccept, "", nil
	case *expr.Reject:
		return verdictReject, "", nil
	case *expr.Objref:
		b.count(counter(e.Name))
	case *expr.Counter:
	case *expr.Verdict:
		return b.evalVerdict(e)
	default:
		b.step(DecideUnsupported, "the rule contains an expression that cannot be evaluated: %T", e)
		return verdictBreak, "", nil
	}
	return verdictContinue, "", nil
}

func (b *branch) evalMeta(e *expr.Meta) (verdict, string, error) {
	if e.SourceRegister {
		switch e.Key {
		case expr.MetaKeyPRIORITY:
			copy(b.priority[:], b.register(e.Register))
		case expr.MetaKeyMARK:
			copy(b.mark[:], b.register(e.Register))
		default:
			b.step(DecideUnsupported, "the rule sets the meta key %d, which is ignored", e.Key)
		}
		return verdictContinue, "", nil
	}
	name := func(s string) []byte { return append([]byte(s), make([]byte, unix.IFNAMSIZ-len(s))...) }
	var data []byte
	switch e.Key {
	case expr.MetaKeyL4PROTO:
		data = []byte{byte(b.packet.Protocol)}
	case expr.MetaKeyNFPROTO:
		data = []byte{byte(b.table.nf.Family)}
	case expr.MetaKeyPRIORITY:
		data = b.priority[:]
	case expr.MetaKeyMARK:
		data = b.mark[:]
	case expr.MetaKeyIIFNAME:
		data = name(b.in)
	case expr.MetaKeyOIFNAME:
		data = name(b.out)
	default:
		b.step(DecideUnsupported, "the rule reads the meta key %d, which is unknown", e.Key)
		return verdictBreak, "", nil
	}
	b.load(e.Register, data)
	return verdictContinue, "", nil
}

// payload returns a part of the packet's headers.
func (b *branch) payload(e *expr.Payload) ([]byte, bool) {
	var header []byte
	switch e.Base {
	case expr.PayloadBaseNetworkHeader:
		source, destination := b.packet.Source.Addr().AsSlice(), b.destination.Addr().AsSlice()
		before := 12
		if len(source) == 16 {
			before = 8
		}
		header = slices.Concat(make([]byte, before), source, destination)
	case expr.PayloadBaseTransportHeader:
		header = make([]byte, 20)
		binary.BigEndian.PutUint16(header, b.packet.Source.Port())
		binary.BigEndian.PutUint16(header[2:], b.destination.Port())
	default:
		return nil, false
	}
	if int(e.Offset+e.Len) > len(header) {
		return nil, false
	}
	return header[e.Offset : e.Offset+e.Len], true
}

func (b *branch) evalCt(e *expr.Ct) (verdict, string, error) {
	var data []byte
	switch e.Key {
	case expr.CtKeySTATE:
		data = binary.NativeEndian.AppendUint32(nil, expr.CtStateBitNEW)
	case expr.CtKeySTATUS:
		data = binary.NativeEndian.AppendUint32(nil, b.status)
	case expr.CtKeyDIRECTION:
		data = []byte{0} // IP_CT_DIR_ORIGINAL
	case expr.CtKeyDSTIP, expr.CtKeyDSTIP6:
		data = b.packet.Destination.Addr().AsSlice()
	case expr.CtKeySRCIP, expr.CtKeySRCIP6:
		data = b.packet.Source.Addr().AsSlice()
	case expr.CtKeyPROTODST:
		data = binary.BigEndian.AppendUint16(nil, b.packet.Destination.Port())
	default:
		b.step(DecideUnsupported, "the rule reads the ct key %d, which is unknown", e.Key)
		return verdictBreak, "", nil
	}
	b.load(e.Register, data)
	return verdictContinue, "", nil
}

func (b *branch) evalVerdict(e *expr.Verdict) (verdict, string, error) {
	switch e.Kind {
	case expr.VerdictReturn:
		return verdictReturn, "", nil
	case expr.VerdictGoto:
		return verdictGoto, e.Chain, nil
	case expr.VerdictJump:
		return verdictJump, e.Chain, nil
	case expr.VerdictDrop:
		b.dropped()
		return verdictDrop, "", nil
	case expr.VerdictAccept:
		return verdictAccept, "", nil
	case expr.VerdictContinue:
		return verdictContinue, "", nil
	default:
		b.step(DecideUnsupported, "the rule has the verdict %d, which is unknown", e.Kind)
		return verdictBreak, "", nil
	}
}

// key returns the key of a lookup in a set.
func (b *branch) key(set string, register uint32) ([]byte, error) {
	n, ok := b.table.keyLen(set)
	if !ok {
		return nil, fmt.Errorf("set %s is unknown", set)
	}
	return slices.Clone(b.register(register)[:n]), nil
}

func (b *branch) evalLookup(e *expr.Lookup) (verdict, string, error) {
	key, err := b.key(e.SetName, e.SourceRegister)
	if err != nil {
		return 0, "", err
	}
	found, ok, err := b.find(e.SetName, key)
	if err != nil {
		return 0, "", fmt.Errorf("look up an element of %s: %w", e.SetName, err)
	}
	b.lookedUp(e.SetName, key, found, ok)
	if ok == e.Invert {
		return verdictBreak, "", nil
	}
	switch {
	case !e.IsDestRegSet || e.Invert:
		return verdictContinue, "", nil
	case found.VerdictData != nil:
		return b.evalVerdict(found.VerdictData)
	}
	b.load(e.DestRegister, found.Val)
	return verdictContinue, "", nil
}

func (b *branch) find(set string, key []byte) (element, bool, error) {
	if e, ok := b.overlay[set][string(key)]; ok {
		if e == nil {
			return element{}, false, nil
		}
		return *e, true, nil
	}
	return b.ruleset.find(set, key)
}

// evalDynset changes an element for the rest of this branch.
func (b *branch) evalDynset(e *expr.Dynset) (verdict, string, error) {
	if len(e.Exprs) > 0 { // a limit that only other connections can exhaust
		return verdictBreak, "", nil
	}
	key, err := b.key(e.SetName, e.SrcRegKey)
	if err != nil {
		return 0, "", err
	}
	elements := b.overlay[e.SetName]
	if elements == nil {
		elements = map[string]*element{}
		b.overlay[e.SetName] = elements
	}
	if e.Operation == dynsetDelete {
		elements[string(key)] = nil
		return verdictContinue, "", nil
	}
	// The kernel does not replace the value of an existing element.
	stored, ok, err := b.find(e.SetName, key)
	if err != nil {
		return 0, "", err
	}
	if !ok {
		stored = element{Key: key, Val: slices.Clone(b.register(e.SrcRegData)[:4])}
	}
	elements[string(key)] = &stored
	return verdictContinue, "", nil
}

// translate applies a NAT expression.
func (b *branch) translate(e *expr.NAT) {
	addr, _ := netip.AddrFromSlice(b.register(e.RegAddrMin)[:b.table.addrLen])
	port := b.destination.Port()
	if e.RegProtoMin != 0 {
		port = binary.BigEndian.Uint16(b.register(e.RegProtoMin))
	}
	b.destination = netip.AddrPortFrom(addr, port)
	if b.destination != b.packet.Destination {
		b.status |= ctStatusDNAT
	}
}

// ctStatusDNAT is IPS_DST_NAT (linux/netfilter/nf_conntrack_common.h).
const ctStatusDNAT = 1 << 5

// keyLen returns the length of the keys of a set, in which each field is padded to 32 bits.
func (t *table) keyLen(set string) (int, bool) {
	for _, s := range slices.Concat(t.frontendSets, t.addrSets[:], t.verdicts[:], []*nftables.Set{
		t.endpointPorts, t.nodePortAddrs, t.nodePortNetworks, t.podCIDRs, t.localPods, t.serviceCIDRs, t.ahead,
	}) {
		if s.Name == set {
			if set == t.ahead.Name {
				return 1, true
			}
			if set == t.endpointPorts.Name {
				return 2, true
			}
			return int(s.KeyType.Bytes), true
		}
	}
	frontend := t.addrLen + 8
	switch {
	case strings.HasPrefix(set, sharedRangesPrefix):
		return 4 + t.addrLen, true
	case strings.HasPrefix(set, rangesPrefix):
		return frontend + t.addrLen, true
	case strings.HasPrefix(set, affinityPrefix):
		return t.addrLen + frontend, true
	}
	return 0, false
}
