// Package agent has the tests of the real agent on a real Kubernetes: its program on the nodes, the standard sidecars and
// snapshot controller beside it, kubelets that mount its volumes and those of a foreign driver.
package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stillpoint.io/stillpoint/agent/kube"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/integration/kubernetes"
	"stillpoint.io/stillpoint/integration/lab"
)

// foreign is the CSI driver of somebody else's whose volumes are snapshotted: files in a pool that the reflink adapter knows.
const foreign = "rawfile.csi.openebs.io"

var (
	cluster  = kubernetes.Shared{Options: kubernetes.Options{Nodes: 1}}
	programs string // the folder of stillpoint and stillpoint-freezer
	theWorld world
)

func TestMain(m *testing.M) {
	kubernetes.Init()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if programs, err = os.MkdirTemp("", "stillpoint-"); err != nil {
		return 1, err
	}
	code = m.Run()
	return code, errors.Join(cluster.Close(), os.RemoveAll(programs))
}

// world is a cluster with the agent on its nodes.
type world struct {
	*kubernetes.Cluster
	node     *kubernetes.Node
	agent    *kubernetes.Process
	sidecars *kubernetes.Sidecars
	pool     string // the foreign driver's files, and ours in the folder made

	once sync.Once
	err  error
}

// get gives the world, which all tests share: each works in a namespace of its own.
func get(t *testing.T) *world {
	t.Helper()
	c := cluster.Get(t)
	w := &theWorld
	w.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // long on a busy machine only
		defer cancel()
		w.Cluster, w.node = c, c.Nodes[0]
		w.err = w.start(ctx)
	})
	if w.err != nil {
		t.Fatal(w.err)
	}
	return w
}

func (w *world) start(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "go", "build", "-o", programs+"/", "stillpoint.io/stillpoint/cmd/...").CombinedOutput()
	if err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	w.pool = w.node.ForeignImages(foreign)
	if err := w.node.Inside(func() error { return mountPool(ctx, w.node.Root+"/../pool.img", w.pool) }); err != nil {
		return err
	}
	if _, err := w.node.AddForeign(ctx, foreign); err != nil {
		return err
	}
	if err := w.Admin.Apply(ctx, []byte(objects)); err != nil {
		return err
	}
	folder, err := w.Folder()
	if err != nil {
		return err
	}
	account, err := w.ServiceAccount(ctx, "default", "stillpoint", kube.Rights())
	if err != nil {
		return err
	}
	kubeconfig, err := w.Kubeconfig(account)
	if err != nil {
		return err
	}
	config, socket := filepath.Join(folder, "config.yaml"), filepath.Join(folder, "csi.sock")
	if err := os.WriteFile(config, fmt.Appendf(nil, "backends:\n  files:\n    adapter: reflink\n    parameters: {pools: %q, volumes: %q}\n", w.pool, w.pool+"/made"), 0o600); err != nil {
		return err
	}
	environment := []string{"STILLPOINT_RUN=" + filepath.Join(folder, "run"), "PATH=" + programs + ":" + os.Getenv("PATH")}
	w.agent, err = w.node.Start("agent", environment, filepath.Join(programs, "stillpoint"), "agent", "--config", config, "--endpoint", "unix://"+socket,
		"--node", w.node.Name, "--kubernetes", kubeconfig)
	if err != nil {
		return err
	}
	if err := kubernetes.Await(ctx, "waiting until the agent serves", func(context.Context) error { _, err := os.Stat(socket); return err }, w.agent); err != nil {
		return err
	}
	if err := w.node.Register(ctx, class.Driver, socket, w.agent); err != nil {
		return err
	}
	w.sidecars, err = w.AddSidecars(ctx, kubernetes.Driver{Name: class.Driver, Socket: socket, Provisioner: true, Metadata: true})
	return err
}

// mountPool makes an XFS in a file and mounts it where this thread is.
func mountPool(ctx context.Context, file, at string) error {
	if err := errors.Join(lab.Sparse(file, 4<<30), lab.Mkfs(ctx, "xfs", file)); err != nil {
		return err
	}
	fs := lab.Filesystem{File: file, Mount: at, Type: "xfs"}
	if err := fs.Up(); err != nil {
		return err
	}
	return os.Mkdir(at+"/made", 0o700)
}

// objects are what every test has.
const objects = `
apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: snap.stillpoint.io}
spec: {attachRequired: false, fsGroupPolicy: File}
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: files}
provisioner: snap.stillpoint.io
allowVolumeExpansion: true
parameters: {snap.stillpoint.io/adapter: reflink}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata: {name: plain}
driver: snap.stillpoint.io
deletionPolicy: Delete
parameters: {snap.stillpoint.io/adapter: reflink}
`

// place is a namespace, and the calls that a test makes in it.
type place struct {
	*world
	t         *testing.T
	ctx       context.Context
	namespace string
}

// in gives a test a namespace of its own.
func in(t *testing.T, namespace string) place {
	w := get(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute) // long on a busy machine only
	t.Cleanup(cancel)
	p := place{w, t, ctx, namespace}
	_, err := w.Admin.Core.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	p.must(err)
	return p
}

func (p place) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// until waits until done returns nil.
func (p place) until(what string, done func() error) {
	p.t.Helper()
	p.must(kubernetes.Await(p.ctx, "waiting until "+what, func(context.Context) error { return done() }, p.agent, p.Server))
}

// gone waits until the API server has an object no more.
func (p place) gone(what string, get func() error) {
	p.t.Helper()
	p.until(what+" is gone", func() error {
		err := get()
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it is there"), err)
	})
}

// apply makes objects, in the namespace if they are of one.
func (p place) apply(format string, args ...any) {
	p.t.Helper()
	p.must(p.Admin.Apply(p.ctx, fmt.Appendf(nil, format, args...)))
}

// foreignClaim makes a claim of that name with a volume of the foreign driver, and a handle of its own.
func (p place) foreignClaim(name string) (handle string) {
	p.t.Helper()
	handle = p.namespace + "-" + name
	p.foreignClaimOf(name, handle)
	return handle
}

// foreignClaimOf makes a claim with a volume of the foreign driver that has the handle.
func (p place) foreignClaimOf(name, handle string) {
	p.t.Helper()
	p.apply(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[2]s-%[3]s}
spec:
  capacity: {storage: 64Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: %[2]s, name: %[3]s}
  csi: {driver: %[4]s, volumeHandle: %[1]s, fsType: ext4}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %[3]s, namespace: %[2]s}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: %[2]s-%[3]s, resources: {requests: {storage: 64Mi}}}
`, handle, p.namespace, name, foreign)
}

// ownClaim makes a claim of our StorageClass, of a snapshot if one is named.
func (p place) ownClaim(name, snapshot string) {
	p.t.Helper()
	source := ""
	if snapshot != "" {
		source = fmt.Sprintf(", dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: %s}", snapshot)
	}
	p.apply(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s, namespace: %s}
spec: {accessModes: [ReadWriteOnce], storageClassName: files, resources: {requests: {storage: 64Mi}}%s}
`, name, p.namespace, source)
}

// pod makes a pod of the claim's name that uses it, and returns where the kubelet has mounted it.
func (p place) pod(claim string) (mount string) {
	p.t.Helper()
	p.apply(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  nodeName: %[3]s
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  automountServiceAccountToken: false
  containers: [{name: main, image: any, volumeMounts: [{name: data, mountPath: /data}]}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: %[1]s}}]
`, claim, p.namespace, p.node.Name)
	var pod *corev1.Pod
	var volume string
	p.until("the pod "+claim+" runs", func() (err error) {
		if pod, err = p.Admin.Core.CoreV1().Pods(p.namespace).Get(p.ctx, claim, metav1.GetOptions{}); err != nil {
			return err
		}
		c, err := p.Admin.Core.CoreV1().PersistentVolumeClaims(p.namespace).Get(p.ctx, claim, metav1.GetOptions{})
		if err == nil && (pod.Status.Phase != corev1.PodRunning || c.Spec.VolumeName == "") {
			err = fmt.Errorf("it is %s, its claim has the volume %q", pod.Status.Phase, c.Spec.VolumeName)
		}
		volume = c.Spec.VolumeName
		return err
	})
	mount, err := p.node.MountPoint(p.ctx, pod, volume)
	p.must(err)
	return mount
}

// removePod deletes a pod and waits until its volume is unmounted.
func (p place) removePod(name, mount string) {
	p.t.Helper()
	p.must(p.Admin.Core.CoreV1().Pods(p.namespace).Delete(p.ctx, name, metav1.DeleteOptions{}))
	p.until("the volume of the pod "+name+" is unmounted", func() error {
		if _, err := os.Stat(mount); !errors.Is(err, os.ErrNotExist) {
			return errors.Join(errors.New("it is there"), err)
		}
		return nil
	})
}

// snapshot makes a VolumeSnapshot.
func (p place) snapshot(name, claim, class string) {
	p.t.Helper()
	p.apply(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: %s, namespace: %s}
spec: {volumeSnapshotClassName: %s, source: {persistentVolumeClaimName: %s}}
`, name, p.namespace, class, claim)
}

// ready waits until a VolumeSnapshot is ready, and returns it with its content.
func (p place) ready(name string) (s *snapshotv1.VolumeSnapshot, c *snapshotv1.VolumeSnapshotContent) {
	p.t.Helper()
	snapshots := p.Admin.Snapshots.SnapshotV1()
	p.until("the snapshot "+name+" is ready", func() (err error) {
		if s, err = snapshots.VolumeSnapshots(p.namespace).Get(p.ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		if s.Status == nil || s.Status.ReadyToUse == nil || !*s.Status.ReadyToUse || s.Status.BoundVolumeSnapshotContentName == nil {
			return fmt.Errorf("its status is %+v", s.Status)
		}
		c, err = snapshots.VolumeSnapshotContents().Get(p.ctx, *s.Status.BoundVolumeSnapshotContentName, metav1.GetOptions{})
		return err
	})
	return s, c
}

// write writes a file on the node as a pod would, and read reads one.
func (p place) write(path, content string) {
	p.t.Helper()
	p.must(p.node.Inside(func() error { return os.WriteFile(path, []byte(content), 0o600) }))
}

func (p place) read(path string) (content string) {
	p.t.Helper()
	p.must(p.node.Inside(func() error {
		b, err := os.ReadFile(path)
		content = string(b)
		return err
	}))
	return content
}

// file is the file of a snapshot in the pool, by its handle.
func (p place) file(handle string) string {
	p.t.Helper()
	var found []string
	p.must(p.node.Inside(func() (err error) {
		found, err = filepath.Glob(p.pool + "/.stillpoint/*." + handle[strings.LastIndexByte(handle, '@')+1:])
		return err
	}))
	if len(found) != 1 {
		p.t.Fatalf("the files of the snapshot %s are %v", handle, found)
	}
	return found[0]
}

// told waits for an event on a VolumeSnapshot, and returns its message.
func (p place) told(snapshot, reason string) (message string) {
	p.t.Helper()
	p.until("there is an event "+reason+" on "+snapshot, func() error {
		list, err := p.Admin.Core.CoreV1().Events(p.namespace).List(p.ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + snapshot + ",reason=" + reason})
		if err != nil {
			return err
		}
		if len(list.Items) == 0 {
			return errors.New("there is none")
		}
		message = list.Items[len(list.Items)-1].Message
		return nil
	})
	return message
}
