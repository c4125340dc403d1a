package apiserver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// longPeriod is a period within which no test ends: what is read all the same did not
// wait for it.
const longPeriod = time.Hour

// manualBatcher is a pace whose pauses are the test's to end.
type manualBatcher struct {
	readBatcher

	listing atomic.Bool // not following
	// pauses has what ends each pause that has begun.
	pauses chan func()

	mu           sync.Mutex
	count        int
	longestPause time.Duration
}

func newPaces(period time.Duration) *manualBatcher {
	p := &manualBatcher{pauses: make(chan func(), 1000)}
	p.readBatcher = newReadBatcher(period, func() bool { return !p.listing.Load() })
	p.afterFunc = func(d time.Duration, f func()) func() bool {
		var once sync.Once
		p.mu.Lock()
		p.count++
		p.longestPause = max(p.longestPause, d)
		p.mu.Unlock()
		p.pauses <- func() { once.Do(f) }
		return func() (stopped bool) {
			once.Do(func() { stopped = true })
			return stopped
		}
	}
	return p
}

func (p *manualBatcher) countPauses() (count int, longest time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count, p.longestPause
}

// connect returns a paced connection and its peer.
func (p *manualBatcher) connect(t *testing.T) (*batchedConn, *net.TCPConn) {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := p.wrapDial(new(net.Dialer).DialContext)(t.Context(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	peer, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = peer.Close() })
	paced, ok := conn.(*batchedConn)
	if !ok {
		t.Fatalf("a connection of TCP is a %T", conn)
	}
	return paced, peer.(*net.TCPConn)
}

func send(t *testing.T, peer net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(peer, text); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, conn net.Conn, want string) {
	t.Helper()
	b := make([]byte, 1024)
	n, err := conn.Read(b)
	if err != nil || string(b[:n]) != want {
		t.Fatalf("read %q, error %v, want %q", b[:n], err, want)
	}
}

// readResult is what a Read that runs beside the test ends in.
type readResult struct {
	text string
	err  error
}

func readAsync(conn net.Conn, size int) <-chan readResult {
	done := make(chan readResult, 1)
	go func() {
		b := make([]byte, size)
		n, err := conn.Read(b)
		done <- readResult{string(b[:n]), err}
	}()
	return done
}

// useUpBurst makes as many readings as there may be without a pause. The first of all
// is not one of them: nothing was drained before.
func useUpBurst(t *testing.T, conn, peer net.Conn) {
	t.Helper()
	exchange(t, conn, peer, 1+readBurst)
}

// exchange has the peer send so many times, and each read.
func exchange(t *testing.T, conn, peer net.Conn, times int) {
	t.Helper()
	for range times {
		send(t, peer, "x")
		receive(t, conn, "x")
	}
}

// waitForBytes waits until so many bytes wait to be read.
func waitForBytes(t *testing.T, conn *batchedConn, want int) {
	t.Helper()
	for got := 0; got < want; {
		var err error
		if controlErr := conn.socket.Control(func(fd uintptr) { got, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); controlErr != nil {
			t.Fatal(controlErr)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func lowWaterMark(t *testing.T, conn *batchedConn) (n int) {
	t.Helper()
	var err error
	if controlErr := conn.socket.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT) }); controlErr != nil {
		t.Fatal(controlErr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestReadBurstWithoutPause says that nothing pauses before a burst is used up.
func TestReadBurstWithoutPause(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	conn, peer := p.connect(t)
	useUpBurst(t, conn, peer)
	if n, _ := p.countPauses(); n != 0 {
		t.Errorf("%d pauses", n)
	}
}

// TestReadBatch says that what arrives during a pause wakes nobody, and is
// read as one when it is over, no later than a period; and that what comes later
// still does not wait.
func TestReadBatch(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	conn, peer := p.connect(t)
	useUpBurst(t, conn, peer)

	done := readAsync(conn, 1024)
	end := <-p.pauses
	for range 3 {
		send(t, peer, "change ")
	}
	waitForBytes(t, conn, len("change change change "))
	if n := lowWaterMark(t, conn); n != batchBytes {
		t.Errorf("low-water mark %d during the pause, want %d", n, batchBytes)
	}
	select {
	case r := <-done:
		t.Fatalf("read %q before the pause was over", r.text)
	default:
	}
	end()
	if r := <-done; r.text != "change change change " || r.err != nil {
		t.Fatalf("read %q, error %v, want three changes", r.text, r.err)
	}
	if n := lowWaterMark(t, conn); n != 1 {
		t.Errorf("low-water mark %d after the pause, want 1", n)
	}
	if n, longest := p.countPauses(); n != 1 || longest > longPeriod {
		t.Errorf("%d pauses, the longest %s, want one of a period", n, longest)
	}

	done = readAsync(conn, len("la"))
	(<-p.pauses)()
	send(t, peer, "later")
	if r := <-done; r.text != "la" || r.err != nil {
		t.Fatalf("read %q, error %v, want what came after the pause", r.text, r.err)
	}
	// What did not fit is not paused for.
	receive(t, conn, "ter")
}

// TestPauseEndsEarly says what ends a pause before its time: the end of the connection,
// on either side, a deadline, and much to read.
func TestPauseEndsEarly(t *testing.T) {
	t.Parallel()
	much := string(bytes.Repeat([]byte("m"), batchBytes))
	for _, tt := range []struct {
		name string
		end  func(*batchedConn, *net.TCPConn) error
		want string
		err  error
	}{
		{"closed", func(conn *batchedConn, _ *net.TCPConn) error { return conn.Close() }, "", net.ErrClosed},
		{"closed by the peer", func(_ *batchedConn, peer *net.TCPConn) error { return peer.Close() }, "", io.EOF},
		{"closed by the peer in one direction", func(_ *batchedConn, peer *net.TCPConn) error { return peer.CloseWrite() }, "", io.EOF},
		{"closed by the peer after a last word", func(_ *batchedConn, peer *net.TCPConn) error {
			_, err := io.WriteString(peer, "last")
			return errors.Join(err, peer.Close())
		}, "last", nil},
		{"reset", func(_ *batchedConn, peer *net.TCPConn) error {
			return errors.Join(peer.SetLinger(0), peer.Close())
		}, "", syscall.ECONNRESET},
		{"deadline", func(conn *batchedConn, _ *net.TCPConn) error { return conn.SetReadDeadline(time.Now()) }, "", os.ErrDeadlineExceeded},
		{"much", func(_ *batchedConn, peer *net.TCPConn) error {
			_, err := io.WriteString(peer, much)
			return err
		}, much, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPaces(longPeriod)
			conn, peer := p.connect(t)
			useUpBurst(t, conn, peer)
			done := readAsync(conn, 2*batchBytes)
			end := <-p.pauses
			if err := tt.end(conn, peer); err != nil {
				t.Fatal(err)
			}
			if r := <-done; r.text != tt.want || !errors.Is(r.err, tt.err) {
				t.Errorf("read %d bytes, error %v, want %d and %v", len(r.text), r.err, len(tt.want), tt.err)
			}
			if !errors.Is(tt.err, net.ErrClosed) {
				if n := lowWaterMark(t, conn); n != 1 {
					t.Errorf("low-water mark %d after the pause, want 1", n)
				}
			}
			end() // it was stopped
		})
	}
}

// TestBulkReadIsNotDelayed says that a server which has much to tell tells it as fast as
// ever, and that pauses which ended early are not paid for later: none is longer than
// a period.
func TestBulkReadIsNotDelayed(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	conn, peer := p.connect(t)
	useUpBurst(t, conn, peer)
	want := randomBytes(64 * batchBytes)
	go func() {
		_, _ = peer.Write(want) // what is missing is seen below
		_ = peer.Close()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, error %v, want the %d that were sent", len(got), err, len(want))
	}
	if _, longest := p.countPauses(); longest > longPeriod {
		t.Errorf("a pause of %s, want none longer than %s", longest, longPeriod)
	}
}

// TestBatchedReadsAreComplete says that what is read is what was sent, however it comes and
// whenever pauses end.
func TestBatchedReadsAreComplete(t *testing.T) {
	t.Parallel()
	for _, period := range []time.Duration{time.Microsecond, 100 * time.Microsecond, time.Millisecond} {
		t.Run(period.String(), func(t *testing.T) {
			t.Parallel()
			p := newPaces(period)
			p.readBatcher = newReadBatcher(period, p.watchingOnly) // by the clock
			conn, peer := p.connect(t)
			want := randomBytes(16 * batchBytes)
			go func() {
				for rest := want; len(rest) > 0; {
					n := min(1+rand.IntN(1<<rand.IntN(18)), len(rest))
					if _, err := peer.Write(rest[:n]); err != nil {
						t.Error(err)
						break
					}
					if rest = rest[n:]; rand.IntN(4) == 0 {
						time.Sleep(rand.N(2 * period))
					}
					if rand.IntN(8) == 0 {
						p.listing.Store(!p.listing.Load())
					}
				}
				_ = peer.Close()
			}()
			var got []byte
			for b := make([]byte, 1<<14); ; {
				n, err := conn.Read(b[:1+rand.IntN(len(b))])
				got = append(got, b[:n]...)
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes were read, not the %d that were sent", len(got), len(want))
			}
		})
	}
}

// randomBytes returns bytes that are drawn at random.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

// TestNoBatchingWhileListing says that nothing pauses while there is more to hear than changes.
func TestNoBatchingWhileListing(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	p.listing.Store(true)
	conn, peer := p.connect(t)
	exchange(t, conn, peer, 10*readBurst)
	if n, _ := p.countPauses(); n != 0 {
		t.Errorf("%d pauses", n)
	}
	p.listing.Store(false)
	exchange(t, conn, peer, readBurst) // none of those before count
	if n, _ := p.countPauses(); n != 0 {
		t.Errorf("%d pauses in the first burst", n)
	}
	readAsync(conn, 1)
	<-p.pauses
}

// TestWatchingOnly says when there is nothing to hear but changes: once all lists have
// been delivered, but while one is read again.
func TestWatchingOnly(t *testing.T) {
	t.Parallel()
	box := newDeltaQueue()
	steps := []struct {
		name string
		do   func()
		want bool
	}{
		{"at first", func() {}, false},
		{"lists begin", func() {
			for _, k := range []resource{services, endpointSlices, nodes, serviceCIDRs} {
				box.beginList(k)
			}
		}, false},
		{"some are complete", func() { box.completeList(services); box.completeList(nodes); box.completeList(serviceCIDRs) }, false},
		{"all are complete", func() { box.completeList(endpointSlices) }, false},
		{"all are delivered", func() { box.pop() }, true},
		{"one again", func() { box.beginList(services) }, false},
		{"it begins anew", func() { box.beginList(services) }, false},
		{"it is complete", func() { box.completeList(services) }, true},
	}
	for _, step := range steps {
		step.do()
		if got := box.watchingOnly(); got != step.want {
			t.Fatalf("%s: following %v, want %v", step.name, got, step.want)
		}
	}
}

// TestBatchedConnections says which connections are paced: those of TCP, whoever makes them,
// where there is a period.
func TestBatchedConnections(t *testing.T) {
	t.Parallel()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	tcp, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	failure := errors.New("no way")
	type dialer = func(context.Context, string, string) (net.Conn, error)
	to := func(network, address string) dialer {
		return func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}
	}
	for _, tt := range []struct {
		name  string
		dial  dialer
		paced bool
		err   error
	}{
		{"its own", nil, true, nil},
		{"another's", to("tcp", tcp.Addr().String()), true, nil},
		{"another's, not of TCP", to("unix", listener.Addr().String()), false, nil},
		{"another's, closed", func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", tcp.Addr().String())
			return conn, errors.Join(err, conn.Close())
		}, true, nil},
		{"no connection", func(context.Context, string, string) (net.Conn, error) { return nil, failure }, false, failure},
	} {
		t.Run(tt.name, func(t *testing.T) {
			given := &rest.Config{Dial: tt.dial}
			config := newReadBatcher(longPeriod, func() bool { return true }).wrapConfig(given)
			if tt.dial == nil && given.Dial != nil {
				t.Error("the caller's configuration is another")
			}
			conn, err := config.Dial(t.Context(), "tcp", tcp.Addr().String())
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			defer conn.Close()
			if _, paced := conn.(*batchedConn); paced != tt.paced {
				t.Errorf("paced %v, want %v", paced, tt.paced)
			}
		})
	}
	given := &rest.Config{}
	if config := newReadBatcher(0, nil).wrapConfig(given); config != given || config.Dial != nil {
		t.Error("without a period the configuration is another")
	}
}

// completeList notes that the list of the kind is complete.
func (m *deltaQueue) completeList(k resource) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.completeListLocked(k)
}

// failingTransport is a server that nothing is to be had from.
type failingTransport struct{}

func (failingTransport) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, errors.New("no way")
}

// TestListsAreNotBatched says that a list, streamed or not, is read without pauses
// until it is complete, and that a watch is none.
func TestListsAreNotBatched(t *testing.T) {
	t.Parallel()
	s, err := New(Options{Config: &rest.Config{Host: "http://192.0.2.1", Transport: failingTransport{}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []resource{services, endpointSlices, nodes, serviceCIDRs} {
		s.queue.completeList(k)
	}
	s.queue.pop()
	yes := true
	for _, l := range s.reflectors {
		for _, tt := range []struct {
			name string
			ask  func() error
			want bool
		}{
			{"watch", func() error { _, err := l.watch(t.Context(), metav1.ListOptions{}); return err }, true},
			{"stream", func() error { _, err := l.watch(t.Context(), metav1.ListOptions{SendInitialEvents: &yes}); return err }, false},
			{"list", func() error { _, err := l.list(t.Context(), metav1.ListOptions{}); return err }, false},
		} {
			if err := tt.ask(); err == nil {
				t.Errorf("%s, %s: no error", l.resource, tt.name)
			}
			if got := s.queue.watchingOnly(); got != tt.want {
				t.Errorf("%s, %s: following %v, want %v", l.resource, tt.name, got, tt.want)
			}
			if err := l.store.Replace(nil, "1"); err != nil {
				t.Fatal(err)
			}
			if !s.queue.watchingOnly() {
				t.Errorf("%s, %s: not following once it is complete", l.resource, tt.name)
			}
		}
	}
}
