package controlplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// keys holds the key pairs of one control plane. The programs read them from files.
type keys struct {
	ca             *keyPair // signs the certificates of the others
	serving        *keyPair // of the API server
	admin          *keyPair
	serviceAccount *keyPair // signs tokens; its certificate is unused
}

// keyPair is a key and its certificate. File names are empty if the pair exists only in
// memory.
type keyPair struct {
	key               *ecdsa.PrivateKey
	cert              *x509.Certificate
	keyPEM, certPEM   []byte
	keyFile, certFile string
}

func newKeys(dir string, addr netip.Addr, serviceCIDRs []netip.Prefix) (*keys, error) {
	k := &keys{}
	var err error
	if k.ca, err = k.newKeyPair(&x509.Certificate{
		Subject: pkix.Name{CommonName: "fairlead test CA"},
		IsCA:    true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}); err != nil {
		return nil, err
	}
	serving := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{addr.AsSlice()},
		DNSNames: []string{
			"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		},
	}
	for _, p := range serviceCIDRs {
		// The first address of each network belongs to the Service default/kubernetes.
		serving.IPAddresses = append(serving.IPAddresses, p.Addr().Next().AsSlice())
	}
	if k.serving, err = k.newKeyPair(serving); err != nil {
		return nil, err
	}
	if k.admin, err = k.newClientCert("admin", "system:masters"); err != nil {
		return nil, err
	}
	if k.serviceAccount, err = k.newKeyPair(&x509.Certificate{}); err != nil {
		return nil, err
	}
	for name, p := range map[string]*keyPair{"ca": k.ca, "serving": k.serving, "admin": k.admin, "service-account": k.serviceAccount} {
		p.keyFile, p.certFile = filepath.Join(dir, name+".key"), filepath.Join(dir, name+".crt")
		if err := os.WriteFile(p.keyFile, p.keyPEM, 0o600); err != nil {
			return nil, fmt.Errorf("write a key: %w", err)
		}
		if err := os.WriteFile(p.certFile, p.certPEM, 0o600); err != nil {
			return nil, fmt.Errorf("write a certificate: %w", err)
		}
	}
	return k, nil
}

// newClientCert creates the client certificate of a user.
func (k *keys) newClientCert(user string, groups ...string) (*keyPair, error) {
	return k.newKeyPair(&x509.Certificate{
		Subject:     pkix.Name{CommonName: user, Organization: groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// newKeyPair creates a key and a certificate from the template. The CA signs the certificate;
// the first certificate, which becomes the CA's, is self-signed.
func (k *keys) newKeyPair(template *x509.Certificate) (*keyPair, error) {
	p, err := makeKeyPair(template, k.ca)
	if err != nil {
		return nil, fmt.Errorf("create a certificate for %q: %w", template.Subject.CommonName, err)
	}
	return p, nil
}

func makeKeyPair(template *x509.Certificate, ca *keyPair) (*keyPair, error) {
	const validity, skew, serialBits = 365 * 24 * time.Hour, time.Hour, 100
	p := &keyPair{}
	var err error
	if p.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), serialBits)); err != nil {
		return nil, err
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-skew), time.Now().Add(validity)
	parent, signer := template, p.key
	if ca != nil {
		parent, signer = ca.cert, ca.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, p.key.Public(), signer)
	if err != nil {
		return nil, err
	}
	if p.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	// Kubernetes supports only this format for token signing keys.
	keyDER, err := x509.MarshalECPrivateKey(p.key)
	if err != nil {
		return nil, err
	}
	p.certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	p.keyPEM = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
	return p, nil
}
