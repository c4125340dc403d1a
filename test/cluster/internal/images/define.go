package images

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// definition describes an image.
type definition struct {
	names        []string
	layers       []*contents
	architecture string
	config       v1.Config
}

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// define returns the images of a cluster and of the end-to-end tests.
func define(programs Programs, names []string) ([]definition, error) {
	built := func(name string) string { return filepath.Join(programs.Dir, name) }
	// wanted returns the names that the tests use for an image, which older releases call otherwise.
	var errs []error
	wanted := func(images ...string) []string {
		var found []string
		for _, n := range names {
			for _, image := range images {
				if strings.HasPrefix(n, "registry.k8s.io/") && strings.Contains(n, "/"+image+":") {
					found = append(found, n)
				}
			}
		}
		if len(found) == 0 {
			errs = append(errs, fmt.Errorf("the end-to-end tests list no image %s: adapt package images to their version", strings.Join(images, " or ")))
		}
		return found
	}

	base, err := busybox()
	if err != nil {
		return nil, err
	}
	utilities := newContents()
	if err := addUtilities(utilities); err != nil {
		return nil, err
	}
	pause := newContents()
	pause.program("pause", built("pause"))
	coredns := newContents()
	coredns.program("coredns", built("coredns"))
	agnhost := newContents()
	agnhost.program("agnhost", built("agnhost"))
	agnhost.link("agnhost-2", "agnhost")
	agnhost.dirs(0o755, "uploads")
	if err := addPorterKey(agnhost, programs.Dir); err != nil {
		return nil, err
	}
	regression := newContents()
	regression.program("regression-issue-74839", built("regression-issue-74839"))
	web := newContents()
	web.text("www/index.html", "<h1>Welcome to nginx!</h1>\n")
	filter := newContents()
	for _, name := range []string{"iptables", "ip6tables", "iptables-save", "ip6tables-save", "iptables-restore", "ip6tables-restore", "ipset", "nft", "bash", "conntrack"} {
		if err := filter.tool("usr/sbin/"+name, name); err != nil {
			return nil, err
		}
	}
	proxy := newContents()
	proxy.program("usr/local/bin/kube-proxy", programs.KubeProxy)

	env := []string{searchPath}
	definitions := []definition{
		{names: wanted("pause"), layers: []*contents{pause}, config: v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}},
		{names: wanted("busybox"), layers: []*contents{base}, config: v1.Config{Cmd: []string{"sh"}, Env: env}},
		{names: wanted("glibc-dns-testing", "jessie-dnsutils"), layers: []*contents{base, utilities, coredns}, config: v1.Config{Cmd: []string{"bash"}, Env: env}},
		{
			names: wanted("agnhost"), layers: []*contents{base, utilities, coredns, agnhost},
			config: v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Env: env},
		},
		{names: wanted("regression-issue-74839"), layers: []*contents{regression}, config: v1.Config{Entrypoint: []string{"/regression-issue-74839"}}},
		// Tests only need its iptables beside the node's.
		{names: wanted("distroless-iptables"), layers: []*contents{base, filter}, config: v1.Config{Env: env}},
		// Tests only need a web server on port 80.
		{
			names: wanted("e2e-test-images/nginx"), layers: []*contents{base, web},
			config: v1.Config{Entrypoint: []string{"/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"}, Env: env},
		},
		{names: []string{CoreDNS}, layers: []*contents{coredns}, config: v1.Config{Entrypoint: []string{"/coredns"}}},
		{names: []string{KubeProxy}, layers: []*contents{base, filter, proxy}, config: v1.Config{Entrypoint: []string{"/usr/local/bin/kube-proxy"}, Env: env}},
	}
	for i := range definitions {
		definitions[i].architecture = runtime.GOARCH
	}
	return definitions, errors.Join(errs...)
}

// busybox returns a userland with a shell, and the users that tests expect.
func busybox() (*contents, error) {
	c := newContents()
	c.dirs(0o755, "bin", "dev", "etc", "home", "lib", "proc", "root", "run", "sys", "usr/bin", "var")
	c.dirs(0o777|os.ModeSticky, "tmp", "var/tmp")
	if err := c.tool("bin/busybox", "busybox"); err != nil {
		return nil, err
	}
	out, err := exec.Command("busybox", "--list").Output() //nolint:noctx // ends at once
	if err != nil {
		return nil, fmt.Errorf("list the programs in busybox: %w", err)
	}
	for applet := range strings.FieldsSeq(string(out)) {
		if applet != "busybox" {
			c.link("bin/"+applet, "/bin/busybox")
		}
	}
	c.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\nuser-defined-in-image:x:1000:1000::/:/bin/sh\n")
	c.text("etc/group", "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")
	c.text("etc/nsswitch.conf", "hosts: files dns\n")
	for _, name := range []string{"etc/protocols", "etc/services"} {
		if _, err := os.Stat("/" + name); err == nil {
			c.add(name, file{source: "/" + name, mode: 0o644})
		}
	}
	return c, nil
}

// addUtilities adds the network programs of the image agnhost. They replace those of busybox:
// Debian's busybox prefers its own nc, ip and nslookup to programs in PATH, so the shell is bash.
func addUtilities(c *contents) error {
	err := c.tools("bash", "curl", "wget", "dig", "nslookup", "host", "ip", "ss", "iperf", "socat", "conntrack", "nsenter", "unshare", "ipcs", "getent")
	if err == nil {
		err = c.tool("usr/bin/nc", "nc.openbsd")
	}
	if err != nil {
		return err
	}
	for _, name := range []string{"bash", "sh"} {
		c.link("bin/"+name, "/usr/bin/bash")
	}
	for name, target := range map[string]string{
		"nc": "/usr/bin/nc", "nslookup": "/usr/bin/nslookup", "ip": "/usr/bin/ip", "wget": "/usr/bin/wget",
	} {
		c.link("bin/"+name, target)
	}
	// busybox's wget tries once.
	c.text("etc/wgetrc", "tries = 1\n")
	// glibc loads these to resolve names.
	const libraries = "/lib/*-linux-gnu/"
	for _, pattern := range []string{"libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"} {
		paths, err := filepath.Glob(libraries + pattern)
		if err != nil {
			return err
		}
		for _, path := range paths {
			c.program(path, path)
		}
	}
	return nil
}

// addPorterKey adds the key and the certificate of `agnhost porter`. They are kept in a directory,
// so that the image stays the same.
func addPorterKey(c *contents, dir string) error {
	key, cert := filepath.Join(dir, "porter.key"), filepath.Join(dir, "porter.crt")
	if _, err := os.Stat(cert); errors.Is(err, fs.ErrNotExist) {
		if err := createKey(key, cert); err != nil {
			return fmt.Errorf("create the key of agnhost porter: %w", err)
		}
	}
	c.add("localhost.key", file{source: key, mode: 0o644})
	c.add("localhost.crt", file{source: cert, mode: 0o644})
	return nil
}

func createKey(keyFile, certFile string) error {
	const validity = 10 * 365 * 24 * time.Hour
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600); err != nil {
		return err
	}
	return os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600)
}
