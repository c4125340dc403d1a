package controlplane

import (
	"context"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// tokenLifetime is longer than any test.
const tokenLifetime = 12 * time.Hour

// Kubeconfig writes a kubeconfig file with a client certificate for a user. The user has the
// permissions that RBAC grants to the user or to one of the groups. The file contains the
// server's IP address, for processes in the control plane's namespace or with a route to the
// address.
func (cp *ControlPlane) Kubeconfig(path, user string, groups ...string) error {
	client, err := cp.keys.newClientCert(user, groups...)
	if err != nil {
		return err
	}
	return cp.writeKubeconfig(path, &api.AuthInfo{ClientCertificateData: client.certPEM, ClientKeyData: client.keyPEM})
}

// ServiceAccountKubeconfig writes a kubeconfig file like [ControlPlane.Kubeconfig], but with
// a token of a Service account, which must exist.
func (cp *ControlPlane) ServiceAccountKubeconfig(ctx context.Context, path, namespace, name string) error {
	token, err := cp.Token(ctx, namespace, name)
	if err != nil {
		return err
	}
	return cp.writeKubeconfig(path, &api.AuthInfo{Token: token})
}

// Token returns a token of a Service account, which must exist. The token is valid for longer
// than any test.
func (cp *ControlPlane) Token(ctx context.Context, namespace, name string) (string, error) {
	seconds := int64(tokenLifetime.Seconds())
	token := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}
	client, err := cp.Client(schema.GroupVersion{Version: "v1"}, authenticationv1.AddToScheme)
	if err == nil {
		err = client.Post().Namespace(namespace).Resource("serviceaccounts").Name(name).SubResource("token").Body(token).Do(ctx).Into(token)
	}
	if err != nil {
		return "", fmt.Errorf("request a token for Service account %s/%s: %w", namespace, name, err)
	}
	return token.Status.Token, nil
}

func (cp *ControlPlane) writeKubeconfig(path string, user *api.AuthInfo) error {
	const name = "test"
	err := clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{name: {Server: cp.URL(), CertificateAuthorityData: cp.keys.ca.certPEM}},
		AuthInfos:      map[string]*api.AuthInfo{name: user},
		Contexts:       map[string]*api.Context{name: {Cluster: name, AuthInfo: name}},
		CurrentContext: name,
	}, path)
	if err != nil {
		return fmt.Errorf("write a kubeconfig: %w", err)
	}
	return nil
}
