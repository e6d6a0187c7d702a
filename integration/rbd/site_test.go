//go:build ceph && cgo

package rbd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/integration/lab"
)

// site is a lab, and what a cut needs.
type site struct {
	*lab.Lab
	rbd     adapters.Adapter
	reflink adapters.Adapter
	node    cut.Node
}

// leg is a mounted volume of a cut.
type leg struct {
	*lab.Filesystem
	id      adapters.VolumeID
	adapter adapters.Adapter
}

const volumeSize = 320 << 20 // mkfs.xfs refuses less than 300 MiB

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Lab: lab.Test(t)}
	s.rbd = open(t, "ceph-rbd", rbdParameters(cluster.Conf, images.Folder, ""))
	s.reflink = open(t, "reflink", nil)
	s.node = nodeIn(s.Dir, freeze)
	return s
}

// rbdParameters are the backend's: with a timeout, requests fail after that.
func rbdParameters(conf, folder, timeout string) map[string]string {
	p := map[string]string{"conf": conf, "fuse": pool + "=" + folder}
	if timeout != "" {
		p["timeout"] = timeout
	}
	return p
}

func open(t *testing.T, name string, parameters map[string]string) adapters.Adapter {
	t.Helper()
	kind, err := registry.Find(name)
	must(t, err)
	a, err := kind.Open(t.Context(), adapters.Config{Name: name, Parameters: parameters})
	must(t, err)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Errorf("closing %s: %v", name, err)
		}
	})
	return a
}

func nodeIn(dir, program string) cut.Node {
	return cut.Node{
		Host: mounts.Host{},
		Freezer: func(ctx context.Context) (*freezer.Client, error) {
			return freezer.Spawn(ctx, freezer.SpawnOptions{Program: program, Records: filepath.Join(dir, "records")})
		},
		SyncCommand: []string{program, "sync"},
		Lock:        filepath.Join(dir, "cut.lock"),
	}
}

var named atomic.Int64

// freeName is the name of an image that there is not.
func freeName(what string) string { return fmt.Sprintf("%s-%d", what, named.Add(1)) }

// image makes a mounted filesystem on an RBD image.
func (s *site) image(t *testing.T, fstype string, features ...string) leg {
	t.Helper()
	name := freeName(fstype)
	fs, err := images.In(s.Lab, features...)(t.Context(), name, fstype, volumeSize)
	must(t, err)
	return leg{fs, rbdID(name), s.rbd}
}

func rbdID(image string) adapters.VolumeID {
	return adapters.VolumeID{Backend: "ceph-rbd", ID: pool + "/" + image}
}

// file makes a mounted filesystem in a file of a reflink pool.
func (s *site) file(t *testing.T, fstype string) leg {
	t.Helper()
	p, err := s.Pool(t.Context(), "pool", "xfs", 2<<30)
	must(t, err)
	fs, err := s.Volume(t.Context(), p.Mount, "file", fstype, volumeSize)
	must(t, err)
	return leg{fs, reflinkID(fs.File), s.reflink}
}

func reflinkID(file string) adapters.VolumeID {
	return adapters.VolumeID{Backend: "reflink", ID: file}
}

// name is the image's.
func (l leg) name() string { return strings.TrimPrefix(l.id.ID, pool+"/") }

func request(name string, legs ...leg) cut.Request {
	r := cut.Request{Name: name, MaxFreeze: 20 * time.Second}
	for _, l := range legs {
		r.Volumes = append(r.Volumes, cut.Volume{ID: l.id, Adapter: l.adapter})
	}
	return r
}

// meddler is an adapter with something that happens before a snapshot is taken, while all is frozen that will be.
type meddler struct {
	adapters.Adapter
	during func() error
}

func (m meddler) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	if err := m.during(); err != nil {
		return adapters.Snapshot{}, err
	}
	return m.Adapter.CreateSnapshot(ctx, id, wanted)
}

// resolve finds the snapshot of a handle.
func (l leg) resolve(t *testing.T, handle string) adapters.SnapshotID {
	t.Helper()
	h, err := adapters.ParseHandle(handle)
	must(t, err)
	id, err := adapters.Resolve(t.Context(), l.adapter, h)
	must(t, err)
	return id
}

// restored is a file with what a leg's snapshot holds, to be written to: of an image a clone, of a file a reflink copy.
func (s *site) restored(t *testing.T, l leg, handle string) string {
	t.Helper()
	id := l.resolve(t, handle)
	if l.id.Backend == "reflink" {
		file := filepath.Join(filepath.Dir(l.File), freeName("clone")+".img")
		made, err := backup.Restore(t.Context(), backup.RestoreRequest{Source: backup.FromSnapshot(s.reflink, id), Target: s.reflink, Volume: reflinkID(file)})
		must(t, err)
		if !made.Cloned {
			t.Errorf("%+v", made)
		}
		return file
	}
	file, err := images.Clone(t.Context(), l.name(), id.Name, freeName("clone"))
	must(t, err)
	return file
}

// snapshots lists what there is of the legs, verified or not.
func snapshots(t *testing.T, legs ...leg) (all []adapters.Snapshot) {
	t.Helper()
	for _, l := range legs {
		for snap, err := range l.adapter.Snapshots(t.Context(), adapters.Filter{Volume: l.canonical(t), Cutting: true}) {
			must(t, err)
			all = append(all, snap)
		}
	}
	return all
}

func (l leg) canonical(t *testing.T) adapters.VolumeID {
	t.Helper()
	v, err := l.adapter.Volume(t.Context(), l.id)
	must(t, err)
	return v.ID
}

// thawed fails unless a leg can be written to soon.
func (l leg) thawed(t *testing.T) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(l.Mount, "alive"), []byte("x"), 0o600) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("%s is still frozen", l.Mount)
	}
}

// run runs a command of Ceph and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	c := cluster.Command(t.Context(), name, args...)
	out, err := c.Output()
	if err != nil {
		words := ""
		if e, ok := err.(*exec.ExitError); ok {
			words = string(e.Stderr)
		}
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, words)
	}
	return string(out)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
