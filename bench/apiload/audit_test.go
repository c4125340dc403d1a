package apiload

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAuditLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	log := newAuditLog(path)
	if counts, err := log.of("proxy"); err != nil || counts.total() != 0 {
		t.Errorf("without a file: %v, error %v, want no requests", counts, err)
	}
	const watch = `{"auditID":"1","stage":"ResponseStarted","requestURI":"/api/v1/nodes?sendInitialEvents=true&watch=true","verb":"watch",` +
		`"user":{"username":"proxy"},"objectRef":{"resource":"nodes"},"responseStatus":{"code":200}}` + "\n"
	steps := []struct{ name, lines, want string }{
		{"a streamed list", watch, "1 × list+watch nodes"},
		{"its end is no second request", `{"auditID":"1","stage":"ResponseComplete","verb":"watch","user":{"username":"proxy"}}` + "\n", "1 × list+watch nodes"},
		{"another user", `{"auditID":"2","verb":"get","requestURI":"/version","user":{"username":"other"}}` + "\n", "1 × list+watch nodes"},
		{
			"a path without a resource", `{"auditID":"3","verb":"get","requestURI":"/version?timeout=5s","user":{"username":"proxy"}}` + "\n",
			"1 × get /version, 1 × list+watch nodes",
		},
		{"half a line", `{"auditID":"4","verb":"create","user":{"username":"proxy"},`, "1 × get /version, 1 × list+watch nodes"},
		{
			"its other half, with an error", `"objectRef":{"resource":"events"},"responseStatus":{"code":403}}` + "\n",
			"1 × create events (status 403), 1 × get /version, 1 × list+watch nodes",
		},
	}
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, step := range steps {
		if _, err := file.WriteString(step.lines); err != nil {
			t.Fatal(err)
		}
		counts, err := log.of("proxy")
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if got := counts.String(); got != step.want {
			t.Errorf("%s: requests are %q, want %q", step.name, got, step.want)
		}
	}
}
