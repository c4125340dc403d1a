//go:build e2e

package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestCheckPermissions checks what `fairlead check` says about users with different permissions.
func TestCheckPermissions(t *testing.T) {
	s := newScenario(t, sharedCluster)
	if s.fairlead.kubeProxy {
		t.Skip("kube-proxy has no check")
	}
	manifest, err := readManifest("rbac.yaml")
	s.must(err)
	var role string
	for _, object := range manifest {
		if object.GetKind() == "ClusterRole" {
			role = object.GetName()
		}
	}
	full, err := s.api.RbacV1().ClusterRoles().Get(t.Context(), role, metav1.GetOptions{})
	s.must(err)
	grant := func(user string, rules []rbacv1.PolicyRule) {
		_, err := s.api.RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{
			ObjectMeta: metav1.ObjectMeta{Name: user}, Rules: rules,
		}, metav1.CreateOptions{})
		s.must(err)
		_, err = s.api.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: user},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
		}, metav1.CreateOptions{})
		s.must(err)
	}
	without := func(resources ...string) []rbacv1.PolicyRule {
		var rules []rbacv1.PolicyRule
		for _, rule := range full.Rules {
			rule = *rule.DeepCopy()
			rule.Resources = slices.DeleteFunc(rule.Resources, func(r string) bool { return slices.Contains(resources, r) })
			if len(rule.Resources) > 0 {
				rules = append(rules, rule)
			}
		}
		return rules
	}
	grant("check-full", full.Rules)
	grant("check-no-events", without("events"))
	grant("check-no-slices", without("endpointslices"))
	grant("check-none", nil)
	for _, test := range []struct {
		user, status string
		parts        []string
	}{
		{"check-full", "ok", []string{"permissions are granted"}},
		{"check-no-events", "warning", []string{"events", "works without it"}},
		{"check-no-slices", "failed", []string{"list endpointslices", "watch endpointslices", "cannot be programmed"}},
		{"check-none", "failed", []string{"list services", "list endpointslices", "cannot be programmed"}},
	} {
		t.Run(test.user, func(t *testing.T) {
			kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
			s.must(s.cp.Kubeconfig(kubeconfig, test.user))
			var out bytes.Buffer
			s.must(s.net.Node.Do(func() error {
				check := exec.CommandContext(t.Context(), s.fairlead.binary, "check", "-o", "json", "--kubeconfig="+kubeconfig, "--hostname-override="+thisNode)
				check.Stdout = &out
				var exit *exec.ExitError
				if err := check.Run(); err != nil && !errors.As(err, &exit) {
					return err
				}
				return nil
			}))
			var report struct {
				Findings []struct{ Check, Status, Message, Fix string }
			}
			if err := json.Unmarshal(out.Bytes(), &report); err != nil {
				t.Fatalf("%v; output:\n%s", err, &out)
			}
			i := slices.IndexFunc(report.Findings, func(f struct{ Check, Status, Message, Fix string }) bool {
				return f.Check == "rbac" && strings.EqualFold(f.Status, test.status)
			})
			if i < 0 {
				t.Fatalf("no finding rbac with status %s:\n%s", test.status, &out)
			}
			f := report.Findings[i]
			for _, part := range test.parts {
				if !strings.Contains(f.Message, part) {
					t.Errorf("message %q lacks %q", f.Message, part)
				}
			}
			if test.status != "ok" && !strings.Contains(f.Fix, "deploy/rbac.yaml") {
				t.Errorf("fix %q does not name deploy/rbac.yaml", f.Fix)
			}
		})
	}
}
