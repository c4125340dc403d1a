package report_test

import (
	"bytes"
	"errors"
	"image"
	"image/png"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/report"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
)

// fixture returns a generated result of a comparison.
func fixture(t testing.TB) *result.Report {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	r := &result.Report{
		Schema: result.Schema, Time: time.Date(2025, 1, 31, 12, 0, 0, 0, time.UTC), TookSeconds: 321, Version: "v1.2.3",
		Command: []string{"fairlead-bench", "compare", "--services=1000,10000"},
		Environments: []result.Environment{{
			Name: result.Native, Kernel: "6.18.44", OS: "Debian GNU/Linux 12 (bookworm)", Load: 0.3,
			Machine: result.Machine{CPU: "AMD EPYC", CPUs: 2, MemoryBytes: 25 << 30, Architecture: "amd64"},
		}},
		Systems: []result.System{
			{Name: "nft", Version: "v1.2.3", Command: []string{"fairlead", "run", "--mode=nft"}},
			{Name: "kube-proxy-nftables", Version: "v1.37.2", Command: []string{"kube-proxy", "--proxy-mode=nftables"}},
		},
		LeftOut: []result.LeftOut{{System: "kube-proxy-ipvs", Environment: result.Native, Reason: "the kernel does not support IPVS"}},
		Notes:   []string{"The figures are made up."},
	}
	systems := []string{"nft", "kube-proxy-nftables", "kube-proxy-iptables"}
	add := func(measure result.Measure, scenario result.Scenario, unit string, n int, spread float64, medians ...float64) {
		for i, system := range systems {
			m := result.Measurement{Measure: measure, System: system, Environment: result.Native, Scenario: scenario, Unit: unit}
			for range n {
				m.Samples = append(m.Samples, medians[i]*math.Exp(spread*random.NormFloat64()))
			}
			m.Distribution = statistics.Summarize(m.Samples)
			r.Measurements = append(r.Measurements, m)
		}
	}
	for _, services := range []int{100, 1000, 10_000} {
		at, size := result.Scenario{Services: services, Endpoints: 10}, float64(services)
		for _, change := range []result.Change{result.ReplaceEndpoint, result.ScaleUp, result.ScaleDown, result.CreateService, result.DeleteService} {
			at.Change = change
			add(result.UpdatePacket, at, "s", 40, 0.4, 0.4e-3, 0.01+3e-5*size, 0.03+2e-4*size)
		}
		at.Change = ""
		add(result.ColdStartAnswer, at, "s", 5, 0.05, 0.05+6e-5*size, 0.3+1e-3*size, 0.4+2e-3*size)
		add(result.Memory, at, "B", 5, 0.03, 20e6+1e4*size, 60e6+2.4e4*size, 60e6+2.6e4*size)
		add(result.PeakMemory, at, "B", 5, 0.03, 20e6+1.2e4*size, 60e6+2.9e4*size, 60e6+3.1e4*size)
		at.Change = result.ReplaceEndpoint
		for _, at.Rate = range []float64{20, 200} {
			add(result.Churn, at, "s", 40, 0.3, 0.5e-3, 1.1, 2.9)
			add(result.ChurnCPU, at, "s", 3, 0.05, 150e-6, 0.6/at.Rate, 1/at.Rate)
		}
	}
	for _, measure := range []result.Measure{result.UpdatePacket, result.ColdStartAnswer, result.Memory, result.ChurnCPU} {
		scenario := result.Scenario{Services: 10_000, Endpoints: 10}
		if measure == result.UpdatePacket || measure == result.ChurnCPU {
			scenario.Change = result.ReplaceEndpoint
		}
		if measure == result.ChurnCPU {
			scenario.Rate = 200
		}
		ours, theirs := r.Find(measure, "nft", result.Native, scenario), r.Find(measure, "kube-proxy-nftables", result.Native, scenario)
		interval, err := statistics.Ratio(theirs.Samples, ours.Samples, statistics.Quantile(0.5))
		if err != nil {
			t.Fatal(err)
		}
		r.Ratios = append(r.Ratios, result.Ratio{
			Measure: measure, Statistic: "p50", Environment: result.Native, Scenario: scenario,
			Numerator: "kube-proxy-nftables", Denominator: "nft", Interval: interval, Method: statistics.Method,
		})
	}
	return r
}

func renderPage(t *testing.T, r *result.Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := report.WriteHTML(&b, r); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestPage checks the content of the page, and that the page loads no other resources.
func TestPage(t *testing.T) {
	page := renderPage(t, fixture(t))
	for _, want := range []string{
		"Fairlead v1.2.3", "31 January 2025", "AMD EPYC", "Linux 6.18.44", "fairlead-bench compare --services=1000,10000",
		"kube-proxy ipvs", "the kernel does not support IPVS", "10,000 Services of 10 endpoints", "prefers-color-scheme:dark",
		"Update latency, measured with packets", "Scaling with the number of Services", "Cold start", "Under churn", "Memory", "95 %", "The figures are made up.",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not contain %q", want)
		}
	}
	for _, not := range []string{"http://", "https://", "<script", "<img", "<link", "@import", "url(", "#0102", "ZgotmplZ"} {
		rest := strings.ReplaceAll(page, "http://www.w3.org/", "")
		if i := strings.Index(rest, not); i >= 0 {
			t.Errorf("the page contains %q: %s", not, rest[i:min(len(rest), i+80)])
		}
	}
}

// TestAPIServer checks that the page names the version of a real API server.
func TestAPIServer(t *testing.T) {
	r := fixture(t)
	if page := renderPage(t, r); strings.Contains(page, "kube-apiserver") {
		t.Error("the page mentions a kube-apiserver, want none")
	}
	r.Environments[0].APIServer = "v1.33.1"
	if page := renderPage(t, r); !strings.Contains(page, "kube-apiserver v1.33.1") {
		t.Error("the page does not name the version of kube-apiserver")
	}
}

// TestEmulated checks that the page marks emulated results and shows no key figures for them.
func TestEmulated(t *testing.T) {
	const notice, keyFigures = "The processor was emulated.", `<div class="claims">`
	r := fixture(t)
	for _, r.Environments[0].Emulated = range []bool{false, true} {
		emulated, page := r.Environments[0].Emulated, renderPage(t, r)
		if strings.Contains(page, notice) != emulated || strings.Contains(page, keyFigures) == emulated {
			t.Errorf("emulated: %v, but the page has the notice: %v, and key figures: %v", emulated, strings.Contains(page, notice), strings.Contains(page, keyFigures))
		}
	}
}

// TestWorse checks the key figures of a system that is worse than kube-proxy.
func TestWorse(t *testing.T) {
	r := fixture(t)
	for i := range r.Ratios {
		r.Ratios[i].Interval = result.Interval{Ratio: 0.5, Low: 0.4, High: 0.8, Confidence: 0.95}
	}
	page := renderPage(t, r)
	for _, want := range []string{"2.0× <small>slower</small>", "2.0× <small>more memory</small>", "95 % confidence: 1.2 to 2.5"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not contain %q", want)
		}
	}
}

// moveToVM makes r a report of a virtual machine.
func moveToVM(r *result.Report) {
	const name = "vm-6.12"
	r.Environments[0].Name, r.Environments[0].Emulated = name, true
	for i := range r.Measurements {
		r.Measurements[i].Environment = name
	}
	for i := range r.Ratios {
		r.Ratios[i].Environment = name
	}
}

func TestMerge(t *testing.T) {
	vm := fixture(t)
	moveToVM(vm)
	other := fixture(t)
	other.Environments[0].Kernel = "5.10"
	realAPI := fixture(t)
	realAPI.Environments[0].APIServer = "v1.33.1"
	for name, test := range map[string]struct {
		with *result.Report
		want string // part of the error
	}{
		"another environment":             {vm, ""},
		"duplicate measurements":          {fixture(t), "duplicate measurement"},
		"another kernel of the same name": {other, "has different machines, kernels or API servers"},
		"a real API server":               {realAPI, "has different machines, kernels or API servers"},
	} {
		t.Run(name, func(t *testing.T) {
			merged, err := report.Merge(fixture(t), test.with)
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want == "":
				if want := len(fixture(t).Ratios) + len(vm.Ratios); len(merged.Ratios) != want {
					t.Errorf("the merged report has %d ratios, want the %d ratios of both", len(merged.Ratios), want)
				}
				if page := renderPage(t, merged); !strings.Contains(page, "Environment vm-6.12") || !strings.Contains(page, "Environment native") {
					t.Error("the page does not show both environments")
				}
			case err == nil || !strings.Contains(err.Error(), test.want):
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

// TestPictures checks the names and colors of the charts.
func TestPictures(t *testing.T) {
	pictures, err := report.Pictures(fixture(t))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range pictures {
		names = append(names, p.Name)
		if !bytes.Contains(p.SVG, []byte("prefers-color-scheme:dark")) || bytes.Contains(p.SVG, []byte("#0102")) {
			t.Errorf("%s.svg has no dark color scheme, or contains placeholder colors", p.Name)
		}
		picture, err := png.Decode(bytes.NewReader(p.PNG))
		if err != nil {
			t.Fatalf("%s.png: %v", p.Name, err)
		}
		if n := colors(picture, picture.Bounds()); n < 10 {
			t.Errorf("%s.png has only %d colors: it seems to be empty", p.Name, n)
		}
	}
	want := "update update-distribution services-update services-start start churn-lag churn-cpu memory"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("got pictures %s, want %s", got, want)
	}
}

// TestEmulatedPictures checks that charts of emulated machines carry the notice themselves,
// because other documents show them without the page.
func TestEmulatedPictures(t *testing.T) {
	r := fixture(t)
	moveToVM(r)
	pictures, err := report.Pictures(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pictures {
		if !strings.HasPrefix(p.Name, "vm-6.12-") || !strings.Contains(p.Title, "emulated") || !bytes.Contains(p.SVG, []byte("emulated")) {
			t.Errorf("%s, %q does not carry the notice of emulation", p.Name, p.Title)
		}
	}
}

// colors counts the colors in a part of a picture.
func colors(picture image.Image, part image.Rectangle) int {
	seen := map[[3]uint32]bool{}
	for y := part.Min.Y; y < part.Max.Y; y++ {
		for x := part.Min.X; x < part.Max.X; x++ {
			r, g, b, _ := picture.At(x, y).RGBA()
			seen[[3]uint32{r, g, b}] = true
		}
	}
	return len(seen)
}

// TestScreenshots renders the page in a browser: on a phone, on a desktop, in a dark color scheme,
// and in print. FAIRLEAD_SCREENSHOTS names a directory to keep the pictures in.
func TestScreenshots(t *testing.T) {
	dir := t.TempDir()
	if keep := os.Getenv("FAIRLEAD_SCREENSHOTS"); keep != "" {
		dir = keep
	}
	file := filepath.Join(dir, "report.html")
	if err := os.WriteFile(file, []byte(renderPage(t, fixture(t))), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name          string
		width, height int
		dark          bool
	}{
		{name: "desktop", width: 1280, height: 5600},
		{name: "desktop-dark", width: 1280, height: 5600, dark: true},
		// Chromium has no windows narrower than 500 pixels, a width that selects the page's layout
		// for phones.
		{name: "phone", width: 500, height: 6800},
	} {
		t.Run(test.name, func(t *testing.T) {
			picture := screenshot(t, file, filepath.Join(dir, test.name+".png"), test.width, test.height, test.dark)
			bounds := picture.Bounds()
			if bounds.Dx() != test.width {
				t.Errorf("the picture is %d pixels wide, want %d", bounds.Dx(), test.width)
			}
			// No part of the page is empty.
			const parts = 8
			for i := range parts {
				part := image.Rect(0, i*bounds.Dy()/parts, bounds.Dx(), (i+1)*bounds.Dy()/parts)
				if n := colors(picture, part); n < 20 {
					t.Errorf("part %d of %d has only %d colors: it seems to be empty", i+1, parts, n)
				}
			}
			// No element is wider than the page: its edge has a single color.
			if n := colors(picture, image.Rect(bounds.Dx()-4, 0, bounds.Dx(), bounds.Dy())); n != 1 {
				t.Errorf("the right edge has %d colors, want only the background", n)
			}
			r, _, _, _ := picture.At(1, 1).RGBA()
			if dark := r < 0x8000; dark != test.dark {
				t.Errorf("dark background: %v, want %v", dark, test.dark)
			}
		})
	}
	t.Run("print", func(t *testing.T) {
		out := filepath.Join(dir, "report.pdf")
		chromium(t, "--no-pdf-header-footer", "--print-to-pdf="+out, "file://"+file)
		if pdf, err := os.ReadFile(out); err != nil || !bytes.HasPrefix(pdf, []byte("%PDF")) || len(pdf) < 20_000 {
			t.Errorf("printed %d bytes, error %v; want a PDF document", len(pdf), err)
		}
	})
}

// screenshot renders the page to a file and returns the picture.
func screenshot(t *testing.T, page, out string, width, height int, dark bool) image.Image {
	t.Helper()
	args := []string{
		"--hide-scrollbars", "--force-device-scale-factor=1", "--screenshot=" + out,
		"--window-size=" + strings.Join([]string{strconv.Itoa(width), strconv.Itoa(height)}, ","),
	}
	if dark {
		args = append(args, "--blink-settings=preferredColorScheme=0")
	} else {
		args = append(args, "--blink-settings=preferredColorScheme=1")
	}
	chromium(t, append(args, "file://"+page)...)
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	picture, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	return picture
}

// chromium runs Chromium, which distributions install under different names.
func chromium(t *testing.T, args ...string) {
	t.Helper()
	for _, name := range []string{"chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"} {
		path, err := exec.LookPath(name)
		if errors.Is(err, exec.ErrNotFound) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		common := []string{"--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir=" + t.TempDir()}
		out, err := exec.CommandContext(t.Context(), path, append(common, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", path, args, err, out)
		}
		return
	}
	t.Fatal("Chromium not found: run `make deps` to install it")
}
