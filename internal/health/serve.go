package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"fairlead.io/fairlead/internal/connlimit"
)

// RetryPeriod is the time between attempts to listen, the same as kube-proxy's.
const RetryPeriod = 5 * time.Second

// Timeouts and limits of every server: idle or slow clients must not accumulate.
const (
	// readHeaderTimeout bounds the time to receive a request's header, readTimeout the time
	// to receive the whole request.
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 30 * time.Second
	// writeTimeout bounds the time to send the response. net/http/pprof adds the duration of
	// a profile to it.
	writeTimeout = 30 * time.Second
	// maxHeaderBytes limits the header in bytes. net/http adds 4096. It leaves room for the
	// token of a monitoring system.
	maxHeaderBytes = 16 << 10
	// idleTimeout bounds the time until the next request on a connection. It is longer than
	// most scrape and probe intervals.
	idleTimeout = 2 * time.Minute
)

func newServer(handler http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler: handler, ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes, ErrorLog: newErrorLog(logger),
	}
}

// ListenFunc has the signature of [net.ListenConfig.Listen].
type ListenFunc func(ctx context.Context, network, address string) (net.Listener, error)

func listen(ctx context.Context, network, address string) (net.Listener, error) {
	var config net.ListenConfig
	return config.Listen(ctx, network, address)
}

// ServeOptions configures [Serve].
type ServeOptions struct {
	// Address is the host and port to listen on. An unspecified address of either family
	// means all addresses of both families.
	Address string
	Handler http.Handler
	// HardFail makes Serve return an error if it cannot listen. Otherwise it logs a Warn and
	// retries every [RetryPeriod].
	HardFail bool
	// OnError, if not nil, is called after each failed attempt to serve.
	OnError func(error)
	// OnListening, if not nil, is called with true when the server listens, and with false when it
	// no longer does.
	OnListening func(bool)
	// RetryNow, when closed, makes a waiting Serve retry immediately. It may be nil.
	RetryNow <-chan struct{}
	// Listen opens the socket. Nil uses this process's network namespace.
	Listen ListenFunc
	// Limiter limits the connections. Nil uses a new limiter with default options.
	Limiter *connlimit.Limiter
	// Logger may be nil, which disables logging.
	Logger *slog.Logger
}

// Serve answers HTTP requests until ctx is done, then closes all connections and returns nil.
// With HardFail it returns an error as soon as it cannot serve.
func Serve(ctx context.Context, options ServeOptions) error {
	log := options.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if options.Listen == nil {
		options.Listen = listen
	}
	options.Logger = log
	if options.Limiter == nil {
		options.Limiter = connlimit.New(connlimit.Options{Server: options.Address, Logger: log})
	}
	warned := ""
	for {
		err := serve(ctx, options)
		if err != nil && options.OnError != nil {
			options.OnError(err)
		}
		switch {
		case err == nil:
			return nil
		case options.HardFail:
			return err
		case err.Error() != warned: // log a repeated error only once
			warned = err.Error()
			log.WarnContext(ctx, "cannot serve HTTP, will retry", "address", options.Address, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-options.RetryNow:
			options.RetryNow = nil // only once
		case <-time.After(RetryPeriod):
		}
	}
}

// serve listens and answers requests. It returns nil when ctx is done.
func serve(ctx context.Context, options ServeOptions) error {
	l, err := options.Listen(ctx, "tcp", options.Address)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", options.Address, err)
	}
	if options.OnListening != nil {
		options.OnListening(true)
		defer options.OnListening(false)
	}
	l = options.Limiter.Listener(l)
	server := newServer(options.Handler, options.Logger)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", options.Address, errors.Join(err, server.Close()))
	}
	return nil
}
