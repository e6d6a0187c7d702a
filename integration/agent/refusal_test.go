package agent

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What is wrong with a class or its volume is told on the VolumeSnapshot, in words, and nothing is left in the pool.
func TestRefusals(t *testing.T) {
	p := in(t, "refusals")
	p.foreignClaim("data")
	p.apply(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: unknown-driver}
spec:
  capacity: {storage: 64Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: refusals, name: unknown-driver}
  csi: {driver: unknown.example, volumeHandle: vol-1}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: unknown-driver, namespace: refusals}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: unknown-driver, resources: {requests: {storage: 64Mi}}}
`)
	p.foreignClaimOf("outside", "..")
	for name, c := range map[string]struct{ parameters, claim, says string }{
		"misspelt-adapter": {"snap.stillpoint.io/adapter: relfink", "data", `did you mean "reflink"`},
		"other-adapter":    {"snap.stillpoint.io/adapter: lvm-thin", "data", `no backend of the adapter "lvm-thin" is configured`},
		"unknown-key":      {"snap.stillpoint.io/adaptor: reflink", "data", `did you mean "snap.stillpoint.io/adapter"`},
		"other-backend":    {"snap.stillpoint.io/backend: file", "data", `did you mean "files"`},
		"unknown-driver":   {"snap.stillpoint.io/adapter: reflink", "unknown-driver", `CSI driver "unknown.example" is none of the adapter reflink`},
		"no-such-volume":   {"snap.stillpoint.io/adapter: reflink", "data", `in none of the backend's pools`}, // nobody has mounted it yet
		"hostile-handle":   {"snap.stillpoint.io/adapter: reflink", "outside", `a handle of that driver is the name of a folder`},
	} {
		t.Run(name, func(t *testing.T) {
			p := p
			p.t = t
			p.apply(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata: {name: %s}
driver: snap.stillpoint.io
deletionPolicy: Delete
parameters: {%s}
`, name, c.parameters)
			p.snapshot(name, c.claim, name)
			if said := strings.ReplaceAll(p.refused(name), `\`, ""); !strings.Contains(said, c.says) {
				t.Errorf("it says %q, not %q", said, c.says)
			}
			p.must(p.Admin.Snapshots.SnapshotV1().VolumeSnapshots(p.namespace).Delete(p.ctx, name, metav1.DeleteOptions{}))
			p.gone("the snapshot", func() error {
				_, err := p.Admin.Snapshots.SnapshotV1().VolumeSnapshots(p.namespace).Get(p.ctx, name, metav1.GetOptions{})
				return err
			})
		})
	}
}

// refused waits until a VolumeSnapshot has an error, and returns it.
func (p place) refused(name string) (message string) {
	p.t.Helper()
	p.until("the snapshot "+name+" has an error", func() error {
		s, err := p.Admin.Snapshots.SnapshotV1().VolumeSnapshots(p.namespace).Get(p.ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s.Status == nil || s.Status.Error == nil || s.Status.Error.Message == nil || !strings.Contains(*s.Status.Error.Message, "rpc error") {
			return fmt.Errorf("its status is %+v", s.Status)
		}
		message = *s.Status.Error.Message
		return nil
	})
	return message
}

// A content that somebody wrote by hand names what is not ours, a file beside our snapshots: it is not ready, and when it is
// deleted with the policy Delete, the file stays.
func TestContentOfWhatIsNotOurs(t *testing.T) {
	p := in(t, "hands")
	p.foreignClaim("data")
	p.pod("data")
	p.snapshot("ours", "data", "plain")
	_, ours := p.ready("ours")
	file := p.file(*ours.Status.SnapshotHandle)
	name := (*ours.Status.SnapshotHandle)[strings.LastIndexByte(*ours.Status.SnapshotHandle, '@')+1:]
	stranger := strings.TrimSuffix(file, name) + "theirs"
	p.must(p.node.Inside(func() error { return exec.CommandContext(p.ctx, "cp", file, stranger).Run() })) // without our mark
	p.apply(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata: {name: by-hand}
spec:
  driver: snap.stillpoint.io
  deletionPolicy: Delete
  volumeSnapshotClassName: plain
  source: {snapshotHandle: "%s"}
  volumeSnapshotRef: {name: by-hand, namespace: hands}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: by-hand, namespace: hands}
spec: {volumeSnapshotClassName: plain, source: {volumeSnapshotContentName: by-hand}}
`, strings.TrimSuffix(*ours.Status.SnapshotHandle, name)+"theirs")
	contents := p.Admin.Snapshots.SnapshotV1().VolumeSnapshotContents()
	p.until("the sidecar has looked at it", func() error {
		c, err := contents.Get(p.ctx, "by-hand", metav1.GetOptions{})
		if err == nil && (c.Status == nil || c.Status.ReadyToUse == nil && c.Status.Error == nil) {
			err = errors.New("it has no status")
		}
		if err == nil && c.Status.ReadyToUse != nil && *c.Status.ReadyToUse {
			t.Error("it is ready")
		}
		return err
	})
	p.must(p.Admin.Snapshots.SnapshotV1().VolumeSnapshots(p.namespace).Delete(p.ctx, "by-hand", metav1.DeleteOptions{}))
	p.must(contents.Delete(p.ctx, "by-hand", metav1.DeleteOptions{}))
	p.gone("the content", func() error { _, err := contents.Get(p.ctx, "by-hand", metav1.GetOptions{}); return err })
	p.must(p.node.Inside(func() error { return exec.CommandContext(p.ctx, "test", "-s", stranger).Run() }))
}
