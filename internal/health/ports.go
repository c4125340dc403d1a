package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"fairlead.io/fairlead/internal/connlimit"
)

// Service identifies a Service.
type Service struct{ Namespace, Name string }

// String returns "namespace/name".
func (s Service) String() string { return s.Namespace + "/" + s.Name }

// Check is the desired state of the health-check node port of one Service.
type Check struct {
	// Port is the Service's spec.healthCheckNodePort.
	Port uint16
	// LocalEndpoints is the number of ready endpoints on this node.
	LocalEndpoints int
}

// PortsOptions configures [Ports].
type PortsOptions struct {
	// Healthy reports whether the node is healthy, see [Proxy.Healthy]. It is called for
	// every request.
	Healthy func() bool
	// OnListenError, if not nil, is called when a port cannot be opened, and again only if
	// the error changes or the port was open in between. [Ports.Run] calls it; it must not
	// block.
	OnListenError func(service Service, port uint16, err error)
	// Listen opens the sockets. Nil uses this process's network namespace.
	Listen ListenFunc
	// MaxListeners limits the number of listening sockets, one for each Service and address.
	// Zero means no limit.
	MaxListeners int
	// Limiter limits the connections of all Services together. Nil uses a limiter with
	// default options.
	Limiter *connlimit.Limiter
	// Logger receives a Warn for each failure. Nil disables logging.
	Logger *slog.Logger
}

// Ports serves the health-check node ports of Services over HTTP. For any path and method,
// the status is 200 if the Service has local endpoints and the node is healthy, and 503
// otherwise. The header X-Load-Balancing-Endpoint-Weight contains the number of local
// endpoints.
//
// Each port is open on every address of [Ports.SetAddrs]. An address that is unavailable does
// not delay the others, and is retried.
type Ports struct {
	options PortsOptions
	wake    chan struct{} // capacity 1

	mu             sync.Mutex
	pendingChecks  map[Service]*Check
	pendingAddrs   []netip.Addr // nil: unchanged
	endedListeners []*listener

	// Run owns the fields below.
	listenAddrs []netip.Addr
	servers     map[Service]*server
	failing     map[Service]string // the last error that was reported
	serving     sync.WaitGroup
	// listenerCount is the number of listeners of all servers.
	listenerCount int
}

// server answers health checks of one Service.
type server struct {
	port      uint16
	endpoints atomic.Int64
	http      *http.Server
	listeners map[netip.Addr]*listener
}

type listener struct {
	net.Listener

	service Service
	server  *server
	addr    netip.Addr
}

// NewPorts returns Ports without Services and addresses.
func NewPorts(options PortsOptions) *Ports {
	if options.Logger == nil {
		options.Logger = slog.New(slog.DiscardHandler)
	}
	if options.Listen == nil {
		options.Listen = listen
	}
	if options.Limiter == nil {
		options.Limiter = connlimit.New(connlimit.Options{Server: "health-check node ports", Logger: options.Logger})
	}
	return &Ports{
		options: options, wake: make(chan struct{}, 1), pendingChecks: map[Service]*Check{},
		servers: map[Service]*server{}, failing: map[Service]string{},
	}
}

// Set adds or updates Services; a nil Check removes one. It does not block, and may be called
// before and during Run.
func (p *Ports) Set(changes map[Service]*Check) {
	if len(changes) == 0 {
		return
	}
	p.mu.Lock()
	maps.Copy(p.pendingChecks, changes)
	p.mu.Unlock()
	p.signal()
}

// SetAddrs sets all addresses to listen on. An unspecified address means all addresses of its
// family. Link-local IPv6 addresses are ignored, because they belong to one interface.
// SetAddrs does not block, and may be called before and during Run.
func (p *Ports) SetAddrs(addrs []netip.Addr) {
	addrs = slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() })
	slices.SortFunc(addrs, netip.Addr.Compare)
	p.mu.Lock()
	p.pendingAddrs = append([]netip.Addr{}, slices.Compact(addrs)...)
	p.mu.Unlock()
	p.signal()
}

func (p *Ports) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run listens and answers until ctx is done, then closes everything and returns nil. Run must
// be called only once.
func (p *Ports) Run(ctx context.Context) error {
	defer p.serving.Wait()
	defer func() {
		for service := range p.servers {
			p.closeServer(service)
		}
	}()
	// Changes do not restart a retry period that has begun.
	var retry <-chan time.Time
	for {
		var retryDue bool
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
		case <-retry:
			retryDue, retry = true, nil
		}
		p.applyPending(ctx, retryDue)
		switch {
		case len(p.failing) == 0:
			retry = nil
		case retry == nil:
			retry = time.After(RetryPeriod)
		}
	}
}

// applyPending applies the changes received since the last call. It closes listeners before
// it opens others, because ports and addresses can move between Services.
func (p *Ports) applyPending(ctx context.Context, retry bool) {
	p.mu.Lock()
	changes, addrs, ended := p.pendingChecks, p.pendingAddrs, p.endedListeners
	p.pendingChecks, p.pendingAddrs, p.endedListeners = map[Service]*Check{}, nil, nil
	p.mu.Unlock()

	reopen := map[Service]struct{}{}
	for _, l := range ended {
		if s := p.servers[l.service]; s == l.server && s.listeners[l.addr] == l {
			delete(s.listeners, l.addr)
			p.listenerCount--
			reopen[l.service] = struct{}{}
		}
	}
	for service, check := range changes {
		s := p.servers[service]
		if s != nil && (check == nil || check.Port != s.port) {
			p.closeServer(service)
			s = nil
		}
		if check == nil {
			continue
		}
		if s == nil {
			s = p.newServer(service, check.Port)
			p.servers[service] = s
			reopen[service] = struct{}{}
		}
		s.endpoints.Store(int64(check.LocalEndpoints))
	}
	if addrs != nil && !slices.Equal(addrs, p.listenAddrs) {
		p.listenAddrs = addrs
		for service, s := range p.servers {
			for addr, l := range s.listeners {
				if !slices.Contains(p.listenAddrs, addr) {
					delete(s.listeners, addr)
					p.listenerCount--
					_ = l.Close()
				}
			}
			reopen[service] = struct{}{}
		}
	}
	if retry {
		for service := range p.failing {
			reopen[service] = struct{}{}
		}
	}
	for service := range reopen {
		if s := p.servers[service]; s != nil {
			p.recordListenResult(ctx, service, s.port, p.openListeners(ctx, service))
		}
	}
}

// closeServer closes the listeners and connections of a Service, which frees its port.
func (p *Ports) closeServer(service Service) {
	s := p.servers[service]
	for _, l := range s.listeners { // including listeners not passed to Serve yet
		_ = l.Close()
	}
	p.listenerCount -= len(s.listeners)
	_ = s.http.Close()
	delete(p.servers, service)
	delete(p.failing, service)
}

// openListeners listens on the addresses that have no listener of the Service yet.
func (p *Ports) openListeners(ctx context.Context, service Service) error {
	s := p.servers[service]
	var errs []error
	for _, addr := range p.listenAddrs {
		if s.listeners[addr] != nil {
			continue
		}
		network := "tcp6"
		if addr.Is4() {
			network = "tcp4"
		}
		if limit := p.options.MaxListeners; limit > 0 && p.listenerCount >= limit {
			errs = append(errs, fmt.Errorf("the limit of %d sockets for health-check node ports is reached: "+
				"raise the limit of open files (RLIMIT_NOFILE)", p.listenerCount))
			break
		}
		socket, err := p.options.Listen(ctx, network, netip.AddrPortFrom(addr, s.port).String())
		switch {
		case addr.IsUnspecified() && errors.Is(err, syscall.EAFNOSUPPORT):
			continue // the node does not have this family
		case err != nil:
			errs = append(errs, err)
			continue
		}
		l := &listener{Listener: p.options.Limiter.Listener(socket), service: service, server: s, addr: addr}
		s.listeners[addr] = l
		p.listenerCount++
		p.serving.Go(func() { p.serve(ctx, l) })
	}
	return errors.Join(errs...)
}

func (p *Ports) serve(ctx context.Context, l *listener) {
	err := l.server.http.Serve(l)
	_ = l.Close()
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return
	}
	p.options.Logger.WarnContext(ctx, "server of health-check node port stopped, will reopen it",
		"service", l.service.String(), "port", l.server.port, "error", err)
	p.mu.Lock()
	p.endedListeners = append(p.endedListeners, l)
	p.mu.Unlock()
	p.signal()
}

// recordListenResult logs and reports err unless it was the last error of the service. A nil
// error clears the last one.
func (p *Ports) recordListenResult(ctx context.Context, service Service, port uint16, err error) {
	if err == nil {
		delete(p.failing, service)
		return
	}
	if p.failing[service] == err.Error() {
		return
	}
	p.failing[service] = err.Error()
	p.options.Logger.WarnContext(ctx, "cannot open health-check node port, will retry",
		"service", service.String(), "port", port, "error", err)
	if p.options.OnListenError != nil {
		p.options.OnListenError(service, port, err)
	}
}

func (p *Ports) newServer(service Service, port uint16) *server {
	s := &server{port: port, listeners: map[netip.Addr]*listener{}}
	s.http = newServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		endpoints, healthy := s.endpoints.Load(), p.options.Healthy()
		status := http.StatusServiceUnavailable
		if endpoints != 0 && healthy {
			status = http.StatusOK
		}
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.FormatInt(endpoints, 10))
		writeJSON(w, status, portResponse(service, endpoints, healthy))
	}), p.options.Logger)
	return s
}

// portResponse returns the same body as kube-proxy, byte for byte. The names need no
// escaping.
func portResponse(service Service, endpoints int64, healthy bool) []byte {
	return fmt.Appendf(nil, `{
	"service": {
		"namespace": %q,
		"name": %q
	},
	"localEndpoints": %d,
	"serviceProxyHealthy": %t
}`, service.Namespace, service.Name, endpoints, healthy)
}
