package apiserver_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/source/apiserver"
)

// TestProbe asks a real API server for the permissions of a user with some rights.
func TestProbe(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	must[*rbacv1.ClusterRole](t)(client.RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: ns},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"services", "nodes"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list"}},
		},
	}, metav1.CreateOptions{}))
	must[*rbacv1.ClusterRoleBinding](t)(client.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: ns},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: ns},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: ns}},
	}, metav1.CreateOptions{}))
	config := cluster.Config()
	config.Impersonate.UserName = ns
	config.Impersonate.Groups = []string{"system:authenticated"}
	probe := must[*apiserver.Probe](t)(apiserver.NewProbe(config))
	if version, _, err := probe.Version(t.Context()); err != nil || version == "" {
		t.Errorf("version %q, error %v", version, err)
	}
	want := []string{
		"watch endpointslices.discovery.k8s.io required", "list servicecidrs.networking.k8s.io", "watch servicecidrs.networking.k8s.io",
		"create events.events.k8s.io", "patch events.events.k8s.io",
	}
	var denied []string
	// New roles may take effect with a delay.
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		denied = nil
		for _, a := range must[[]apiserver.Access](t)(probe.Access(t.Context())) {
			switch {
			case a.Allowed:
			case a.Required:
				denied = append(denied, fmt.Sprint(a, " required"))
			default:
				denied = append(denied, a.String())
			}
		}
		if slices.Equal(denied, want) || time.Now().After(deadline) {
			break
		}
	}
	if !slices.Equal(denied, want) {
		t.Errorf("denied %q, want %q", denied, want)
	}
	if found, err := probe.HasNode(t.Context(), "no-such-node"); err != nil || found {
		t.Errorf("found a Node that does not exist, error %v", err)
	}
}
