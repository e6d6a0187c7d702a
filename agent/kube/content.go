package kube

import (
	"context"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

// Content is what Kubernetes knows of a snapshot by its handle: a VolumeSnapshotContent of our driver.
type Content struct {
	Name      string
	Namespace string // of the VolumeSnapshot that it is bound to
	Snapshot  string // that VolumeSnapshot's name
	UID       string // and its UID; empty while a content that somebody wrote waits for its VolumeSnapshot
	Volume    string // the handle of the volume, as its PersistentVolume had it; empty of one that somebody wrote
	Class     string // the VolumeSnapshotClass; empty of a group's member
	Written   bool   // somebody wrote it, for a snapshot that was there: nothing that it says was checked when it was made
}

// pageSize is how many contents are asked for at a time.
const pageSize = 500

// Contents finds the VolumeSnapshotContents of our driver that have a snapshot's handle: none, one, or several, because
// anybody who may make them can write one with any handle.
func (a *API) Contents(ctx context.Context, handle string) ([]Content, error) {
	var found []Content
	options := metav1.ListOptions{Limit: pageSize}
	for {
		page, err := a.snapshots.SnapshotV1().VolumeSnapshotContents().List(ctx, options)
		if err != nil {
			return nil, fetched("the VolumeSnapshotContents of snapshot "+handle, err)
		}
		found = append(found, withHandle(handle, page.Items)...)
		if options.Continue = page.Continue; options.Continue == "" {
			return found, nil
		}
	}
}

func withHandle(handle string, contents []snapshotv1.VolumeSnapshotContent) (found []Content) {
	for _, c := range contents {
		written := c.Spec.Source.SnapshotHandle
		is := written != nil && *written == handle || c.Status != nil && c.Status.SnapshotHandle != nil && *c.Status.SnapshotHandle == handle
		if !is || c.Spec.Driver != class.Driver {
			continue
		}
		ref := c.Spec.VolumeSnapshotRef
		content := Content{Name: c.Name, Namespace: ref.Namespace, Snapshot: ref.Name, UID: string(ref.UID), Written: written != nil}
		if c.Spec.Source.VolumeHandle != nil {
			content.Volume = *c.Spec.Source.VolumeHandle
		}
		if c.Spec.VolumeSnapshotClassName != nil {
			content.Class = *c.Spec.VolumeSnapshotClassName
		}
		found = append(found, content)
	}
	return found
}

// VolumeHandle is the handle that the volume of a snapshot has in Kubernetes, by the name that the snapshot was asked for
// with: that holds the VolumeSnapshot's UID, and so does the name of its content. NotFound if there is no such content any
// more: the snapshot was not made for Kubernetes, or is to be deleted.
func (a *API) VolumeHandle(ctx context.Context, wanted string) (string, error) {
	uid, is := class.UIDOf(wanted)
	if !is {
		return "", fault.Errorf(fault.NotFound, "snapshot %s: it was not made for a VolumeSnapshot", wanted)
	}
	// k8s.io/external-snapshotter: pkg/utils/util.go, GetDynamicSnapshotContentNameForSnapshot.
	name := "snapcontent-" + uid
	content, err := a.snapshots.SnapshotV1().VolumeSnapshotContents().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", fetched("VolumeSnapshotContent "+name, err)
	}
	if content.Spec.Driver != class.Driver || content.Spec.Source.VolumeHandle == nil {
		return "", fault.Errorf(fault.NotFound, "VolumeSnapshotContent %s: it is not that of a snapshot of ours", name)
	}
	return *content.Spec.Source.VolumeHandle, nil
}

// Related says that whoever may read the snapshot target, which is all that was asked when a call came, may read base too:
// every namespace that has target has base. NotFound if not, and the same NotFound whatever the reason, so that nobody
// finds out by asking which handles there are.
func (a *API) Related(ctx context.Context, base, target string) error {
	baseContents, err := a.Contents(ctx, base)
	if err != nil {
		return err
	}
	targetContents, err := a.Contents(ctx, target)
	if err != nil {
		return err
	}
	return related(baseContents, targetContents)
}

func related(base, target []Content) error {
	has := map[string]bool{}
	for _, c := range base {
		has[c.Namespace] = has[c.Namespace] || c.UID != ""
	}
	bound := false
	for _, c := range target {
		if c.UID == "" {
			continue // nobody can read by it yet
		}
		if bound = true; !has[c.Namespace] {
			return errUnrelated
		}
	}
	if !bound {
		return errUnrelated
	}
	return nil
}

var errUnrelated = fault.Errorf(fault.NotFound, "there are no two such snapshots of one volume in one namespace")

// ClassOf reads the class that a snapshot's handle belongs to, for the calls that carry no parameters: handle, content,
// class. NotFound if there is no content with that handle, none of them has a class, or the class is gone; Invalid if they
// have several classes, or the class is wrong.
func (a *API) ClassOf(ctx context.Context, handle string) (name string, _ class.Class, _ error) {
	contents, err := a.Contents(ctx, handle)
	if err != nil {
		return "", class.Class{}, err
	}
	if name, err = classOf(handle, contents); err != nil {
		return "", class.Class{}, err
	}
	c, err := a.Class(ctx, name)
	return name, c, err
}

// classOf: a content that somebody wrote does not count where there is one that our driver's own snapshot made.
func classOf(handle string, contents []Content) (string, error) {
	var own, written []string
	for _, c := range contents {
		switch {
		case c.Class == "":
		case c.Written:
			written = append(written, c.Class)
		default:
			own = append(own, c.Class)
		}
	}
	names := own
	if len(names) == 0 {
		names = written
	}
	if len(names) == 0 {
		return "", fault.Errorf(fault.NotFound, "snapshot %s: no VolumeSnapshotContent of it names a VolumeSnapshotClass: give one that is written by hand a volumeSnapshotClassName", handle)
	}
	for _, n := range names {
		if n != names[0] {
			return "", fault.Errorf(fault.Invalid, "snapshot %s: its VolumeSnapshotContents are of two classes, %s and %s: delete the wrong one", handle, names[0], n)
		}
	}
	return names[0], nil
}

// Class reads a VolumeSnapshotClass. NotFound if there is none, Invalid if it is of another driver or says what is not
// understood.
func (a *API) Class(ctx context.Context, name string) (class.Class, error) {
	c, err := a.snapshots.SnapshotV1().VolumeSnapshotClasses().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return class.Class{}, fetched("VolumeSnapshotClass "+name, err)
	}
	if c.Driver != class.Driver {
		return class.Class{}, fault.Errorf(fault.Invalid, "VolumeSnapshotClass %s: it is of the driver %s, not of %s", name, c.Driver, class.Driver)
	}
	parsed, err := class.Parse(class.Snapshots, c.Parameters)
	if err != nil {
		return class.Class{}, fault.Errorf(fault.Invalid, "VolumeSnapshotClass %s: %w", name, err)
	}
	return parsed, nil
}
