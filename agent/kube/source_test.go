package kube

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

var origin = class.Origin{Namespace: "shop", Name: "s1", UID: "uid-s1"}

func claim() *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data", UID: "uid-data"},
		Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv-1"}}
}

func volume() *corev1.PersistentVolume {
	return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-1"}, Spec: corev1.PersistentVolumeSpec{
		ClaimRef: &corev1.ObjectReference{Namespace: "shop", Name: "data", UID: "uid-data"},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
			Driver: "x.example", VolumeHandle: "h-1", FSType: "ext4", VolumeAttributes: map[string]string{"pool": "p"}}}}}
}

func TestClaimOf(t *testing.T) {
	name := "data"
	s := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{UID: "uid-s1"}}
	s.Spec.Source.PersistentVolumeClaimName = &name
	if got, err := claimOf(origin, s); got != "data" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	s.UID = "uid-s2"
	if _, err := claimOf(origin, s); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "uid-s2") {
		t.Errorf("another snapshot of that name: %v", err)
	}
	s.UID, s.Spec.Source.PersistentVolumeClaimName = "uid-s1", nil
	if _, err := claimOf(origin, s); !errors.Is(err, fault.Invalid) {
		t.Errorf("of a content: %v", err)
	}
}

func TestSourceOf(t *testing.T) {
	got, err := sourceOf(origin, "h-1", claim(), volume())
	want := Source{origin, "data", "pv-1", adapters.PersistentVolume{Driver: "x.example", Handle: "h-1", Attributes: map[string]string{"pool": "p"}}, false, "ext4"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	block := corev1.PersistentVolumeBlock
	for says, change := range map[string]func(*corev1.PersistentVolume){
		"bound to no claim":             func(v *corev1.PersistentVolume) { v.Spec.ClaimRef = nil },
		"another claim, other/data":     func(v *corev1.PersistentVolume) { v.Spec.ClaimRef.Namespace = "other" },
		"another claim, shop/logs":      func(v *corev1.PersistentVolume) { v.Spec.ClaimRef.Name = "logs" },
		"an earlier claim of that name": func(v *corev1.PersistentVolume) { v.Spec.ClaimRef.UID = "uid-old" },
		"not of a CSI driver":           func(v *corev1.PersistentVolume) { v.Spec.CSI = nil },
		`handle is "h-2"`:               func(v *corev1.PersistentVolume) { v.Spec.CSI.VolumeHandle = "h-2" },
	} {
		v := volume()
		change(v)
		if _, err := sourceOf(origin, "h-1", claim(), v); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("it does not say %q: %v", says, err)
		}
	}
	v := volume()
	v.Spec.VolumeMode = &block
	if got, err := sourceOf(origin, "h-1", claim(), v); err != nil || !got.Block {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestSourceIsOfTheAdapter(t *testing.T) {
	kind := adapters.Kind{Name: "example", Drivers: []string{"x.example"}, Resolve: func(pv adapters.PersistentVolume) (string, error) {
		return pv.Attributes["pool"] + "/" + pv.Handle, nil
	}}
	s, err := sourceOf(origin, "h-1", claim(), volume())
	if err != nil {
		t.Fatal(err)
	}
	if id, err := s.Of(kind); id != "p/h-1" || err != nil {
		t.Errorf("%q, %v", id, err)
	}
	kind.Drivers = []string{"y.example"}
	if _, err := s.Of(kind); !errors.Is(err, fault.Unsupported) {
		t.Errorf("of another driver: %v", err)
	}
}
