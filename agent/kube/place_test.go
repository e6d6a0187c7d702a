package kube

import (
	"errors"
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stillpoint.io/stillpoint/fault"
)

func TestAttachedTo(t *testing.T) {
	attachment := func(volume, node string, attached bool) storagev1.VolumeAttachment {
		return storagev1.VolumeAttachment{Spec: storagev1.VolumeAttachmentSpec{NodeName: node, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &volume}},
			Status: storagev1.VolumeAttachmentStatus{Attached: attached}}
	}
	all := []storagev1.VolumeAttachment{attachment("pv-1", "c", true), attachment("pv-1", "a", true), attachment("pv-1", "b", false), attachment("pv-2", "d", true), {}}
	for volume, want := range map[string]Place{"pv-1": {[]string{"a", "c"}, Attached}, "pv-2": {[]string{"d"}, Attached}, "pv-3": {nil, Nowhere}} {
		if got := attachedTo(volume, all); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v", volume, got)
		}
	}
}

func TestUsedOn(t *testing.T) {
	pod := func(node string, phase corev1.PodPhase, volume corev1.VolumeSource) corev1.Pod {
		return corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: corev1.PodSpec{NodeName: node, Volumes: []corev1.Volume{{Name: "v", VolumeSource: volume}}},
			Status: corev1.PodStatus{Phase: phase}}
	}
	uses := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}
	for what, c := range map[string]struct {
		pods []corev1.Pod
		want Place
	}{
		"two pods on one node":   {[]corev1.Pod{pod("a", corev1.PodRunning, uses), pod("a", corev1.PodPending, uses)}, Place{[]string{"a"}, InUse}},
		"pods on two nodes":      {[]corev1.Pod{pod("b", corev1.PodRunning, uses), pod("a", corev1.PodRunning, uses)}, Place{[]string{"a", "b"}, InUse}},
		"pods that have ended":   {[]corev1.Pod{pod("a", corev1.PodSucceeded, uses), pod("a", corev1.PodFailed, uses)}, Place{nil, Nowhere}},
		"a pod without a node":   {[]corev1.Pod{pod("", corev1.PodPending, uses)}, Place{nil, Nowhere}},
		"a pod of another claim": {[]corev1.Pod{pod("a", corev1.PodRunning, corev1.VolumeSource{})}, Place{nil, Nowhere}},
	} {
		if got := usedOn("data", c.pods); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v", what, got)
		}
	}
	ephemeral := pod("a", corev1.PodRunning, corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}})
	if got := usedOn("p-v", []corev1.Pod{ephemeral}); got.Evidence != InUse {
		t.Errorf("a generic ephemeral volume: %+v", got)
	}
}

func TestReachedFrom(t *testing.T) {
	node := func(name, zone string) corev1.Node {
		return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/hostname": name, "zone": zone}}}
	}
	nodes := []corev1.Node{node("a", "1"), node("b", "1"), node("c", "2")}
	affine := func(key string, values ...string) *corev1.PersistentVolume {
		v := volume()
		v.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: corev1.NodeSelectorOpIn, Values: values}}}}}}
		return v
	}
	for _, c := range []struct {
		volume *corev1.PersistentVolume
		want   Place
	}{
		{affine("kubernetes.io/hostname", "c"), Place{[]string{"c"}, Reaches}},
		{affine("zone", "1"), Place{[]string{"a", "b"}, Reaches}},
		{affine("zone", "3"), Place{nil, Nowhere}},
	} {
		if got, err := reachedFrom(c.volume, nodes); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v, %v; want %+v", got, err, c.want)
		}
	}
	if _, err := reachedFrom(affine("not/a/key", "x"), nodes); !errors.Is(err, fault.Invalid) {
		t.Errorf("a wrong affinity: %v", err)
	}
}
