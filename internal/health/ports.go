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

// Service names a Service.
type Service struct{ Namespace, Name string }

// String returns "namespace/name".
func (s Service) String() string { return s.Namespace + "/" + s.Name }

// Check is what a health-check node port says.
type Check struct {
	// Port is the Service's spec.healthCheckNodePort.
	Port uint16
	// LocalEndpoints is the number of ready endpoints on this node.
	LocalEndpoints int
}

// PortsOptions are what [Ports] depend on.
type PortsOptions struct {
	// Healthy is asked at each request: [Proxy.Healthy].
	Healthy func() bool
	// Failed, if not nil, is called when a port can't be listened on, and again
	// only if the reason changes or it could be in between. It is called by
	// [Ports.Run] and must not block.
	OnListenError func(service Service, port uint16, err error)
	// Listen makes the sockets; nil means in this process's network namespace.
	Listen ListenFunc
	// MaxListeners limits the sockets that listen, one for each Service and address.
	// Zero means no limit.
	MaxListeners int
	// Limiter bounds the connections of all Services together. Nil means one with
	// defaults.
	Limiter *connlimit.Limiter
	// Logger gets a Warn for each failure. Nil means no logging.
	Logger *slog.Logger
}

// Ports answer at the health-check node ports of Services, over HTTP: any path
// and any method gets 200 if the Service has local endpoints and the node is
// healthy, and 503 if not. The header X-Load-Balancing-Endpoint-Weight is the
// number of local endpoints.
//
// Each Service is listened for on every address of [Ports.SetAddrs]. An address
// that can't be listened on holds no other up, and is tried again.
type Ports struct {
	options PortsOptions
	wake    chan struct{} // one slot

	mu             sync.Mutex
	pendingChecks  map[Service]*Check
	pendingAddrs   []netip.Addr // nil: as before
	endedListeners []*listener

	// The rest is Run's.
	listenAddrs []netip.Addr
	servers     map[Service]*server
	failing     map[Service]string // what was reported
	serving     sync.WaitGroup
	// listenerCount is how many there are of all servers.
	listenerCount int
}

// server answers for one Service.
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

// Set hands over Services that are new or have changed, and nil for those that
// are gone. It does not block, and may be called before and during Run.
func (p *Ports) Set(changes map[Service]*Check) {
	if len(changes) == 0 {
		return
	}
	p.mu.Lock()
	maps.Copy(p.pendingChecks, changes)
	p.mu.Unlock()
	p.signal()
}

// SetAddrs hands over all the addresses to listen on. An unspecified address
// stands for all of its family. Link-local IPv6 addresses, which belong to one
// interface, are left out. It does not block, and may be called before and
// during Run.
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

// Run listens and answers until ctx is done, closes everything, and returns nil.
// It is called once.
func (p *Ports) Run(ctx context.Context) error {
	defer p.serving.Wait()
	defer func() {
		for service := range p.servers {
			p.closeServer(service)
		}
	}()
	// Whatever else happens, a period that has begun goes on to its end.
	var retry <-chan time.Time
	for {
		var again bool
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
		case <-retry:
			again, retry = true, nil
		}
		p.applyPending(ctx, again)
		switch {
		case len(p.failing) == 0:
			retry = nil
		case retry == nil:
			retry = time.After(RetryPeriod)
		}
	}
}

// applyPending takes over what was handed in. Whatever has to close does so before
// anything opens, as ports and addresses move.
func (p *Ports) applyPending(ctx context.Context, retry bool) {
	p.mu.Lock()
	changes, addrs, ended := p.pendingChecks, p.pendingAddrs, p.endedListeners
	p.pendingChecks, p.pendingAddrs, p.endedListeners = map[Service]*Check{}, nil, nil
	p.mu.Unlock()

	open := map[Service]struct{}{}
	for _, l := range ended {
		if s := p.servers[l.service]; s == l.server && s.listeners[l.addr] == l {
			delete(s.listeners, l.addr)
			p.listenerCount--
			open[l.service] = struct{}{}
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
			open[service] = struct{}{}
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
			open[service] = struct{}{}
		}
	}
	if retry {
		for service := range p.failing {
			open[service] = struct{}{}
		}
	}
	for service := range open {
		if s := p.servers[service]; s != nil {
			p.recordListenResult(ctx, service, s.port, p.openListeners(ctx, service))
		}
	}
}

// closeServer closes the listeners and connections of a Service, and frees its port.
func (p *Ports) closeServer(service Service) {
	s := p.servers[service]
	for _, l := range s.listeners { // those that the server has not seen yet, too
		_ = l.Close()
	}
	p.listenerCount -= len(s.listeners)
	_ = s.http.Close()
	delete(p.servers, service)
	delete(p.failing, service)
}

// openListeners listens where the Service is not listened for yet.
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
			errs = append(errs, fmt.Errorf("%d sockets of health-check node ports are open, and no more are allowed: "+
				"raise the limit of open files (RLIMIT_NOFILE)", p.listenerCount))
			break
		}
		socket, err := p.options.Listen(ctx, network, netip.AddrPortFrom(addr, s.port).String())
		switch {
		case addr.IsUnspecified() && errors.Is(err, syscall.EAFNOSUPPORT):
			continue // nobody can ask there
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
	p.options.Logger.WarnContext(ctx, "a health-check node port has stopped; opening it again",
		"service", l.service.String(), "port", l.server.port, "error", err)
	p.mu.Lock()
	p.endedListeners = append(p.endedListeners, l)
	p.mu.Unlock()
	p.signal()
}

// recordListenResult tells of a failure that has not been told of.
func (p *Ports) recordListenResult(ctx context.Context, service Service, port uint16, err error) {
	if err == nil {
		delete(p.failing, service)
		return
	}
	if p.failing[service] == err.Error() {
		return
	}
	p.failing[service] = err.Error()
	p.options.Logger.WarnContext(ctx, "a health-check node port can't be opened; trying again until it succeeds",
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

// portResponse is kube-proxy's, to the tab. The names in it need no escapes.
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
