package backup

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
)

var passphrase = adapters.NewSecret("correct horse battery staple")

// world is a storage system in memory, a repository in a folder, and what the volume must hold.
type world struct {
	t       testing.TB
	store   *mem.Store
	adapter adapters.Adapter
	options repository.Options
	at      repository.Location
	repo    *repository.Repository
	volume  *mem.Volume
	id      adapters.VolumeID
	model   *model // of the volume
	cuts    int
}

func newWorld(t testing.TB, chunk, size int64) *world {
	t.Helper()
	return newWorldOf(t, repository.Options{ChunkSize: chunk, Host: "test"}.Quick(), size)
}

// newKopiaWorld is one whose repository kopia's own command opens, as it opens every repository outside of tests.
func newKopiaWorld(t testing.TB, chunk, size int64) *world {
	t.Helper()
	return newWorldOf(t, repository.Options{ChunkSize: chunk, Host: "test"}, size)
}

func newWorldOf(t testing.TB, o repository.Options, size int64) *world {
	t.Helper()
	w := &world{t: t, store: new(mem.Store), options: o, at: repository.Location{Path: t.TempDir()}}
	w.adapter = w.store.Adapter("mem")
	var err error
	if w.volume, err = w.store.Create("vol", size); err != nil {
		t.Fatal(err)
	}
	v, err := w.adapter.Volume(t.Context(), adapters.VolumeID{Backend: "mem", ID: "vol"})
	if err != nil {
		t.Fatal(err)
	}
	w.id = v.ID
	w.model = newModel(size)
	w.empty()
	t.Cleanup(func() {
		if err := w.adapter.Close(); err != nil {
			t.Errorf("left open: %v", err)
		}
	})
	return w
}

// empty puts an empty repository where the world's is to be.
func (w *world) empty() {
	w.t.Helper()
	if err := os.CopyFS(w.at.Path, os.DirFS(emptyRepository(w.t, w.options))); err != nil {
		w.t.Fatal(err)
	}
	w.repo = openRepository(w.t, w.at)
}

// anew gives the world another, empty repository.
func (w *world) anew() {
	w.t.Helper()
	if err := os.RemoveAll(w.at.Path); err != nil {
		w.t.Fatal(err)
	}
	w.empty()
}

// sound verifies the whole repository: every byte of every backup, and whatever else is there.
func (w *world) sound() {
	w.t.Helper()
	r, err := repository.Open(w.t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		w.t.Fatal(err)
	}
	defer r.Close(context.Background())
	if s, err := VerifyAll(w.t.Context(), VerifyRequest{Repository: r, All: true}); err != nil {
		w.t.Fatalf("%+v, %v", s, err)
	}
}

var (
	emptyMu    sync.Mutex
	emptyPaths = map[repository.Options]string{}
)

// emptyRepository is a repository to be copied.
func emptyRepository(t testing.TB, o repository.Options) string {
	t.Helper()
	emptyMu.Lock()
	defer emptyMu.Unlock()
	if path, ok := emptyPaths[o]; ok {
		return path
	}
	path := filepath.Join(testDir, fmt.Sprint("empty-", len(emptyPaths)))
	if err := repository.Init(t.Context(), repository.Location{Path: path}, passphrase, o); err != nil {
		t.Fatal(err)
	}
	emptyPaths[o] = path
	return path
}

func openRepository(t testing.TB, at repository.Location) *repository.Repository {
	t.Helper()
	r, err := repository.Open(t.Context(), at, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (w *world) write(p []byte, off int64) {
	w.t.Helper()
	if _, err := w.volume.WriteAt(p, off); err != nil {
		w.t.Fatal(err)
	}
	w.model.write(p, off)
}

func (w *world) zero(off, length int64) {
	w.t.Helper()
	if err := w.volume.Zero(off, length); err != nil {
		w.t.Fatal(err)
	}
	w.model.zero(off, length)
}

func (w *world) resize(size int64) {
	w.t.Helper()
	if err := w.volume.Resize(size); err != nil {
		w.t.Fatal(err)
	}
	w.model = w.model.resized(size)
}

// mem is the adapter itself, for what stands around it.
func (w *world) mem() *mem.Adapter { return w.adapter.(*mem.Adapter) }

// cut makes a verified snapshot and returns what it must hold.
func (w *world) cut() (adapters.SnapshotID, *model) {
	w.t.Helper()
	w.cuts++
	s, err := w.adapter.CreateSnapshot(w.t.Context(), w.id, fmt.Sprintf("cut-%d", w.cuts))
	if err == nil {
		err = w.adapter.Publish(w.t.Context(), s.ID, adapters.Notes{Cut: "test", Consistency: adapters.CrashConsistent})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return s.ID, w.model.clone()
}

func (w *world) backup(s adapters.SnapshotID) Report {
	w.t.Helper()
	r, err := Run(w.t.Context(), w.request(s))
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *world) request(s adapters.SnapshotID) Request {
	return Request{Adapter: w.adapter, Snapshot: s, Repository: w.repo}
}

func backupID(t testing.TB, handle string) string {
	t.Helper()
	h, err := repository.ParseHandle(handle)
	if err != nil {
		t.Fatal(err)
	}
	return h.ID
}

// content opens a backup's image.
func (w *world) content(handle string) adapters.Image {
	w.t.Helper()
	b, err := w.repo.Backup(w.t.Context(), backupID(w.t, handle))
	if err != nil {
		w.t.Fatal(err)
	}
	image, err := w.repo.OpenImage(w.t.Context(), b)
	if err != nil {
		w.t.Fatal(err)
	}
	return image
}

// volumeContent cuts a volume and opens the cut.
func (w *world) volumeContent(id adapters.VolumeID) adapters.Image {
	w.t.Helper()
	w.cuts++
	s, err := w.adapter.CreateSnapshot(w.t.Context(), id, fmt.Sprintf("look-%d", w.cuts))
	if err == nil {
		err = w.adapter.Publish(w.t.Context(), s.ID, adapters.Notes{})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	opener, _ := adapters.As[adapters.Opener](w.adapter)
	image, err := opener.Open(w.t.Context(), s.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	return image
}

// random is bytes that do not compress, the same for the same state of rng. A cipher makes them: the race detector looks on at
// all that rng does.
func random(rng *rand.Rand, n int64) []byte {
	var key [16]byte
	binary.LittleEndian.PutUint64(key[:], rng.Uint64())
	binary.LittleEndian.PutUint64(key[8:], rng.Uint64())
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err) // of the key's length
	}
	p := make([]byte, n)
	cipher.NewCTR(block, make([]byte, aes.BlockSize)).XORKeyStream(p, p)
	return p
}
