package dns

import (
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/miekg/dns"
	"k8s.io/apimachinery/pkg/types"
)

// schemaVersion is the version of the Kubernetes DNS specification.
const schemaVersion = "1.1.0"

// maxCNAMEs is the maximum number of CNAME records that are followed.
const maxCNAMEs = 8

// response is the result of a question.
type response struct {
	rcode                    int
	answer, authority, extra []dns.RR
}

// resolve answers one question.
func (s *Server) resolve(question dns.Question) response {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !s.synced {
		return response{rcode: dns.RcodeServerFailure}
	}
	if question.Qclass != dns.ClassINET {
		return response{rcode: dns.RcodeRefused}
	}
	labels := splitLabels(question.Name)
	if front, ok := s.trimClusterDomain(labels); ok {
		l := lookup{server: s, qtype: question.Qtype}
		if !l.resolveName(question.Name, parseName(front), maxCNAMEs) {
			l.rcode = dns.RcodeNameError
		}
		if l.rcode == dns.RcodeNameError || len(l.answer) == 0 {
			l.authority = []dns.RR{s.soaRecord(s.domain)}
		}
		return l.response
	}
	if addr, ok := parseReverse(labels); ok {
		return s.resolveReverse(question, addr)
	}
	return s.resolveShort(question, labels)
}

// resolveReverse answers for an address. An address of no Service is refused.
func (s *Server) resolveReverse(question dns.Question, addr netip.Addr) response {
	domains := s.domainsForAddr(addr)
	if len(domains) == 0 {
		return response{rcode: dns.RcodeRefused}
	}
	l := lookup{server: s, qtype: question.Qtype}
	for _, domain := range domains {
		l.addRequested(&dns.PTR{Hdr: s.recordHeader(question.Name, dns.TypePTR), Ptr: domain})
	}
	return l.response
}

// resolveShort answers for a name outside the cluster domain by completing it with a search
// list.
func (s *Server) resolveShort(question dns.Question, labels []string) response {
	for _, search := range [][]string{{s.searchNamespace, labelService}, {labelService}, {}} {
		parsed := parseName(slices.Concat(labels, search))
		switch parsed.kind {
		case kindService, kindHost, kindPort, kindPod:
			l := lookup{server: s, qtype: question.Qtype}
			if l.resolveName(question.Name, parsed, maxCNAMEs) {
				return l.response
			}
		case kindNone, kindApex, kindVersion, kindEmptyNonTerminal, kindNamespace, kindProtocol:
		}
	}
	if s.canDeny(labels) {
		return response{rcode: dns.RcodeNameError}
	}
	return response{rcode: dns.RcodeRefused}
}

// canDeny reports whether no other server can know a name outside the cluster domain: a
// single label, or a name with the last label svc. A name that ends in a namespace may
// exist elsewhere: dev and app are top-level domains, and resolvers cache a negative answer
// for them. Names with the last label of the cluster domain are not denied.
func (s *Server) canDeny(labels []string) bool {
	if len(labels) == 0 || labels[len(labels)-1] == s.domainLabels[len(s.domainLabels)-1] {
		return false
	}
	last := labels[len(labels)-1]
	return len(labels) == 1 || last == labelService
}

// lookup collects the records for one question.
type lookup struct {
	response
	server *Server
	qtype  uint16
}

// addRequested adds a record to the answer if the question asks for its type.
func (l *lookup) addRequested(rr dns.RR) {
	if rrtype := rr.Header().Rrtype; l.qtype == rrtype || l.qtype == dns.TypeANY {
		l.answer = append(l.answer, rr)
	}
}

// resolveName adds the records of a name in the cluster domain with the given owner name
// and reports whether the name exists. It follows at most aliases CNAME records.
func (l *lookup) resolveName(owner string, n parsedName, aliases int) bool {
	s := l.server
	switch n.kind {
	case kindApex:
		l.addRequested(s.soaRecord(owner))
		return true
	case kindVersion:
		l.addRequested(&dns.TXT{Hdr: s.recordHeader(owner, dns.TypeTXT), Txt: []string{schemaVersion}})
		return true
	case kindEmptyNonTerminal:
		return true
	case kindNamespace:
		return s.hasNamespace(n.namespace)
	case kindPod:
		if !s.hasNamespace(n.namespace) {
			return false
		}
		l.addAddrs(owner, []netip.Addr{n.addr})
		return true
	case kindService, kindHost, kindProtocol, kindPort:
		r := s.records[types.NamespacedName{Namespace: n.namespace, Name: n.service}]
		return r != nil && !r.nonexistent && l.resolveService(owner, n, r, aliases)
	case kindNone:
	}
	return false
}

// resolveService adds the records of a Service's name or of a name below it.
func (l *lookup) resolveService(owner string, n parsedName, r *serviceRecords, aliases int) bool {
	switch n.kind {
	case kindHost:
		addrs, ok := r.hosts[n.host]
		l.addAddrs(owner, addrs)
		return ok
	case kindProtocol:
		return r.hasProtocol(n.protocol)
	case kindPort:
		ports, ok := r.srv[srvKey{n.port, n.protocol}]
		l.addSRV(owner, r, ports)
		return ok
	default:
		if r.externalName != "" {
			l.addCNAME(owner, r.externalName, aliases)
			return true
		}
		l.addAddrs(owner, r.addrs)
		return true
	}
}

// addCNAME adds a CNAME record and, if its target is in the cluster domain, the target's
// records. A CNAME record answers questions of all types.
func (l *lookup) addCNAME(owner, target string, aliases int) {
	l.answer = append(l.answer, &dns.CNAME{Hdr: l.server.recordHeader(owner, dns.TypeCNAME), Target: target})
	front, ok := l.server.trimClusterDomain(splitLabels(target))
	if !ok || l.qtype == dns.TypeCNAME || l.qtype == dns.TypeANY {
		return
	}
	if aliases == 0 {
		l.rcode = dns.RcodeServerFailure
		return
	}
	// The response code is that of the last name in the chain (RFC 6604).
	if !l.resolveName(target, parseName(front), aliases-1) {
		l.rcode = dns.RcodeNameError
	}
}

// addAddrs adds address records in random order, because most clients use the first one.
func (l *lookup) addAddrs(owner string, addrs []netip.Addr) {
	first := len(l.answer)
	for _, addr := range addrs {
		l.addRequested(l.server.addressRecord(owner, addr))
	}
	shuffle(l.answer[first:])
}

// addSRV adds SRV records in random order, and the addresses of their targets.
func (l *lookup) addSRV(owner string, r *serviceRecords, ports []srvRecord) {
	const weight = 100 // equal for all targets
	first := len(l.answer)
	added := map[string]bool{}
	for _, port := range ports {
		target, addrs := r.domain, r.addrs
		if port.host != "" {
			target, addrs = port.host+"."+r.domain, r.hosts[port.host]
		}
		before := len(l.answer)
		l.addRequested(&dns.SRV{Hdr: l.server.recordHeader(owner, dns.TypeSRV), Weight: weight, Port: port.port, Target: target})
		if len(l.answer) == before || added[target] {
			continue
		}
		added[target] = true
		for _, addr := range addrs {
			l.extra = append(l.extra, l.server.addressRecord(target, addr))
		}
	}
	shuffle(l.answer[first:])
}

func shuffle(rrs []dns.RR) {
	rand.Shuffle(len(rrs), func(i, j int) { rrs[i], rrs[j] = rrs[j], rrs[i] })
}

func (s *Server) addressRecord(owner string, addr netip.Addr) dns.RR {
	if addr.Is4() {
		return &dns.A{Hdr: s.recordHeader(owner, dns.TypeA), A: addr.AsSlice()}
	}
	return &dns.AAAA{Hdr: s.recordHeader(owner, dns.TypeAAAA), AAAA: addr.AsSlice()}
}

func (s *Server) recordHeader(owner string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: owner, Rrtype: rrtype, Class: dns.ClassINET, Ttl: s.ttl}
}

// soaRecord returns the SOA record, which limits how long clients cache a negative answer.
// Its other times are unused without zone transfers.
func (s *Server) soaRecord(owner string) dns.RR {
	const refresh, retry, expire = 7200, 1800, 86400 // seconds
	return &dns.SOA{
		Hdr: s.recordHeader(owner, dns.TypeSOA), Ns: "ns.dns." + s.domain, Mbox: "hostmaster." + s.domain,
		Serial: s.serial, Refresh: refresh, Retry: retry, Expire: expire, Minttl: s.ttl,
	}
}
