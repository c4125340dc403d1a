package compare

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/bench/testbed"
)

// localServerFactory are servers in this process. Each object of the content is encoded once for
// all of them.
type localServerFactory struct {
	sequence *apiserver.VersionSequence
	versions []*apiserver.Version
}

func newLocalServerFactory(c *content) (*localServerFactory, error) {
	f := &localServerFactory{sequence: &apiserver.VersionSequence{}}
	for _, o := range c.objects() {
		v, err := f.sequence.Stamp(o)
		if err != nil {
			return nil, err
		}
		f.versions = append(f.versions, v)
	}
	return f, nil
}

func (f *localServerFactory) open(context.Context) (server, error) {
	api := apiserver.New()
	api.Put(f.versions...)
	return &localServer{sequence: f.sequence, api: api}, nil
}

// localServer is a server in this process.
type localServer struct {
	sequence *apiserver.VersionSequence
	api      *apiserver.Server
	mu       sync.Mutex // versions are put in the order in which they are made
}

// localServerPort is where the server listens, at the node's loopback address.
const localServerPort = 8080

func (f *localServer) attach(ctx context.Context, r *testbed.Testbed, kubeconfig string) (func() error, error) {
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), localServerPort)
	if err := writeKubeconfig(kubeconfig, "http://"+at.String()); err != nil {
		return nil, err
	}
	listener, err := r.Node.Listen(ctx, "tcp4", at)
	if err != nil {
		return nil, err
	}
	s := &http.Server{
		Handler: f.api, ReadHeaderTimeout: time.Minute,
		// Requests end with the run, which Close alone does not tell them.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	go func() { _ = s.Serve(listener) }() // returns when it is closed
	return s.Close, nil
}

// writeKubeconfig writes how the server is reached: without TLS, so that no system
// spends time on it.
func writeKubeconfig(path, url string) error {
	text := `apiVersion: v1
kind: Config
clusters:
- name: bench
  cluster: {server: "` + url + `"}
users:
- name: bench
contexts:
- name: bench
  context: {cluster: bench, user: bench}
current-context: bench
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write a kubeconfig: %w", err)
	}
	return nil
}

func (f *localServer) create(_ context.Context, objects ...apiserver.Object) *request {
	return f.applyEach(objects, f.api.Put)
}

func (f *localServer) update(_ context.Context, objects ...apiserver.Object) *request {
	return f.applyEach(objects, f.api.Put)
}

func (f *localServer) delete(_ context.Context, objects ...apiserver.Object) *request {
	return f.applyEach(objects, f.api.Delete)
}

// applyEach does something to a new version of each object.
func (f *localServer) applyEach(objects []apiserver.Object, do func(...*apiserver.Version)) *request {
	return doRequest(func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, o := range objects {
			v, err := f.sequence.Stamp(o)
			if err != nil {
				return err
			}
			do(v)
		}
		return nil
	})
}

func (f *localServer) close() error { return nil }
