package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"stillpoint.io/stillpoint/integration/lab"
)

// agent is a running agent, and a client of it.
type agent struct {
	cmd    *exec.Cmd
	words  bytes.Buffer
	waited sync.Once
	ended  error

	csipb.IdentityClient
	csipb.ControllerClient
	csipb.GroupControllerClient
	csipb.NodeClient
}

// startAgent starts one and waits until it is ready.
func startAgent(t *testing.T, bin, config, socket string, more ...string) *agent {
	t.Helper()
	a := &agent{}
	a.cmd = exec.Command(filepath.Join(bin, "stillpoint"), append([]string{"agent", "--config", config, "--endpoint", "unix://" + socket, "--node", "node-a"}, more...)...)
	a.cmd.Stderr = &a.words
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.cmd.Process.Kill()
		a.wait()
		if t.Failed() {
			t.Logf("the agent said: %s", a.words.String())
		}
	})
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	a.IdentityClient, a.ControllerClient = csipb.NewIdentityClient(conn), csipb.NewControllerClient(conn)
	a.GroupControllerClient, a.NodeClient = csipb.NewGroupControllerClient(conn), csipb.NewNodeClient(conn)
	r, err := a.Probe(t.Context(), &csipb.ProbeRequest{}, grpc.WaitForReady(true))
	if err != nil || !r.GetReady().GetValue() {
		t.Fatalf("probe: %v, %v", r, err)
	}
	return a
}

func (a *agent) wait() error {
	a.waited.Do(func() { a.ended = a.cmd.Wait() })
	return a.ended
}

func mounting(fstype string) *csipb.VolumeCapability {
	return &csipb.VolumeCapability{
		AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{FsType: fstype}},
	}
}

// pod is what the kubelet does for a pod with a volume, and undoes.
type pod struct {
	*agent
	volume, staged, target string
	use                    *csipb.VolumeCapability
	readOnly               bool
}

func (p pod) start(t *testing.T) {
	t.Helper()
	for range 2 { // every call may be repeated
		_, err := p.NodeStageVolume(t.Context(), &csipb.NodeStageVolumeRequest{VolumeId: p.volume, StagingTargetPath: p.staged, VolumeCapability: p.use})
		ok(t, err)
		_, err = p.NodePublishVolume(t.Context(), &csipb.NodePublishVolumeRequest{VolumeId: p.volume, StagingTargetPath: p.staged, TargetPath: p.target, VolumeCapability: p.use, Readonly: p.readOnly})
		ok(t, err)
	}
}

func (p pod) stop(t *testing.T) {
	t.Helper()
	for range 2 {
		_, err := p.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: p.volume, TargetPath: p.target})
		ok(t, err)
		_, err = p.NodeUnstageVolume(t.Context(), &csipb.NodeUnstageVolumeRequest{VolumeId: p.volume, StagingTargetPath: p.staged})
		ok(t, err)
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// site is an agent over a pool.
type site struct {
	*lab.Lab
	bin, config, socket, pool string
}

func newSite(t *testing.T, bin, fstype string) site {
	t.Helper()
	s := site{Lab: lab.Test(t), bin: bin}
	environment(t, s.Dir)
	pool, err := s.Pool(t.Context(), "pool", fstype, 8<<30)
	ok(t, err)
	s.pool, s.socket, s.config = pool.Mount, filepath.Join(s.Dir, "csi.sock"), filepath.Join(s.Dir, "config.yaml")
	ok(t, os.WriteFile(s.config, fmt.Appendf(nil, "backends:\n  files:\n    adapter: reflink\n    parameters: {pools: %q, volumes: %q}\n", pool.Mount, pool.Mount), 0o600))
	return s
}

func (s site) create(t *testing.T, a *agent, name string, size int64, source *csipb.VolumeContentSource) string {
	t.Helper()
	r, err := a.CreateVolume(t.Context(), &csipb.CreateVolumeRequest{Name: name, CapacityRange: &csipb.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csipb.VolumeCapability{mounting("")}, VolumeContentSource: source, Parameters: map[string]string{"snap.stillpoint.io/adapter": "reflink"}})
	ok(t, err)
	return r.GetVolume().GetVolumeId()
}

func (s site) pod(a *agent, volume, name, fstype string) pod {
	return pod{agent: a, volume: volume, staged: filepath.Join(s.Dir, "staged-"+name), target: filepath.Join(s.Dir, "target-"+name), use: mounting(fstype)}
}

func (s site) left(t *testing.T) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	ok(t, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, s.Dir+"/staged") || strings.Contains(line, s.Dir+"/target") {
			t.Errorf("left mounted: %s", line)
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && strings.HasPrefix(string(b), s.pool+"/") {
			t.Errorf("left attached: %s to %s", b, l)
		}
	}
	files, err := os.ReadDir(s.pool)
	ok(t, err)
	for _, f := range files {
		if f.Name() != ".stillpoint" {
			t.Errorf("left in the pool: %s", f.Name())
		}
	}
}

// The agent as a program, over a pool of files.
func TestAgent(t *testing.T) {
	if testing.Short() {
		t.Skip("needs real filesystems: left out by -short, `make test` runs it")
	}
	bin := programs(t)
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run("volumes/"+fstype, func(t *testing.T) { agentServesVolumes(t, bin, fstype) })
	}
	t.Run("groups", func(t *testing.T) { agentServesGroups(t, bin) })
	t.Run("killed and stopped", func(t *testing.T) { agentKilledAndStopped(t, bin) })
}

// What a user of Kubernetes does, on each filesystem: a volume is made, mounted and written to, snapshotted while it is
// written to, restored and cloned beside the original, grown, and removed, and nothing is left. (An ext4 is grown while it is
// mounted only by who has CAP_SYS_RESOURCE, which containers seldom have: package integration/thin grows it in a guest.)
func agentServesVolumes(t *testing.T, bin, fstype string) {
	const size = 512 << 20
	larger := int64(2 * size)
	if fstype == "ext4" {
		larger = size
	}
	s := newSite(t, bin, "xfs")
	a := startAgent(t, s.bin, s.config, s.socket)
	volume := s.create(t, a, "pvc-one", size, nil)
	one := s.pod(a, volume, "one", fstype)
	one.start(t)
	file := filepath.Join(one.target, "file")
	ok(t, os.WriteFile(file, []byte("before"), 0o600))

	taken, err := a.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: "snapshot-1", SourceVolumeId: volume})
	ok(t, err)
	ok(t, os.WriteFile(file, []byte("after"), 0o600))
	from := &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Snapshot{Snapshot: &csipb.VolumeContentSource_SnapshotSource{SnapshotId: taken.GetSnapshot().GetSnapshotId()}}}
	of := &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Volume{Volume: &csipb.VolumeContentSource_VolumeSource{VolumeId: volume}}}
	restored, cloned := s.pod(a, s.create(t, a, "pvc-two", larger, from), "two", fstype), s.pod(a, s.create(t, a, "pvc-three", size, of), "three", fstype)
	restored.start(t) // beside its original, whose UUID it has
	cloned.readOnly = true
	cloned.start(t)
	for at, want := range map[string]string{restored.target: "before", cloned.target: "after", one.target: "after"} {
		if b, err := os.ReadFile(filepath.Join(at, "file")); string(b) != want {
			t.Errorf("%s holds %q, not %q, %v", at, b, want, err)
		}
	}
	if err := os.WriteFile(filepath.Join(cloned.target, "file"), nil, 0o600); err == nil {
		t.Error("what is published read-only was written to")
	}
	if n := restored.bytes(t); n < larger*8/10 {
		t.Errorf("the filesystem of a larger clone has %d bytes", n)
	}

	_, err = a.ControllerExpandVolume(t.Context(), &csipb.ControllerExpandVolumeRequest{VolumeId: volume, CapacityRange: &csipb.CapacityRange{RequiredBytes: larger}})
	ok(t, err)
	_, err = a.NodeExpandVolume(t.Context(), &csipb.NodeExpandVolumeRequest{VolumeId: volume, VolumePath: one.target})
	ok(t, err)
	if n := one.bytes(t); n < larger*8/10 {
		t.Errorf("grown, the filesystem has %d bytes", n)
	}

	if _, err := a.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: volume}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a volume in use was deleted: %v", err)
	}
	for _, p := range []pod{one, restored, cloned} {
		p.stop(t)
		_, err := a.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: p.volume})
		ok(t, err)
	}
	list, err := a.ListSnapshots(t.Context(), &csipb.ListSnapshotsRequest{})
	if err != nil || len(list.GetEntries()) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	_, err = a.DeleteSnapshot(t.Context(), &csipb.DeleteSnapshotRequest{SnapshotId: taken.GetSnapshot().GetSnapshotId()})
	ok(t, err)
	s.left(t)
	a.cmd.Process.Signal(syscall.SIGTERM)
	if err := a.wait(); err != nil || !strings.Contains(a.words.String(), "msg=frozen name=snapshot-1 filesystem="+one.staged) {
		t.Errorf("it ended with %v, and froze nothing", err)
	}
}

// bytes is the size of the filesystem.
func (p pod) bytes(t *testing.T) int64 {
	t.Helper()
	r, err := p.NodeGetVolumeStats(t.Context(), &csipb.NodeGetVolumeStatsRequest{VolumeId: p.volume, VolumePath: p.target})
	ok(t, err)
	return r.GetUsage()[0].GetTotal()
}

// A group over two volumes is one cut; its members tell so, and whoever names the wrong ones is refused.
func agentServesGroups(t *testing.T, bin string) {
	s := newSite(t, bin, "btrfs")
	a := startAgent(t, s.bin, s.config, s.socket)
	one, two := s.pod(a, s.create(t, a, "pvc-one", 512<<20, nil), "one", "ext4"), s.pod(a, s.create(t, a, "pvc-two", 512<<20, nil), "two", "xfs")
	one.start(t)
	two.start(t)
	request := &csipb.CreateVolumeGroupSnapshotRequest{Name: "groupsnapshot-1", SourceVolumeIds: []string{one.volume, two.volume}}
	made, err := a.CreateVolumeGroupSnapshot(t.Context(), request)
	ok(t, err)
	again, err := a.CreateVolumeGroupSnapshot(t.Context(), request)
	g := made.GetGroupSnapshot()
	if err != nil || again.GetGroupSnapshot().String() != g.String() || len(g.GetSnapshots()) != 2 || !g.GetReadyToUse() {
		t.Fatalf("%v, again %v, %v", g, again, err)
	}
	var ids []string
	for i, m := range g.GetSnapshots() {
		if m.GetSourceVolumeId() != request.SourceVolumeIds[i] || m.GetGroupSnapshotId() != g.GetGroupSnapshotId() {
			t.Errorf("%v", m)
		}
		ids = append(ids, m.GetSnapshotId())
	}
	for _, sources := range [][]string{{one.volume}, {two.volume}} {
		if r, err := a.CreateVolumeGroupSnapshot(t.Context(), &csipb.CreateVolumeGroupSnapshotRequest{Name: "groupsnapshot-1", SourceVolumeIds: sources}); status.Code(err) != codes.AlreadyExists {
			t.Errorf("a group of other volumes: %v, %v", r, err)
		}
	}
	alone, err := a.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: "snapshot-alone", SourceVolumeId: one.volume})
	ok(t, err)
	id := g.GetGroupSnapshotId()
	for want, members := range map[codes.Code][]string{codes.OK: ids, codes.InvalidArgument: ids[:1], codes.NotFound: append(ids[:2:2], ids[0][:len(ids[0])-1]+"z")} {
		if r, err := a.GetVolumeGroupSnapshot(t.Context(), &csipb.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: members}); status.Code(err) != want {
			t.Errorf("%v: %v, %v, want %v", members, r, err, want)
		}
	}
	wrong := &csipb.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: append(ids[:2:2], alone.GetSnapshot().GetSnapshotId())}
	if _, err := a.DeleteVolumeGroupSnapshot(t.Context(), wrong); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a group was deleted with a snapshot of another cut: %v", err)
	}
	listed, err := a.ListSnapshots(t.Context(), &csipb.ListSnapshotsRequest{})
	ok(t, err)
	groups := map[string]int{}
	for _, e := range listed.GetEntries() {
		groups[e.GetSnapshot().GetGroupSnapshotId()]++
	}
	if len(listed.GetEntries()) != 3 || groups[id] != 2 || groups[""] != 1 {
		t.Errorf("%v", listed)
	}
	for range 2 {
		_, err = a.DeleteVolumeGroupSnapshot(t.Context(), &csipb.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: ids})
		ok(t, err)
	}
	if r, err := a.GetVolumeGroupSnapshot(t.Context(), &csipb.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: ids}); status.Code(err) != codes.NotFound {
		t.Errorf("a group that was deleted: %v, %v", r, err)
	}
	one.stop(t)
	two.stop(t)
}

// An agent that is killed leaves pods running; the next one finds what it left, and can undo it. One that is told to stop
// lets its calls end.
func agentKilledAndStopped(t *testing.T, bin string) {
	s := newSite(t, bin, "xfs")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	address := free.Addr().String()
	free.Close()
	a := startAgent(t, s.bin, s.config, s.socket)
	volume := s.create(t, a, "pvc-one", 256<<20, nil)
	one := s.pod(a, volume, "one", "ext4")
	one.start(t)
	ok(t, os.WriteFile(filepath.Join(one.target, "file"), []byte("kept"), 0o600))
	a.cmd.Process.Kill()
	a.wait()

	b := startAgent(t, s.bin, s.config, s.socket, "--probes", address, "--log", "json")
	one.agent = b
	one.start(t)
	if got, err := os.ReadFile(filepath.Join(one.target, "file")); string(got) != "kept" {
		t.Errorf("%q, %v", got, err)
	}
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/": 404} {
		r, err := http.Get("http://" + address + path)
		ok(t, err)
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("%s: %d", path, r.StatusCode)
		}
	}
	raw := pod{agent: b, volume: s.create(t, b, "pvc-raw", 64<<20, nil), staged: filepath.Join(s.Dir, "staged-raw"), target: filepath.Join(s.Dir, "target-raw")}
	raw.use = &csipb.VolumeCapability{AccessMode: one.use.GetAccessMode(), AccessType: &csipb.VolumeCapability_Block{Block: &csipb.VolumeCapability_BlockVolume{}}}
	early := &csipb.NodePublishVolumeRequest{VolumeId: raw.volume, StagingTargetPath: raw.staged, TargetPath: raw.target, VolumeCapability: raw.use}
	if _, err := b.NodePublishVolume(t.Context(), early); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("published before it was staged: %v", err)
	}
	raw.start(t)
	early.Readonly = true
	if _, err := b.NodePublishVolume(t.Context(), early); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("a device published read-only: %v", err)
	}
	if _, err := b.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: "s", SourceVolumeId: raw.volume}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "snap.stillpoint.io/allow-crash-consistent") {
		t.Errorf("a raw device that nobody can stop: %v", err)
	}
	if _, err := b.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: "s", SourceVolumeId: volume, Parameters: map[string]string{"snap.stillpoint.io/adaptor": "reflink"}}); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), `"snap.stillpoint.io/adapter"`) {
		t.Errorf("a misspelt parameter: %v", err)
	}
	raw.stop(t)
	one.stop(t)
	for _, v := range []string{volume, raw.volume} {
		_, err := b.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: v})
		ok(t, err)
	}
	s.left(t)

	if second := exec.Command(filepath.Join(s.bin, "stillpoint"), "agent", "--config", s.config, "--endpoint", s.socket); true {
		if out, err := second.CombinedOutput(); second.ProcessState.ExitCode() != 4 || !strings.Contains(string(out), "already") {
			t.Errorf("a second agent on the socket: %v: %s", err, out)
		}
	}
	results := make(chan error, 8)
	for i := range cap(results) {
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := b.CreateVolume(ctx, &csipb.CreateVolumeRequest{Name: fmt.Sprint("pvc-", i), VolumeCapabilities: []*csipb.VolumeCapability{mounting("")}})
			results <- err
		}()
	}
	ok(t, <-results)
	b.cmd.Process.Signal(syscall.SIGTERM)
	for range cap(results) - 1 {
		if err := <-results; err != nil && status.Code(err) != codes.Unavailable {
			t.Errorf("a call under way, or one that came too late: %v", err)
		}
	}
	if err := b.wait(); err != nil {
		t.Errorf("told to stop, it ended with %v", err)
	}
	if _, err := os.Stat(s.socket); !os.IsNotExist(err) {
		t.Errorf("the socket stays: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(s.pool, ".stillpoint-restore-*"))
	if err != nil || len(files) > 0 {
		t.Errorf("half-made volumes: %v, %v", files, err)
	}
}
