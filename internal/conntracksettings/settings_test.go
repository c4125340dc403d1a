package conntracksettings

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// defaults are kube-proxy's defaults.
var defaults = Settings{
	MaxPerCore: 32 << 10, Min: 128 << 10, TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour,
}

// kernelDefaults are the values of a kernel after boot.
func kernelDefaults() map[string]int {
	return map[string]int{
		sysctlPath(sysctlMax): 65536, hashSizePath: 16384,
		sysctlPath(sysctlTCPEstablished): 432000, sysctlPath(sysctlTCPCloseWait): 60, sysctlPath(sysctlTCPBeLiberal): 0,
		sysctlPath(sysctlUDP): 30, sysctlPath(sysctlUDPStream): 120,
	}
}

func writeTree(t *testing.T, cpus string, values map[string]int) string {
	t.Helper()
	root := t.TempDir()
	write := func(path, text string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("sys/devices/system/cpu/online", cpus+"\n")
	for path, value := range values {
		write(path, strconv.Itoa(value)+"\n")
	}
	return root
}

func readTree(t *testing.T, root string, values map[string]int) map[string]int {
	t.Helper()
	now := map[string]int{}
	for path := range values {
		text, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		if now[path], err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
			t.Fatal(err)
		}
	}
	return now
}

// TestApply checks the values that kube-proxy computes: which settings are raised, which
// are set, and which stay unchanged.
func TestApply(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		settings Settings
		cpus     string
		before   map[string]int // besides kernelDefaults
		want     map[string]int // besides before
	}{
		{
			"defaults, few CPUs", defaults, "0-1", nil,
			map[string]int{sysctlMax: 131072, hashSizePath: 32768, sysctlTCPEstablished: 86400, sysctlTCPCloseWait: 3600},
		},
		{
			"defaults, 8 CPUs, one offline", defaults, "0-5,7-8", nil,
			map[string]int{sysctlMax: 262144, hashSizePath: 65536, sysctlTCPEstablished: 86400, sysctlTCPCloseWait: 3600},
		},
		{"the maximum has a limit", Settings{MaxPerCore: 32 << 10}, "0-63", nil, map[string]int{sysctlMax: 1048576, hashSizePath: 262144}},
		{"min above the limit", Settings{MaxPerCore: 1, Min: 2000000}, "0", nil, map[string]int{sysctlMax: 2000000, hashSizePath: 500000}},
		{"limit before min", Settings{MaxPerCore: 2000000, Min: 3000000}, "0", nil, map[string]int{sysctlMax: 1048576, hashSizePath: 262144}},
		{
			"never lowered",
			Settings{MaxPerCore: 1000, Min: 5},
			"0",
			map[string]int{sysctlMax: 300000, hashSizePath: 100000},
			nil,
		},
		{"hash table alone", Settings{MaxPerCore: 65536}, "0", map[string]int{hashSizePath: 99999}, nil},
		{"hash table below a quarter", Settings{MaxPerCore: 100000}, "0", map[string]int{sysctlMax: 100000}, map[string]int{hashSizePath: 25000}},
		{"min without maxPerCore", Settings{Min: 131072}, "0", nil, nil},
		{"nothing", Settings{}, "0", nil, nil},
		{
			"timeouts are set, up and down",
			Settings{UDPTimeout: 10 * time.Second, UDPStreamTimeout: time.Hour},
			"0", nil,
			map[string]int{sysctlUDP: 10, sysctlUDPStream: 3600},
		},
		{
			"fractions of seconds",
			Settings{UDPTimeout: time.Millisecond, UDPStreamTimeout: 1900 * time.Millisecond},
			"0", nil,
			map[string]int{sysctlUDP: 1, sysctlUDPStream: 1},
		},
		{"liberal", Settings{TCPBeLiberal: true}, "0", nil, map[string]int{sysctlTCPBeLiberal: 1}},
		{"not liberal leaves it on", defaults, "0-1", map[string]int{
			sysctlTCPBeLiberal: 1, sysctlMax: 131072, hashSizePath: 32768, sysctlTCPEstablished: 86400, sysctlTCPCloseWait: 3600,
		}, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			before := kernelDefaults()
			for name, value := range test.before {
				before[toPath(name)] = value
			}
			want := maps.Clone(before)
			for name, value := range test.want {
				want[toPath(name)] = value
			}
			root := writeTree(t, test.cpus, before)
			result, err := test.settings.apply(root)
			if err != nil || len(result.Failures) > 0 {
				t.Fatalf("failures %v, error %v", result.Failures, err)
			}
			if diff := cmp.Diff(want, readTree(t, root, before)); diff != "" {
				t.Errorf("values (-want +got):\n%s", diff)
			}
			changes := map[string]int{}
			for _, c := range result.Changes {
				changes[c.Name] = c.New
			}
			if len(changes)+len(test.want) > 0 && !cmp.Equal(test.want, changes) {
				t.Errorf("changes %v, want %v", changes, test.want)
			}
			if again, err := test.settings.apply(root); len(again.Changes) > 0 || err != nil {
				t.Errorf("applied again: changes %v, error %v", again.Changes, err)
			}
		})
	}
}

func toPath(name string) string {
	if strings.HasPrefix(name, "/") {
		return name
	}
	return sysctlPath(name)
}

// TestFailures checks that one setting that cannot be changed does not prevent the others.
func TestFailures(t *testing.T) {
	t.Parallel()
	values := kernelDefaults()
	delete(values, sysctlPath(sysctlTCPEstablished))
	root := writeTree(t, "0-1", values)
	hashSize := filepath.Join(root, hashSizePath)
	if err := os.WriteFile(hashSize, []byte("many"), 0o600); err != nil {
		t.Fatal(err)
	}
	result, err := defaults.apply(root)
	if err != nil {
		t.Fatal(err)
	}
	var failures []string
	for _, f := range result.Failures {
		failures = append(failures, f.String())
	}
	want := []string{
		hashSizePath + `=32768 (is unknown): strconv.Atoi: parsing "many": invalid syntax`,
		sysctlTCPEstablished + "=86400 (is unknown): no such file or directory",
	}
	if diff := cmp.Diff(want, failures); diff != "" {
		t.Errorf("failures (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Change{{sysctlMax, 65536, 131072}, {sysctlTCPCloseWait, 60, 3600}}, result.Changes); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
	if got, want := result.Changes[0].String(), sysctlMax+"=131072 (was 65536)"; got != want {
		t.Errorf("change %q, want %q", got, want)
	}
}

func TestNotLoaded(t *testing.T) {
	t.Parallel()
	root := writeTree(t, "0", nil)
	if _, err := defaults.apply(root); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("error %v, want %v", err, ErrNotLoaded)
	}
	if _, err := (Settings{}).apply(root); err != nil {
		t.Errorf("without settings: error %v", err)
	}
}

func TestCountCPUs(t *testing.T) {
	t.Parallel()
	for list, want := range map[string]int{"0": 1, "0-1": 2, "0-3,8-11": 8, "0,2,4-5": 4, "": 0, "x": 0, "3-1": 0, "0-": 0} {
		if got := countCPUs(list); got != want {
			t.Errorf("%q: %d CPUs, want %d", list, got, want)
		}
	}
}
