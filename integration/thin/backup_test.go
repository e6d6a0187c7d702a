package thin

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

// remote makes a repository of the site's.
func (s *site) remote(t *testing.T) *repository.Repository {
	t.Helper()
	at, secret := remoteIn(s.Dir)
	must(t, repository.Init(t.Context(), at, secret, repository.Options{}))
	r, err := repository.Open(t.Context(), at, secret, repository.OpenOptions{Host: "test"})
	must(t, err)
	t.Cleanup(func() {
		if err := r.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return r
}

func remoteIn(dir string) (repository.Location, adapters.Secret) {
	return repository.Location{Path: filepath.Join(dir, "remote")}, adapters.NewSecret("only for this test")
}

// churn writes, overwrites and removes files, and has the filesystem discard what is free.
func churn(t *testing.T, rng *rand.Rand, mount string) {
	t.Helper()
	for range 12 {
		at := filepath.Join(mount, fmt.Sprintf("file-%d", rng.IntN(20)))
		if rng.IntN(4) == 0 {
			if err := os.Remove(at); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			continue
		}
		f, err := os.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o600)
		must(t, err)
		p := make([]byte, rng.IntN(2<<20))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		_, err = f.WriteAt(p, rng.Int64N(4<<20))
		must(t, err)
		must(t, f.Close())
	}
	if _, err := run(exec.Command("fstrim", mount)); err != nil {
		t.Fatal(err)
	}
}

// Backups of a mounted thin volume: the first is full and reads what is allocated, the others are incremental and read what
// dm-thin's metadata says has changed. Each is compared with its snapshot, every byte of it; one is restored into a new thin
// volume, and over an old one. Nothing stays reserved or active in the pool.
func TestBackups(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			s := newSite(t)
			r := s.remote(t)
			l := s.volume(t, "data", fstype)
			rng := rand.New(rand.NewPCG(4, uint64(len(fstype))))
			var ids []adapters.SnapshotID
			var made backup.Report
			for round := range 3 {
				churn(t, rng, l.Mount)
				res, err := s.make(t, request(fmt.Sprintf("round-%d", round), l))
				must(t, err)
				id := l.resolve(t, res.Snapshots[0])
				made, err = backup.Run(t.Context(), backup.Request{Adapter: s.thin, Snapshot: id, Repository: r})
				must(t, err)
				t.Logf("%s: read %d bytes, new %d of %d", made.Kind, made.BytesRead, made.BytesNew, made.Size)
				kind := repository.Incremental
				if round == 0 {
					kind = repository.Full
				}
				if made.Kind != kind || made.Distrusted || len(made.Warnings)+len(made.Suspect) > 0 || made.BytesRead >= volumeSize/2 {
					t.Errorf("round %d: %+v", round, made)
				}
				h, err := repository.ParseHandle(made.Backup)
				must(t, err)
				same, err := backup.VerifyAgainst(t.Context(), backup.AgainstRequest{Repository: r, ID: h.ID, Adapter: s.thin, Snapshot: id})
				if err != nil || !same.Same || same.BytesCompared != volumeSize {
					t.Errorf("%+v, %v", same, err)
				}
				if ids = append(ids, id); len(ids) > 2 { // the base of the next is enough
					must(t, s.thin.DeleteSnapshot(t.Context(), ids[0]))
					ids = ids[1:]
				}
			}
			last := ids[len(ids)-1]
			h, err := repository.ParseHandle(made.Backup)
			must(t, err)
			fresh := adapters.VolumeID{Backend: "lvm-thin", ID: group + "/restored"}
			for _, overwrite := range []bool{false, true} {
				if overwrite { // by something else
					must(t, scribble(s.device(t, fresh)))
				}
				report, err := backup.Restore(t.Context(), backup.RestoreRequest{
					Source: backup.FromBackup(r, h.ID), Target: s.thin, Volume: fresh, Overwrite: overwrite,
				})
				must(t, err)
				t.Logf("restored, overwriting %v: %+v", overwrite, report)
				s.mustBe(t, s.device(t, fresh), last)
			}
			must(t, s.Sound(t.Context(), fstype, s.device(t, fresh)))
			cloned := adapters.VolumeID{Backend: "lvm-thin", ID: group + "/cloned"}
			report, err := backup.Restore(t.Context(), backup.RestoreRequest{Source: backup.FromSnapshot(s.thin, last), Target: s.thin, Volume: cloned})
			if err != nil || !report.Cloned {
				t.Fatalf("%+v, %v", report, err)
			}
			s.mustBe(t, s.device(t, cloned), last)
			must(t, s.Sound(t.Context(), fstype, s.device(t, cloned)))
			s.quiet(t)
		})
	}
}

// device is the device node of a thin volume.
func (s *site) device(t *testing.T, id adapters.VolumeID) string {
	t.Helper()
	return s.volumeOf(t, id).Path
}

// scribble writes over all of a device.
func scribble(device string) error {
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p := bytes.Repeat([]byte{0xA5}, 1<<20)
	for off := int64(0); off < volumeSize; off += int64(len(p)) {
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// mustBe compares a device with a snapshot.
func (s *site) mustBe(t *testing.T, device string, id adapters.SnapshotID) {
	t.Helper()
	opener, _ := adapters.As[adapters.Opener](s.thin)
	image, err := opener.Open(t.Context(), id)
	must(t, err)
	defer func() { must(t, image.Close()) }()
	f, err := os.Open(device)
	must(t, err)
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err != nil || size != image.Size() {
		t.Fatalf("%s has %d bytes, %s has %d: %v", device, size, id, image.Size(), err)
	}
	want, got := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < image.Size(); off += int64(len(want)) {
		n := min(int64(len(want)), image.Size()-off)
		_, err := image.ReadAt(t.Context(), want[:n], off)
		must(t, err)
		_, err = f.ReadAt(got[:n], off)
		must(t, err)
		if !bytes.Equal(want[:n], got[:n]) {
			t.Fatalf("%s differs from %s within the MiB at %d", device, id, off)
		}
	}
}

// quiet checks that no metadata snapshot is reserved, and that no snapshot of ours is active.
func (s *site) quiet(t *testing.T) {
	t.Helper()
	status, err := run(exec.Command("dmsetup", "status", "--target", "thin-pool"))
	must(t, err)
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) < 8 || f[7] != "-" {
			t.Errorf("the pool has a metadata snapshot: %s", line)
		}
	}
	active, err := run(exec.Command("lvs", "--noheadings", "-o", "lv_name", "--select", `lv_active=active && lv_name=~"^sp-"`, group))
	must(t, err)
	if active != "" {
		t.Errorf("active still: %s", active)
	}
}

// A backup that is killed at any read leaves nothing in the way: the next one is right, and after it nothing is reserved in
// the pool, and no snapshot active.
func TestBackupKilled(t *testing.T) {
	s := newSite(t)
	r := s.remote(t)
	l := s.volume(t, "data", "xfs")
	rng := rand.New(rand.NewPCG(5, 5))
	self, err := os.Executable()
	must(t, err)
	for round := range 3 {
		churn(t, rng, l.Mount)
		res, err := s.make(t, request(fmt.Sprintf("round-%d", round), l))
		must(t, err)
		c := exec.Command(self)
		c.Env = append(os.Environ(), fmt.Sprintf("%s=%d", envVictim, 1+round*round), envBackup+"="+res.Snapshots[0], envDir+"="+s.Dir)
		if out, err := c.CombinedOutput(); err == nil || c.ProcessState.Exited() {
			t.Fatalf("it was not killed: %v\n%s", err, out)
		}
		id := l.resolve(t, res.Snapshots[0])
		made, err := backup.Run(t.Context(), backup.Request{Adapter: s.thin, Snapshot: id, Repository: r})
		must(t, err)
		h, err := repository.ParseHandle(made.Backup)
		must(t, err)
		same, err := backup.VerifyAgainst(t.Context(), backup.AgainstRequest{Repository: r, ID: h.ID, Adapter: s.thin, Snapshot: id})
		if err != nil || !same.Same {
			t.Errorf("%+v, %v", same, err)
		}
		s.quiet(t)
	}
}

// dying backs a snapshot up, and is killed at the n-th read.
func dying(a adapters.Adapter, handle string, n int32) error {
	var left atomic.Int32
	left.Store(n)
	a = adapters.Decorate(a, adapters.Layer{Around: func(ctx context.Context, c adapters.Call, do adapters.Do) error {
		if c.Method == "ReadAt" && left.Add(-1) == 0 {
			unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		return do(ctx, c)
	}})
	ctx := context.Background()
	h, err := adapters.ParseHandle(handle)
	if err != nil {
		return err
	}
	id, err := adapters.Resolve(ctx, a, h)
	if err != nil {
		return err
	}
	at, secret := remoteIn(os.Getenv(envDir))
	r, err := repository.Open(ctx, at, secret, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	_, err = backup.Run(ctx, backup.Request{Adapter: a, Snapshot: id, Repository: r, Pace: backup.Pace{Bytes: 1, Time: 1}})
	return err
}
