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

// longPeriod is a period that is longer than any test, so that a read which returns has not
// waited for it.
const longPeriod = time.Hour

// manualBatcher is a readBatcher whose pauses the test ends.
type manualBatcher struct {
	*readBatcher

	received atomic.Uint64 // the number of changes
	listing  atomic.Bool   // makes watchingOnly return false
	// pauses receives a function for each pause, which ends it.
	pauses chan func()

	mu           sync.Mutex
	count        int
	longestPause time.Duration
}

func newPaces(period time.Duration) *manualBatcher {
	p := &manualBatcher{pauses: make(chan func(), 1000)}
	p.readBatcher = newReadBatcher(period, func() bool { return !p.listing.Load() }, p.received.Load)
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

// connect returns a batched connection and its peer.
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
	batched, ok := conn.(*batchedConn)
	if !ok {
		t.Fatalf("TCP connection is a %T", conn)
	}
	return batched, peer.(*net.TCPConn)
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

// readResult is the result of a concurrent read.
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

// useUpBurst receives as many changes as are possible without a pause.
func (p *manualBatcher) useUpBurst(t *testing.T, conn, peer net.Conn) {
	t.Helper()
	p.exchange(t, conn, peer, changeBurst)
	p.received.Add(1)
}

// exchange sends and reads several changes of one byte.
func (p *manualBatcher) exchange(t *testing.T, conn, peer net.Conn, times int) {
	t.Helper()
	for range times {
		send(t, peer, "x")
		receive(t, conn, "x")
		p.received.Add(1)
	}
}

// waitForBytes waits until the socket has the number of bytes to read.
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

// TestReadBurstWithoutPause checks that no read pauses before the burst is used up.
func TestReadBurstWithoutPause(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	conn, peer := p.connect(t)
	p.useUpBurst(t, conn, peer)
	if n, _ := p.countPauses(); n != 0 {
		t.Errorf("%d pauses, want none", n)
	}
}

// TestShouldPause checks that reads pause only while at least two changes arrive in a period.
func TestShouldPause(t *testing.T) {
	t.Parallel()
	const period = 10 * time.Millisecond
	type phase struct {
		every     time.Duration // between two changes
		changes   int
		minPauses int
		maxPauses int
	}
	for _, tt := range []struct {
		name   string
		phases []phase
	}{
		{"rare changes", []phase{{time.Second, 100, 0, 0}}},
		{"just below two in a period", []phase{{5100 * time.Microsecond, 1000, 0, 0}}},
		{"just above two in a period", []phase{{4900 * time.Microsecond, 2000, 100, 2000}}},
		{"bursts", []phase{{0, changeBurst, 0, 0}, {time.Second, 1, 0, 0}, {0, changeBurst - 1, 0, 0}}},
		{"a long burst", []phase{{0, changeBurst, 0, 0}, {0, 5, 5, 5}}},
		{"frequent changes", []phase{{time.Millisecond, 20, 0, 20}, {time.Millisecond, 1000, 1000, 1000}}},
		{"rare changes after frequent ones", []phase{{time.Millisecond, 1000, 900, 1000}, {50 * time.Millisecond, 2, 0, 1}, {50 * time.Millisecond, 100, 0, 0}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var changes atomic.Uint64
			p := newReadBatcher(period, nil, changes.Load)
			now := time.Now()
			for i, phase := range tt.phases {
				pauses := 0
				for range phase.changes {
					now = now.Add(phase.every)
					changes.Add(1)
					if p.shouldPause(now) {
						pauses++
					}
				}
				if pauses < phase.minPauses || pauses > phase.maxPauses {
					t.Errorf("phase %d: %d pauses, want %d to %d", i, pauses, phase.minPauses, phase.maxPauses)
				}
			}
		})
	}
}

// TestReadBatch checks that data that arrives during a pause does not wake the reader, is
// read together after at most one period, and that data after the pause is not delayed.
func TestReadBatch(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	conn, peer := p.connect(t)
	p.useUpBurst(t, conn, peer)

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
		t.Fatalf("read %q before the end of the pause", r.text)
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
		t.Errorf("%d pauses, the longest %s, want one of at most a period", n, longest)
	}

	done = readAsync(conn, len("la"))
	(<-p.pauses)()
	send(t, peer, "later")
	if r := <-done; r.text != "la" || r.err != nil {
		t.Fatalf("read %q, error %v, want the data after the pause", r.text, r.err)
	}
	// The rest, which did not fit, is read without a pause.
	receive(t, conn, "ter")
}

// TestPauseEndsEarly checks the events that end a pause early: the end of the connection on
// either side, a deadline, and bulk data.
func TestPauseEndsEarly(t *testing.T) {
	t.Parallel()
	bulk := string(bytes.Repeat([]byte("m"), batchBytes))
	for _, tt := range []struct {
		name string
		end  func(*batchedConn, *net.TCPConn) error
		want string
		err  error
	}{
		{"closed", func(conn *batchedConn, _ *net.TCPConn) error { return conn.Close() }, "", net.ErrClosed},
		{"closed by the peer", func(_ *batchedConn, peer *net.TCPConn) error { return peer.Close() }, "", io.EOF},
		{"half-closed by the peer", func(_ *batchedConn, peer *net.TCPConn) error { return peer.CloseWrite() }, "", io.EOF},
		{"closed by the peer after data", func(_ *batchedConn, peer *net.TCPConn) error {
			_, err := io.WriteString(peer, "last")
			return errors.Join(err, peer.Close())
		}, "last", nil},
		{"reset", func(_ *batchedConn, peer *net.TCPConn) error {
			return errors.Join(peer.SetLinger(0), peer.Close())
		}, "", syscall.ECONNRESET},
		{"deadline", func(conn *batchedConn, _ *net.TCPConn) error { return conn.SetReadDeadline(time.Now()) }, "", os.ErrDeadlineExceeded},
		{"bulk data", func(_ *batchedConn, peer *net.TCPConn) error {
			_, err := io.WriteString(peer, bulk)
			return err
		}, bulk, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPaces(longPeriod)
			conn, peer := p.connect(t)
			p.useUpBurst(t, conn, peer)
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
			end() // has no effect after the pause was stopped
		})
	}
}

// TestBulkReadIsNotDelayed checks that a server that sends bulk data is read without delay,
// and that pauses that ended early do not extend later ones: none is longer than a period.
func TestBulkReadIsNotDelayed(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	conn, peer := p.connect(t)
	p.useUpBurst(t, conn, peer)
	want := randomBytes(64 * batchBytes)
	go func() {
		_, _ = peer.Write(want) // missing data fails the test below
		_ = peer.Close()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, error %v, want the %d sent bytes", len(got), err, len(want))
	}
	if _, longest := p.countPauses(); longest > longPeriod {
		t.Errorf("a pause of %s, want none longer than %s", longest, longPeriod)
	}
}

// TestBatchedReadsAreComplete checks that all data is read, however it arrives and whenever
// pauses end.
func TestBatchedReadsAreComplete(t *testing.T) {
	t.Parallel()
	for _, period := range []time.Duration{time.Microsecond, 100 * time.Microsecond, time.Millisecond} {
		t.Run(period.String(), func(t *testing.T) {
			t.Parallel()
			p := newPaces(period)
			p.readBatcher = newReadBatcher(period, p.watchingOnly, p.received.Load) // use the real clock
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
				p.received.Add(uint64(rand.IntN(10)))
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, want) {
				t.Errorf("read %d bytes, which differ from the %d sent bytes", len(got), len(want))
			}
		})
	}
}

// randomBytes returns random bytes.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

// TestNoBatchingWhileListing checks that no read pauses while a list is being read.
func TestNoBatchingWhileListing(t *testing.T) {
	t.Parallel()
	p := newPaces(longPeriod)
	p.listing.Store(true)
	conn, peer := p.connect(t)
	p.exchange(t, conn, peer, 1)
	for range 10 * changeBurst { // objects of a list are no changes
		send(t, peer, "x")
		receive(t, conn, "x")
	}
	if n, _ := p.countPauses(); n != 0 {
		t.Errorf("%d pauses, want none", n)
	}
	p.listing.Store(false)
	p.exchange(t, conn, peer, changeBurst-1)
	if n, _ := p.countPauses(); n != 0 {
		t.Errorf("%d pauses in the first burst, want none", n)
	}
	p.received.Add(1)
	readAsync(conn, 1)
	<-p.pauses
}

// TestWatchingOnly checks watchingOnly: true after all lists have been delivered, except
// while one is read again.
func TestWatchingOnly(t *testing.T) {
	t.Parallel()
	queue := newDeltaQueue()
	steps := []struct {
		name string
		do   func()
		want bool
	}{
		{"at first", func() {}, false},
		{"lists begin", func() {
			for _, res := range []resource{services, endpointSlices, nodes, serviceCIDRs} {
				queue.beginList(res)
			}
		}, false},
		{"some are complete", func() { queue.completeList(services); queue.completeList(nodes); queue.completeList(serviceCIDRs) }, false},
		{"all are complete", func() { queue.completeList(endpointSlices) }, false},
		{"all are delivered", func() { queue.pop() }, true},
		{"a list begins again", func() { queue.beginList(services) }, false},
		{"the list restarts", func() { queue.beginList(services) }, false},
		{"the list is complete", func() { queue.completeList(services) }, true},
	}
	for _, step := range steps {
		step.do()
		if got := queue.watchingOnly(); got != step.want {
			t.Fatalf("%s: watchingOnly %v, want %v", step.name, got, step.want)
		}
	}
}

// TestBatchedConnections checks that all TCP connections are batched if there is a period,
// whichever function dials them.
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
	failure := errors.New("dial failed")
	type dialer = func(context.Context, string, string) (net.Conn, error)
	to := func(network, address string) dialer {
		return func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}
	}
	for _, tt := range []struct {
		name    string
		dial    dialer
		batched bool
		err     error
	}{
		{"default dialer", nil, true, nil},
		{"custom dialer", to("tcp", tcp.Addr().String()), true, nil},
		{"custom dialer, not TCP", to("unix", listener.Addr().String()), false, nil},
		{"custom dialer, closed connection", func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", tcp.Addr().String())
			return conn, errors.Join(err, conn.Close())
		}, true, nil},
		{"failed dial", func(context.Context, string, string) (net.Conn, error) { return nil, failure }, false, failure},
	} {
		t.Run(tt.name, func(t *testing.T) {
			given := &rest.Config{Dial: tt.dial}
			config := newReadBatcher(longPeriod, func() bool { return true }, nil).wrapConfig(given)
			if tt.dial == nil && given.Dial != nil {
				t.Error("the caller's configuration was modified")
			}
			conn, err := config.Dial(t.Context(), "tcp", tcp.Addr().String())
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			defer conn.Close()
			if _, batched := conn.(*batchedConn); batched != tt.batched {
				t.Errorf("batched %v, want %v", batched, tt.batched)
			}
		})
	}
	given := &rest.Config{}
	if config := newReadBatcher(0, nil, nil).wrapConfig(given); config != given || config.Dial != nil {
		t.Error("a zero period changes the configuration")
	}
}

// completeList records that the list of the resource is complete.
func (m *deltaQueue) completeList(res resource) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.completeListLocked(res)
}

// failingTransport fails all requests.
type failingTransport struct{}

func (failingTransport) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, errors.New("dial failed")
}

// TestListsAreNotBatched checks that a list, streamed or not, is read without pauses until
// it is complete, and that a watch is batched.
func TestListsAreNotBatched(t *testing.T) {
	t.Parallel()
	s, err := New(Options{Config: &rest.Config{Host: "http://192.0.2.1", Transport: failingTransport{}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, res := range []resource{services, endpointSlices, nodes, serviceCIDRs} {
		s.queue.completeList(res)
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
				t.Errorf("%s, %s: watchingOnly %v, want %v", l.resource, tt.name, got, tt.want)
			}
			if err := l.store.Replace(nil, "1"); err != nil {
				t.Fatal(err)
			}
			if !s.queue.watchingOnly() {
				t.Errorf("%s, %s: not watchingOnly after the list is complete", l.resource, tt.name)
			}
		}
	}
}
