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

// localServerFactory opens API servers in this process. They share the encoding of each object of
// the content.
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

// localServer is an API server in this process.
type localServer struct {
	sequence *apiserver.VersionSequence
	api      *apiserver.Server
	mu       sync.Mutex // serializes Stamp and Put, so that resource versions increase
}

// localServerPort is the port of the server on the node's loopback address.
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
		// Close does not end requests; canceling ctx does.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	go func() { _ = s.Serve(listener) }() // returns when the server is closed
	return s.Close, nil
}

// writeKubeconfig writes a kubeconfig without TLS, so that no system spends processor time on TLS.
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
		return fmt.Errorf("write kubeconfig: %w", err)
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

// applyEach stamps each object with the next resource version and calls apply.
func (f *localServer) applyEach(objects []apiserver.Object, apply func(...*apiserver.Version)) *request {
	var versions []*apiserver.Version
	r := doRequest(func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, o := range objects {
			v, err := f.sequence.Stamp(o)
			if err != nil {
				return err
			}
			versions = append(versions, v)
			apply(v)
		}
		return nil
	})
	r.versions = versions
	return r
}

func (f *localServer) close() error { return nil }
