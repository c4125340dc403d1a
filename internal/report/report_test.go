package report_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/report"
)

func TestRedact(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, text, want string }{
		{"addresses", "10.96.0.10:80/TCP [fd00::1]:80 https://10.0.0.1:6443/api", "10.96.0.10:80/TCP [fd00::1]:80 https://10.0.0.1:6443/api"},
		{"user of a URL", `"master": "https://admin:pass@10.0.0.1:6443"`, `"master": "https://REDACTED@10.0.0.1:6443"`},
		{"private key", "a\n-----BEGIN EC PRIVATE KEY-----\nMHc\n-----END EC PRIVATE KEY-----\nb", "a\nREDACTED\nb"},
		{"cut private key", "a\n-----BEGIN PRIVATE KEY-----\nMHc", "a\nREDACTED"},
		{"web token", "x eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln y", "x REDACTED y"},
		{"header", "Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer REDACTED"},
		{"fields", "token: abc\npassword=\"d e\"\nclient-key-data: Zm9v", "token: REDACTED\npassword=\"REDACTED e\"\nclient-key-data: REDACTED"},
		{"metric", `rest_client_requests_total{host="10.0.0.1:6443"} 3`, `rest_client_requests_total{host="10.0.0.1:6443"} 3`},
	} {
		if got := string(report.Redact([]byte(test.text))); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

// TestWrite checks that a part that fails does not affect the others.
func TestWrite(t *testing.T) {
	t.Parallel()
	part := func(name, content string, err error) report.Part {
		return report.Part{Name: name, Collect: func(context.Context) ([]byte, error) { return []byte(content), err }}
	}
	var buffer bytes.Buffer
	summary, err := report.Write(t.Context(), &buffer, "folder", []report.Part{
		part("a.txt", "a", nil), part("b.txt", "", errors.New("no permission")), part("c.txt", "part", errors.New("the rest is missing")), part("large.txt", strings.Repeat("x", 33<<20), nil), part("d.txt", "d", nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "b.txt: no permission\nc.txt: the rest is missing\nlarge.txt: only the first 32 MiB are in the report"
	if missing := summary.Missing(); missing == nil || missing.Error() != want {
		t.Errorf("missing: %v, want %s", missing, want)
	}
	unzipped, err := gzip.NewReader(&buffer)
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewReader(unzipped)
	var names []string
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
	}
	if got, want := strings.Join(names, " "), "folder/a.txt folder/c.txt folder/large.txt folder/d.txt folder/report.json"; got != want {
		t.Errorf("files %s, want %s", got, want)
	}
}
