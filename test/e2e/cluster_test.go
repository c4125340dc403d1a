//go:build e2e

package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"

	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/test/controlplane"
)

// The nodes of the cluster. Fairlead runs on thisNode. In the network, the pods of both
// nodes are connected to thisNode.
const (
	thisNode, thisZone   = "this-node", "zone-a"
	otherNode, otherZone = "other-node", "zone-b"
)

// kubeProxyEnv names an environment variable with the path of a kube-proxy to test instead of
// Fairlead. A test that fails with kube-proxy is either wrong or shows a deliberate
// difference.
const kubeProxyEnv = "FAIRLEAD_E2E_KUBE_PROXY"

// serviceAccount is the ServiceAccount of deploy/rbac.yaml.
var serviceAccount = types.NamespacedName{Namespace: "kube-system", Name: "fairlead"}

// cluster is a network, a control plane and Fairlead.
type cluster struct {
	dir      string
	net      *nettest.Network
	cp       *controlplane.ControlPlane
	api      kubernetes.Interface
	fairlead *fairlead
}

// newCluster creates a cluster with two Nodes. It does not start Fairlead.
func newCluster(ctx context.Context, options controlplane.Options) (*cluster, error) {
	c := &cluster{}
	return c, c.setUp(ctx, options)
}

func (c *cluster) setUp(ctx context.Context, options controlplane.Options) error {
	var err error
	if c.net, err = nettest.New(nettest.Options{}); err != nil {
		return err
	}
	options.Namespace, options.Address = c.net.Outside.Namespace, c.net.Outside.IPv4
	if c.cp, err = controlplane.New(ctx, options); err != nil {
		return err
	}
	if c.dir, err = os.MkdirTemp(c.cp.Dir(), "fairlead-"); err != nil {
		return err
	}
	config := c.cp.Config()
	config.ContentType = "application/vnd.kubernetes.protobuf"
	if c.api, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if err := c.applyRBAC(ctx); err != nil {
		return err
	}
	if err := c.createNode(ctx, thisNode, thisZone, c.net.Node.Addrs(), c.net.PodCIDRs); err != nil {
		return err
	}
	if err := c.createNode(ctx, otherNode, otherZone, []netip.Addr{netip.MustParseAddr("192.0.2.77")}, nil); err != nil {
		return err
	}
	kubeconfig := filepath.Join(c.dir, "kubeconfig.conf")
	if err := c.cp.ServiceAccountKubeconfig(ctx, kubeconfig, serviceAccount.Namespace, serviceAccount.Name); err != nil {
		return err
	}
	cidrs := make([]string, 0, len(c.net.PodCIDRs))
	for _, p := range c.net.PodCIDRs {
		cidrs = append(cidrs, p.String())
	}
	podCIDRs := strings.Join(cidrs, ",")
	c.fairlead = &fairlead{host: c.net.Node, logFile: filepath.Join(c.dir, "fairlead.log")}
	if c.fairlead.binary = os.Getenv(kubeProxyEnv); c.fairlead.binary != "" {
		c.fairlead.kubeProxy = true
		c.fairlead.args = []string{
			"--proxy-mode=nftables", "--kubeconfig=" + kubeconfig, "--hostname-override=" + thisNode, "--cluster-cidr=" + podCIDRs,
		}
		return nil
	}
	if c.fairlead.binary, err = buildFairlead(ctx, c.dir); err != nil {
		return err
	}
	c.fairlead.args, err = daemonSetArgs(c.dir, podCIDRs)
	return err
}

// start starts Fairlead and waits until it has programmed the node.
func (c *cluster) start(ctx context.Context) error {
	if err := c.fairlead.start(); err != nil {
		return err
	}
	return c.fairlead.waitReady(ctx)
}

// close stops everything. It accepts a partly created cluster.
func (c *cluster) close() error {
	if c == nil {
		return nil
	}
	var errs []error
	if c.fairlead != nil {
		errs = append(errs, c.fairlead.kill())
	}
	if c.cp != nil {
		errs = append(errs, c.cp.Close())
	}
	if c.net != nil {
		errs = append(errs, c.net.Close())
	}
	return errors.Join(errs...)
}

// applyRBAC creates the objects of deploy/rbac.yaml.
func (c *cluster) applyRBAC(ctx context.Context) error {
	objects, err := readManifest("rbac.yaml")
	if err != nil {
		return err
	}
	for _, document := range objects {
		data, err := document.MarshalJSON()
		if err != nil {
			return err
		}
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(data, nil, nil)
		if err != nil {
			return fmt.Errorf("deploy/rbac.yaml: %w", err)
		}
		switch o := object.(type) {
		case *corev1.ServiceAccount:
			_, err = c.api.CoreV1().ServiceAccounts(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
		case *rbacv1.ClusterRole:
			_, err = c.api.RbacV1().ClusterRoles().Create(ctx, o, metav1.CreateOptions{})
		case *rbacv1.ClusterRoleBinding:
			_, err = c.api.RbacV1().ClusterRoleBindings().Create(ctx, o, metav1.CreateOptions{})
		default:
			err = fmt.Errorf("unexpected type %T", object)
		}
		if err != nil {
			return fmt.Errorf("deploy/rbac.yaml: %w", err)
		}
	}
	return nil
}

func (c *cluster) createNode(ctx context.Context, name, zone string, addrs []netip.Addr, podCIDRs []netip.Prefix) error {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
		corev1.LabelHostname: name, corev1.LabelTopologyZone: zone,
	}}}
	for _, p := range podCIDRs {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, p.String())
	}
	if len(podCIDRs) > 0 {
		node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
	}
	for _, a := range addrs {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	if _, err := c.api.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create Node %s: %w", name, err)
	}
	return nil
}

// patch returns a merge patch that sets the value at the path.
func patch(value any, path ...string) []byte {
	for _, name := range slices.Backward(path) {
		value = map[string]any{name: value}
	}
	data, err := json.Marshal(value)
	if err != nil {
		panic(err) // a mistake in the test
	}
	return data
}

// waitTimeout bounds every wait for an expected event. It is long so that a busy machine does
// not fail a test.
const waitTimeout = 30 * time.Second

// eventually calls fn until it returns nil. After waitTimeout it returns the last error of
// fn.
func eventually(ctx context.Context, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, waitTimeout)
	defer cancel()
	const period = 20 * time.Millisecond
	for {
		err := fn(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("timed out after %s: %w", waitTimeout, err)
		case <-time.After(period):
		}
	}
}

func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
