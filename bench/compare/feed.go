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
	"fairlead.io/fairlead/bench/rig"
)

// feeds are servers in this process. Each object of the content is encoded once for
// all of them.
type feeds struct {
	clock    *apiserver.Clock
	versions []*apiserver.Version
}

func newFeeds(c *content) (*feeds, error) {
	f := &feeds{clock: &apiserver.Clock{}}
	for _, o := range c.objects() {
		v, err := f.clock.Version(o)
		if err != nil {
			return nil, err
		}
		f.versions = append(f.versions, v)
	}
	return f, nil
}

func (f *feeds) open(context.Context) (server, error) {
	api := apiserver.New()
	api.Put(f.versions...)
	return &feed{clock: f.clock, api: api}, nil
}

// feed is a server in this process.
type feed struct {
	clock *apiserver.Clock
	api   *apiserver.Server
	mu    sync.Mutex // versions are put in the order in which they are made
}

// feedPort is where the server listens, at the node's loopback address.
const feedPort = 8080

func (f *feed) join(ctx context.Context, r *rig.Rig, kubeconfig string) (func() error, error) {
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), feedPort)
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

func (f *feed) create(_ context.Context, objects ...apiserver.Object) *request {
	return f.each(objects, f.api.Put)
}

func (f *feed) update(_ context.Context, objects ...apiserver.Object) *request {
	return f.each(objects, f.api.Put)
}

func (f *feed) delete(_ context.Context, objects ...apiserver.Object) *request {
	return f.each(objects, f.api.Delete)
}

// each does something to a new version of each object.
func (f *feed) each(objects []apiserver.Object, do func(...*apiserver.Version)) *request {
	return asked(func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, o := range objects {
			v, err := f.clock.Version(o)
			if err != nil {
				return err
			}
			do(v)
		}
		return nil
	})
}

func (f *feed) close() error { return nil }
