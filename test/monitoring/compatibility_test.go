package monitoring_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// documented returns a table of docs/compatibility.md: Fairlead's answers by the name in the first
// column.
func documented(t *testing.T, heading string) map[string]string {
	t.Helper()
	document, err := os.ReadFile(filepath.Join(repository, "docs", "compatibility.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(document), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("docs/compatibility.md lacks the section %s", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	answers := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (?:.+ \\| )?(.+) \\|$").FindAllStringSubmatch(section, -1) {
		answers[row[1]] = row[2]
	}
	return answers
}

// kubeProxySources returns the syntax trees of the real kube-proxy's Linux sources, without tests.
func kubeProxySources(t *testing.T) []*ast.File {
	t.Helper()
	list := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	list.Dir = filepath.Join(repository, "bench", "kubeproxy") // the module that builds the real kube-proxy
	list.Stderr = os.Stderr
	module, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	for _, folder := range []string{"cmd/kube-proxy", "pkg/proxy"} {
		err := filepath.WalkDir(filepath.Join(strings.TrimSpace(string(module)), folder), func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && (d.Name() == "winkernel" || d.Name() == "kubemark"):
				return fs.SkipDir
			case d.IsDir(), filepath.Ext(path) != ".go", strings.HasSuffix(path, "_test.go"), strings.HasSuffix(path, "_windows.go"):
				return nil
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			files = append(files, f)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// inspectCalls calls visit for each call of a method or of a function of another package.
func inspectCalls(files []*ast.File, visit func(name string, args []ast.Expr)) {
	for _, f := range files {
		ast.Inspect(f, func(node ast.Node) bool {
			if call, ok := node.(*ast.CallExpr); ok {
				if selector, ok := call.Fun.(*ast.SelectorExpr); ok {
					visit(selector.Sel.Name, call.Args)
				}
			}
			return true
		})
	}
}

// stringLiteral returns the value of a string literal, or an empty string.
func stringLiteral(e ast.Expr) string {
	literal, ok := e.(*ast.BasicLit)
	if !ok || literal.Kind != token.STRING {
		return ""
	}
	text, err := strconv.Unquote(literal.Value)
	if err != nil {
		return ""
	}
	return text
}

// sourceMetrics returns the names of the metrics that kube-proxy's own sources define.
func sourceMetrics(files []*ast.File) []string {
	names := map[string]bool{}
	for _, f := range files {
		ast.Inspect(f, func(node ast.Node) bool {
			options, ok := node.(*ast.CompositeLit)
			if !ok {
				return true
			}
			fields := map[string]string{}
			for _, element := range options.Elts {
				if pair, ok := element.(*ast.KeyValueExpr); ok {
					if key, ok := pair.Key.(*ast.Ident); ok {
						fields[key.Name] = stringLiteral(pair.Value)
					}
				}
			}
			if _, ok := fields["Subsystem"]; ok && fields["Name"] != "" {
				names["kubeproxy_"+fields["Name"]] = true
			}
			return true
		})
	}
	inspectCalls(files, func(name string, args []ast.Expr) {
		if name == "NewDesc" && len(args) > 0 {
			names[stringLiteral(args[0])] = true
		}
	})
	return slices.Sorted(maps.Keys(names))
}

// row returns the table's answer for a name. An asterisk at the end of a row's name stands for any
// text; a row without one has precedence.
func row(answers map[string]string, name string) (key, answer string) {
	if answer, ok := answers[name]; ok {
		return name, answer
	}
	for key, answer := range answers {
		if prefix, ok := strings.CutSuffix(key, "*"); ok && strings.HasPrefix(name, prefix) {
			return key, answer
		}
	}
	return "", ""
}

// TestCompatibilityMetrics checks that docs/compatibility.md lists every metric that kube-proxy has
// or defines, and that Fairlead has exactly those with the answer "same".
func TestCompatibilityMetrics(t *testing.T) {
	kube, fair := kubeProxy(t), fairlead(t)
	kube.awaitProgrammed()
	fair.awaitProgrammed()
	answers, names, got := documented(t, "Metrics"), map[string]bool{}, map[string]bool{}
	for _, path := range []string{"/metrics", "/metrics/slis"} {
		for name := range parseMetrics(t, kube.get(path)) {
			names[name] = true
		}
		for name := range parseMetrics(t, fair.get(path)) {
			got[name] = true
		}
	}
	for _, name := range sourceMetrics(kubeProxySources(t)) {
		names[name] = true
	}
	used := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		key, answer := row(answers, name)
		used[key] = true
		switch {
		case answer == "":
			t.Errorf("docs/compatibility.md lacks the metric %s", name)
		case got[name] != strings.HasPrefix(answer, "same"):
			t.Errorf("docs/compatibility.md: %s: %q, but Fairlead has it: %t", name, answer, got[name])
		}
	}
	for key := range answers {
		if !used[key] {
			t.Errorf("docs/compatibility.md: kube-proxy has no metric %s", key)
		}
	}
}

// installedPaths returns the paths that a library function adds to a server, by its name in
// kube-proxy's sources.
func installedPaths() map[string][]string {
	return map[string][]string{
		"healthz.InstallHandler":             {"/healthz", "/healthz/ping"},
		"slis.SLIMetricsWithReset{}.Install": {"/metrics/slis"},
		"routes.Profiling{}.Install":         {"/debug/pprof/"},
		"routes.DebugFlags{}.Install":        {"/debug/flags", "/debug/flags/v"},
		"configz.InstallHandler":             {"/configz"},
		"flagz.Install":                      {"/flagz"},
		"statusz.Install":                    {"/statusz"},
	}
}

// sourcePaths returns the paths of kube-proxy's metrics server and of its health server.
func sourcePaths(t *testing.T, files []*ast.File) (metrics, health []string) {
	t.Helper()
	add := func(call *ast.CallExpr) {
		function := types.ExprString(call.Fun)
		switch receiver, method, _ := strings.Cut(function, "."); {
		case receiver == "proxyMux" && strings.HasPrefix(method, "Handle"):
			metrics = append(metrics, stringLiteral(call.Args[0]))
		case receiver == "serveMux" && strings.HasPrefix(method, "Handle"):
			health = append(health, stringLiteral(call.Args[0]))
		case slices.ContainsFunc(call.Args, func(e ast.Expr) bool { return types.ExprString(e) == "proxyMux" }):
			paths, ok := installedPaths()[function]
			if !ok {
				t.Errorf("kube-proxy calls %s: add the paths to installedPaths", function)
			}
			metrics = append(metrics, paths...)
		}
	}
	for _, f := range files {
		ast.Inspect(f, func(node ast.Node) bool {
			if call, ok := node.(*ast.CallExpr); ok {
				add(call)
			}
			return true
		})
	}
	return metrics, health
}

// TestCompatibilityPaths checks that docs/compatibility.md lists every path of kube-proxy's HTTP
// servers, and that Fairlead answers those with the answer "same" with kube-proxy's status.
func TestCompatibilityPaths(t *testing.T) {
	kube, fair := kubeProxy(t), fairlead(t)
	kube.awaitProgrammed()
	fair.awaitProgrammed()
	metrics, health := sourcePaths(t, kubeProxySources(t))
	got, want := documented(t, "HTTP paths"), map[string]bool{}
	for server, paths := range map[string][]string{metricsAddress: metrics, healthzAddress: health} {
		_, port, _ := strings.Cut(server, ":")
		for _, path := range paths {
			want[":"+port+path] = true
			status := func(p *proxy) int {
				response, err := p.request(http.MethodGet, server, path, "", "")
				if err != nil {
					t.Fatalf("%s: %v", path, err)
				}
				return response.status
			}
			answer, wantStatus := got[":"+port+path], status(kube)
			if strings.HasPrefix(answer, "none") {
				wantStatus = http.StatusNotFound
			}
			if s := status(fair); s != wantStatus {
				t.Errorf("docs/compatibility.md: :%s%s: %q, but Fairlead's status is %d, want %d", port, path, answer, s, wantStatus)
			}
		}
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got))); diff != "" {
		t.Errorf("paths in docs/compatibility.md (-want +got):\n%s", diff)
	}
}

// TestCompatibilityEvents checks that docs/compatibility.md lists the reasons of all Events that
// kube-proxy's sources record, and that Fairlead defines those with the answer "same".
func TestCompatibilityEvents(t *testing.T) {
	reasons := map[string]bool{}
	inspectCalls(kubeProxySources(t), func(name string, args []ast.Expr) {
		// Eventf(regarding, related, type, reason, action, note, args...)
		if name == "Eventf" && len(args) > 5 {
			reasons[stringLiteral(args[3])] = true
		}
	})
	got := documented(t, "Events")
	if diff := cmp.Diff(slices.Sorted(maps.Keys(reasons)), slices.Sorted(maps.Keys(got))); diff != "" {
		t.Errorf("Events in docs/compatibility.md (-want +got):\n%s", diff)
	}
	source, err := os.ReadFile(filepath.Join(repository, "source", "apiserver", "events.go"))
	if err != nil {
		t.Fatal(err)
	}
	for reason, answer := range got {
		if defined := strings.Contains(string(source), strconv.Quote(reason)); defined != strings.HasPrefix(answer, "same") {
			t.Errorf("docs/compatibility.md: %s: %q, but Fairlead has it: %t", reason, answer, defined)
		}
	}
}

// TestCompatibilityFeatureGates checks that docs/compatibility.md lists the feature gates that
// kube-proxy's sources check, and says which of them Fairlead reports as enabled.
func TestCompatibilityFeatureGates(t *testing.T) {
	gates := map[string]bool{}
	inspectCalls(kubeProxySources(t), func(name string, args []ast.Expr) {
		if name == "Enabled" && len(args) == 1 {
			if gate, ok := args[0].(*ast.SelectorExpr); ok {
				gates[gate.Sel.Name] = true
			}
		}
	})
	got := documented(t, "Feature gates")
	if diff := cmp.Diff(slices.Sorted(maps.Keys(gates)), slices.Sorted(maps.Keys(got))); diff != "" {
		t.Errorf("feature gates in docs/compatibility.md (-want +got):\n%s", diff)
	}
	p := fairlead(t)
	p.awaitProgrammed()
	metrics := p.get("/metrics")
	for gate, answer := range got {
		enabled := regexp.MustCompile(`(?m)^kubernetes_feature_enabled{name="` + gate + `",stage="[A-Z]*"} 1$`).MatchString(metrics)
		if enabled != strings.HasPrefix(answer, "on") {
			t.Errorf("docs/compatibility.md: %s: %q, but Fairlead reports it as enabled: %t", gate, answer, enabled)
		}
	}
}

// TestCompatibilityVersions checks that the tests in docs/compatibility.md exist, and that the
// versions of Kubernetes and Linux are those of the tests.
func TestCompatibilityVersions(t *testing.T) {
	read := func(path string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(repository, path))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	_, section, _ := strings.Cut(read("docs/compatibility.md"), "\n## Supported versions\n")
	rows := regexp.MustCompile("(?m)^\\| ([^|]+) \\| ([^|]+) \\| `([^`]+)` \\|$").FindAllStringSubmatch(section, -1)
	if len(rows) == 0 {
		t.Fatal("docs/compatibility.md lacks the versions")
	}
	makefile, tests := read("Makefile"), testNames(t)
	kernels := regexp.MustCompile(`(?m)^KERNELS-amd64 := (.+)$`).FindStringSubmatch(makefile)[1]
	release := regexp.MustCompile(`k8s.io/kubernetes v(\d+\.\d+)\.`).FindStringSubmatch(read("test/e2e/kubernetes/go.mod"))[1]
	for _, r := range rows {
		what, versions, test := r[1], r[2], r[3]
		command, isTarget := strings.CutPrefix(test, "make ")
		target, variables, _ := strings.Cut(command, " ")
		if isTarget && !strings.Contains(makefile, "\n"+target+":") || !isTarget && !tests[test] {
			t.Errorf("%s: there is no %s", what, test)
		}
		want := ""
		switch {
		case test == "make test-vm":
			want = kernels
		case target == "conformance" && variables != "":
			want = strings.TrimPrefix(variables, "KUBERNETES=") + ":"
		case strings.Contains(what, "Kubernetes"):
			want = release
		}
		if !strings.HasPrefix(versions, want) {
			t.Errorf("%s: %q, want %s", what, versions, want)
		}
	}
}

// testNames returns the names of all tests of the main module.
func testNames(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	err := filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != repository:
			return fs.SkipDir
		case d.IsDir(), !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		for _, match := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(text, -1) {
			names[string(match[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
