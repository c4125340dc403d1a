package apiserver

import (
	"errors"
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const protobuf = "application/vnd.kubernetes.protobuf"

// Config returns the client configuration for the API server: from the kubeconfig file, or
// the in-cluster configuration if kubeconfig is empty. master, if not empty, overrides the
// server's URL; without a kubeconfig file the client then has no credentials. The content
// type is protobuf. Rate limits are client-go's defaults, which kube-proxy uses as well: 5
// requests a second with a burst of 10. The caller may change QPS, Burst, ContentType and
// AcceptContentTypes.
//
// Errors name the kubeconfig file or the API server URL, and the fix. They do not name
// flags, because the caller may get the values from elsewhere.
func Config(kubeconfig, master string) (*rest.Config, error) {
	config, err := load(kubeconfig, master)
	if err != nil {
		return nil, err
	}
	config.ContentType = protobuf
	config.AcceptContentTypes = protobuf + ",application/json"
	return config, nil
}

func load(kubeconfig, master string) (*rest.Config, error) {
	if kubeconfig == "" && master == "" {
		config, err := rest.InClusterConfig()
		switch {
		case errors.Is(err, rest.ErrNotInCluster):
			return nil, errors.New("no kubeconfig is given and this is not a pod of a cluster: " +
				"give the path of a kubeconfig file, or run in a pod with a ServiceAccount")
		case err != nil:
			return nil, fmt.Errorf("no kubeconfig is given and the pod's ServiceAccount can't be used: %w: "+
				"give the path of a kubeconfig file, or set automountServiceAccountToken: true", err)
		}
		return config, nil
	}
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig},
		&clientcmd.ConfigOverrides{ClusterInfo: clientcmdapi.Cluster{Server: master}},
	).ClientConfig()
	if err == nil && master != "" {
		if _, _, urlErr := rest.DefaultServerUrlFor(config); urlErr != nil {
			return nil, fmt.Errorf("API server %s: %w: write it as https://10.0.0.1:6443", master, urlErr)
		}
	}
	switch {
	case err != nil && kubeconfig == "":
		return nil, fmt.Errorf("API server %s: %w: write it as https://10.0.0.1:6443", master, err)
	case err != nil:
		return nil, fmt.Errorf("kubeconfig %s: %w: give the path of a file that kubectl can use", kubeconfig, err)
	}
	return config, nil
}

// describeCredentials describes how the client authenticates, without any secret.
func describeCredentials(config *rest.Config) string {
	switch {
	case config.ExecProvider != nil:
		return "exec plugin " + config.ExecProvider.Command
	case config.AuthProvider != nil:
		return "auth provider " + config.AuthProvider.Name
	case config.BearerTokenFile != "":
		return "token in " + config.BearerTokenFile
	case config.BearerToken != "":
		return "token"
	case config.Username != "":
		return "password of " + config.Username
	case config.CertFile != "":
		return "client certificate in " + config.CertFile
	case len(config.CertData) > 0:
		return "client certificate"
	default:
		return "none"
	}
}
