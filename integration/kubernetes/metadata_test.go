package kubernetes

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The sidecar for changed blocks hands them to a service account that may see the snapshot, and to no other.
func testMetadata(t *testing.T, c *Cluster, s *Sidecars) {
	ctx := deadline(t)
	may := []rbacv1.PolicyRule{{APIGroups: []string{"snapshot.storage.k8s.io"}, Resources: []string{"volumesnapshots"}, Verbs: []string{"get"}}}
	if _, err := c.ServiceAccount(ctx, "default", "backup", may); err != nil {
		t.Fatal(err)
	}
	stranger := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "stranger"}}
	if _, err := c.Admin.Core.CoreV1().ServiceAccounts("default").Create(ctx, stranger, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := c.Kubeconfig(c.Admin)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	ask := func(account string) (answer string, err error) {
		p, err := c.Start("changedblocks", nil, c.Program("changedblocks"), "-kubeconfig="+kubeconfig, "-snapshot=first", "-service-account="+account)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Wait(ctx)
		return p.Log(), err
	}
	if _, err := ask("stranger"); err == nil || !strings.Contains(err.Error(), "PermissionDenied") {
		t.Errorf("a stranger is told %v", err)
	}
	if answer, err := ask("backup"); err != nil || !strings.Contains(answer, `"byte_offset":8192`) {
		t.Errorf("%s, %v", answer, err)
	}
}
