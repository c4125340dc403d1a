package statuspage_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"fairlead.io/fairlead/internal/nettest"
)

// TestAgent opens the page of an agent that programs a node, and checks that the page follows a
// change of a Service without a reload.
func TestAgent(t *testing.T) {
	network := nettest.NewT(t, nettest.Options{})
	folder := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("web.yaml", `apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
`)
	start(t, network.Node, "run", "--mode=nft", "--manifests="+folder, "--service-cidr=10.96.0.0/16", "--conntrack-max-per-core=0")
	address := forward(t, network.Node, netip.MustParseAddrPort("127.0.0.1:10265"))

	b := newBrowser(t)
	b.emulate(1280, 900, false)
	b.run(
		chromedp.Navigate("http://"+address+"/"),
		chromedp.WaitVisible(`.connection[data-state=on]`),
		chromedp.WaitVisible(`//tr[.//th[contains(., "shop/web")] and contains(., "No endpoints") and contains(., "10.96.0.10:80/TCP")]`),
		chromedp.Evaluate(`window.notReloaded = true`, nil),
	)
	write("pod.yaml", `apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {containers: [{name: main, image: example}]}
status:
  podIPs: [{ip: 10.244.0.7}]
  conditions: [{type: Ready, status: "True"}]
`)
	var notReloaded bool
	var latency string
	b.run(
		chromedp.WaitVisible(`//tr[.//th[contains(., "shop/web")] and contains(., "Ready")]`),
		chromedp.WaitVisible(`//table[contains(@class, "changes-table")]//tr[contains(., "shop/web") and contains(., "+10.244.0.7:8080")]`),
		chromedp.Text(`.changes-table tbody td.number`, &latency),
		chromedp.Evaluate(`window.notReloaded === true`, &notReloaded),
	)
	if !notReloaded {
		t.Error("the page was loaded again")
	}
	if latency == "" || latency == "–" {
		t.Errorf("latency %q of the change", latency)
	}
	// The filter selects on the server and keeps the focus.
	var url string
	var focused bool
	b.run(
		chromedp.SendKeys(`#q`, "nothing"),
		chromedp.WaitVisible(`//p[contains(., "No Service matches")]`),
		chromedp.Location(&url),
		chromedp.Evaluate(`document.activeElement.id === "q"`, &focused),
	)
	if want := "http://" + address + "/?q=nothing"; url != want || !focused {
		t.Errorf("URL %s, focus in the filter %v; want %s and the focus", url, focused, want)
	}
}

// start builds the agent and runs it on a host until the end of the test.
func start(t *testing.T, host *nettest.Host, args ...string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "fairlead")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, "./cmd/fairlead")
	build.Dir = "../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	agent := exec.CommandContext(t.Context(), program, args...)
	agent.Stderr = t.Output()
	if err := host.Do(agent.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Wait() })
}

// forward listens on a loopback address of this machine, forwards connections to an address of a
// host, and returns the address.
func forward(t *testing.T, host *nettest.Host, to netip.AddrPort) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	ctx := t.Context()
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				if err := copyBoth(ctx, client, host, to); err != nil {
					_, _ = fmt.Fprintln(t.Output(), err)
				}
			}()
		}
	}()
	return listener.Addr().String()
}

// copyBoth connects to the host, waiting until it listens, and copies until one side closes.
func copyBoth(ctx context.Context, client net.Conn, host *nettest.Host, to netip.AddrPort) error {
	defer client.Close()
	server, err := host.Dial(ctx, "tcp", to)
	for err != nil && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
		server, err = host.Dial(ctx, "tcp", to)
	}
	if err != nil {
		return err
	}
	defer server.Close()
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() {
		_, _ = io.Copy(server, client)
		_ = server.Close()
	}()
	_, _ = io.Copy(client, server)
	return nil
}
