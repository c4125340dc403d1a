package outcome

import (
	"os"
	"testing"
)

func TestPasses(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Errorf("user %d, want root", os.Getuid())
	}
	text, err := os.ReadFile("testdata/file")
	if err != nil || string(text) != "found\n" {
		t.Errorf("testdata/file contains %q (%v)", text, err)
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	t.Logf("Linux %s%v", release, err)
	t.Logf("FAIRLEAD_OUTCOME=%s", os.Getenv("FAIRLEAD_OUTCOME"))
}

func TestFails(t *testing.T) {
	t.Parallel()
	t.Error("this is why")
}
