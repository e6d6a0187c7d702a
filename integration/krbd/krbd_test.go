//go:build ceph && cgo

// Package krbd holds the test of what most users have: filesystems on images that the kernel's rbd, and rbd-nbd, have
// mapped. It runs in a guest (package vm), whose kernel has both, with a cluster of its own in there.
package krbd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/ceph"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/fault"
	ceph_cluster "stillpoint.io/stillpoint/integration/ceph"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

func TestMain(m *testing.M) {
	os.Exit(vm.Main(m, vm.Config{
		Memory:   2 << 30,
		Modules:  []string{"rbd", "nbd"},
		Programs: []string{"stillpoint.io/stillpoint/cmd/stillpoint-freezer"},
	}))
}

const volumeSize = 320 << 20

// site is a cluster and a lab.
type site struct {
	*lab.Lab
	cluster *ceph_cluster.Cluster
	names   int
}

// leg is a mounted volume of a cut.
type leg struct {
	*lab.Filesystem
	id      adapters.VolumeID
	adapter adapters.Adapter
}

// way is how an image becomes a device.
type way struct{ mount, unmount []string }

var (
	kernel = way{[]string{"rbd", "map", "-o", "noudev"}, []string{"rbd", "unmap", "-o", "noudev"}} // there is no udev to wait for
	// The hook that rbd-nbd would run for each snapshot must not run: it thaws what we froze.
	nbd = way{[]string{"rbd-nbd", "map", "--quiesce"}, []string{"rbd-nbd", "unmap"}}
)

func (s *site) run(t *testing.T, command ...string) string {
	t.Helper()
	c := s.cluster.Command(t.Context(), command[0], command[1:]...)
	out, err := c.Output()
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		err = fmt.Errorf("%w: %s", err, ended.Stderr)
	}
	if err != nil {
		t.Fatalf("%s: %v", strings.Join(command, " "), err)
	}
	return strings.TrimSpace(string(out))
}

// device maps an image until the test ends.
func (s *site) device(t *testing.T, w way, image string) string {
	t.Helper()
	device := s.run(t, append(append([]string{}, w.mount...), "rbd/"+image)...)
	t.Cleanup(func() {
		c := s.cluster.Command(context.Background(), w.unmount[0], append(append([]string{}, w.unmount[1:]...), device)...)
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", c, err, out)
		}
	})
	return device
}

// image makes a mounted filesystem on an image.
func (s *site) image(t *testing.T, a adapters.Adapter, w way, name, fstype string) leg {
	t.Helper()
	s.run(t, "rbd", "create", "rbd/"+name, "--size", fmt.Sprintf("%dB", volumeSize))
	fs := &lab.Filesystem{Device: s.device(t, w, name), Mount: filepath.Join(s.Dir, "mnt-"+name), Type: fstype}
	must(t, lab.Mkfs(t.Context(), fstype, fs.Device))
	must(t, fs.Up())
	t.Cleanup(func() {
		if err := fs.Down(); err != nil {
			t.Error(err)
		}
	})
	l := leg{fs, adapters.VolumeID{Backend: "ceph-rbd", ID: "rbd/" + name}, a}
	if v, err := a.Volume(t.Context(), l.id); err != nil || v.Path != fs.Device || v.Device == 0 || v.Freeze != adapters.FreezeNests {
		t.Fatalf("%+v, %v, want on %s", v, err, fs.Device)
	}
	return l
}

// again is a file or device with what a leg's snapshot holds, to be written to.
func (s *site) again(t *testing.T, l leg, handle string) string {
	t.Helper()
	h, err := adapters.ParseHandle(handle)
	must(t, err)
	id, err := adapters.Resolve(t.Context(), l.adapter, h)
	must(t, err)
	s.names++
	name := fmt.Sprintf("clone-%d", s.names)
	if l.id.Backend == "reflink" {
		file := filepath.Join(filepath.Dir(l.File), name+".img")
		_, err := backup.Restore(t.Context(), backup.RestoreRequest{Source: backup.FromSnapshot(l.adapter, id), Target: l.adapter, Volume: adapters.VolumeID{Backend: "reflink", ID: file}})
		must(t, err)
		return file
	}
	s.run(t, "rbd", "clone", "--rbd-default-clone-format", "2", l.id.ID+"@"+id.Name, "rbd/"+name)
	return s.device(t, kernel, name)
}

// An XFS on an image that the kernel's rbd has mapped, an ext4 on one that rbd-nbd has, and an ext4 in a file of a pool are
// cut at one instant, under a writer that writes to one after the other. Each is sound.
func TestCut(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a guest and a cluster: left out by -short, `make test` runs it")
	}
	cluster, err := ceph_cluster.Start(t.Context(), ceph_cluster.Options{Bare: true, Size: "8G"})
	must(t, err)
	t.Cleanup(func() {
		if err := cluster.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Log("the cluster is there")
	rbd, err := ceph.RBD().Open(t.Context(), adapters.Config{Name: "ceph-rbd", Parameters: map[string]string{"conf": cluster.Conf, "nbd": "true"}})
	must(t, err)
	defer rbd.Close()
	files, err := reflink.Kind().Open(t.Context(), adapters.Config{Name: "reflink"})
	must(t, err)
	defer files.Close()

	s := &site{Lab: lab.Test(t), cluster: cluster}
	pool, err := s.Pool(t.Context(), "pool", "xfs", 2<<30)
	must(t, err)
	file, err := s.Volume(t.Context(), pool.Mount, "file", "ext4", volumeSize)
	must(t, err)
	legs := []leg{
		s.image(t, rbd, kernel, "by-the-kernel", "xfs"),
		{file, adapters.VolumeID{Backend: "reflink", ID: file.File}, files},
		s.image(t, rbd, nbd, "by-rbd-nbd", "ext4"),
	}
	var folders []string
	for _, l := range legs {
		folders = append(folders, l.Mount)
	}
	t.Log("all is mounted")
	writer, err := lab.StartWriter(folders, 8<<20, 8<<20)
	must(t, err)
	var cuts []cut.Result
	for i := range 2 {
		time.Sleep(200 * time.Millisecond) // something for the writer to do, not something to wait for
		res, err := s.make(t, fmt.Sprintf("cut-%d", i), legs)
		if err != nil {
			t.Error(err)
			break
		}
		t.Logf("%+v", res)
		if len(res.Frozen) != len(legs) || len(res.Unverified)+len(res.Crash)+len(res.Separate) > 0 {
			t.Errorf("%+v", res)
		}
		cuts = append(cuts, res)
	}
	must(t, writer.Stop())
	for _, res := range cuts {
		s.check(t, legs, res)
	}
}

// check checks that a cut's snapshots are sound and of one instant.
func (s *site) check(t *testing.T, legs []leg, res cut.Result) {
	t.Helper()
	var folders []string
	for i, l := range legs {
		at := s.again(t, l, res.Snapshots[i])
		must(t, s.Replayed(t.Context(), l.Type, at))
		fs, err := s.MountAgain(t.Context(), l.Type, at)
		must(t, err)
		defer fs.Down()
		folders = append(folders, fs.Mount)
	}
	last, err := lab.Instant(folders)
	if err != nil || last[0] == 0 {
		t.Errorf("%v, %v", last, err)
	}
	t.Logf("%s: the writer was at %v", res.Name, last)
}

// make makes a cut, and makes it anew when the machine starved it: a guest has one processor, and its host other things to
// do.
func (s *site) make(t *testing.T, name string, legs []leg) (res cut.Result, err error) {
	t.Helper()
	program := vm.Program("stillpoint-freezer")
	r := cut.Request{Name: name, MaxFreeze: 30 * time.Second}
	for _, l := range legs {
		r.Volumes = append(r.Volumes, cut.Volume{ID: l.id, Adapter: l.adapter})
	}
	for range 10 {
		res, err = cut.Make(t.Context(), r, cut.Node{
			Freezer: func(ctx context.Context) (*freezer.Client, error) {
				return freezer.Spawn(ctx, freezer.SpawnOptions{Program: program, Records: filepath.Join(s.Dir, "records")})
			},
			SyncCommand: []string{program, "sync"},
			Lock:        filepath.Join(s.Dir, "cut.lock"),
		})
		words := fmt.Sprint(err)
		if !errors.Is(err, fault.Void) || !strings.Contains(words, "the freezer has not answered for") && !strings.Contains(words, "the client gave no sign of life for") {
			break
		}
		t.Logf("once more, because %v", err)
	}
	return res, err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
