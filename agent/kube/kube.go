// Package kube looks things up in Kubernetes: which volume a VolumeSnapshot is of, on which node that volume is, which
// class a snapshot's handle belongs to, and where the kubelet has mounted a volume. It also tells people, by events on
// their VolumeSnapshots, what happens to them. What a class may say is package class.
//
// Decisions are functions of objects; [API] fetches the objects. It answers from the API server each time, not from a copy:
// what is decided by it is what may be frozen, read and deleted.
package kube

import (
	"context"
	"errors"

	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stillpoint.io/stillpoint/fault"
)

// API asks the API server of the cluster. Its methods may be called in parallel.
type API struct {
	core      kubernetes.Interface
	snapshots snapshots.Interface
}

// New makes an API that speaks as config says. It does not connect yet.
func New(config *rest.Config) (*API, error) {
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fault.Errorf(fault.Invalid, "the configuration of the API server's client: %w", err)
	}
	a := new(API)
	if a.core, err = kubernetes.NewForConfigAndClient(config, client); err != nil {
		return nil, err
	}
	a.snapshots, err = snapshots.NewForConfigAndClient(config, client)
	return a, err
}

// Rights are what this package needs of the API server, and no more: the rules of the agent's ClusterRole.
func Rights() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{"snapshot.storage.k8s.io"}, Resources: []string{"volumesnapshots", "volumesnapshotclasses"}, Verbs: []string{"get"}},
		{APIGroups: []string{"snapshot.storage.k8s.io"}, Resources: []string{"volumesnapshotcontents"}, Verbs: []string{"get", "list"}},
		{APIGroups: []string{""}, Resources: []string{"persistentvolumes", "persistentvolumeclaims"}, Verbs: []string{"get"}},
		{APIGroups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"list"}},
		{APIGroups: []string{"storage.k8s.io"}, Resources: []string{"volumeattachments"}, Verbs: []string{"list"}},
		{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
	}
}

// fetched gives an error of the API server a kind; what names what was asked for.
func fetched(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return fault.Errorf(fault.NotFound, "%s: the API server has none: %w", what, err)
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fault.Errorf(fault.Invalid, "%s: the agent's service account may not ask for it: compare its ClusterRole with the chart's: %w", what, err)
	case errors.Is(err, context.Canceled):
		return err
	}
	return fault.Errorf(fault.Unavailable, "%s: asking the API server: %w", what, err)
}
