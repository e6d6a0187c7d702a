package kubernetes

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute) // long on a busy machine only
	t.Cleanup(cancel)
	return ctx
}

// A snapshot of a PersistentVolume of another driver becomes ready, by the real snapshot controller and sidecar, and is
// deleted by the driver that made it.
func TestSnapshotOfAnotherDriversVolume(t *testing.T) {
	c, ctx := shared.Get(t), deadline(t)
	d, socket := serve(t, c, "snap.example")
	s, err := c.AddSidecars(ctx, Driver{Name: d.name, Socket: socket, Provisioner: true, Metadata: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, p := range s.Processes() {
			if err := p.Kill(); err != nil {
				t.Error(err)
			}
		}
	}()
	const objects = `
apiVersion: v1
kind: Secret
metadata: {name: credentials}
stringData: {key: s3cr3t}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: other}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: default, name: other}
  csi: {driver: other.example, volumeHandle: other-1}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: other}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: other, resources: {requests: {storage: 1Gi}}}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata: {name: example}
driver: snap.example
deletionPolicy: Delete
parameters: {color: red, csi.storage.k8s.io/snapshotter-secret-name: credentials, csi.storage.k8s.io/snapshotter-secret-namespace: default}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: first}
spec: {volumeSnapshotClassName: example, source: {persistentVolumeClaimName: other}}
`
	if err := c.Admin.Apply(ctx, []byte(objects)); err != nil {
		t.Fatal(err)
	}
	snapshots := c.Admin.Snapshots.SnapshotV1().VolumeSnapshots("default")
	var first *snapshotv1.VolumeSnapshot
	err = Await(ctx, "waiting for the snapshot", func(ctx context.Context) (err error) {
		first, err = snapshots.Get(ctx, "first", metav1.GetOptions{})
		if err == nil && (first.Status == nil || first.Status.ReadyToUse == nil || !*first.Status.ReadyToUse) {
			err = errors.New("not ready")
		}
		return err
	}, c.Server, c.SnapshotController)
	if err != nil {
		t.Fatal(err)
	}
	created, _ := d.asked()
	r := created[0]
	if r.Name != "snapshot-"+string(first.UID) || r.SourceVolumeId != "other-1" || r.Secrets["key"] != "s3cr3t" || r.Parameters["color"] != "red" ||
		r.Parameters["csi.storage.k8s.io/volumesnapshot/name"] != "first" || r.Parameters["csi.storage.k8s.io/volumesnapshot/namespace"] != "default" {
		t.Errorf("CreateSnapshot of %q as %q with %v", r.SourceVolumeId, r.Name, r.Parameters)
	}
	content, err := c.Admin.Snapshots.SnapshotV1().VolumeSnapshotContents().Get(ctx, *first.Status.BoundVolumeSnapshotContentName, metav1.GetOptions{})
	if err != nil || content.Status.SnapshotHandle == nil || *content.Status.SnapshotHandle != "other-1@"+r.Name {
		t.Errorf("the content: %+v, %v", content, err)
	}
	t.Run("changed blocks", func(t *testing.T) { testMetadata(t, c, s) })

	if err := snapshots.Delete(ctx, "first", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	err = Await(ctx, "waiting for the content to be gone", func(ctx context.Context) error {
		_, err := c.Admin.Snapshots.SnapshotV1().VolumeSnapshotContents().Get(ctx, content.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it is there"), err)
	}, c.Server, c.SnapshotController)
	if _, deleted := d.asked(); err != nil || len(deleted) == 0 || deleted[0].SnapshotId != *content.Status.SnapshotHandle || deleted[0].Secrets["key"] != "s3cr3t" {
		t.Errorf("deleted %v: %v", deleted, err)
	}
}

// A pod's volume is mounted by the real kubelet, on its node and nowhere else, and unmounted again.
func TestPodWithVolume(t *testing.T) {
	c, ctx := shared.Get(t), deadline(t)
	n := c.Nodes[0]
	f, err := n.AddForeign(ctx, "block.example")
	if err != nil {
		t.Fatal(err)
	}
	const objects = `
apiVersion: v1
kind: PersistentVolume
metadata: {name: blocks}
spec:
  capacity: {storage: 64Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: default, name: blocks}
  csi: {driver: block.example, volumeHandle: blk-1, fsType: ext4}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: blocks}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: blocks, resources: {requests: {storage: 64Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: user}
spec:
  nodeName: node-a
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  automountServiceAccountToken: false
  containers: [{name: main, image: any, volumeMounts: [{name: data, mountPath: /data}]}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: blocks}}]
`
	if err := c.Admin.Apply(ctx, []byte(objects)); err != nil {
		t.Fatal(err)
	}
	pods := c.Admin.Core.CoreV1().Pods("default")
	var pod *corev1.Pod
	err = Await(ctx, "waiting for the pod", func(ctx context.Context) (err error) {
		if pod, err = pods.Get(ctx, "user", metav1.GetOptions{}); err == nil && pod.Status.Phase != corev1.PodRunning {
			err = errors.New(string(pod.Status.Phase))
		}
		return err
	}, c.Server, n.Kubelet, f.Process)
	if err != nil {
		t.Fatal(err)
	}
	mount, err := n.MountPoint(ctx, pod, "blocks")
	if err != nil {
		t.Fatal(err)
	}
	written := filepath.Join(mount, "written")
	if err := n.Inside(func() error { return os.WriteFile(written, []byte("by a pod"), 0o600) }); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(written); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mount is seen outside of the node: %v", err)
	}
	const plugins = "/var/lib/kubelet/device-plugins/kubelet.sock" // whatever the kubelet's folder is
	if err := n.Inside(func() error { _, err := os.Stat(plugins); return err }); err != nil {
		t.Errorf("it is no longer so that the kubelet writes there: %v", err)
	}
	if info, err := os.Stat(plugins); err == nil && info.ModTime().After(began) {
		t.Errorf("the kubelet writes to this machine's %s", plugins)
	}
	data, err := os.ReadFile(filepath.Join(filepath.Dir(mount), "vol_data.json"))
	if err != nil || !strings.Contains(string(data), `"volumeHandle":"blk-1"`) {
		t.Errorf("what the kubelet keeps of the volume: %s, %v", data, err)
	}
	if err := pods.Delete(ctx, "user", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	err = Await(ctx, "waiting for the volume to be unmounted", func(context.Context) error {
		if _, err := os.Stat(mount); !errors.Is(err, os.ErrNotExist) {
			return errors.Join(errors.New("it is there"), err)
		}
		return nil
	}, n.Kubelet, f.Process)
	if err != nil {
		t.Error(err)
	}
}

func TestServiceAccountHasItsRightsOnly(t *testing.T) {
	c, ctx := shared.Get(t), deadline(t)
	user, err := c.ServiceAccount(ctx, "default", "reader", []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := user.Core.CoreV1().Pods("default").List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("what it may: %v", err)
	}
	if _, err := user.Core.CoreV1().Secrets("default").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("what it may not: %v", err)
	}
}

// The API server can hang, die and come back.
func TestServerGone(t *testing.T) {
	c, ctx := shared.Get(t), deadline(t)
	ask := func(limit time.Duration) error {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		_, err := c.Admin.Core.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
		return err
	}
	if err := ask(time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := c.Server.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := ask(200 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("paused, it answers: %v", err)
	}
	if err := c.Server.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := c.Answers(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Server.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := ask(time.Minute); err == nil {
		t.Error("dead, it answers")
	}
	if err := c.Server.Start(); err != nil {
		t.Fatal(err)
	}
	if err := c.Answers(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Nodes[0].Ready(ctx); err != nil {
		t.Error(err)
	}
}

// A server of this machine is reached from inside, and only where it was brought.
func TestBring(t *testing.T) {
	c, ctx := shared.Get(t), deadline(t)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "from outside") }))
	defer server.Close()
	outside := strings.TrimPrefix(server.URL, "http://")
	if _, err := c.Dial(ctx, "tcp", outside); err == nil {
		t.Fatal("the network of the cluster is not its own")
	}
	inside, err := c.Bring(ctx, outside)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: c.Dial}}
	defer client.CloseIdleConnections()
	answer, err := client.Get("http://" + inside)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if body, err := io.ReadAll(answer.Body); string(body) != "from outside" {
		t.Errorf("%q, %v", body, err)
	}
}
