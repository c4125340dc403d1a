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

// RetryPeriod is the time between attempts to listen, as kube-proxy has it.
const RetryPeriod = 5 * time.Second

// Connections that say nothing, and clients that read nothing, must not pile up.
const (
	// readHeaderTimeout bounds how long a client may take to send the header of a
	// request, and readTimeout the whole of it.
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 30 * time.Second
	// writeTimeout bounds how long a client may take to read the answer. Profiles
	// of net/http/pprof add their duration to it.
	writeTimeout = 30 * time.Second
	// maxHeaderBytes is the size of a header in bytes, to which net/http adds 4096: room
	// for the token of a monitoring system.
	maxHeaderBytes = 16 << 10
	// idleTimeout bounds how long it may take until its next request, if there
	// is one: longer than most intervals between scrapes and probes.
	idleTimeout = 2 * time.Minute
)

func newServer(handler http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler: handler, ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes, ErrorLog: newErrorLog(logger),
	}
}

// ListenFunc is [net.ListenConfig.Listen].
type ListenFunc func(ctx context.Context, network, address string) (net.Listener, error)

func listen(ctx context.Context, network, address string) (net.Listener, error) {
	var config net.ListenConfig
	return config.Listen(ctx, network, address)
}

// ServeOptions say what [Serve] serves.
type ServeOptions struct {
	// Address is the host and port to listen on. An unspecified address of
	// either family stands for all addresses of both.
	Address string
	Handler http.Handler
	// HardFail makes Serve return when it can't listen. Otherwise it logs a Warn
	// and tries again, every [RetryPeriod].
	HardFail bool
	// Wake, when it is closed, makes Serve try at once if it can't listen. Nil never
	// is.
	RetryNow <-chan struct{}
	// Listen makes the socket; nil means in this process's network namespace.
	Listen ListenFunc
	// Limiter bounds the connections. Nil means one of its own, with defaults.
	Limiter *connlimit.Limiter
	// Logger, if nil, gets nothing.
	Logger *slog.Logger
}

// Serve answers HTTP requests. It blocks until ctx is done, closes all
// connections, and returns nil; or returns an error early if HardFail is set.
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
		switch {
		case err == nil:
			return nil
		case options.HardFail:
			return err
		case err.Error() != warned: // once is enough
			warned = err.Error()
			log.WarnContext(ctx, "not served; trying again until it succeeds", "address", options.Address, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-options.RetryNow:
			options.RetryNow = nil // once
		case <-time.After(RetryPeriod):
		}
	}
}

// serve returns nil when ctx is done.
func serve(ctx context.Context, options ServeOptions) error {
	l, err := options.Listen(ctx, "tcp", options.Address)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", options.Address, err)
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
