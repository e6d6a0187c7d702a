package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	at      repository.Location
	repo    *repository.Repository
	volume  *mem.Volume
	id      adapters.VolumeID
	model   []byte // of the volume, nil if it is too large for one
	cuts    int
}

func newWorld(t testing.TB, chunk, size int64) *world {
	t.Helper()
	w := &world{t: t, store: new(mem.Store), at: repository.Location{Path: t.TempDir()}}
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
	if size <= 1<<30 {
		w.model = make([]byte, size)
	}
	w.empty(chunk)
	t.Cleanup(func() {
		if err := w.adapter.Close(); err != nil {
			t.Errorf("left open: %v", err)
		}
	})
	return w
}

// empty puts an empty repository where the world's is to be.
func (w *world) empty(chunk int64) {
	w.t.Helper()
	if err := os.CopyFS(w.at.Path, os.DirFS(emptyRepository(w.t, chunk))); err != nil {
		w.t.Fatal(err)
	}
	w.repo = openRepository(w.t, w.at)
}

// anew gives the world another, empty repository.
func (w *world) anew(chunk int64) {
	w.t.Helper()
	if err := os.RemoveAll(w.at.Path); err != nil {
		w.t.Fatal(err)
	}
	w.empty(chunk)
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
	emptyPaths = map[int64]string{} // by chunk size
)

// emptyRepository is a repository to be copied: deriving the key for a new one takes a good part of a second.
func emptyRepository(t testing.TB, chunk int64) string {
	t.Helper()
	emptyMu.Lock()
	defer emptyMu.Unlock()
	if path, ok := emptyPaths[chunk]; ok {
		return path
	}
	path := filepath.Join(testDir, fmt.Sprint("empty-", chunk))
	if err := repository.Init(t.Context(), repository.Location{Path: path}, passphrase, repository.Options{ChunkSize: chunk, Host: "test"}); err != nil {
		t.Fatal(err)
	}
	emptyPaths[chunk] = path
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
	if w.model != nil {
		copy(w.model[off:], p)
	}
}

func (w *world) zero(off, length int64) {
	w.t.Helper()
	if err := w.volume.Zero(off, length); err != nil {
		w.t.Fatal(err)
	}
	clear(w.model[off : off+length])
}

func (w *world) resize(size int64) {
	w.t.Helper()
	if err := w.volume.Resize(size); err != nil {
		w.t.Fatal(err)
	}
	model := make([]byte, size)
	copy(model, w.model)
	w.model = model
}

// mem is the adapter itself, for what stands around it.
func (w *world) mem() *mem.Adapter { return w.adapter.(*mem.Adapter) }

// cut makes a verified snapshot and returns what it must hold.
func (w *world) cut() (adapters.SnapshotID, []byte) {
	w.t.Helper()
	w.cuts++
	s, err := w.adapter.CreateSnapshot(w.t.Context(), w.id, fmt.Sprintf("cut-%d", w.cuts))
	if err == nil {
		err = w.adapter.Publish(w.t.Context(), s.ID, adapters.Notes{Cut: "test", Consistency: adapters.CrashConsistent})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return s.ID, bytes.Clone(w.model)
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

// content reads a backup's image.
func (w *world) content(handle string) []byte {
	w.t.Helper()
	b, err := w.repo.Backup(w.t.Context(), backupID(w.t, handle))
	if err != nil {
		w.t.Fatal(err)
	}
	image, err := w.repo.OpenImage(w.t.Context(), b)
	if err != nil {
		w.t.Fatal(err)
	}
	defer image.Close()
	p := make([]byte, image.Size())
	if n, err := image.ReadAt(w.t.Context(), p, 0); err != nil && !errors.Is(err, io.EOF) || n != len(p) {
		w.t.Fatalf("read %d of %d: %v", n, len(p), err)
	}
	return p
}

// snapshotContent reads a snapshot.
func snapshotContent(t testing.TB, a adapters.Adapter, id adapters.SnapshotID) []byte {
	t.Helper()
	opener, _ := adapters.As[adapters.Opener](a)
	image, err := opener.Open(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, image.Size())
	n, err := image.ReadAt(t.Context(), p, 0)
	if err != nil && !errors.Is(err, io.EOF) || n != len(p) {
		t.Fatalf("read %d of %d: %v", n, len(p), err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

// volumeContent cuts a volume and reads the cut.
func (w *world) volumeContent(id adapters.VolumeID) []byte {
	w.t.Helper()
	w.cuts++
	s, err := w.adapter.CreateSnapshot(w.t.Context(), id, fmt.Sprintf("look-%d", w.cuts))
	if err == nil {
		err = w.adapter.Publish(w.t.Context(), s.ID, adapters.Notes{})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return snapshotContent(w.t, w.adapter, s.ID)
}

func mustEqual(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: differs at %d: %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

func random(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	for i := 0; i < len(p); i += 8 {
		v := rng.Uint64()
		for k := i; k < min(i+8, len(p)); k++ {
			p[k] = byte(v)
			v >>= 8
		}
	}
	return p
}
