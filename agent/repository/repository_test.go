package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/blob/sharded"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

var secret = adapters.NewSecret("correct horse battery staple")

func mustInit(t testing.TB, chunk int64) Location {
	t.Helper()
	at := Location{Path: filepath.Join(t.TempDir(), "repository")}
	if err := Init(t.Context(), at, secret, Options{ChunkSize: chunk, Host: "test"}.Quick()); err != nil {
		t.Fatal(err)
	}
	return at
}

func mustOpen(t testing.TB, at Location, o OpenOptions) *Repository {
	t.Helper()
	o.Host = "test"
	r, err := Open(t.Context(), at, secret, o)
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

// commit makes a backup of chunks, each full of one byte.
func commit(r *Repository, id string, fill ...byte) (Backup, error) {
	ctx := context.Background()
	w, err := r.NewWriter(ctx)
	if err != nil {
		return Backup{}, err
	}
	defer w.Close(ctx)
	x := w.NewIndex(int64(len(fill)) * r.ChunkSize())
	var chunks []Chunk
	for _, b := range fill {
		p := make([]byte, r.ChunkSize())
		for i := range p {
			p[i] = b
		}
		c, _, err := w.Write(ctx, p)
		if err != nil {
			return Backup{}, err
		}
		chunks = append(chunks, c)
	}
	size := int64(len(fill)) * r.ChunkSize()
	s, err := w.WriteSegment(ctx, chunks, size)
	if err == nil {
		err = x.Add(s)
	}
	if err != nil {
		return Backup{}, err
	}
	image, err := x.Finish(ctx)
	if err != nil {
		return Backup{}, err
	}
	v := adapters.VolumeID{Backend: "mem", ID: "local/vol"}
	return w.Commit(ctx, Backup{
		ID: id, Volume: v, Snapshot: adapters.SnapshotID{Volume: v, Name: "cut"}, Kind: Full, Size: size, ChunkSize: r.ChunkSize(), Data: size,
		Created: time.Now(), Started: time.Now(), Finished: time.Now(), Image: image,
	}, func(ctx context.Context, back *Image) error {
		p := make([]byte, r.ChunkSize())
		if n, err := back.ReadAt(ctx, p, 0); err != nil || p[n-1] != fill[0] {
			return fmt.Errorf("read back %d bytes that end in %d: %w", n, p[n-1], err)
		}
		return nil
	})
}

func TestInitRefuses(t *testing.T) {
	at := mustInit(t, 0)
	occupied := Location{Path: t.TempDir()}
	if err := os.WriteFile(filepath.Join(occupied.Path, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := Location{Path: filepath.Join(t.TempDir(), "new")}
	for name, c := range map[string]struct {
		at         Location
		passphrase adapters.Secret
		chunk      int64
		want       fault.Kind
	}{
		"there is one already": {at, secret, 0, fault.Busy},
		"something is there":   {occupied, secret, 0, fault.Invalid},
		"a file":               {Location{Path: filepath.Join(occupied.Path, "file")}, secret, 0, fault.Invalid},
		"chunk too small":      {fresh, secret, MinChunkSize / 2, fault.Invalid},
		"chunk too large":      {fresh, secret, MaxChunkSize * 2, fault.Invalid},
		"chunk not a power":    {fresh, secret, 3 << 20, fault.Invalid},
		"no passphrase":        {fresh, adapters.NewSecret(""), 0, fault.Invalid},
	} {
		if err := Init(t.Context(), c.at, c.passphrase, Options{ChunkSize: c.chunk}); err == nil || fault.KindOf(err) != c.want {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
	if _, err := os.Stat(fresh.Path); err == nil {
		t.Error("a refused Init left a folder")
	}
}

func TestOpenRefuses(t *testing.T) {
	at := mustInit(t, 0)
	if _, err := Open(t.Context(), at, adapters.NewSecret("wrong"), OpenOptions{}); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "wrong passphrase") {
		t.Errorf("wrong passphrase: %v", err)
	}
	if _, err := Open(t.Context(), Location{Path: t.TempDir()}, secret, OpenOptions{}); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "stillpoint remote init") {
		t.Errorf("nothing there: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Location{Path: file}, secret, OpenOptions{}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a file: %v", err)
	}
	foreign := t.TempDir()
	st, err := filesystem.New(t.Context(), &filesystem.Options{Path: foreign, Options: sharded.Options{DirectoryShards: []int{1, 3}}}, true)
	if err == nil {
		err = repo.Initialize(t.Context(), st, nil, secret.Reveal())
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Location{Path: foreign}, secret, OpenOptions{}); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "stillpoint remote init") {
		t.Errorf("somebody else's: %v", err)
	}
}

// What a repository says does not depend on who asks, nor on when it was opened.
func TestEverybodySeesTheSame(t *testing.T) {
	at := mustInit(t, MinChunkSize)
	writer := mustOpen(t, at, OpenOptions{Remote: "main"})
	others := []*Repository{mustOpen(t, at, OpenOptions{Remote: "main"}), mustOpen(t, at, OpenOptions{Remote: "main", ReadOnly: true}), writer}
	if writer.ChunkSize() != MinChunkSize {
		t.Errorf("chunk size %d", writer.ChunkSize())
	}
	for i, id := range []string{"a", "b", "c"} {
		if _, err := commit(writer, id, byte(i), 7); err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Forget(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	for i, r := range append(others, mustOpen(t, at, OpenOptions{Remote: "main"})) {
		got, err := r.Backups(t.Context(), Filter{Volume: adapters.VolumeID{Backend: "mem", ID: "local/vol"}})
		if err != nil || len(got) != 2 || got[0].ID != "c" || got[1].ID != "a" || got[0].Handle.String() != "backup:main/c" {
			t.Errorf("%d: %v, %v", i, got, err)
		}
		if got, err := r.Backups(t.Context(), Filter{Volume: adapters.VolumeID{Backend: "mem", ID: "other"}}); err != nil || len(got) != 0 {
			t.Errorf("%d: another volume's: %v, %v", i, got, err)
		}
		if _, err := r.Backup(t.Context(), "b"); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%d: forgotten: %v", i, err)
		}
		s, err := r.Status(t.Context())
		if err != nil || s.Backups != 2 || s.Volumes != 1 || s.Stored == 0 || s.ChunkSize != MinChunkSize || len(s.ID) != 64 {
			t.Errorf("%d: %+v, %v", i, s, err)
		}
		image, err := r.OpenImage(t.Context(), got[0])
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 2)
		if _, err := image.ReadAt(t.Context(), p, MinChunkSize-1); err != nil || p[0] != 2 || p[1] != 7 {
			t.Errorf("%d: read %v: %v", i, p, err)
		}
	}
	if err := writer.Forget(t.Context(), "b"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("forgotten twice: %v", err)
	}
	if _, err := commit(others[1], "d", 1); err == nil {
		t.Error("written to though opened read-only")
	}
}

// What is in the environment for kopia's own command does not reach us.
func TestKopiasEnvironment(t *testing.T) {
	t.Setenv("KOPIA_CACHE_DIRECTORY", t.TempDir())
	t.Setenv("KOPIA_PASSWORD", "another")
	for _, id := range []string{"a", "b"} {
		r := mustOpen(t, mustInit(t, MinChunkSize), OpenOptions{})
		if _, err := commit(r, id, 1); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(os.Getenv("KOPIA_CACHE_DIRECTORY")); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// More manifests than kopia leaves alone: it puts them together while it lists them, which a reader must not need.
func TestManyManifests(t *testing.T) {
	at := mustInit(t, MinChunkSize)
	r := mustOpen(t, at, OpenOptions{})
	for i := range 20 {
		if _, err := commit(r, "b"+string(rune('a'+i)), byte(i)); err != nil {
			t.Fatal(err)
		}
	}
	for _, o := range []OpenOptions{{ReadOnly: true}, {}} {
		got, err := mustOpen(t, at, o).Backups(t.Context(), Filter{})
		if err != nil || len(got) != 20 {
			t.Errorf("%d backups: %v", len(got), err)
		}
	}
}

// Two processes commit one id: one backup is there afterwards, and both are told which.
func TestOneIDTwice(t *testing.T) {
	at := mustInit(t, MinChunkSize)
	a, b := mustOpen(t, at, OpenOptions{}), mustOpen(t, at, OpenOptions{})
	first, err := commit(a, "same", 1)
	if err != nil {
		t.Fatal(err)
	}
	second, err := commit(b, "same", 1)
	if err != nil || second.Image != first.Image || second.manifest != first.manifest {
		t.Errorf("%+v and %+v: %v", first, second, err)
	}
	if got, err := a.Backups(t.Context(), Filter{}); err != nil || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}
	if err := a.Forget(t.Context(), "same"); err != nil {
		t.Error(err)
	}
	if got, err := b.Backups(t.Context(), Filter{}); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestHandles(t *testing.T) {
	h, err := ParseHandle("backup:main/2f1c9a30-0000-4000-8000-000000000001")
	if err != nil || h.Remote != "main" || h.String() != "backup:main/2f1c9a30-0000-4000-8000-000000000001" {
		t.Errorf("%+v, %v", h, err)
	}
	for _, bad := range []string{"", "backup:", "backup:main", "backup:main/", "backup:/x", "backup:Main/x", "backup:main/a/b", "backup:main/.x", "mem:x", "backup:main/" + strings.Repeat("x", 64)} {
		if h, err := ParseHandle(bad); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%q: %+v, %v", bad, h, err)
		}
	}
}

// A killed writer's file is removed, one that is being written is not.
func TestPartialFiles(t *testing.T) {
	at := mustInit(t, MinChunkSize)
	r := mustOpen(t, at, OpenOptions{})
	files := &folderFiles{root: at.Path}
	living, err := files.create()
	if err != nil {
		t.Fatal(err)
	}
	defer living.Close()
	dead, err := files.create()
	if err != nil {
		t.Fatal(err)
	}
	dead.Close() // and with it the lock
	if _, err := commit(r, "a", 1); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(living.Name()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dead.Name()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	entries, err := os.ReadDir(filepath.Join(at.Path, partialDir))
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestDump(t *testing.T) {
	r := mustOpen(t, mustInit(t, MinChunkSize), OpenOptions{})
	b, err := commit(r, "a", 1, 0, 2)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := r.Dump(t.Context(), &out, b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"id": "a"`, `"kind": "full"`, b.Image.String(), "       131072        65536 ", r.ZeroChunk(MinChunkSize).String() + " zero"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestIsZero(t *testing.T) {
	p := make([]byte, 3*len(zeroPage)+5)
	if !IsZero(p) || !IsZero(nil) {
		t.Error("zeros are not zero")
	}
	for _, i := range []int{0, 1, len(zeroPage) - 1, len(zeroPage), len(p) - 1} {
		p[i] = 1
		if IsZero(p) {
			t.Errorf("a one at %d is not seen", i)
		}
		p[i] = 0
	}
}

// The guess at compressibility is right where being wrong costs.
func TestCompressible(t *testing.T) {
	p := make([]byte, 1<<20)
	seed := uint64(1)
	for i := range p {
		seed = seed*6364136223846793005 + 1442695040888963407
		p[i] = byte(seed >> 56)
	}
	if compressible(p) {
		t.Error("noise is taken for compressible")
	}
	text := strings.Repeat("the quick brown fox jumps over the lazy dog; ", 1<<15)
	if !compressible([]byte(text)) {
		t.Error("text is taken for noise")
	}
	copy(p[len(p)/2:], text)
	if !compressible(p) {
		t.Error("half of it is text")
	}
}
