package backup

import (
	"context"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

var repositoryFilter = repository.Filter{}

// blobs lists the files of a repository that begin with a prefix, by kopia's letters: p for data, q for indexes and
// manifests, x for the index of all contents.
func blobs(t *testing.T, at repository.Location, prefix string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(at.Path, func(path string, d fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(at.Path, path); err == nil && !d.IsDir() && strings.HasPrefix(rel, prefix+string(filepath.Separator)) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// Damaged data is found and named by a verification, and no restore makes a volume of it.
func TestDamage(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, path string){
		"a byte flipped": func(t *testing.T, path string) {
			p, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			p[len(p)/2] ^= 1
			if err := os.WriteFile(path, p, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cut short": func(t *testing.T, path string) {
			if err := os.Truncate(path, 5000); err != nil {
				t.Fatal(err)
			}
		},
		"gone": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 64<<10, 4<<20)
			w.write(random(rand.New(rand.NewPCG(1, 1)), 3<<20), 1<<20)
			s, _ := w.cut()
			r := w.backup(s)
			if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, r.Backup)}); err != nil {
				t.Fatal(err)
			}
			for _, path := range blobs(t, w.at, "p") {
				damage(t, path)
			}
			got, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, r.Backup)})
			if fault.KindOf(err) != fault.Corrupt || got.BytesBad < 64<<10 || len(got.Bad) == 0 || !strings.Contains(got.Bad[0], "bytes at ") || got.BytesBad+got.BytesVerified != 3<<20 {
				t.Errorf("%+v, %v", got, err)
			}
			_, err = Restore(t.Context(), RestoreRequest{Source: FromBackup(w.repo, backupID(t, r.Backup)), Target: w.adapter, Volume: target("v")})
			if fault.KindOf(err) != fault.Corrupt {
				t.Errorf("restored: %v", err)
			}
			if _, err := w.adapter.Volume(t.Context(), target("v")); fault.KindOf(err) != fault.NotFound {
				t.Errorf("a damaged backup was made into a volume: %v", err)
			}
		})
	}
}

// Damage to what describes the backups is never taken for an answer.
func TestDamagedIndexes(t *testing.T) {
	for _, prefix := range []string{"q", "x"} {
		t.Run(prefix, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 64<<10, 4<<20)
			w.write(random(rand.New(rand.NewPCG(1, 1)), 3<<20), 1<<20)
			s, _ := w.cut()
			id := backupID(t, w.backup(s).Backup)
			files := blobs(t, w.at, prefix)
			if len(files) == 0 {
				t.Fatal("no such blobs")
			}
			for _, path := range files {
				p, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				for i := range p {
					p[i] ^= 0x55
				}
				if err := os.WriteFile(path, p, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			r, err := repository.Open(t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test"})
			if err == nil {
				_, err = Verify(t.Context(), VerifyRequest{Repository: r, ID: id})
				r.Close(t.Context())
			}
			if fault.KindOf(err) != fault.Corrupt {
				t.Errorf("%v (%s)", err, fault.KindOf(err))
			}
		})
	}
}

// A repository on a full disk: the backup fails as Exhausted, leaves no piece of a file, and works once there is room.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	l := lab.Test(t)
	disk, err := l.Pool(t.Context(), "small", "ext4", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, 64<<10, 200<<20)
	w.write(random(rand.New(rand.NewPCG(2, 2)), 30<<20), 0)
	small, wantSmall := w.cut()
	w.write(random(rand.New(rand.NewPCG(3, 3)), 100<<20), 50<<20)
	large, _ := w.cut()

	w.at = repository.Location{Path: filepath.Join(disk.Mount, "repository")}
	if err := repository.Init(t.Context(), w.at, passphrase, w.options); err != nil {
		t.Fatal(err)
	}
	r, err := repository.Open(t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close(context.Background())
	w.repo = r
	first := w.backup(small)
	if _, err := Run(t.Context(), w.request(large)); fault.KindOf(err) != fault.Exhausted {
		t.Errorf("%v (%s)", err, fault.KindOf(err))
	}
	if left := blobs(t, w.at, ".partial"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if all, err := r.Backups(t.Context(), repositoryFilter); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := Verify(t.Context(), VerifyRequest{Repository: r, ID: backupID(t, first.Backup)}); err != nil {
		t.Error(err)
	}
	mustEqual(t, "what was there", w.content(first.Backup), wantSmall)
}

// A repository on a filesystem that is mounted read-only can be listed, verified and restored from, and says so when
// it should be written.
func TestReadOnlyRepository(t *testing.T) {
	t.Parallel()
	l := lab.Test(t)
	disk, err := l.Pool(t.Context(), "ro", "ext4", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, 64<<10, 4<<20)
	w.write([]byte("something"), 1<<20)
	w.at = repository.Location{Path: filepath.Join(disk.Mount, "repository")}
	if err := repository.Init(t.Context(), w.at, passphrase, w.options); err != nil {
		t.Fatal(err)
	}
	open := func() *repository.Repository {
		r, err := repository.Open(t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test"})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	w.repo = open()
	var handle string
	var want *model
	for range 18 { // more manifests than kopia leaves alone
		w.write([]byte("x"), 2<<20)
		s, content := w.cut()
		handle, want = w.backup(s).Backup, content
	}
	w.repo.Close(t.Context())
	if err := unix.Mount("", disk.Mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	w.repo = open()
	defer w.repo.Close(context.Background())
	mustEqual(t, "image", w.content(handle), want)
	if all, err := w.repo.Backups(t.Context(), repositoryFilter); err != nil || len(all) != 18 {
		t.Errorf("%d, %v", len(all), err)
	}
	if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, handle)}); err != nil {
		t.Error(err)
	}
	s, _ := w.cut()
	if _, err := Run(t.Context(), w.request(s)); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "cannot be written") {
		t.Errorf("backup: %v", err)
	}
	if err := w.repo.Forget(t.Context(), backupID(t, handle)); fault.KindOf(err) != fault.Invalid {
		t.Errorf("forget: %v", err)
	}
}
