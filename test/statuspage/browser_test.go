// Package statuspage_test tests the status page in a browser.
package statuspage_test

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	stdsync "sync"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// waitTimeout bounds operations that take a second on an idle machine.
const waitTimeout = time.Minute

// browser is a tab of a headless Chromium. It fails the test if a page logs an error.
type browser struct {
	t   *testing.T
	ctx context.Context //nolint:containedctx // chromedp's handle of the tab

	mu     stdsync.Mutex
	errors []string
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]), chromedp.ExecPath(chromium(t)), chromedp.NoSandbox, chromedp.DisableGPU, chromedp.Flag("hide-scrollbars", true),
		chromedp.ModifyCmdFunc(func(cmd *exec.Cmd) {
			// Debian's program is a script, so end it together with its children.
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		}))
	allocator, cancelAllocator := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(cancelAllocator)
	ctx, cancel := chromedp.NewContext(allocator)
	t.Cleanup(cancel)
	ctx, cancelTimeout := context.WithTimeout(ctx, waitTimeout)
	t.Cleanup(cancelTimeout)
	b := &browser{t: t, ctx: ctx}
	chromedp.ListenTarget(ctx, func(event any) {
		switch event := event.(type) {
		case *runtime.EventExceptionThrown:
			b.addError(event.ExceptionDetails.Error())
		case *runtime.EventConsoleAPICalled:
			b.addError("console: " + string(event.Type))
		case *log.EventEntryAdded:
			b.addError(event.Entry.Text + " " + event.Entry.URL)
		}
	})
	b.run(log.Enable(), runtime.Enable())
	return b
}

func (b *browser) addError(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errors = append(b.errors, text)
}

// run performs actions, and fails the test if one fails or the page has logged an error.
func (b *browser) run(actions ...chromedp.Action) {
	b.t.Helper()
	err := chromedp.Run(b.ctx, actions...)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, text := range b.errors {
		err = errors.Join(err, errors.New(text))
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// emulate sets the size of the window and the color scheme.
func (b *browser) emulate(width, height int64, dark bool) {
	b.t.Helper()
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	b.run(
		emulation.SetDeviceMetricsOverride(width, height, 1, width < 600),
		emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}),
	)
}

// chromium returns the path of Chromium, which distributions install under different names.
func chromium(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Fatal("Chromium not found: run `make deps` to install it")
	return ""
}
