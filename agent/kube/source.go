package kube

import (
	"context"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

// Source is the volume that a VolumeSnapshot is of.
type Source struct {
	Origin     class.Origin
	Claim      string // the PersistentVolumeClaim's name, in the snapshot's namespace
	Volume     string // the PersistentVolume's name
	Persistent adapters.PersistentVolume
	Block      bool   // its mode is Block: there is no filesystem that Kubernetes knows of
	Filesystem string // the fsType of the PersistentVolume, if it says one
}

// Of finds the volume in the adapter's terms: Unsupported if its driver is none that the adapter knows, Invalid if the
// volume cannot be one of the adapter's.
func (s Source) Of(kind adapters.Kind) (id string, err error) { return kind.VolumeOf(s.Persistent) }

// Source finds the volume that is to be snapshotted for a VolumeSnapshot, by what a CreateSnapshot call says: whose it is,
// and the volume's handle. The handle alone does not name a volume, two drivers may give the same one. NotFound if the
// VolumeSnapshot, its claim or the volume is not there; Invalid if they contradict each other or the call; Unavailable if
// they cannot be asked for or are not bound yet.
func (a *API) Source(ctx context.Context, o class.Origin, handle string) (Source, error) {
	snapshot, err := a.snapshots.SnapshotV1().VolumeSnapshots(o.Namespace).Get(ctx, o.Name, metav1.GetOptions{})
	if err != nil {
		return Source{}, fetched("VolumeSnapshot "+o.String(), err)
	}
	name, err := claimOf(o, snapshot)
	if err != nil {
		return Source{}, err
	}
	claim, err := a.core.CoreV1().PersistentVolumeClaims(o.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return Source{}, fetched("PersistentVolumeClaim "+o.Namespace+"/"+name+" of the VolumeSnapshot "+o.String(), err)
	}
	if claim.Spec.VolumeName == "" {
		return Source{}, fault.Errorf(fault.Unavailable, "VolumeSnapshot %s: its PersistentVolumeClaim %s has no volume yet", o, claim.Name)
	}
	volume, err := a.core.CoreV1().PersistentVolumes().Get(ctx, claim.Spec.VolumeName, metav1.GetOptions{})
	if err != nil {
		return Source{}, fetched("PersistentVolume "+claim.Spec.VolumeName+" of the VolumeSnapshot "+o.String(), err)
	}
	return sourceOf(o, handle, claim, volume)
}

// claimOf is the name of the claim that a VolumeSnapshot is of, if it is the one that was asked for.
func claimOf(o class.Origin, s *snapshotv1.VolumeSnapshot) (string, error) {
	if string(s.UID) != o.UID {
		return "", fault.Errorf(fault.Invalid, "VolumeSnapshot %s: it was deleted and another one of that name made: its UID is %s, the call is for %s", o, s.UID, o.UID)
	}
	if s.Spec.Source.PersistentVolumeClaimName == nil {
		return "", fault.Errorf(fault.Invalid, "VolumeSnapshot %s: it is of a VolumeSnapshotContent, not of a PersistentVolumeClaim: there is nothing to snapshot", o)
	}
	return *s.Spec.Source.PersistentVolumeClaimName, nil
}

// sourceOf checks that a claim and a volume are bound to each other, and that the volume is the one the call is for.
func sourceOf(o class.Origin, handle string, claim *corev1.PersistentVolumeClaim, volume *corev1.PersistentVolume) (Source, error) {
	invalid := func(format string, args ...any) (Source, error) {
		return Source{}, fault.Errorf(fault.Invalid, "VolumeSnapshot %s: its PersistentVolumeClaim %s and PersistentVolume %s: "+format,
			append([]any{o, claim.Name, volume.Name}, args...)...)
	}
	bound := volume.Spec.ClaimRef
	switch {
	case bound == nil:
		return invalid("the volume is bound to no claim")
	case bound.Namespace != claim.Namespace || bound.Name != claim.Name:
		return invalid("the volume is bound to another claim, %s/%s", bound.Namespace, bound.Name)
	case bound.UID != claim.UID:
		return invalid("the volume is bound to an earlier claim of that name")
	case volume.Spec.CSI == nil:
		return invalid("the volume is not of a CSI driver")
	case volume.Spec.CSI.VolumeHandle != handle:
		return invalid("the volume's handle is %q, the call is for %q", volume.Spec.CSI.VolumeHandle, handle)
	}
	csi := volume.Spec.CSI
	return Source{
		Origin: o, Claim: claim.Name, Volume: volume.Name,
		Persistent: adapters.PersistentVolume{Driver: csi.Driver, Handle: csi.VolumeHandle, Attributes: csi.VolumeAttributes},
		Block:      volume.Spec.VolumeMode != nil && *volume.Spec.VolumeMode == corev1.PersistentVolumeBlock,
		Filesystem: csi.FSType,
	}, nil
}
