package apiload

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"
)

// auditPolicy logs the requests of the given users. A watch is logged when it starts.
func auditPolicy(users []string) []byte {
	policy, err := json.Marshal(map[string]any{
		"apiVersion": "audit.k8s.io/v1", "kind": "Policy",
		"omitStages": []string{"RequestReceived"},
		"rules":      []any{map[string]any{"level": "Metadata", "users": users}, map[string]any{"level": "None"}},
	})
	if err != nil {
		panic(err) // only strings
	}
	return policy
}

// auditEvent has the fields of an audit event that are read.
type auditEvent struct {
	AuditID    string `json:"auditID"`
	RequestURI string `json:"requestURI"`
	Verb       string `json:"verb"`
	User       struct {
		Username string `json:"username"`
	} `json:"user"`
	ObjectRef *struct {
		Resource    string `json:"resource"`
		Subresource string `json:"subresource"`
	} `json:"objectRef"`
	ResponseStatus struct {
		Code int `json:"code"`
	} `json:"responseStatus"`
}

// operation describes a request: verb and resource or path.
func (e auditEvent) operation() string {
	uri, err := url.Parse(e.RequestURI)
	if err != nil {
		uri = &url.URL{Path: e.RequestURI}
	}
	verb := e.Verb
	if uri.Query().Get("sendInitialEvents") == "true" {
		verb = "list+watch"
	}
	if e.ObjectRef == nil {
		return verb + " " + uri.Path
	}
	name := e.ObjectRef.Resource
	if e.ObjectRef.Subresource != "" {
		name += "/" + e.ObjectRef.Subresource
	}
	if e.ResponseStatus.Code >= 400 { //nolint:mnd // an HTTP error
		name += fmt.Sprintf(" (status %d)", e.ResponseStatus.Code)
	}
	return verb + " " + name
}

// auditLog counts requests in an audit log.
type auditLog struct {
	path   string
	offset int64
	seen   map[string]bool // IDs of requests that were counted
	counts map[string]Requests
}

// Requests counts requests by operation.
type Requests map[string]int

func (r Requests) minus(s Requests) Requests {
	d := Requests{}
	for name, n := range r {
		if n != s[name] {
			d[name] = n - s[name]
		}
	}
	return d
}

func (r Requests) total() (n int) {
	for _, count := range r {
		n += count
	}
	return n
}

// String lists the operations with their counts.
func (r Requests) String() string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(r)) {
		parts = append(parts, fmt.Sprintf("%d × %s", r[name], name))
	}
	return strings.Join(parts, ", ")
}

func newAuditLog(path string) *auditLog {
	return &auditLog{path: path, seen: map[string]bool{}, counts: map[string]Requests{}}
}

// of returns the number of requests of a user so far.
func (l *auditLog) of(user string) (Requests, error) {
	if err := l.read(); err != nil {
		return nil, fmt.Errorf("read the audit log: %w", err)
	}
	return maps.Clone(l.counts[user]), nil
}

// read counts the requests since the last read.
func (l *auditLog) read() error {
	file, err := os.Open(l.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // no request yet
	}
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // read-only
	if _, err := file.Seek(l.offset, io.SeekStart); err != nil {
		return err
	}
	for lines := bufio.NewReader(file); ; {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil // an incomplete line is read again later
		}
		if err != nil {
			return err
		}
		l.offset += int64(len(line))
		if err := l.count(line); err != nil {
			return err
		}
	}
}

func (l *auditLog) count(line []byte) error {
	var e auditEvent
	if err := json.Unmarshal(bytes.TrimSpace(line), &e); err != nil {
		return err
	}
	if l.seen[e.AuditID] {
		return nil
	}
	l.seen[e.AuditID] = true
	counts := l.counts[e.User.Username]
	if counts == nil {
		counts = Requests{}
		l.counts[e.User.Username] = counts
	}
	counts[e.operation()]++
	return nil
}
