package connlimit_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"fairlead.io/fairlead/internal/connlimit"
)

// scriptedListener returns the connections and errors that the test sends to accepts.
type scriptedListener struct {
	accepts chan any // error or net.Conn
	closed  chan struct{}
	close   func()
}

func newScriptedListener() *scriptedListener {
	closed := make(chan struct{})
	return &scriptedListener{accepts: make(chan any, 100), closed: closed, close: sync.OnceFunc(func() { close(closed) })}
}

func (s *scriptedListener) Accept() (net.Conn, error) {
	select {
	case <-s.closed:
		return nil, net.ErrClosed
	case result := <-s.accepts:
		if err, ok := result.(error); ok {
			return nil, err
		}
		return result.(net.Conn), nil
	}
}

func (s *scriptedListener) Close() error {
	s.close()
	return nil
}

func (*scriptedListener) Addr() net.Addr { return &net.TCPAddr{} }

// clientConn is a fake connection of a client.
type clientConn struct {
	net.Conn

	addr   net.Addr
	closed bool
}

func (c *clientConn) RemoteAddr() net.Addr { return c.addr }

func (c *clientConn) Write(p []byte) (int, error) { return len(p), nil }

func (c *clientConn) Close() error {
	c.closed = true
	return nil
}

func newClientConn(addr string) *clientConn {
	return &clientConn{addr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 1))}
}

// TestDisplacement checks which connection a new one displaces: a connection of the same
// client if that client is at its limit, otherwise of the client with the most connections.
// In both cases the least recently answered connection is displaced.
func TestDisplacement(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		clients  []string // addresses, one for each connection
		answered []int    // connections that the server answers before the last one arrives
		want     []int    // connections that must be closed
		stats    connlimit.Stats
	}{
		{"below the limits", []string{"10.0.0.1", "10.0.0.1", "10.0.0.2"}, nil, nil, connlimit.Stats{Open: 3}},
		{"one client", []string{"10.0.0.1", "10.0.0.1", "10.0.0.1"}, nil, []int{0}, connlimit.Stats{Open: 2, DisplacedByClient: 1}},
		{"one client, first connection answered", []string{"10.0.0.1", "10.0.0.1", "10.0.0.1"}, []int{0}, []int{1}, connlimit.Stats{Open: 2, DisplacedByClient: 1}},
		{
			"many clients",
			[]string{"10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3", "10.0.0.4"},
			nil,
			[]int{1},
			connlimit.Stats{Open: 4, DisplacedByLimit: 1},
		},
		{
			"many clients with one connection each",
			[]string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"},
			[]int{0},
			[]int{1},
			connlimit.Stats{Open: 4, DisplacedByLimit: 1},
		},
		{
			"an IPv6 /64 network is one client",
			[]string{"2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "2001:db8::3"},
			nil,
			[]int{0},
			connlimit.Stats{Open: 3, DisplacedByClient: 1},
		},
		{
			"IPv4 clients of a dual-stack socket",
			[]string{"::ffff:10.0.0.1", "10.0.0.2", "::ffff:10.0.0.3"},
			nil, nil,
			connlimit.Stats{Open: 3},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			limiter := connlimit.New(connlimit.Options{Max: 4, MaxPerClient: 2})
			inner := newScriptedListener()
			l := limiter.Listener(inner)
			var conns []*clientConn
			var accepted []net.Conn
			for i, addr := range test.clients {
				if i == len(test.clients)-1 {
					for _, n := range test.answered {
						if _, err := accepted[n].Write(nil); err != nil {
							t.Fatal(err)
						}
					}
				}
				c := newClientConn(addr)
				conns = append(conns, c)
				inner.accepts <- net.Conn(c)
				got, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				accepted = append(accepted, got)
			}
			var closed []int
			for i, c := range conns {
				if c.closed {
					closed = append(closed, i)
				}
			}
			if fmt.Sprint(closed) != fmt.Sprint(test.want) {
				t.Errorf("closed connections %v, want %v", closed, test.want)
			}
			test.stats.Limit = 4
			if got := limiter.Stats(); got != test.stats {
				t.Errorf("stats %+v, want %+v", got, test.stats)
			}
			for range 2 {
				for _, c := range accepted {
					_ = c.Close()
				}
				if got := limiter.Stats().Open; got != 0 {
					t.Errorf("%d connections left after all were closed", got)
				}
			}
		})
	}
}

// TestAcceptErrors checks that Accept retries after transient errors without spinning, and
// returns other errors.
func TestAcceptErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		limiter := connlimit.New(connlimit.Options{Max: 4})
		inner := newScriptedListener()
		l := limiter.Listener(inner)
		errno := func(e syscall.Errno) error {
			return &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", e)}
		}
		for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EMFILE} {
			inner.accepts <- errno(e)
		}
		inner.accepts <- net.Conn(newClientConn("10.0.0.1"))
		begin := time.Now()
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		if got, least := time.Since(begin), 6*5*time.Millisecond; got < least {
			t.Errorf("six errors took %s, want at least %s", got, least)
		}
		// Without free descriptors, Accept displaces an open connection.
		inner.accepts <- errno(syscall.EMFILE)
		inner.accepts <- net.Conn(newClientConn("10.0.0.2"))
		begin = time.Now()
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		if got := limiter.Stats(); got.DisplacedByDescriptors != 1 || got.Open != 1 || time.Since(begin) != 0 {
			t.Errorf("stats %+v after %s", got, time.Since(begin))
		}
		inner.accepts <- errno(syscall.EINVAL)
		if _, err := l.Accept(); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("error %v, want EINVAL", err)
		}
		for range 50 {
			inner.accepts <- errno(syscall.ENOMEM)
		}
		ended := make(chan error)
		go func() {
			_, err := l.Accept()
			ended <- err
		}()
		time.Sleep(10 * time.Second)
		if got := len(inner.accepts); got < 30 {
			t.Errorf("%d attempts in ten seconds", 50-got)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("error %v after Close, want net.ErrClosed", err)
		}
	})
}

// TestWriteTimeout checks that a client that reads nothing does not block a Write forever.
func TestWriteTimeout(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := connlimit.New(connlimit.Options{WriteTimeout: 50 * time.Millisecond}).Listener(inner)
	defer l.Close()
	silent, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.CopyN(conn, zeroReader{}, 1<<30); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("error %v, want a timeout", err)
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { return len(p), nil }
