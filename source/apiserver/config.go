package apiserver

import (
	"errors"
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const protobuf = "application/vnd.kubernetes.protobuf"

// Config returns how to reach the API server: as the kubeconfig file of that path
// says, or, if the path is empty, as every pod is told. master, if not empty, is
// the server's URL whatever the file says; without a file nothing proves then who
// the client is. Protobuf is asked for. The limits are client-go's, which are
// those of kube-proxy: 5 requests a second after a burst of 10; the caller may
// set others (QPS, Burst), as well as ContentType and AcceptContentTypes.
//
// An error says what cannot be used, "kubeconfig FILE" or "API server URL", and what
// to do. It does not say how the caller was given it, such as the name of a flag.
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
				"give the path of a kubeconfig file, or run with a ServiceAccount in a pod")
		case err != nil:
			return nil, fmt.Errorf("no kubeconfig is given and the pod's ServiceAccount can't be used: %w: "+
				"give the path of a kubeconfig file, or let the pod mount its token (automountServiceAccountToken)", err)
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

// describeCredentials says what proves to the server who asks, without any secret.
func describeCredentials(config *rest.Config) string {
	switch {
	case config.ExecProvider != nil:
		return "of the command " + config.ExecProvider.Command
	case config.AuthProvider != nil:
		return "of the provider " + config.AuthProvider.Name
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
