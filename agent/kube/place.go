package kube

import (
	"context"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	"stillpoint.io/stillpoint/fault"
)

// Evidence is what a node was found by.
type Evidence string

const (
	Attached Evidence = "attached" // a VolumeAttachment says that the volume is attached there
	InUse    Evidence = "in use"   // a pod that uses the claim is there
	Reaches  Evidence = "reaches"  // the volume's node affinity allows it, and nothing says more
	Nowhere  Evidence = "nowhere"  // Kubernetes does not say: nothing uses the volume, or it needs no attachment and no pod is there
)

// Place is where a volume is, as far as Kubernetes knows. Several nodes may have it at once.
type Place struct {
	Nodes    []string // their names, sorted, each once
	Evidence Evidence
}

// Place finds the nodes that a volume is on: those that it is attached to; else those of the pods that use its claim; else
// those that its node affinity allows, if that says anything. Nowhere is not an error: the kubelets have the last word, see
// [Kubelet].
func (a *API) Place(ctx context.Context, s Source) (Place, error) {
	attachments, err := a.core.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
	if err != nil {
		return Place{}, fetched("the attachments of PersistentVolume "+s.Volume, err)
	}
	if p := attachedTo(s.Volume, attachments.Items); p.Evidence != Nowhere {
		return p, nil
	}
	pods, err := a.core.CoreV1().Pods(s.Origin.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return Place{}, fetched("the pods that use PersistentVolumeClaim "+s.Origin.Namespace+"/"+s.Claim, err)
	}
	if p := usedOn(s.Claim, pods.Items); p.Evidence != Nowhere {
		return p, nil
	}
	volume, err := a.core.CoreV1().PersistentVolumes().Get(ctx, s.Volume, metav1.GetOptions{})
	if err != nil {
		return Place{}, fetched("PersistentVolume "+s.Volume, err)
	}
	if volume.Spec.NodeAffinity == nil || volume.Spec.NodeAffinity.Required == nil {
		return Place{Evidence: Nowhere}, nil
	}
	nodes, err := a.core.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return Place{}, fetched("the nodes that PersistentVolume "+s.Volume+" can be reached from", err)
	}
	return reachedFrom(volume, nodes.Items)
}

func attachedTo(volume string, all []storagev1.VolumeAttachment) Place {
	return place(Attached, func(yield func(string) bool) {
		for _, a := range all {
			if name := a.Spec.Source.PersistentVolumeName; name != nil && *name == volume && a.Status.Attached && !yield(a.Spec.NodeName) {
				return
			}
		}
	})
}

// usedOn: a pod that has ended holds no volume any more, one that is being deleted still does.
func usedOn(claim string, pods []corev1.Pod) Place {
	return place(InUse, func(yield func(string) bool) {
		for _, pod := range pods {
			ended := pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
			if pod.Spec.NodeName != "" && !ended && uses(pod, claim) && !yield(pod.Spec.NodeName) {
				return
			}
		}
	})
}

// uses: a generic ephemeral volume has a claim too, which is named after the pod and the volume.
func uses(pod corev1.Pod, claim string) bool {
	return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
		return v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claim || v.Ephemeral != nil && pod.Name+"-"+v.Name == claim
	})
}

func reachedFrom(volume *corev1.PersistentVolume, nodes []corev1.Node) (Place, error) {
	selector, err := nodeaffinity.NewNodeSelector(volume.Spec.NodeAffinity.Required)
	if err != nil {
		return Place{}, fault.Errorf(fault.Invalid, "PersistentVolume %s: its node affinity: %w", volume.Name, err)
	}
	return place(Reaches, func(yield func(string) bool) {
		for i := range nodes {
			if selector.Match(&nodes[i]) && !yield(nodes[i].Name) {
				return
			}
		}
	}), nil
}

// place is what a search found.
func place(by Evidence, found func(yield func(string) bool)) Place {
	names := map[string]bool{}
	for name := range found {
		names[name] = true
	}
	if len(names) == 0 {
		return Place{Evidence: Nowhere}
	}
	return Place{Nodes: slices.Sorted(maps.Keys(names)), Evidence: by}
}
