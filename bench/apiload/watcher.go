package apiload

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"

	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/test/controlplane"
)

const (
	mediaJSON     = "application/json"
	mediaProtobuf = "application/vnd.kubernetes.protobuf"
	encodingGzip  = "gzip"
	metadataOnly  = ";as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	metadataList  = ";as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

	servicesPath = "/api/v1/services"
	slicesPath   = "/apis/discovery.k8s.io/v1/endpointslices"
	nodesPath    = "/api/v1/nodes"
	cidrsPath    = "/apis/networking.k8s.io/v1/servicecidrs"

	// Selectors of Service proxies.
	serviceSelector = "!service.kubernetes.io/service-proxy-name"
	sliceSelector   = "!service.kubernetes.io/headless"
)

// reader sends requests from a client's namespace and discards the responses.
type reader struct {
	http *http.Client
	base string
}

func newReader(cp *controlplane.ControlPlane, c *client) (*reader, error) {
	config := cp.Config()
	config.Dial = c.dial
	config.DisableCompression = true // a request asks for it itself
	h, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	return &reader{http: h, base: cp.URL()}, nil
}

func (r *reader) close() { r.http.CloseIdleConnections() }

// get opens a request.
func (r *reader) get(ctx context.Context, path string, query url.Values, accept, encoding string) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+path+"?"+query.Encode(), http.NoBody)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", accept)
	if encoding != "" {
		request.Header.Set("Accept-Encoding", encoding)
	}
	response, err := r.http.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(response.Body) // for the error only
		return nil, errors.Join(fmt.Errorf("GET %s: %s: %s", path, response.Status, body), response.Body.Close())
	}
	return response.Body, nil
}

// list reads a whole list from the API server's cache.
func (r *reader) list(ctx context.Context, path string, query url.Values, accept, encoding string) error {
	query = cloneQuery(query)
	query.Set("resourceVersion", "0")
	body, err := r.get(ctx, path, query, accept, encoding)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, body)
	return errors.Join(err, body.Close())
}

// stream reads a streamed list and then the events, until ctx is done. listed is called at the
// end of the list.
func (r *reader) stream(ctx context.Context, path string, query url.Values, accept, encoding string, listed func()) error {
	query = cloneQuery(query)
	query.Set("watch", "true")
	query.Set("allowWatchBookmarks", "true")
	query.Set("sendInitialEvents", "true")
	query.Set("resourceVersionMatch", "NotOlderThan")
	query.Set("timeoutSeconds", "3600")
	response, err := r.get(ctx, path, query, accept+";stream=watch", encoding)
	if err != nil {
		return err
	}
	defer response.Close() //nolint:errcheck // read-only
	body := io.Reader(response)
	if encoding == encodingGzip {
		if body, err = gzip.NewReader(response); err != nil {
			return fmt.Errorf("watch %s: %w", path, err)
		}
	}
	const size = 64 << 10
	// The last bytes of a read and the next read may contain the annotation together.
	mark, buffer, kept := []byte("k8s.io/initial-events-end"), make([]byte, size), 0
	for done := false; ; {
		n, err := body.Read(buffer[kept:])
		if !done {
			data := buffer[:kept+n]
			if done = bytes.Contains(data, mark); done {
				listed()
				kept = 0
			} else {
				kept = copy(buffer, data[max(0, len(data)-len(mark)):])
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch %s: %w", path, err)
		}
	}
}

// renew opens a watch from a version and ends it.
func (r *reader) renew(ctx context.Context, path string, query url.Values, version string) error {
	query = cloneQuery(query)
	query.Set("watch", "true")
	query.Set("allowWatchBookmarks", "true")
	query.Set("resourceVersion", version)
	body, err := r.get(ctx, path, query, mediaProtobuf+";stream=watch", "")
	if err != nil {
		return err
	}
	return body.Close()
}

func cloneQuery(q url.Values) url.Values {
	c := url.Values{}
	maps.Copy(c, q)
	return c
}

// watched is a resource that a Service proxy follows.
type watched struct {
	path  string
	query url.Values
}

// proxyWatches returns the requests of a Service proxy on a node.
func proxyWatches(node string) []watched {
	return []watched{
		{servicesPath, url.Values{"labelSelector": {serviceSelector}, "fieldSelector": {"spec.clusterIP!=None"}}},
		{slicesPath, url.Values{"labelSelector": {sliceSelector}}},
		{nodesPath, url.Values{"fieldSelector": {"metadata.name=" + node}}},
		{cidrsPath, nil},
	}
}
