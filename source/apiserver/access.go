package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"k8s.io/client-go/rest"
)

// Access is a permission that Fairlead uses.
type Access struct {
	Group, Resource, Verb string
	// Required means that no Service can be programmed without it.
	Required bool
	// Allowed reports whether the API server grants it.
	Allowed bool
}

// String returns the permission as `kubectl auth can-i` writes it.
func (a Access) String() string {
	if a.Group == "" {
		return a.Verb + " " + a.Resource
	}
	return a.Verb + " " + a.Resource + "." + a.Group
}

// permissions returns all permissions that Fairlead uses.
func permissions() []Access {
	var all []Access
	for _, res := range []resource{services, endpointSlices, nodes, serviceCIDRs} {
		for _, verb := range []string{verbList, verbWatch} {
			all = append(all, Access{
				Group: res.groupVersion().Group, Resource: string(res), Verb: verb, Required: res == services || res == endpointSlices,
			})
		}
	}
	const eventsGroup = "events.k8s.io"
	return append(all, Access{Group: eventsGroup, Resource: "events", Verb: "create"}, Access{Group: eventsGroup, Resource: "events", Verb: "patch"})
}

// Probe sends requests to the API server on behalf of `fairlead check`.
type Probe struct {
	client *http.Client
	base   *url.URL
}

// probeTimeout limits each request of a Probe.
const probeTimeout = 5 * time.Second

// NewProbe returns a Probe for a configuration of [Config].
func NewProbe(config *rest.Config) (*Probe, error) {
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, err
	}
	return &Probe{client, base}, nil
}

// Server returns the URL of the API server.
func (p *Probe) Server() string { return p.base.String() }

// Version returns the version of the API server, and how long it took to answer.
func (p *Probe) Version(ctx context.Context) (version string, took time.Duration, err error) {
	var body struct {
		GitVersion string `json:"gitVersion"`
	}
	began := time.Now()
	err = p.do(ctx, http.MethodGet, "/version", nil, &body)
	return body.GitVersion, time.Since(began), err
}

// Access asks the API server which permissions it grants.
func (p *Probe) Access(ctx context.Context) ([]Access, error) {
	all := permissions()
	for i, a := range all {
		review := map[string]any{
			"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
			"spec": map[string]any{"resourceAttributes": map[string]string{"group": a.Group, "resource": a.Resource, "verb": a.Verb}},
		}
		var result struct {
			Status struct {
				Allowed bool `json:"allowed"`
			} `json:"status"`
		}
		if err := p.do(ctx, http.MethodPost, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review, &result); err != nil {
			return nil, fmt.Errorf("ask for the permission to %s: %w", a, err)
		}
		all[i].Allowed = result.Status.Allowed
	}
	return all, nil
}

// HasNode reports whether the cluster has the Node.
func (p *Probe) HasNode(ctx context.Context, name string) (bool, error) {
	var list struct {
		Items []json.RawMessage `json:"items"`
	}
	err := p.do(ctx, http.MethodGet, "/api/v1/nodes?fieldSelector="+url.QueryEscape("metadata.name="+name), nil, &list)
	return len(list.Items) > 0, err
}

// do sends a request and decodes the response. Statuses other than 2xx are errors.
func (p *Probe) do(ctx context.Context, method, path string, body, result any) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var content io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		content = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(p.base.String(), "/")+path, content)
	if err != nil {
		return err
	}
	request.Header.Set("Accept", "application/json")
	request.Header.Set("Content-Type", "application/json")
	response, err := p.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close() //nolint:errcheck // it is only read
	const most = 1 << 20
	data, err := io.ReadAll(io.LimitReader(response.Body, most))
	if err != nil {
		return err
	}
	if response.StatusCode/100 != 2 {
		var status struct {
			Message string `json:"message"`
		}
		_ = json.Unmarshal(data, &status) // the message stays empty
		return fmt.Errorf("status %d %s", response.StatusCode, status.Message)
	}
	return json.Unmarshal(data, result)
}
