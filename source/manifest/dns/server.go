package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/kube"
)

// Options configures a [Server]. The zero value is usable.
type Options struct {
	// ClusterDomain is the domain of all Service names. The default is cluster.local. A
	// final dot is optional.
	ClusterDomain string
	// DefaultNamespace is the namespace in which clients without a search list find a
	// Service by its name alone. The default is "default".
	DefaultNamespace string
	// TTL is how long clients may cache an answer, in whole seconds. The default is 5 s.
	TTL time.Duration
	// Limiter limits TCP connections. Nil means a limiter with default options.
	Limiter *connlimit.Limiter
	// Logger receives warnings. Nil discards them.
	Logger *slog.Logger
}

// WriteTimeout is how long a TCP client may take to read an answer, for
// [connlimit.Options]. Package github.com/miekg/dns limits the time to send a query: 2 s
// for the first one, and 8 s for later ones.
const WriteTimeout = 2 * time.Second

const (
	defaultClusterDomain = "cluster.local"
	defaultNamespace     = "default"
	defaultTTL           = 5 * time.Second
)

// Server answers DNS queries for the names of Services. [Server.Apply] updates its data.
type Server struct {
	domain          string   // with the final dot, in lower case
	domainLabels    []string // the labels of domain
	searchNamespace string
	ttl             uint32
	limiter         *connlimit.Limiter
	logger          *slog.Logger

	mu sync.RWMutex // protects the fields below
	// synced is set by the first Apply.
	synced   bool
	serial   uint32
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
	// slicesByService has the names of each Service's EndpointSlices.
	slicesByService map[types.NamespacedName]map[types.NamespacedName]bool
	// records has the records of each Service.
	records map[types.NamespacedName]*serviceRecords
	// servicesPerNamespace counts the Services of each namespace.
	servicesPerNamespace map[string]int
	// reverse has the names of each address, by Service.
	reverse map[netip.Addr]map[types.NamespacedName][]string
}

// New returns a Server without data. It answers SERVFAIL until the first [Server.Apply].
func New(o Options) *Server {
	domain := dns.CanonicalName(cmp.Or(o.ClusterDomain, defaultClusterDomain))
	logger := o.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	limiter := o.Limiter
	if limiter == nil {
		limiter = connlimit.New(connlimit.Options{Server: "dns", WriteTimeout: WriteTimeout, Logger: logger})
	}
	return &Server{
		limiter:              limiter,
		domain:               domain,
		domainLabels:         splitLabels(domain),
		searchNamespace:      cmp.Or(o.DefaultNamespace, defaultNamespace),
		ttl:                  uint32(cmp.Or(o.TTL, defaultTTL) / time.Second),
		logger:               logger.With(slog.String("component", "dns")),
		services:             map[types.NamespacedName]*corev1.Service{},
		slices:               map[types.NamespacedName]*discoveryv1.EndpointSlice{},
		slicesByService:      map[types.NamespacedName]map[types.NamespacedName]bool{},
		records:              map[types.NamespacedName]*serviceRecords{},
		servicesPerNamespace: map[string]int{},
		reverse:              map[netip.Addr]map[types.NamespacedName][]string{},
	}
}

// Apply applies a change. Its cost depends on the changed Services only. A query sees
// either no part of the change or the complete change; after Apply has returned, it sees
// the complete change. The first Delta must be complete, as it is from a source. Apply may
// be called at any time, even while Serve is not running.
func (s *Server) Apply(d kube.Delta) {
	s.mu.Lock()
	defer s.mu.Unlock()
	dirty := map[types.NamespacedName]bool{}
	for _, key := range d.DeletedServices {
		delete(s.services, key)
		dirty[key] = true
	}
	for _, service := range d.Services {
		key := types.NamespacedName{Namespace: service.Namespace, Name: service.Name}
		s.services[key] = service
		dirty[key] = true
	}
	for _, key := range d.DeletedEndpointSlices {
		s.putSlice(key, nil, dirty)
	}
	for _, slice := range d.EndpointSlices {
		key := types.NamespacedName{Namespace: slice.Namespace, Name: slice.Name}
		s.putSlice(key, slice, dirty)
	}
	for key := range dirty {
		s.rebuildRecords(key)
	}
	s.synced = true
	s.serial++
}

// putSlice replaces an EndpointSlice, or removes it if slice is nil. It adds the previous
// and the new Service of the slice to dirty.
func (s *Server) putSlice(key types.NamespacedName, slice *discoveryv1.EndpointSlice, dirty map[types.NamespacedName]bool) {
	if old := s.slices[key]; old != nil {
		owner := serviceOf(old)
		dirty[owner] = true
		delete(s.slicesByService[owner], key)
		if len(s.slicesByService[owner]) == 0 {
			delete(s.slicesByService, owner)
		}
		delete(s.slices, key)
	}
	if slice == nil {
		return
	}
	owner := serviceOf(slice)
	dirty[owner] = true
	if s.slicesByService[owner] == nil {
		s.slicesByService[owner] = map[types.NamespacedName]bool{}
	}
	s.slicesByService[owner][key] = true
	s.slices[key] = slice
}

// serviceOf returns the name of the Service that the slice belongs to.
func serviceOf(slice *discoveryv1.EndpointSlice) types.NamespacedName {
	return types.NamespacedName{Namespace: slice.Namespace, Name: slice.Labels[discoveryv1.LabelServiceName]}
}

// rebuildRecords replaces the records of one Service.
func (s *Server) rebuildRecords(key types.NamespacedName) {
	if old := s.records[key]; old != nil {
		for addr := range old.reverse {
			delete(s.reverse[addr], key)
			if len(s.reverse[addr]) == 0 {
				delete(s.reverse, addr)
			}
		}
		delete(s.records, key)
		s.servicesPerNamespace[key.Namespace]--
		if s.servicesPerNamespace[key.Namespace] == 0 {
			delete(s.servicesPerNamespace, key.Namespace)
		}
	}
	service := s.services[key]
	if service == nil {
		return
	}
	var endpointSlices []*discoveryv1.EndpointSlice
	for slice := range s.slicesByService[key] {
		endpointSlices = append(endpointSlices, s.slices[slice])
	}
	r := newServiceRecords(s.domain, service, endpointSlices)
	if service.Spec.Type == corev1.ServiceTypeExternalName && r.nonexistent {
		s.logger.Warn("spec.externalName is not a domain name; the Service has no DNS records",
			slog.String("service", key.String()), slog.String("external_name", service.Spec.ExternalName))
	}
	s.records[key] = r
	s.servicesPerNamespace[key.Namespace]++
	for addr, domains := range r.reverse {
		if s.reverse[addr] == nil {
			s.reverse[addr] = map[types.NamespacedName][]string{}
		}
		s.reverse[addr][key] = domains
	}
}

// Sockets has a UDP and a TCP socket that receive queries.
type Sockets struct {
	UDP net.PacketConn
	TCP net.Listener
}

// Listen opens a UDP and a TCP socket at address (host:port) in the network namespace of
// the calling thread. Queries wait in the sockets until [Server.Serve] is called. Port 0
// selects a port that is free for both protocols; [Sockets.Addr] returns it.
func Listen(ctx context.Context, address string) (*Sockets, error) {
	// A port that is free for TCP may be in use for UDP. Several attempts make a failure
	// unlikely.
	const attempts = 8
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen address %q: %w", address, err)
	}
	var config net.ListenConfig
	for attempt := 1; ; attempt++ {
		tcp, err := config.Listen(ctx, "tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen for DNS queries: %w", err)
		}
		_, chosen, err := net.SplitHostPort(tcp.Addr().String())
		if err == nil {
			var udp net.PacketConn
			if udp, err = config.ListenPacket(ctx, "udp", net.JoinHostPort(host, chosen)); err == nil {
				return &Sockets{UDP: udp, TCP: tcp}, nil
			}
		}
		if port != "0" || attempt == attempts {
			return nil, fmt.Errorf("listen for DNS queries: %w", errors.Join(err, tcp.Close()))
		}
		_ = tcp.Close() // retry with another port
	}
}

// Addr returns the address of the sockets as host:port.
func (s *Sockets) Addr() string { return s.TCP.Addr().String() }

// Close closes both sockets. Serve closes its sockets when it returns.
func (s *Sockets) Close() error { return errors.Join(s.UDP.Close(), s.TCP.Close()) }

// ListenAndServe calls [Listen] and [Server.Serve] with one address.
func (s *Server) ListenAndServe(ctx context.Context, address string) error {
	sockets, err := Listen(ctx, address)
	if err != nil {
		return err
	}
	return s.Serve(ctx, sockets)
}

// Serve answers queries that arrive at the sockets. It blocks until ctx is done and then
// returns nil, or until a socket fails. It closes the sockets before it returns.
func (s *Server) Serve(ctx context.Context, sockets ...*Sockets) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, socket := range sockets {
		s.serveSocket(ctx, group, "udp "+socket.Addr(), &dns.Server{PacketConn: socket.UDP})
		s.serveSocket(ctx, group, "tcp "+socket.Addr(), &dns.Server{Listener: s.limiter.Listener(socket.TCP)})
	}
	// Wait for the context even without sockets.
	group.Go(func() error {
		<-ctx.Done()
		return nil
	})
	return group.Wait()
}

// serveSocket starts goroutines in the group that answer queries at one socket until ctx is
// done.
func (s *Server) serveSocket(ctx context.Context, group *errgroup.Group, where string, server *dns.Server) {
	// Answers come from memory. Only a TCP client that does not read its answer delays the
	// shutdown.
	const shutdownTimeout = time.Second
	started, ended := make(chan struct{}), make(chan struct{})
	server.NotifyStartedFunc = func() { close(started) }
	server.Handler = s
	server.UDPSize = maxUDPQuerySize
	server.DecorateReader = func(r dns.Reader) dns.Reader { return retryingReader{r} }
	group.Go(func() error {
		defer close(ended)
		// After ctx is done, the error is about the closed socket.
		if err := server.ActivateAndServe(); err != nil && ctx.Err() == nil {
			return fmt.Errorf("serve DNS at %s: %w", where, err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		select {
		case <-started: // ShutdownContext requires a started server
		case <-ended:
			return nil
		}
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if err := server.ShutdownContext(end); err != nil {
			s.logger.DebugContext(end, "dns connections cut off", slog.String("at", where), slog.Any("error", err))
		}
		return nil
	})
}

// retryingReader retries reads after transient errors, which would otherwise end the
// server.
type retryingReader struct{ dns.Reader }

// ReadUDP implements [dns.Reader].
func (r retryingReader) ReadUDP(conn *net.UDPConn, timeout time.Duration) ([]byte, *dns.SessionUDP, error) {
	const pause = 10 * time.Millisecond
	for {
		query, session, err := r.Reader.ReadUDP(conn, timeout)
		if err == nil || !connlimit.IsTransient(err) {
			return query, session, err
		}
		time.Sleep(pause)
	}
}

const (
	// maxUDPQuerySize is the size of the query buffer, in bytes.
	maxUDPQuerySize = 4096
	// maxUDPAnswerSize is the size in bytes that fits all paths without fragmentation
	// (https://www.dnsflagday.net/2020/).
	maxUDPAnswerSize = 1232
)

// ServeDNS answers one query. It implements [dns.Handler] of github.com/miekg/dns.
func (s *Server) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	_, overTCP := w.RemoteAddr().(*net.TCPAddr)
	if err := w.WriteMsg(s.newReply(query, overTCP)); err != nil {
		s.logger.Debug("dns answer not sent", slog.String("client", w.RemoteAddr().String()), slog.Any("error", err))
	}
}

// newReply returns the reply to a query, truncated to the size that the transport and the
// client accept.
func (s *Server) newReply(query *dns.Msg, overTCP bool) *dns.Msg {
	reply := new(dns.Msg).SetReply(query)
	size := dns.MinMsgSize
	opt := query.IsEdns0()
	if opt != nil {
		size = min(int(opt.UDPSize()), maxUDPAnswerSize)
	}
	if overTCP {
		size = dns.MaxMsgSize
	}
	switch {
	case opt != nil && opt.Version() != 0:
		reply.Rcode = dns.RcodeBadVers
	case query.Opcode != dns.OpcodeQuery:
		reply.Rcode = dns.RcodeNotImplemented
	case len(query.Question) != 1:
		reply.Rcode = dns.RcodeFormatError
	default:
		resp := s.resolve(query.Question[0])
		reply.Rcode, reply.Answer, reply.Ns, reply.Extra = resp.rcode, resp.answer, resp.authority, resp.extra
		reply.Authoritative = resp.rcode == dns.RcodeSuccess || resp.rcode == dns.RcodeNameError
	}
	if opt != nil {
		reply.SetEdns0(maxUDPAnswerSize, false)
	}
	reply.Truncate(size)
	return reply
}

// domainsForAddr returns the names of an address, sorted.
func (s *Server) domainsForAddr(addr netip.Addr) []string {
	return slices.Sorted(func(yield func(string) bool) {
		for domains := range maps.Values(s.reverse[addr]) {
			for _, domain := range domains {
				if !yield(domain) {
					return
				}
			}
		}
	})
}

// trimClusterDomain returns the labels before the cluster domain. It reports false for a
// name outside the cluster domain.
func (s *Server) trimClusterDomain(labels []string) ([]string, bool) {
	n := len(labels) - len(s.domainLabels)
	if n < 0 || !slices.Equal(labels[n:], s.domainLabels) {
		return nil, false
	}
	return labels[:n], true
}

// hasNamespace reports whether the namespace is known to exist.
func (s *Server) hasNamespace(namespace string) bool {
	return s.servicesPerNamespace[namespace] > 0 || namespace == s.searchNamespace
}
