package addons

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"

	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// CreateNode creates the Node with its pod networks and its zone. kubelet, which would otherwise
// create it, cannot set the networks.
func CreateNode(ctx context.Context, client kubernetes.Interface, n topology.Node) error {
	object := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: map[string]string{
		corev1.LabelHostname:     n.Name,
		corev1.LabelTopologyZone: n.Zone,
	}}}
	for _, pods := range n.PodCIDRs() {
		object.Spec.PodCIDRs = append(object.Spec.PodCIDRs, pods.String())
	}
	object.Spec.PodCIDR = object.Spec.PodCIDRs[0]
	if _, err := client.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create Node %s: %w", n.Name, err)
	}
	return nil
}

// Wait waits until all nodes, and all DaemonSets and Deployments among objects, are ready. It logs
// each step.
func Wait(ctx context.Context, client kubernetes.Interface, nodes int, objects []*unstructured.Unstructured, log *slog.Logger) error {
	conditions := []condition{{"nodes", func() (string, error) { return nodesMissing(ctx, client, nodes) }}}
	for _, o := range objects {
		namespace, name := o.GetNamespace(), o.GetName()
		switch o.GetKind() {
		case "DaemonSet":
			conditions = append(conditions, condition{"DaemonSet " + name, func() (string, error) {
				d, err := client.AppsV1().DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
				if err != nil {
					return "", err
				}
				return missing(int(d.Status.NumberReady), nodes), nil
			}})
		case "Deployment":
			conditions = append(conditions, condition{"Deployment " + name, func() (string, error) {
				d, err := client.AppsV1().Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
				if err != nil {
					return "", err
				}
				return missing(int(d.Status.ReadyReplicas), int(*d.Spec.Replicas)), nil
			}})
		}
	}
	for _, c := range conditions {
		if err := c.wait(ctx); err != nil {
			return fmt.Errorf("wait for %s: %w", c.name, err)
		}
		log.InfoContext(ctx, "ready", "what", c.name)
	}
	return nil
}

// condition is a condition of the cluster. check describes the difference, or returns an empty
// string.
type condition struct {
	name  string
	check func() (string, error)
}

// errPermanent marks an error that does not go away.
var errPermanent = errors.New("cannot succeed")

// wait calls check until there is neither a difference nor an error.
func (c condition) wait(ctx context.Context) error {
	const period = 250 * time.Millisecond
	for {
		text, err := c.check()
		if err == nil && text == "" || errors.Is(err, errPermanent) {
			return err
		}
		select {
		case <-ctx.Done():
			if err != nil {
				return err
			}
			return fmt.Errorf("%s: %w", text, ctx.Err())
		case <-time.After(period):
		}
	}
}

func missing(got, want int) string {
	if got >= want {
		return ""
	}
	return fmt.Sprintf("%d of %d are ready", got, want)
}

func nodesMissing(ctx context.Context, client kubernetes.Interface, want int) (string, error) {
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	ready := 0
	var reasons []string
	for _, n := range list.Items {
		for _, c := range n.Status.Conditions {
			if c.Type != corev1.NodeReady {
				continue
			}
			if c.Status == corev1.ConditionTrue {
				ready++
			} else {
				reasons = append(reasons, n.Name+": "+c.Message)
			}
		}
	}
	if text := missing(ready, want); text != "" {
		return text + "; " + strings.Join(reasons, "; "), nil
	}
	return "", nil
}
