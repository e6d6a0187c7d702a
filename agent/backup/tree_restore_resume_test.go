package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/integration/lab"
)

// breaker counts the bytes that were fetched to be written, also if that fails, and does something when there are enough.
type breaker struct {
	at   int64
	do   func()
	seen atomic.Int64
}

func (b *breaker) around(a adapters.Adapter) adapters.Adapter {
	return adapters.Decorate(a, adapters.Layer{Around: func(ctx context.Context, c adapters.Call, do adapters.Do) error {
		if c.Method == "WriteAt" {
			if now := b.seen.Add(c.Length); now >= b.at && now-c.Length < b.at {
				b.do()
			}
		}
		return do(ctx, c)
	}})
}

// planted is an adapter whose volumes that are trees are one directory.
type planted struct {
	adapters.Adapter
	path string
}

func (p planted) BeginTree(ctx context.Context, spec adapters.TreeSpec) (adapters.TreeTarget, error) {
	return RestoreRequest{Directory: p.path}.begin(ctx, spec.Token)
}

// thicket is a tree of some 24 MiB in files of all kinds and sizes.
func thicket(g *grove) {
	rng := rand.New(rand.NewPCG(5, 5))
	g.grow(rng, 80)
	g.apply(func(m *adaptertest.TreeModel) error { return m.Write("large", random(rng, 9<<20), 0, nil) },
		func(m *adaptertest.TreeModel) error { return m.Link("large", "large-too") },
		func(m *adaptertest.TreeModel) error { return m.Write("sparse", random(rng, 5000), 3<<20, nil) },
		func(m *adaptertest.TreeModel) error { return m.Truncate("sparse", 8<<20) },
		func(m *adaptertest.TreeModel) error { return m.Mkdir("many", rng) })
	for i := range 150 {
		path := fmt.Sprint("many/", i)
		g.apply(func(m *adaptertest.TreeModel) error { return m.Write(path, random(rng, 100<<10), 0, rng) })
	}
}

// A restore of a tree that is interrupted half-way fetches the other half when it is run again, whatever happened to what
// was left of it, and the result is that of one that was not. That of another backup into the same place is right too.
func TestTreeRestoreResumed(t *testing.T) {
	t.Parallel()
	g := newGrove(t)
	thicket(g)
	s, want := g.cutTree()
	b := FromBackup(g.repo, backupID(t, g.backup(s).Backup))
	dir := lab.Test(t).Dir
	whole, err := Restore(t.Context(), RestoreRequest{Source: b, Directory: filepath.Join(dir, "whole")})
	if err != nil || whole.BytesFound != 0 || whole.BytesWritten < 20<<20 {
		t.Fatalf("%+v, %v", whole, err)
	}
	total := whole.BytesWritten
	out := filepath.Join(dir, "out")
	interrupt := func(q RestoreRequest) int64 {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		half := &breaker{at: total / 2, do: cancel}
		q.Target = half.around(q.Target)
		if r, err := Restore(ctx, q); !errors.Is(err, context.Canceled) {
			t.Fatalf("%+v, %v", r, err)
		}
		return half.seen.Load()
	}
	left := func() string {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(dir, ".stillpoint-restore-*"))
		if err != nil || len(found) != 1 {
			t.Fatalf("left: %v, %v", found, err)
		}
		return found[0]
	}
	into := RestoreRequest{Source: b, Target: planted{g.adapter, out}, Volume: g.id}

	fetched := interrupt(into)
	r, err := Restore(t.Context(), RestoreRequest{Source: b, Directory: out})
	if twice := fetched + r.BytesWritten - total; err != nil || twice > total/10 || r.BytesFound+r.BytesWritten != total {
		t.Errorf("%d of %d bytes were fetched twice: %+v, %v", twice, total, r, err)
	}
	mustBe(t, out, want)
	must(t, os.RemoveAll(out))

	volume := RestoreRequest{Source: b, Target: g.adapter, Volume: adapters.VolumeID{Backend: "mem", ID: "local/again"}}
	fetched = interrupt(volume)
	r, err = Restore(t.Context(), volume)
	if twice := fetched + r.BytesWritten - total; err != nil || twice > total/10 || r.BytesFound+r.BytesWritten != total {
		t.Errorf("a volume: %d of %d bytes were fetched twice: %+v, %v", twice, total, r, err)
	}

	// What was left is spoilt in every way, and interrupted again at once.
	interrupt(into)
	spoil(t, left())
	again := into
	ctx, cancel := context.WithCancel(t.Context())
	again.Target = (&breaker{at: 1, do: cancel}).around(into.Target)
	if _, err := Restore(ctx, again); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	r, err = Restore(t.Context(), RestoreRequest{Source: b, Directory: out})
	if err != nil || r.BytesFound < total/4 {
		t.Errorf("%+v, %v", r, err)
	}
	mustBe(t, out, want)
	if a, b := room(t, filepath.Join(out, "sparse")), room(t, filepath.Join(dir, "whole", "sparse")); a > b {
		t.Errorf("the sparse file takes %d blocks instead of %d", a, b)
	}
	must(t, os.RemoveAll(out))

	// Another backup comes into the same place, in which names of one file are two files.
	g.apply(func(m *adaptertest.TreeModel) error { return m.Remove("large-too") },
		func(m *adaptertest.TreeModel) error {
			return m.Write("large-too", random(rand.New(rand.NewPCG(6, 6)), 9<<20), 0, nil)
		})
	g.grow(rand.New(rand.NewPCG(7, 7)), 40)
	s, changed := g.cutTree()
	interrupt(into)
	next := FromBackup(g.repo, backupID(t, g.backup(s).Backup))
	if r, err := Restore(t.Context(), RestoreRequest{Source: next, Directory: out}); err != nil || r.BytesFound == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	mustBe(t, out, changed)
	must(t, os.RemoveAll(out))

	// What somebody else may have come into is not taken over, nor what was given up.
	interrupt(into)
	must(t, os.Chmod(left(), 0o755))
	if r, err := Restore(t.Context(), RestoreRequest{Source: b, Directory: out}); err != nil || r.BytesFound != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	must(t, os.RemoveAll(out))
	interrupt(into)
	if _, err := Restore(t.Context(), RestoreRequest{Source: b, Directory: out, GiveUp: true}); err != nil {
		t.Error(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// spoil changes everything that was left without changing a file's size or time.
func spoil(t *testing.T, root string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(root, "foreign"), []byte("foreign"), 0o644))
	n := 0
	must(t, filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if n++; n%3 == 0 && info.Size() > 0 {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{1}, info.Size()/2)
			if err = errors.Join(err, f.Close()); err != nil {
				return err
			}
		}
		if err := errors.Join(unix.Setxattr(path, "user.foreign", []byte("x"), 0), os.Chmod(path, 0o4777)); err != nil {
			return err
		}
		return os.Chtimes(path, info.ModTime(), info.ModTime())
	}))
	if n == 0 {
		t.Fatal("nothing was left")
	}
	sparse := filepath.Join(root, "sparse") // all of it takes room now
	p, err := os.ReadFile(sparse)
	if errors.Is(err, os.ErrNotExist) {
		p = make([]byte, 8<<20)
	} else if err != nil {
		t.Fatal(err)
	}
	p[1<<20] = 1
	must(t, os.WriteFile(sparse, p, 0o600))
}

// room is how many blocks a file takes.
func room(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	must(t, err)
	defer f.Close()
	must(t, f.Sync())
	var st unix.Stat_t
	must(t, unix.Fstat(int(f.Fd()), &st))
	return st.Blocks
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// plantingChild restores a tree into a directory and kills itself on the way.
func plantingChild() error {
	ctx := context.Background()
	var at int64
	if _, err := fmt.Sscan(os.Getenv("AT"), &at); err != nil {
		return err
	}
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	k, err := newKillTree(1)
	if err != nil {
		return err
	}
	fmt.Println("open")
	die := &breaker{at: at, do: func() {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		time.Sleep(time.Hour)
	}}
	_, err = Restore(ctx, RestoreRequest{Source: FromBackup(r, os.Getenv("BACKUP")), Target: die.around(planted{k.adapter, os.Getenv("DIRECTORY")})})
	return errors.Join(err, errors.New("it came to its end"))
}

// Killed again and again, a restore of a tree comes to its end, and fetches nearly nothing twice.
func TestTreeRestoreResumedKilled(t *testing.T) {
	t.Parallel()
	g := newGrove(t)
	thicket(g)
	s, want := g.cutTree()
	id := backupID(t, g.backup(s).Backup)
	const step = 8 << 20
	out := filepath.Join(lab.Test(t).Dir, "out")
	for range 2 {
		if c := runChild(t, "plant", time.Hour, 0, "REPOSITORY="+g.at.Path, "BACKUP="+id, "DIRECTORY="+out, fmt.Sprint("AT=", step)); !c.killed {
			t.Fatal("the child was not killed")
		}
	}
	r, err := Restore(t.Context(), RestoreRequest{Source: FromBackup(g.repo, id), Directory: out})
	if total := r.BytesFound + r.BytesWritten; err != nil || 2*step+r.BytesWritten-total > total/10 {
		t.Errorf("%+v, %v", r, err)
	}
	mustBe(t, out, want)
	entries, err := os.ReadDir(filepath.Dir(out))
	if err != nil || len(entries) != 1 || strings.HasPrefix(entries[0].Name(), ".") {
		t.Errorf("left: %v, %v", entries, err)
	}
}
