package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"

	"fairlead.io/fairlead/internal/nettest"
)

const redisPort = 6379

// startRedis runs redis-server in the pod if it is installed, and a responder otherwise. It
// returns a description of the program.
func startRedis(ctx context.Context, pod *nettest.Host, dir string) (description string, stop func() error, err error) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		stop, err = startResponder(ctx, pod)
		return "a small responder, because redis-server is not installed", stop, err
	}
	args := []string{"--port", strconv.Itoa(redisPort), "--dir", dir, "--save", "", "--appendonly", "no", "--protected-mode", "no"}
	args = append(args, "--bind")
	for _, addr := range pod.Addrs() {
		args = append(args, addr.String())
	}
	var output tail
	p, err := startProcess(ctx, pod.Namespace, &output, path, args...)
	if err != nil {
		return "", nil, err
	}
	if err := awaitRedis(ctx, pod, p); err != nil {
		return "", nil, fmt.Errorf("%s does not answer: %w\n%s", path, errors.Join(err, p.stop()), output.String())
	}
	description = "redis-server"
	if version, err := exec.CommandContext(ctx, path, "--version").Output(); err == nil {
		for field := range strings.FieldsSeq(string(version)) {
			if v, ok := strings.CutPrefix(field, "v="); ok {
				description += " " + v
			}
		}
	}
	return description, p.stop, nil
}

// awaitRedis blocks until the Redis in the pod answers.
func awaitRedis(ctx context.Context, pod *nettest.Host, p *process) error {
	return eventually(ctx, func() error {
		select {
		case <-p.done:
			return permanentError{fmt.Errorf("process ended: %w", p.err)}
		default:
		}
		conn, err := pod.Dial(ctx, "tcp", netip.AddrPortFrom(pod.IPv4, redisPort))
		if err != nil {
			return err
		}
		_, err = redisCommand(ctx, conn, "PING")
		return err
	})
}

// tail keeps the last 1000 bytes of the data written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	t.text = t.text[max(0, len(t.text)-1000):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}

// redisCommand sends one command to Redis over conn, returns the answer, and closes conn.
func redisCommand(ctx context.Context, conn net.Conn, args ...string) (string, error) {
	defer conn.Close() //nolint:errcheck // the exchange is complete
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return "", err
		}
	}
	var command strings.Builder
	fmt.Fprintf(&command, "*%d\r\n", len(args))
	for _, arg := range args {
		fmt.Fprintf(&command, "$%d\r\n%s\r\n", len(arg), arg)
	}
	if _, err := io.WriteString(conn, command.String()); err != nil {
		return "", err
	}
	r := bufio.NewReader(conn)
	line, err := readLine(r)
	if err != nil {
		return "", err
	}
	switch {
	case line == "$-1":
		return "", nil
	case strings.HasPrefix(line, "$"):
		return readLine(r)
	case strings.HasPrefix(line, "+"), strings.HasPrefix(line, ":"):
		return line[1:], nil
	default:
		return "", fmt.Errorf("redis: %s", line)
	}
}

func readLine(r *bufio.Reader) (string, error) {
	line, err := r.ReadString('\n')
	return strings.TrimRight(line, "\r\n"), err
}

// responder implements the part of Redis' protocol that the demo and a user of redis-cli need.
type responder struct {
	mu     sync.Mutex
	values map[string]string
}

// startResponder serves the protocol on all addresses of the pod.
func startResponder(ctx context.Context, pod *nettest.Host) (stop func() error, err error) {
	r := &responder{values: map[string]string{}}
	s := newStreamServer()
	for _, addr := range pod.Addrs() {
		l, err := pod.Listen(ctx, "tcp", netip.AddrPortFrom(addr, redisPort))
		if err != nil {
			return nil, errors.Join(err, s.close())
		}
		s.serve(l, r.serveConn)
	}
	return s.close, nil
}

// serveConn executes the commands on one connection until it is closed.
func (r *responder) serveConn(conn net.Conn) {
	in := bufio.NewReader(conn)
	for {
		args, err := readCommand(in)
		if err != nil {
			return
		}
		if _, err := io.WriteString(conn, r.execute(args)+"\r\n"); err != nil {
			return
		}
	}
}

// readCommand reads the words of a command: a RESP array, or a line as typed in telnet.
func readCommand(in *bufio.Reader) ([]string, error) {
	const maxWords = 1024
	line, err := readLine(in)
	if err != nil {
		return nil, err
	}
	count, isArray := strings.CutPrefix(line, "*")
	if !isArray {
		return strings.Fields(line), nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n > maxWords {
		return nil, fmt.Errorf("invalid number of words %q", count)
	}
	var args []string
	for range n {
		if _, err := readLine(in); err != nil { // the length; the demo's words contain no line breaks
			return nil, err
		}
		arg, err := readLine(in)
		if err != nil {
			return nil, err
		}
		args = append(args, arg)
	}
	return args, nil
}

// execute executes a command and returns the answer without the line break.
func (r *responder) execute(args []string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	command := ""
	if len(args) > 0 {
		command = strings.ToUpper(args[0])
	}
	switch {
	case command == "PING" && len(args) == 1:
		return "+PONG"
	case command == "SET" && len(args) == 3:
		r.values[args[1]] = args[2]
		return "+OK"
	case command == "GET" && len(args) == 2:
		value, ok := r.values[args[1]]
		if !ok {
			return "$-1"
		}
		return fmt.Sprintf("$%d\r\n%s", len(value), value)
	case command == "INCR" && len(args) == 2:
		value, ok := r.values[args[1]]
		n, err := strconv.ParseInt(value, 10, 64)
		if ok && err != nil {
			return "-ERR value is not an integer or out of range"
		}
		r.values[args[1]] = strconv.FormatInt(n+1, 10)
		return ":" + r.values[args[1]]
	default:
		return fmt.Sprintf("-ERR this is the demo's responder, which knows PING, SET, GET and INCR, not %q", args)
	}
}

// streamServer serves connections until it is closed.
type streamServer struct {
	wg sync.WaitGroup

	mu     sync.Mutex
	closed bool
	open   map[io.Closer]struct{}
}

func newStreamServer() *streamServer { return &streamServer{open: map[io.Closer]struct{}{}} }

// track runs fn in a goroutine. It closes c when fn returns or the server is closed.
func (s *streamServer) track(c io.Closer, fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close()
		return
	}
	s.open[c] = struct{}{}
	s.wg.Go(func() {
		fn()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.open, c)
		_ = c.Close()
	})
}

// serve accepts connections and runs handle for each of them in a goroutine.
func (s *streamServer) serve(l net.Listener, handle func(net.Conn)) {
	s.track(l, func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.track(conn, func() { handle(conn) })
		}
	})
}

func (s *streamServer) close() error {
	s.mu.Lock()
	s.closed = true
	for c := range s.open {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}
