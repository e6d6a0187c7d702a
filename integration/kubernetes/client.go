package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	core "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// Client speaks to the API server of a cluster as somebody.
type Client struct {
	Config    *rest.Config // connects into the cluster's network, without a limit of requests
	Core      core.Interface
	Snapshots snapshots.Interface
	Dynamic   dynamic.Interface
}

// identity is who a client is: the name of a certificate of the authority, or a token.
type identity struct{ certificate, token string }

func (c *Cluster) newClient(who identity) (*Client, error) {
	config := &rest.Config{Host: serverURL, BearerToken: who.token, TLSClientConfig: rest.TLSClientConfig{CAData: c.authority.pem},
		Dial: c.place.dial, QPS: -1}
	if who.certificate != "" {
		config.CertFile, config.KeyFile = c.authority.path(who.certificate+".crt"), c.authority.path(who.certificate+".key")
	}
	http, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	client := &Client{Config: config}
	if client.Core, err = core.NewForConfigAndClient(config, http); err != nil {
		return nil, err
	}
	if client.Snapshots, err = snapshots.NewForConfigAndClient(config, http); err != nil {
		return nil, err
	}
	client.Dynamic, err = dynamic.NewForConfigAndClient(config, http)
	return client, err
}

// Kubeconfig writes a file that makes a program in the cluster's network the same user as a client.
func (c *Cluster) Kubeconfig(client *Client) (path string, err error) {
	f, err := os.CreateTemp(c.dir, "kubeconfig-")
	if err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	user := &api.AuthInfo{ClientCertificate: client.Config.CertFile, ClientKey: client.Config.KeyFile, Token: client.Config.BearerToken}
	return f.Name(), clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"test": {Server: serverURL, CertificateAuthorityData: c.authority.pem}},
		AuthInfos:      map[string]*api.AuthInfo{"test": user},
		Contexts:       map[string]*api.Context{"test": {Cluster: "test", AuthInfo: "test"}},
		CurrentContext: "test",
	}, f.Name())
}

// ServiceAccount makes a service account that has the rights of a role everywhere, and gives a client that is it, by a
// token as a pod has. Rules are those of a ClusterRole.
func (c *Cluster) ServiceAccount(ctx context.Context, namespace, name string, rules []rbacv1.PolicyRule) (*Client, error) {
	meta := metav1.ObjectMeta{Name: name}
	if _, err := c.Admin.Core.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	meta.Name = namespace + ":" + name
	if _, err := c.Admin.Core.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta, Rules: rules}, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	binding := &rbacv1.ClusterRoleBinding{ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: name}}}
	if _, err := c.Admin.Core.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	client, err := c.As(ctx, namespace, name)
	if err != nil || len(rules) == 0 {
		return client, err
	}
	return client, c.effective(ctx, client, rules[0])
}

// effective waits until the API server has heard of a role that it keeps: it does so by a watch.
func (c *Cluster) effective(ctx context.Context, client *Client, rule rbacv1.PolicyRule) error {
	ask := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
		Group: rule.APIGroups[0], Resource: rule.Resources[0], Verb: rule.Verbs[0]}}}
	return Await(ctx, "waiting for the rights of a service account", func(ctx context.Context) error {
		answer, err := client.Core.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, ask, metav1.CreateOptions{})
		if err == nil && !answer.Status.Allowed {
			err = errors.New("it has none")
		}
		return err
	}, c.Server)
}

// As gives a client that is a service account which exists, by a token that is good for a day.
func (c *Cluster) As(ctx context.Context, namespace, serviceAccount string) (*Client, error) {
	day := int64(24 * time.Hour / time.Second)
	token, err := c.Admin.Core.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, serviceAccount,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &day}}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	return c.newClient(identity{token: token.Status.Token})
}

// Apply makes the objects of a YAML stream, or changes those that exist, as `kubectl apply --server-side` does. An object
// that names no namespace goes to "default".
func (c *Client) Apply(ctx context.Context, manifests []byte) error {
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(c.Core.Discovery()))
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(manifests), 4096)
	for {
		var o unstructured.Unstructured
		err := decoder.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading manifests: %w", err)
		}
		if len(o.Object) == 0 {
			continue // an empty document
		}
		if err := c.apply(ctx, mapper, &o); err != nil {
			return fmt.Errorf("applying %s %s: %w", o.GetKind(), o.GetName(), err)
		}
	}
}

func (c *Client) apply(ctx context.Context, mapper *restmapper.DeferredDiscoveryRESTMapper, o *unstructured.Unstructured) error {
	kind := o.GroupVersionKind()
	mapping, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return err
	}
	var resource dynamic.ResourceInterface = c.Dynamic.Resource(mapping.Resource)
	if mapping.Scope.Name() == "namespace" {
		if o.GetNamespace() == "" {
			o.SetNamespace("default")
		}
		resource = c.Dynamic.Resource(mapping.Resource).Namespace(o.GetNamespace())
	}
	content, err := o.MarshalJSON()
	if err != nil {
		return err
	}
	force := true
	_, err = resource.Patch(ctx, o.GetName(), types.ApplyPatchType, content, metav1.PatchOptions{FieldManager: "test", Force: &force})
	return err
}
