// Package nfhooks reads which nf_tables base chains and other functions handle the packets of a
// network namespace, in which order, and which chains drop packets that no rule accepts. It also
// reads the policies of iptables-legacy. It changes nothing.
package nfhooks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Hook is the place of a function in the path of packets.
type Hook uint32

// The hooks of the families IPv4 and IPv6.
const (
	Prerouting  Hook = unix.NF_INET_PRE_ROUTING
	Input       Hook = unix.NF_INET_LOCAL_IN
	Forward     Hook = unix.NF_INET_FORWARD
	Output      Hook = unix.NF_INET_LOCAL_OUT
	Postrouting Hook = unix.NF_INET_POST_ROUTING
)

// String returns nft's name of the hook.
func (h Hook) String() string {
	switch h {
	case Prerouting:
		return "prerouting"
	case Input:
		return "input"
	case Forward:
		return "forward"
	case Output:
		return "output"
	case Postrouting:
		return "postrouting"
	default:
		return fmt.Sprintf("hook %d", uint32(h))
	}
}

// Chain is a base chain of nf_tables.
type Chain struct {
	// Family is ip, ip6 or inet.
	Family, Table, Name string
	// Type is filter, nat or route.
	Type     string
	Hook     Hook
	Priority int32
	// Drops reports that the policy is drop.
	Drops bool
}

// String returns the chain in nft's notation.
func (c Chain) String() string { return fmt.Sprintf("chain %s %s %s", c.Family, c.Table, c.Name) }

// Function is a function that the kernel calls at a hook.
type Function struct {
	Priority int32
	// Name describes a base chain as in [Chain.String], or is the name of the kernel's function
	// and its module.
	Name string
}

// ErrUnsupported means that the kernel cannot list the functions of hooks: it is older than 5.14,
// or built without CONFIG_NETFILTER_NETLINK_HOOK.
var ErrUnsupported = errors.New("the kernel does not list the functions of hooks (CONFIG_NETFILTER_NETLINK_HOOK)")

// Conn is a connection to netfilter in a network namespace.
type Conn struct{ netlink *netlink.Conn }

// Dial returns a Conn for the network namespace of the calling thread.
func Dial() (*Conn, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for netfilter: %w", err)
	}
	return &Conn{conn}, nil
}

// Close closes the connection.
func (c *Conn) Close() error { return c.netlink.Close() }

// request sends a request of a subsystem of nfnetlink and returns the attributes of the replies,
// each after the family of its header.
func (c *Conn) request(subsystem, message int, flags netlink.HeaderFlags, family byte, attributes []byte) ([]netlink.Message, error) {
	return c.netlink.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(subsystem<<8 | message), Flags: netlink.Request | flags}, //nolint:gosec // constants
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attributes...),
	})
}

const headerLen = 4 // struct nfgenmsg

// decode calls visit for each attribute of a message with struct nfgenmsg.
func decode(m netlink.Message, visit func(*netlink.AttributeDecoder) error) error {
	if len(m.Data) < headerLen {
		return fmt.Errorf("netfilter message of %d bytes", len(m.Data))
	}
	return visitAll(m.Data[headerLen:], visit)
}

func visitAll(data []byte, visit func(*netlink.AttributeDecoder) error) error {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return err
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		if err := visit(d); err != nil {
			return err
		}
	}
	return d.Err()
}

func familyName(number byte) string {
	switch number {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_INET:
		return "inet"
	default:
		return fmt.Sprintf("family %d", number)
	}
}

// Chains returns the base chains of the families ip, ip6 and inet. The kernel sends all chains, so
// the cost depends on their number.
func (c *Conn) Chains() ([]Chain, error) {
	var chains []Chain
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_INET} {
		messages, err := c.request(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETCHAIN, netlink.Dump, family, nil)
		if err != nil {
			return nil, fmt.Errorf("list nf_tables chains of family %s: %w", familyName(family), err)
		}
		for _, m := range messages {
			chain, isBase, err := parseChain(m)
			if err != nil {
				return nil, fmt.Errorf("list nf_tables chains of family %s: %w", familyName(family), err)
			}
			if isBase {
				chains = append(chains, chain)
			}
		}
	}
	return chains, nil
}

func parseChain(m netlink.Message) (chain Chain, isBase bool, err error) {
	if len(m.Data) < headerLen {
		return Chain{}, false, fmt.Errorf("netfilter message of %d bytes", len(m.Data))
	}
	chain.Family = familyName(m.Data[0])
	err = decode(m, func(d *netlink.AttributeDecoder) error {
		switch d.Type() {
		case unix.NFTA_CHAIN_TABLE:
			chain.Table = d.String()
		case unix.NFTA_CHAIN_NAME:
			chain.Name = d.String()
		case unix.NFTA_CHAIN_TYPE:
			chain.Type = d.String()
		case unix.NFTA_CHAIN_POLICY:
			chain.Drops = d.Uint32() == nfDrop
		case unix.NFTA_CHAIN_HOOK:
			isBase = true
			return visitAll(d.Bytes(), func(h *netlink.AttributeDecoder) error {
				switch h.Type() {
				case unix.NFTA_HOOK_HOOKNUM:
					chain.Hook = Hook(h.Uint32())
				case unix.NFTA_HOOK_PRIORITY:
					chain.Priority = int32(h.Uint32()) //nolint:gosec // the kernel sends it as unsigned
				}
				return nil
			})
		}
		return nil
	})
	return chain, isBase, err
}

// nfDrop is NF_DROP of linux/netfilter.h.
const nfDrop = 0

// Attributes of linux/netfilter/nfnetlink_hook.h.
const (
	hookNumber    = 1
	hookPriority  = 2
	hookFunction  = 4
	hookModule    = 5
	hookChainInfo = 6
	infoDesc      = 1
	descTable     = 1
	descFamily    = 2
	descName      = 3
)

// Functions returns the functions that the kernel calls for packets of a family, ip or ip6, at a
// hook, in the order of the calls. The error is [ErrUnsupported] if the kernel cannot list them.
func (c *Conn) Functions(family string, hook Hook) ([]Function, error) {
	number := byte(unix.NFPROTO_IPV4)
	if family == "ip6" {
		number = unix.NFPROTO_IPV6
	}
	attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: hookNumber, Data: binary.BigEndian.AppendUint32(nil, uint32(hook))},
	})
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	messages, err := c.request(unix.NFNL_SUBSYS_HOOK, 0, netlink.Dump, number, attributes)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return nil, ErrUnsupported
	case err != nil:
		return nil, fmt.Errorf("list the functions at hook %s of family %s: %w", hook, family, err)
	}
	var functions []Function
	for _, m := range messages {
		f, err := parseFunction(m)
		if err != nil {
			return nil, fmt.Errorf("list the functions at hook %s of family %s: %w", hook, family, err)
		}
		functions = append(functions, f)
	}
	return functions, nil
}

func parseFunction(m netlink.Message) (Function, error) {
	var f Function
	var name, module, table, chain string
	family := ""
	if len(m.Data) > 0 {
		family = familyName(m.Data[0])
	}
	err := decode(m, func(d *netlink.AttributeDecoder) error {
		switch d.Type() {
		case hookPriority:
			f.Priority = int32(d.Uint32()) //nolint:gosec // the kernel sends it as unsigned
		case hookFunction:
			name = d.String()
		case hookModule:
			module = d.String()
		case hookChainInfo:
			return visitAll(d.Bytes(), func(info *netlink.AttributeDecoder) error {
				if info.Type() != infoDesc {
					return nil
				}
				return visitAll(info.Bytes(), func(desc *netlink.AttributeDecoder) error {
					switch desc.Type() {
					case descTable:
						table = desc.String()
					case descFamily: // inet chains have functions in the families ip and ip6
						family = familyName(desc.Uint8())
					case descName:
						chain = desc.String()
					}
					return nil
				})
			})
		}
		return nil
	})
	switch {
	case chain != "":
		f.Name = Chain{Family: family, Table: table, Name: chain}.String()
	case module != "":
		f.Name = name + " of module " + strings.Trim(module, "[]")
	default:
		f.Name = name
	}
	return f, err
}

// Dropper is a base chain, or a chain of iptables-legacy, that drops or rejects packets that its
// rules do not accept.
type Dropper struct {
	Hook Hook
	// Name describes the chain. Family is ip, ip6 or inet.
	Name, Family string
	// Reason is "policy drop", or describes the unconditional rule.
	Reason string
	// Fix is a command that makes the chain accept packets.
	Fix string
}

// Droppers returns the chains at the hooks prerouting, input and forward that drop or reject what
// their rules do not accept. Chains for which skip returns true are left out.
func (c *Conn) Droppers(chains []Chain, skip func(Chain) bool) ([]Dropper, error) {
	var droppers []Dropper
	for _, chain := range chains {
		if chain.Hook != Prerouting && chain.Hook != Input && chain.Hook != Forward || skip(chain) {
			continue
		}
		reason := policyDrop
		if !chain.Drops {
			var err error
			if reason, err = c.unconditionalDrop(chain); err != nil {
				return nil, err
			}
		}
		if reason != "" {
			droppers = append(droppers, Dropper{
				Hook: chain.Hook, Name: chain.String(), Family: chain.Family, Reason: reason, Fix: chain.acceptCommand(reason),
			})
		}
	}
	legacy, err := legacyDroppers()
	return append(droppers, legacy...), err
}

// acceptCommand returns a command that makes the chain accept connections to Services. In input
// chains these are connections to Fairlead itself, with the default node port range.
func (c Chain) acceptCommand(reason string) string {
	program := map[string]string{"ip": "iptables", "ip6": "ip6tables"}[c.Family]
	isIPTables := c.Table == "filter" && program != "" && c.Name == strings.ToUpper(c.Hook.String())
	chain := fmt.Sprintf("%s %s %s", c.Family, c.Table, c.Name)
	switch {
	case isIPTables && c.Hook == Input:
		return program + " -I INPUT -p tcp -m multiport --dports 10256,30000:32767 -j ACCEPT"
	case isIPTables && reason == policyDrop:
		return program + " -P " + c.Name + " ACCEPT"
	case isIPTables:
		return program + " -I " + c.Name + " -m conntrack --ctstate DNAT -j ACCEPT"
	case c.Hook == Input:
		return "nft insert rule " + chain + " tcp dport { 10256, 30000-32767 } accept"
	case c.Hook == Forward:
		return "nft insert rule " + chain + " ct status dnat accept"
	default: // the packets are not translated yet
		return "accept connections to Services in " + c.String()
	}
}

// policyDrop is the reason of a Dropper without a rule that drops.
const policyDrop = "policy drop"

// unconditionalDrop returns a description of a rule in the chain itself that drops or rejects all
// packets that reach it, or an empty string.
func (c *Conn) unconditionalDrop(chain Chain) (string, error) {
	rules, err := c.rules(chain.Family, chain.Table, chain.Name)
	if err != nil {
		return "", err
	}
	for _, r := range rules {
		if verdict := r.unconditionalDrop(); verdict != "" {
			return "unconditional rule " + verdict, nil
		}
	}
	return "", nil
}

// ForwardDrops returns the chains FORWARD of iptables, legacy or nft, whose policy is DROP. Unlike
// [Conn.Droppers], its cost does not depend on the number of chains.
func (c *Conn) ForwardDrops() ([]Dropper, error) {
	var droppers []Dropper
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
			{Type: unix.NFTA_CHAIN_TABLE, Data: []byte("filter\x00")}, {Type: unix.NFTA_CHAIN_NAME, Data: []byte("FORWARD\x00")},
		})
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		messages, err := c.request(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETCHAIN, 0, family, attributes)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read chain FORWARD of table %s filter: %w", familyName(family), err)
		}
		for _, m := range messages {
			chain, isBase, err := parseChain(m)
			if err != nil {
				return nil, err
			}
			if isBase && chain.Drops {
				droppers = append(droppers, Dropper{
					Hook: Forward, Name: chain.String(), Family: chain.Family, Reason: policyDrop, Fix: chain.acceptCommand(policyDrop),
				})
			}
		}
	}
	legacy, err := legacyDroppers()
	for _, d := range legacy {
		if d.Hook == Forward {
			droppers = append(droppers, d)
		}
	}
	return droppers, err
}
