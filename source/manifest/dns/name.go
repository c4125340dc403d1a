package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

// Labels between the namespace and the cluster domain.
const (
	labelService = "svc"
	labelPod     = "pod"
)

const labelVersion = "dns-version"

// nameKind is the form of a name in the cluster domain.
type nameKind uint8

const (
	kindNone             nameKind = iota // invalid
	kindApex                             // the cluster domain
	kindVersion                          // dns-version
	kindEmptyNonTerminal                 // svc and pod
	kindNamespace                        // <namespace>.svc and <namespace>.pod
	kindService                          // <service>.<namespace>.svc
	kindHost                             // <host>.<service>.<namespace>.svc
	kindProtocol                         // _<protocol>.<service>.<namespace>.svc
	kindPort                             // _<port>._<protocol>.<service>.<namespace>.svc
	kindPod                              // <address with dashes>.<namespace>.pod
)

// parsedName is a parsed name in the cluster domain. Its parts are in lower case.
type parsedName struct {
	kind               nameKind
	namespace, service string
	host               string     // for kindHost
	port, protocol     string     // for kindPort and kindProtocol, with underscores
	addr               netip.Addr // for kindPod
}

// splitLabels returns the labels of a domain name in presentation format, in lower case,
// because DNS names are case-insensitive.
func splitLabels(domain string) []string {
	return dns.SplitDomainName(dns.CanonicalName(domain))
}

// parseName parses the labels before the cluster domain.
func parseName(labels []string) parsedName {
	if len(labels) == 0 {
		return parsedName{kind: kindApex}
	}
	last := len(labels) - 1
	rest := labels[:last]
	switch labels[last] {
	case labelVersion:
		if len(rest) == 0 {
			return parsedName{kind: kindVersion}
		}
	case labelService:
		return parseService(rest)
	case labelPod:
		return parsePod(rest)
	}
	return parsedName{}
}

func parseService(labels []string) parsedName {
	switch n := len(labels); n {
	case 0:
		return parsedName{kind: kindEmptyNonTerminal}
	case 1:
		return parsedName{kind: kindNamespace, namespace: labels[0]}
	case 2:
		return parsedName{kind: kindService, namespace: labels[1], service: labels[0]}
	case 3:
		parsed := parsedName{kind: kindHost, namespace: labels[2], service: labels[1], host: labels[0]}
		if strings.HasPrefix(labels[0], "_") {
			parsed.kind, parsed.host, parsed.protocol = kindProtocol, "", labels[0]
		}
		return parsed
	case 4:
		if strings.HasPrefix(labels[0], "_") && strings.HasPrefix(labels[1], "_") {
			return parsedName{kind: kindPort, namespace: labels[3], service: labels[2], port: labels[0], protocol: labels[1]}
		}
	}
	return parsedName{}
}

func parsePod(labels []string) parsedName {
	switch len(labels) {
	case 0:
		return parsedName{kind: kindEmptyNonTerminal}
	case 1:
		return parsedName{kind: kindNamespace, namespace: labels[0]}
	case 2:
		if addr, ok := parseDashedAddr(labels[0]); ok {
			return parsedName{kind: kindPod, namespace: labels[1], addr: addr}
		}
	}
	return parsedName{}
}

// dashedAddr returns the address as a label: 10-1-0-5, or fd00--5.
func dashedAddr(addr netip.Addr) string {
	return strings.NewReplacer(".", "-", ":", "-").Replace(addr.String())
}

// parseDashedAddr is the inverse of dashedAddr.
func parseDashedAddr(label string) (netip.Addr, bool) {
	for _, separator := range []string{".", ":"} {
		addr, err := netip.ParseAddr(strings.ReplaceAll(label, "-", separator))
		if err == nil && addr.Zone() == "" && dashedAddr(addr) == label {
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// parseReverse returns the address of a name in in-addr.arpa or ip6.arpa.
func parseReverse(labels []string) (netip.Addr, bool) {
	const (
		suffix   = 2 // in-addr or ip6, arpa
		octets   = 4
		nibbles  = 32
		nibbleIn = 4 // bits
	)
	if len(labels) < suffix || labels[len(labels)-1] != "arpa" {
		return netip.Addr{}, false
	}
	digits := slices.Clone(labels[:len(labels)-suffix])
	slices.Reverse(digits)
	switch zone := labels[len(labels)-suffix]; {
	case zone == "in-addr" && len(digits) == octets:
		// ParseAddr rejects signs and leading zeros.
		addr, err := netip.ParseAddr(strings.Join(digits, "."))
		return addr, err == nil && addr.Is4()
	case zone == "ip6" && len(digits) == nibbles:
		var bytes [nibbles / 2]byte
		for i, digit := range digits {
			if len(digit) != 1 {
				return netip.Addr{}, false
			}
			nibble, err := strconv.ParseUint(digit, 16, nibbleIn)
			if err != nil {
				return netip.Addr{}, false
			}
			bytes[i/2] = bytes[i/2]<<nibbleIn | byte(nibble)
		}
		return netip.AddrFrom16(bytes), true
	}
	return netip.Addr{}, false
}
