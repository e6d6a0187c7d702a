//go:build ceph && cgo

package rbd

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/integration/s3"
)

// place is where a repository is: in a bucket of the cluster's own gateway. It goes to victims as JSON.
type place struct{ Endpoint, Bucket, Region, AccessKey, SecretKey string }

func (p place) location() repository.Location {
	return repository.Location{S3: &repository.S3{
		Endpoint: p.Endpoint, Bucket: p.Bucket, Region: p.Region,
		AccessKey: adapters.NewSecret(p.AccessKey), SecretKey: adapters.NewSecret(p.SecretKey),
	}}
}

func (p place) open(ctx context.Context) (*repository.Repository, error) {
	return repository.Open(ctx, p.location(), passphrase, repository.OpenOptions{Host: "test"})
}

var passphrase = adapters.NewSecret("only for this test")

func remote(t *testing.T) (place, *repository.Repository) {
	t.Helper()
	store, err := s3.OfCluster(cluster)
	must(t, err)
	p := place{store.Endpoint, store.Bucket(t), store.Region, store.AccessKey, store.SecretKey}
	must(t, repository.Init(t.Context(), p.location(), passphrase, repository.Options{}))
	r, err := p.open(t.Context())
	must(t, err)
	t.Cleanup(func() {
		if err := r.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return p, r
}

// write makes a file of random bytes.
func (l leg) write(t *testing.T, name string, size int) {
	t.Helper()
	p := make([]byte, size)
	rand.Read(p)
	must(t, os.WriteFile(filepath.Join(l.Mount, name), p, 0o600))
}

// cut cuts a leg and gives its snapshot.
func (s *site) cut(t *testing.T, name string, l leg) adapters.SnapshotID {
	t.Helper()
	res, err := cut.Make(t.Context(), request(name, l), s.node)
	must(t, err)
	return l.resolve(t, res.Snapshots[0])
}

// exported is the hash of an image or snapshot as Ceph's own command reads it.
func exported(t *testing.T, spec string) (sum [sha256.Size]byte) {
	t.Helper()
	c := cluster.Command(t.Context(), "rbd", "export", "--no-progress", spec, "-")
	return hashed(t, c)
}

func hashed(t *testing.T, c *exec.Cmd) (sum [sha256.Size]byte) {
	t.Helper()
	h := sha256.New()
	var words bytes.Buffer
	c.Stdout, c.Stderr = h, &words
	if err := c.Run(); err != nil {
		t.Fatalf("%s: %v: %s", c, err, words.Bytes())
	}
	h.Sum(sum[:0])
	return sum
}

// An image with a filesystem in use is backed up into a bucket of the same cluster: at first in full, then what has
// changed. What is restored, into another image and into a file of a reflink pool, over nothing and over what is old, is
// the snapshot byte for byte, as Ceph's own command reads both.
func TestBackups(t *testing.T) {
	s := newSite(t)
	_, r := remote(t)
	l, beside := s.image(t, "xfs"), s.file(t, "ext4")
	var last adapters.SnapshotID
	var handles []string
	for round, kind := range []repository.Kind{repository.Full, repository.Incremental, repository.Incremental} {
		l.write(t, fmt.Sprintf("file-%d", round), (24-8*round)<<20)
		l.write(t, "again", 3<<20)
		last = s.cut(t, fmt.Sprintf("round-%d", round), l)
		made, err := backup.Run(t.Context(), backup.Request{Adapter: s.rbd, Snapshot: last, Repository: r})
		must(t, err)
		t.Logf("%s: read %d, audited %d, new %d of %d bytes", made.Kind, made.BytesRead, made.BytesAudited, made.BytesNew, made.Size)
		if made.Kind != kind || made.Distrusted || len(made.Warnings)+len(made.Suspect) > 0 || made.Size != volumeSize || made.BytesRead >= volumeSize/2 {
			t.Errorf("%+v", made)
		}
		handles = append(handles, made.Backup)
	}
	want := exported(t, l.id.ID+"@"+last.Name)
	h, err := repository.ParseHandle(handles[len(handles)-1])
	must(t, err)
	image := rbdID(freeName("restored"))
	file := filepath.Join(filepath.Dir(beside.File), "restored.img")
	for _, x := range []struct {
		what      string
		adapter   adapters.Adapter
		id        adapters.VolumeID
		overwrite bool
	}{{"a new image", s.rbd, image, false}, {"that image, written over", s.rbd, image, true}, {"a new file", s.reflink, reflinkID(file), false}} {
		if x.overwrite {
			run(t, "rbd", "bench", "--io-type", "write", "--io-size", "4M", "--io-total", "64M", "--io-pattern", "rand", image.ID)
			if exported(t, image.ID) == want {
				t.Fatal("nothing was written over: the test proves nothing")
			}
		}
		report, err := backup.Restore(t.Context(), backup.RestoreRequest{Source: backup.FromBackup(r, h.ID), Target: x.adapter, Volume: x.id, Overwrite: x.overwrite})
		must(t, err)
		t.Logf("%s: %+v", x.what, report)
		got := [sha256.Size]byte{}
		if x.adapter == s.rbd {
			got = exported(t, image.ID)
		} else {
			got = hashed(t, exec.CommandContext(t.Context(), "cat", file))
		}
		if got != want {
			t.Errorf("%s is not what the snapshot is", x.what)
		}
	}
	must(t, s.Replayed(t.Context(), "xfs", file))
	must(t, s.Replayed(t.Context(), "xfs", images.File(image.ID[len(pool)+1:])))
}

// A backup that is killed in the middle is resumed: what its last checkpoint says is stored is not read again, and the
// image is right.
func TestBackupKilled(t *testing.T) {
	s := newSite(t)
	p, r := remote(t)
	at, err := json.Marshal(p)
	must(t, err)
	name := freeName("raw")
	file, err := images.Create(t.Context(), name, rawSize)
	must(t, err)
	for round, kind := range []repository.Kind{repository.Full, repository.Incremental} {
		scatter(t, file)
		snap, err := s.rbd.CreateSnapshot(t.Context(), rbdID(name), fmt.Sprintf("round-%d", round))
		must(t, err)
		must(t, s.rbd.Publish(t.Context(), snap.ID, adapters.Notes{}))
		c := s.victim(t, 0, envBackup+"="+snap.ID.String(), envS3+"="+string(at))
		if out, err := c.CombinedOutput(); err == nil || c.ProcessState.Exited() {
			t.Fatalf("it was not killed: %v\n%s", err, out)
		}
		made, err := backup.Run(t.Context(), backup.Request{Adapter: s.rbd, Snapshot: snap.ID, Repository: r})
		must(t, err)
		t.Logf("%s: %d bytes resumed, %d read", made.Kind, made.BytesResumed, made.BytesRead)
		if made.Kind != kind || made.BytesResumed == 0 || made.Distrusted {
			t.Errorf("%+v", made)
		}
		h, err := repository.ParseHandle(made.Backup)
		must(t, err)
		same, err := backup.VerifyAgainst(t.Context(), backup.AgainstRequest{Repository: r, ID: h.ID, Adapter: s.rbd, Snapshot: snap.ID})
		if err != nil || !same.Same || same.BytesCompared != rawSize {
			t.Errorf("%+v, %v", same, err)
		}
	}
}

const rawSize = 256 << 20

// scatter writes random bytes all over a file, and leaves holes between.
func scatter(t *testing.T, file string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	p := make([]byte, 2<<20)
	for off := int64(0); off < rawSize; off += 16 << 20 {
		rand.Read(p)
		_, err := f.WriteAt(p, off)
		must(t, err)
	}
	must(t, f.Sync())
}

// backUpAndDie backs a snapshot up until there is a checkpoint of it, and is killed then. What lies behind its middle is
// not read before that.
func backUpAndDie(ctx context.Context, a adapters.Adapter, handle string) error {
	var p place
	h, err := adapters.ParseHandle(handle)
	if err := errors.Join(err, json.Unmarshal([]byte(os.Getenv(envS3)), &p)); err != nil {
		return err
	}
	id, err := adapters.Resolve(ctx, a, h)
	if err != nil {
		return err
	}
	r, err := p.open(ctx)
	if err != nil {
		return err
	}
	a = adapters.Decorate(a, adapters.Layer{Around: func(ctx context.Context, c adapters.Call, do adapters.Do) error {
		if c.Method == "ReadAt" && c.Offset >= rawSize/2 {
			if err := dieAtCheckpoint(ctx, r); err != nil {
				return err
			}
		}
		return do(ctx, c)
	}})
	_, err = backup.Run(ctx, backup.Request{Adapter: a, Snapshot: id, Repository: r, Pace: backup.Pace{Bytes: 1, Time: 1}})
	return err
}

// dieAtCheckpoint kills the process when the repository has a checkpoint with something done.
func dieAtCheckpoint(ctx context.Context, r *repository.Repository) error {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		all, err := r.Checkpoints(ctx, repository.Filter{})
		if err != nil {
			return err
		}
		for _, c := range all {
			if c.Done > 0 {
				die()
			}
		}
	}
	return errors.New("no checkpoint in a minute")
}
