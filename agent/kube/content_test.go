package kube

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

func TestWithHandle(t *testing.T) {
	s := func(v string) *string { return &v }
	made := snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: "made"}, Spec: snapshotv1.VolumeSnapshotContentSpec{Driver: class.Driver,
		VolumeSnapshotRef: corev1.ObjectReference{Namespace: "shop", Name: "s1", UID: "u1"}, VolumeSnapshotClassName: s("c"),
		Source: snapshotv1.VolumeSnapshotContentSource{VolumeHandle: s("h-1")}}, Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: s("mem:a@1")}}
	written := snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: "written"}, Spec: snapshotv1.VolumeSnapshotContentSpec{Driver: class.Driver,
		VolumeSnapshotRef: corev1.ObjectReference{Namespace: "spy", Name: "s2"}, Source: snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: s("mem:a@1")}}}
	other := *made.DeepCopy()
	other.Spec.Driver = "other.example"
	young := *made.DeepCopy()
	young.Status = nil
	got := withHandle("mem:a@1", []snapshotv1.VolumeSnapshotContent{made, written, other, young})
	want := []Content{{Name: "made", Namespace: "shop", Snapshot: "s1", UID: "u1", Volume: "h-1", Class: "c"}, {Name: "written", Namespace: "spy", Snapshot: "s2", Written: true}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if got := withHandle("mem:a@2", []snapshotv1.VolumeSnapshotContent{made, written}); got != nil {
		t.Errorf("another handle: %+v", got)
	}
}

func TestClassOf(t *testing.T) {
	own, written := func(c string) Content { return Content{Class: c} }, func(c string) Content { return Content{Class: c, Written: true} }
	for _, c := range []struct {
		contents []Content
		want     string
		kind     fault.Kind
		says     string
	}{
		{[]Content{own("a")}, "a", 0, ""},
		{[]Content{own("a"), own("a"), own("")}, "a", 0, ""},
		{[]Content{written("b"), own("a")}, "a", 0, ""},
		{[]Content{written("b"), own("")}, "b", 0, ""},
		{[]Content{own("a"), own("b")}, "", fault.Invalid, "two classes, a and b"},
		{[]Content{own("")}, "", fault.NotFound, "volumeSnapshotClassName"},
		{nil, "", fault.NotFound, "volumeSnapshotClassName"},
	} {
		got, err := classOf("mem:a@1", c.contents)
		if got != c.want || (err == nil) != (c.says == "") || err != nil && (!errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%+v: %q, %v", c.contents, got, err)
		}
	}
}

func TestRelated(t *testing.T) {
	in := func(namespaces ...string) (all []Content) {
		for _, n := range namespaces {
			all = append(all, Content{Namespace: n, UID: "u"})
		}
		return all
	}
	waiting := []Content{{Namespace: "shop", Written: true}}
	for _, c := range []struct {
		base, target []Content
		want         bool
	}{
		{in("shop"), in("shop"), true},
		{in("shop", "lab"), in("shop"), true},
		{in("shop"), in("shop", "spy"), false}, // who reads target in spy may not read base
		{in("shop"), in("spy"), false},
		{nil, in("shop"), false},
		{in("shop"), nil, false},
		{waiting, in("shop"), false},
		{in("shop"), waiting, false},
		{nil, nil, false},
	} {
		if err := related(c.base, c.target); (err == nil) != c.want || err != nil && !errors.Is(err, fault.NotFound) {
			t.Errorf("%+v, %+v: %v", c.base, c.target, err)
		}
	}
}
