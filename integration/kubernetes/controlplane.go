package kubernetes

import (
	"bytes"
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

const (
	serverAddress = "127.0.0.1:6443"
	serverURL     = "https://" + serverAddress
	storeURL      = "http://127.0.0.1:2379"
)

// controlPlane starts it until the API has all that tests use.
func (c *Cluster) controlPlane(ctx context.Context) error {
	pki := filepath.Join(c.dir, "pki")
	for _, dir := range []string{pki, c.logs} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	var err error
	if c.authority, err = newAuthority(pki); err != nil {
		return err
	}
	a := c.authority
	err = errors.Join(a.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, "127.0.0.1", "localhost", "kubernetes.default.svc"),
		a.issue("admin", pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}), a.issueSigner("service-accounts"))
	if err != nil {
		return err
	}
	// The data is thrown away with the cluster: nothing has to reach a disk.
	if c.Store, err = c.Start("etcd", nil, c.Program("etcd"), "--data-dir="+filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+storeURL, "--advertise-client-urls="+storeURL, "--listen-peer-urls=http://127.0.0.1:2380"); err != nil {
		return err
	}
	// Without the admission plugin a pod can be made before the controllers have made the namespace's service account.
	if c.Server, err = c.Start("kube-apiserver", nil, c.Program("kube-apiserver"), "--etcd-servers="+storeURL,
		"--bind-address=127.0.0.1", "--secure-port=6443", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24",
		"--client-ca-file="+a.path("ca.crt"), "--tls-cert-file="+a.path("apiserver.crt"), "--tls-private-key-file="+a.path("apiserver.key"),
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+a.path("service-accounts.pub"),
		"--service-account-signing-key-file="+a.path("service-accounts.key"), "--authorization-mode=Node,RBAC", "--allow-privileged=true",
		"--enable-admission-plugins=NodeRestriction", "--disable-admission-plugins=ServiceAccount", "--enable-priority-and-fairness=false"); err != nil {
		return err
	}
	if c.Admin, err = c.newClient(identity{certificate: "admin"}); err != nil {
		return err
	}
	if err := c.Answers(ctx); err != nil {
		return err
	}
	admin, err := c.Kubeconfig(c.Admin)
	if err != nil {
		return err
	}
	if c.Controllers, err = c.Start("kube-controller-manager", nil, c.Program("kube-controller-manager"), "--kubeconfig="+admin,
		"--authentication-kubeconfig="+admin, "--authorization-kubeconfig="+admin, "--bind-address=127.0.0.1", "--leader-elect=false",
		"--controllers=persistentvolume-binder-controller,persistentvolumeclaim-protection-controller,persistentvolume-protection-controller,"+
			"garbage-collector-controller,serviceaccount-controller",
		"--service-account-private-key-file="+a.path("service-accounts.key"), "--root-ca-file="+a.path("ca.crt")); err != nil {
		return err
	}
	if err := c.customResources(ctx); err != nil {
		return err
	}
	c.SnapshotController, err = c.start(c.place, "snapshot-controller", true, nil, c.Program("snapshot-controller"), "--kubeconfig="+admin,
		"--feature-gates=CSIVolumeGroupSnapshot=true", "--retry-interval-start="+retry, "-v=5")
	return err
}

// Answers waits until the API server is ready: after a start, or after it was paused or killed.
func (c *Cluster) Answers(ctx context.Context) error {
	return Await(ctx, "waiting for the API server", func(ctx context.Context) error {
		return c.Admin.Core.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	}, c.Store, c.Server)
}

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// customResources makes those of snapshots, of groups of them, and of changed blocks.
func (c *Cluster) customResources(ctx context.Context) error {
	files, err := filepath.Glob(filepath.Join(c.programs, "crds", "*.yaml"))
	if err != nil {
		return err
	}
	var all [][]byte
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		all = append(all, content)
	}
	if err := c.Admin.Apply(ctx, bytes.Join(all, []byte("\n---\n"))); err != nil {
		return err
	}
	return Await(ctx, "waiting for the custom resources", func(ctx context.Context) error {
		list, err := c.Admin.Dynamic.Resource(definitions).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, d := range list.Items {
			if !established(d) {
				return fmt.Errorf("%s is not established yet", d.GetName())
			}
		}
		return nil
	}, c.Server)
}

func established(d unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(d.Object, "status", "conditions") // none yet is no condition
	for _, condition := range conditions {
		if m, ok := condition.(map[string]any); ok && m["type"] == "Established" && m["status"] == "True" {
			return true
		}
	}
	return false
}
