package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/kubernetes"
)

const objects = `
apiVersion: v1
kind: Secret
metadata: {name: store}
stringData: {access-key: a, secret-key: b, passphrase: c}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: data}
spec:
  capacity: {storage: 64Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: default, name: data}
  csi: {driver: block.example, volumeHandle: blk-1, fsType: ext4, volumeAttributes: {pool: p}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: data, resources: {requests: {storage: 64Mi}}}
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
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata: {name: offsite}
driver: snap.stillpoint.io
deletionPolicy: Delete
parameters:
  snap.stillpoint.io/adapter: example
  snap.stillpoint.io/type: S3
  snap.stillpoint.io/remote-name: offsite
  snap.stillpoint.io/s3-bucket: backups
  snap.stillpoint.io/s3-endpoint: s3.example
  csi.storage.k8s.io/snapshotter-secret-name: store
  csi.storage.k8s.io/snapshotter-secret-namespace: default
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: first}
spec: {volumeSnapshotClassName: offsite, source: {persistentVolumeClaimName: data}}
`

// From the VolumeSnapshot that somebody makes to its volume, its node, the kubelet's mount and its class, with the rights
// of the agent's service account and no others: the calls are those of the real sidecar, the kubelet is real.
func TestSnapshotIsLookedUp(t *testing.T) {
	c := cluster.Get(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute) // long on a busy machine only
	defer cancel()
	agent, err := c.ServiceAccount(ctx, "default", "agent", Rights())
	if err != nil {
		t.Fatal(err)
	}
	api, err := New(agent.Config)
	if err != nil {
		t.Fatal(err)
	}
	node := c.Nodes[0]
	if _, err := node.AddForeign(ctx, "block.example"); err != nil {
		t.Fatal(err)
	}
	calls := make(chan call, 100)
	if _, err := c.AddSidecars(ctx, kubernetes.Driver{Name: class.Driver, Socket: listen(t, c, calls)}); err != nil {
		t.Fatal(err)
	}
	if err := c.Admin.Apply(ctx, []byte(objects)); err != nil {
		t.Fatal(err)
	}
	var asked call
	select {
	case asked = <-calls:
	case <-ctx.Done():
		t.Fatal("the sidecar asks for no snapshot")
	}
	o, err := class.OriginOf(asked.request.Parameters, asked.request.Name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := class.Parse(class.Snapshots, asked.request.Parameters); err != nil {
		t.Errorf("the parameters of a real call: %v", err)
	}
	if _, err := class.ParseSecrets(asked.request.Secrets); err != nil {
		t.Errorf("the secrets of a real call: %v", err)
	}
	source, err := api.Source(ctx, o, asked.request.SourceVolumeId)
	if err != nil {
		t.Fatal(err)
	}
	if p := source.Persistent; source.Volume != "data" || source.Claim != "data" || source.Filesystem != "ext4" || p.Driver != "block.example" || p.Handle != "blk-1" || p.Attributes["pool"] != "p" {
		t.Errorf("%+v", source)
	}
	if _, err := api.Source(ctx, o, "blk-2"); !errors.Is(err, fault.Invalid) {
		t.Errorf("with the handle of somebody else's volume: %v", err)
	}
	gone := o
	gone.Name = "none"
	if _, err := api.Source(ctx, gone, "blk-1"); !errors.Is(err, fault.NotFound) {
		t.Errorf("of a snapshot that is not there: %v", err)
	}

	pod, err := c.Admin.Core.CoreV1().Pods("default").Get(ctx, "user", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mount, err := node.MountPoint(ctx, pod, "data")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Kubelet(node.Root).Published("block.example", "blk-1"); err != nil || !reflect.DeepEqual(got, []Published{{Path: mount, Volume: "data", Pod: string(pod.UID)}}) {
		t.Errorf("the kubelet has it at %+v, %v", got, err)
	}

	asked.answer <- "example:p/blk-1@" + "s1"
	name, parsed := "", class.Class{}
	for err = errors.New("not yet"); err != nil && ctx.Err() == nil; time.Sleep(20 * time.Millisecond) { // until the sidecar has written the handle
		name, parsed, err = api.ClassOf(ctx, "example:p/blk-1@s1")
	}
	if err != nil || name != "offsite" || parsed.Backup == nil || parsed.Backup.Bucket.Name != "backups" {
		t.Errorf("class %q, %+v, %v", name, parsed, err)
	}
	if _, _, err := api.ClassOf(ctx, "example:p/blk-1@s2"); !errors.Is(err, fault.NotFound) {
		t.Errorf("another handle: %v", err)
	}

	if handle, err := api.VolumeHandle(ctx, asked.request.Name); handle != "blk-1" || err != nil {
		t.Errorf("the volume's handle: %q, %v", handle, err)
	}
	if _, err := api.VolumeHandle(ctx, "snapshot-00000000-0000-0000-0000-000000000000"); !errors.Is(err, fault.NotFound) {
		t.Errorf("the volume of a snapshot that is not there: %v", err)
	}
	if err := api.Related(ctx, "example:p/blk-1@s1", "example:p/blk-1@s1"); err != nil {
		t.Errorf("a snapshot and itself: %v", err)
	}
	if err := api.Related(ctx, "example:p/blk-1@s2", "example:p/blk-1@s1"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a snapshot that is not there as the base: %v", err)
	}

	t.Run("node", func(t *testing.T) { testPlace(t, c, api, source) })
	t.Run("events", func(t *testing.T) { testEvents(t, c, api, o) })
	t.Run("least rights", func(t *testing.T) { testLeastRights(t, c, source) })
}

// testPlace: attachments count more than pods, pods more than affinity.
func testPlace(t *testing.T, c *kubernetes.Cluster, api *API, source Source) {
	ctx := t.Context()
	if p, err := api.Place(ctx, source); err != nil || !reflect.DeepEqual(p, Place{[]string{"node-a"}, InUse}) {
		t.Errorf("%+v, %v", p, err)
	}
	attachments := c.Admin.Core.StorageV1().VolumeAttachments()
	a, err := attachments.Create(ctx, &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "data"},
		Spec: storagev1.VolumeAttachmentSpec{Attacher: "block.example", NodeName: "node-z", Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &source.Volume}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if p, err := api.Place(ctx, source); err != nil || p.Evidence != InUse {
		t.Errorf("being attached: %+v, %v", p, err)
	}
	a.Status.Attached = true
	if _, err := attachments.UpdateStatus(ctx, a, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if p, err := api.Place(ctx, source); err != nil || !reflect.DeepEqual(p, Place{[]string{"node-z"}, Attached}) {
		t.Errorf("attached: %+v, %v", p, err)
	}
	if err := attachments.Delete(ctx, "data", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// testEvents: an event is on the snapshot, and is counted when it is told again, by whomever.
func testEvents(t *testing.T, c *kubernetes.Cluster, api *API, o class.Origin) {
	told := Frozen(1, 12*time.Millisecond)
	seen := func(count int32) {
		t.Helper()
		var last []corev1.Event
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			list, err := c.Admin.Core.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + o.UID + ",reason=" + told.Reason})
			if err != nil {
				t.Fatal(err)
			}
			if last = list.Items; len(last) == 1 && last[0].Message == told.Message && last[0].Count == count && last[0].InvolvedObject.Name == o.Name {
				return
			}
		}
		t.Fatalf("not %d times: %+v", count, last)
	}
	r := api.NewRecorder("stillpoint-agent", "node-a")
	defer func() { r.Close() }()
	r.Tell(o, told)
	seen(1)
	r.Tell(o, told)
	seen(2)
	if err := c.Server.Pause(); err != nil {
		t.Fatal(err)
	}
	r.Tell(o, told) // it does not wait
	if err := c.Server.Resume(); err != nil {
		t.Fatal(err)
	}
	seen(3)
	r.Tell(class.Origin{Namespace: "none", Name: "x", UID: "y"}, told)
	for end := time.Now().Add(30 * time.Second); r.Lost() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("what the server refuses is not lost")
		}
	}
	r.Close()
	r = api.NewRecorder("stillpoint-agent", "node-b")
	r.Tell(o, told)
	r.Tell(o, told)
	seen(4) // the second knows what the server said of the first
}

// testLeastRights: without any single right something does not work.
func testLeastRights(t *testing.T, c *kubernetes.Cluster, source Source) {
	ctx := t.Context()
	affine := source // what nothing uses, so that every way to its node is tried
	affine.Claim = "none"
	pv, err := c.Admin.Core.CoreV1().PersistentVolumes().Get(ctx, "data", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pv.ObjectMeta = metav1.ObjectMeta{Name: "affine"}
	pv.Spec.ClaimRef, pv.Spec.NodeAffinity = nil, &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
		MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: []string{"node-a"}}}}}}}
	if _, err := c.Admin.Core.CoreV1().PersistentVolumes().Create(ctx, pv, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	affine.Volume = "affine"
	everything := func(api *API) error {
		_, err := api.Source(ctx, source.Origin, source.Persistent.Handle)
		p, errPlace := api.Place(ctx, affine)
		if errPlace == nil && !reflect.DeepEqual(p, Place{[]string{"node-a"}, Reaches}) {
			errPlace = fmt.Errorf("it is at %+v", p)
		}
		_, errClass := api.Class(ctx, "offsite")
		_, errContents := api.Contents(ctx, "x")
		_, errHandle := api.VolumeHandle(ctx, "snapshot-"+source.Origin.UID)
		r := &Recorder{api: api, counts: map[string]int32{}}
		e := told{source.Origin, Event{corev1.EventTypeNormal, "Tried", "Tried."}, time.Now()}
		return errors.Join(err, errPlace, errClass, errContents, errHandle, r.try(ctx, e), r.try(ctx, e))
	}
	as := func(name string, rules []rbacv1.PolicyRule) *API {
		client, err := c.ServiceAccount(ctx, "default", name, rules)
		if err != nil {
			t.Fatal(err)
		}
		api, err := New(client.Config)
		if err != nil {
			t.Fatal(err)
		}
		return api
	}
	if err := everything(as("all", Rights())); err != nil {
		t.Fatalf("with all rights: %v", err)
	}
	for i, rule := range single(Rights()) {
		rest := slices.Delete(single(Rights()), i, i+1)
		what := fmt.Sprintf("%s %s", rule.Verbs[0], rule.Resources[0])
		err := everything(as(fmt.Sprintf("lacks-%d", i), rest))
		if err == nil || !strings.Contains(err.Error(), "cannot "+rule.Verbs[0]+` resource "`+rule.Resources[0]+`"`) {
			t.Errorf("without the right to %s: %v", what, err)
		}
	}
}

// single splits rules into those of one resource and one verb.
func single(rules []rbacv1.PolicyRule) (all []rbacv1.PolicyRule) {
	for _, r := range rules {
		for _, resource := range r.Resources {
			for _, verb := range r.Verbs {
				all = append(all, rbacv1.PolicyRule{APIGroups: r.APIGroups, Resources: []string{resource}, Verbs: []string{verb}})
			}
		}
	}
	return all
}

// call is a CreateSnapshot of the sidecar's, which waits for the handle that it is answered with.
type call struct {
	request *csi.CreateSnapshotRequest
	answer  chan string
}

// controller is what the sidecar speaks to.
type controller struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	calls chan<- call
}

// listen serves a controller until the test ends, and returns its socket.
func listen(t *testing.T, c *kubernetes.Cluster, calls chan<- call) string {
	t.Helper()
	dir, err := c.Folder()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "csi.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	csi.RegisterIdentityServer(s, &controller{calls: calls})
	csi.RegisterControllerServer(s, &controller{calls: calls})
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

func (c *controller) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: class.Driver, VendorVersion: "1"}, nil
}

func (c *controller) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (c *controller) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{{Type: &csi.PluginCapability_Service_{
		Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}}}}}, nil
}

func (c *controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: []*csi.ControllerServiceCapability{{Type: &csi.ControllerServiceCapability_Rpc{
		Rpc: &csi.ControllerServiceCapability_RPC{Type: csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT}}}}}, nil
}

func (c *controller) CreateSnapshot(ctx context.Context, r *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	answer := make(chan string)
	c.calls <- call{r, answer}
	select {
	case handle := <-answer:
		return &csi.CreateSnapshotResponse{Snapshot: &csi.Snapshot{SnapshotId: handle, SourceVolumeId: r.SourceVolumeId, SizeBytes: 64 << 20, CreationTime: timestamppb.Now(), ReadyToUse: true}}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
