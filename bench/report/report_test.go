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

// fixture is a made-up result of a comparison.
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
		LeftOut: []result.LeftOut{{System: "kube-proxy-ipvs", Environment: result.Native, Reason: "the kernel has no IPVS"}},
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

// The page needs nothing but itself, and says what there is to say.
func TestPage(t *testing.T) {
	page := renderPage(t, fixture(t))
	for _, want := range []string{
		"Fairlead v1.2.3", "31 January 2025", "AMD EPYC", "Linux 6.18.44", "fairlead-bench compare --services=1000,10000",
		"kube-proxy ipvs", "the kernel has no IPVS", "10,000 Services of 10 endpoints", "prefers-color-scheme:dark",
		"An update, seen by packets", "Against the number of Services", "A cold start", "Under churn", "Memory", "95 %", "The figures are made up.",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not have %q", want)
		}
	}
	for _, not := range []string{"http://", "https://", "<script", "<img", "<link", "@import", "url(", "#0102", "ZgotmplZ"} {
		rest := strings.ReplaceAll(page, "http://www.w3.org/", "")
		if i := strings.Index(rest, not); i >= 0 {
			t.Errorf("the page has %q: %s", not, rest[i:min(len(rest), i+80)])
		}
	}
}

// Which API server there was is said where there was a real one.
func TestAPIServer(t *testing.T) {
	r := fixture(t)
	if page := renderPage(t, r); strings.Contains(page, "kube-apiserver") {
		t.Error("the page says that there was a kube-apiserver")
	}
	r.Environments[0].APIServer = "v1.33.1"
	if page := renderPage(t, r); !strings.Contains(page, "kube-apiserver v1.33.1") {
		t.Error("the page does not say which kube-apiserver there was")
	}
}

// Emulated figures say so, and claim nothing.
func TestEmulated(t *testing.T) {
	const says, claims = "The processor was emulated.", `<div class="claims">`
	r := fixture(t)
	for _, r.Environments[0].Emulated = range []bool{false, true} {
		emulated, page := r.Environments[0].Emulated, renderPage(t, r)
		if strings.Contains(page, says) != emulated || strings.Contains(page, claims) == emulated {
			t.Errorf("emulated: %v, but the page says so: %v, and makes claims: %v", emulated, strings.Contains(page, says), strings.Contains(page, claims))
		}
	}
}

// A system that is worse is shown to be.
func TestWorse(t *testing.T) {
	r := fixture(t)
	for i := range r.Ratios {
		r.Ratios[i].Interval = result.Interval{Ratio: 0.5, Low: 0.4, High: 0.8, Confidence: 0.95}
	}
	page := renderPage(t, r)
	for _, want := range []string{"2.0× <small>slower</small>", "2.0× <small>more memory</small>", "95 % confidence: 1.2 to 2.5"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not have %q", want)
		}
	}
}

// moveToVM makes a report one of a virtual machine.
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
		"the same once more":              {fixture(t), "is there twice"},
		"another kernel of the same name": {other, "two different machines, kernels or API servers"},
		"a real API server":               {realAPI, "two different machines, kernels or API servers"},
	} {
		t.Run(name, func(t *testing.T) {
			merged, err := report.Merge(fixture(t), test.with)
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want == "":
				if want := len(fixture(t).Ratios) + len(vm.Ratios); len(merged.Ratios) != want {
					t.Errorf("there are %d ratios, want the %d of both and no others", len(merged.Ratios), want)
				}
				if page := renderPage(t, merged); !strings.Contains(page, "Environment vm-6.12") || !strings.Contains(page, "Environment native") {
					t.Error("the page does not have both environments")
				}
			case err == nil || !strings.Contains(err.Error(), test.want):
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

// Each chart can be a file too.
func TestPictures(t *testing.T) {
	pictures, err := report.Pictures(fixture(t))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range pictures {
		names = append(names, p.Name)
		if !bytes.Contains(p.SVG, []byte("prefers-color-scheme:dark")) || bytes.Contains(p.SVG, []byte("#0102")) {
			t.Errorf("%s.svg has no colours for dark, or some that were not named", p.Name)
		}
		picture, err := png.Decode(bytes.NewReader(p.PNG))
		if err != nil {
			t.Fatalf("%s.png: %v", p.Name, err)
		}
		if n := colours(picture, picture.Bounds()); n < 10 {
			t.Errorf("%s.png has %d colours, so it shows nothing", p.Name, n)
		}
	}
	want := "update update-distribution services-update services-start start churn-lag churn-cpu memory"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("pictures are %s, want %s", got, want)
	}
}

// Pictures are looked at without the page around them.
func TestEmulatedPictures(t *testing.T) {
	r := fixture(t)
	moveToVM(r)
	pictures, err := report.Pictures(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pictures {
		if !strings.HasPrefix(p.Name, "vm-6.12-") || !strings.Contains(p.Title, "emulated") || !bytes.Contains(p.SVG, []byte("emulated")) {
			t.Errorf("%s, %q does not say that it is of an emulated machine", p.Name, p.Title)
		}
	}
}

// colours counts the colours in a part of a picture.
func colours(picture image.Image, part image.Rectangle) int {
	seen := map[[3]uint32]bool{}
	for y := part.Min.Y; y < part.Max.Y; y++ {
		for x := part.Min.X; x < part.Max.X; x++ {
			r, g, b, _ := picture.At(x, y).RGBA()
			seen[[3]uint32{r, g, b}] = true
		}
	}
	return len(seen)
}

// The page is looked at in a browser: on a phone, on a desktop, in dark, and in
// print. FAIRLEAD_SCREENSHOTS is a folder to keep the pictures in.
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
		// The browser has no window narrower than 500 pixels: that is still a
		// phone to the page.
		{name: "phone", width: 500, height: 6800},
	} {
		t.Run(test.name, func(t *testing.T) {
			picture := screenshot(t, file, filepath.Join(dir, test.name+".png"), test.width, test.height, test.dark)
			bounds := picture.Bounds()
			if bounds.Dx() != test.width {
				t.Errorf("the picture is %d pixels wide, want %d", bounds.Dx(), test.width)
			}
			// There is something to see all the way down.
			const parts = 8
			for i := range parts {
				part := image.Rect(0, i*bounds.Dy()/parts, bounds.Dx(), (i+1)*bounds.Dy()/parts)
				if n := colours(picture, part); n < 20 {
					t.Errorf("part %d of %d has %d colours, so there is nothing to see", i+1, parts, n)
				}
			}
			// Nothing is wider than the page: its edge is of one colour.
			if n := colours(picture, image.Rect(bounds.Dx()-4, 0, bounds.Dx(), bounds.Dy())); n != 1 {
				t.Errorf("the right edge has %d colours, want the ground alone", n)
			}
			r, _, _, _ := picture.At(1, 1).RGBA()
			if dark := r < 0x8000; dark != test.dark {
				t.Errorf("the ground is dark: %v, want %v", dark, test.dark)
			}
		})
	}
	t.Run("print", func(t *testing.T) {
		out := filepath.Join(dir, "report.pdf")
		chromium(t, "--no-pdf-header-footer", "--print-to-pdf="+out, "file://"+file)
		if pdf, err := os.ReadFile(out); err != nil || !bytes.HasPrefix(pdf, []byte("%PDF")) || len(pdf) < 20_000 {
			t.Errorf("printed %d bytes, %v, want a document", len(pdf), err)
		}
	})
}

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

// chromium runs the browser, as Debian and others name it.
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
	t.Fatal("there is no Chromium: `make deps` installs it")
}
