package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv4"

	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/nettest"
)

const (
	// packetSize is the number of bytes in a UDP packet of [Flows.SendPackets].
	packetSize = 64
	// packetBatch is the number of packets of one system call.
	packetBatch = 100
	// flowTimeout is the maximum duration of an operation of [Flows].
	flowTimeout = 10 * time.Second
	// answerTimeout is the time after which a request is repeated, because its packet may have been dropped
	// before the Service was programmed.
	answerTimeout = 200 * time.Millisecond
)

// Flows are an established TCP connection and an established UDP flow from the client to one endpoint. The
// caller must close them. The methods must not be called concurrently.
type Flows struct {
	testbed  *Testbed
	listener net.Listener
	server   net.PacketConn
	// tcp and udp are the client's ends, and peer the endpoint's end of tcp.
	tcp, udp, peer net.Conn
}

// OpenFlows opens flows to the addresses tcp and udp, each of which is the endpoint or a Service with this
// endpoint. It waits until the Services are programmed.
func (r *Testbed) OpenFlows(ctx context.Context, endpoint, tcp, udp netip.AddrPort) (_ *Flows, err error) {
	f := &Flows{testbed: r}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open flows to %s and %s: %w", tcp, udp, err), f.Close())
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, flowTimeout)
	defer cancel()
	if f.listener, err = r.Endpoints.Listen(ctx, nettest.TCP, endpoint); err != nil {
		return f, err
	}
	if f.server, err = r.Endpoints.ListenPacket(ctx, nettest.UDP, endpoint); err != nil {
		return f, err
	}
	// The kernel drops packets of SendPackets at the endpoint's socket, so that no process wakes up.
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtLen},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: packetSize, SkipFalse: 1},
		bpf.RetConstant{Val: packetSize},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return f, fmt.Errorf("assemble the filter of the endpoint's socket: %w", err)
	}
	if err := ipv4.NewPacketConn(f.server).SetBPF(filter); err != nil {
		return f, fmt.Errorf("set the filter of the endpoint's socket: %w", err)
	}
	for f.tcp == nil {
		dialing, cancel := context.WithTimeout(ctx, answerTimeout)
		f.tcp, err = r.Client.Dial(dialing, nettest.TCP, tcp)
		cancel()
		if ctx.Err() != nil {
			return f, errors.Join(ctx.Err(), err)
		}
	}
	if f.peer, err = f.listener.Accept(); err != nil {
		return f, err
	}
	if f.udp, err = r.Client.Dial(ctx, nettest.UDP, udp); err != nil {
		return f, err
	}
	for err = f.exchangeUDP(answerTimeout); err != nil; err = f.exchangeUDP(answerTimeout) {
		if ctx.Err() != nil {
			return f, errors.Join(ctx.Err(), err)
		}
	}
	return f, nil
}

// Exchange sends a short message in both directions of both flows.
func (f *Flows) Exchange() error {
	if err := f.setDeadline(); err != nil {
		return err
	}
	b := make([]byte, 1)
	for _, step := range []func() error{
		func() error { _, err := f.tcp.Write(b); return err },
		func() error { _, err := io.ReadFull(f.peer, b); return err },
		func() error { _, err := f.peer.Write(b); return err },
		func() error { _, err := io.ReadFull(f.tcp, b); return err },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("exchange TCP messages: %w", err)
		}
	}
	return f.exchangeUDP(flowTimeout)
}

func (f *Flows) exchangeUDP(timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	err := errors.Join(f.udp.SetDeadline(deadline), f.server.SetDeadline(deadline))
	b := make([]byte, 1)
	if err == nil {
		_, err = f.udp.Write(b)
	}
	var client net.Addr
	if err == nil {
		_, client, err = f.server.ReadFrom(b)
	}
	if err == nil {
		_, err = f.server.WriteTo(b, client)
	}
	if err == nil {
		_, err = f.udp.Read(b)
	}
	if err != nil {
		return fmt.Errorf("exchange UDP packets: %w", err)
	}
	return nil
}

// setDeadline limits the next operation.
func (f *Flows) setDeadline() error {
	deadline := time.Now().Add(flowTimeout)
	return errors.Join(f.tcp.SetDeadline(deadline), f.peer.SetDeadline(deadline), f.udp.SetDeadline(deadline))
}

// SendPackets sends n packets of 64 bytes over the UDP flow and returns the mean time of one. The kernel
// passes packets from the client's socket through the node to the endpoint's socket before the system call
// returns. A call sends many packets (sendmmsg), because calls take longer than packets on some kernels.
func (f *Flows) SendPackets(n int) (time.Duration, error) {
	if err := f.setDeadline(); err != nil {
		return 0, err
	}
	payload := [][]byte{make([]byte, packetSize)}
	batch := make([]ipv4.Message, min(n, packetBatch))
	for i := range batch {
		batch[i].Buffers = payload
	}
	conn := ipv4.NewPacketConn(f.udp.(*net.UDPConn))
	start := time.Now()
	for left := n; left > 0; {
		sent, err := conn.WriteBatch(batch[:min(left, len(batch))], 0)
		if err != nil {
			return 0, fmt.Errorf("send packets: %w", err)
		}
		left -= sent
	}
	return time.Since(start) / time.Duration(n), nil
}

// Transfer sends bytes over the TCP connection and returns the time until they have arrived.
func (f *Flows) Transfer(size int64) (time.Duration, error) {
	if err := f.setDeadline(); err != nil {
		return 0, err
	}
	const buffer = 256 << 10 // bytes
	received := make(chan error, 1)
	start := time.Now()
	go func() {
		b := make([]byte, buffer)
		for left := size; left > 0; {
			n, err := f.peer.Read(b)
			if left -= int64(n); err != nil && left > 0 {
				received <- err
				return
			}
		}
		received <- nil
	}()
	var err error
	b := make([]byte, buffer)
	for left := size; left > 0 && err == nil; left -= buffer {
		_, err = f.tcp.Write(b[:min(left, buffer)])
	}
	if err != nil {
		err = errors.Join(err, f.peer.SetReadDeadline(time.Now()))
	}
	if err := errors.Join(err, <-received); err != nil {
		return 0, fmt.Errorf("transfer %d bytes: %w", size, err)
	}
	return time.Since(start), nil
}

// WaitOffloaded exchanges messages until the node has put both flows into its flowtable.
func (f *Flows) WaitOffloaded(ctx context.Context) error {
	const flows = 2
	for end := time.Now().Add(flowTimeout); ; {
		if err := f.Exchange(); err != nil {
			return err
		}
		offloaded, err := conntrack.CountOffloaded(ctx, f.testbed.Node.Fd())
		switch {
		case err != nil:
			return err
		case offloaded >= flows:
			return nil
		case time.Now().After(end):
			return fmt.Errorf("%d of %d flows are in the flowtable after %s; UDP flows require Linux 6.4", offloaded, flows, flowTimeout)
		}
	}
}

// Close closes the flows.
func (f *Flows) Close() error {
	var errs []error
	for _, c := range []net.Conn{f.tcp, f.udp, f.peer} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if f.listener != nil {
		errs = append(errs, f.listener.Close())
	}
	if f.server != nil {
		errs = append(errs, f.server.Close())
	}
	return errors.Join(errs...)
}
