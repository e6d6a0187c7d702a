package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// countedTrees counts the bytes that are read from files, and does something when there are so many.
type countedTrees struct {
	adapters.Adapter
	read *atomic.Int64
	at   int64
	do   func() error
}

func (c countedTrees) OpenTree(ctx context.Context, id adapters.SnapshotID, base *adapters.SnapshotID) (adapters.Tree, error) {
	trees, _ := adapters.As[adapters.Trees](c.Adapter)
	t, err := trees.OpenTree(ctx, id, base)
	return countedTree{t, c}, err
}

type countedTree struct {
	adapters.Tree
	c countedTrees
}

func (t countedTree) OpenFile(ctx context.Context, path string) (adapters.File, error) {
	f, err := t.Tree.OpenFile(ctx, path)
	return countedFile{f, t.c}, err
}

type countedFile struct {
	adapters.File
	c countedTrees
}

func (f countedFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(ctx, p, off)
	if read := f.c.read.Add(int64(n)); err == nil && f.c.at > 0 && read >= f.c.at {
		if err := f.c.do(); err != nil {
			return 0, err
		}
	}
	return n, err
}

// So does one in the middle of a large file.
func TestTreeResumeLarge(t *testing.T) {
	t.Parallel()
	const size = 2*repository.SegmentSize + 12345
	text := make([]byte, size)
	for at := 0; at < len(text)-100; at += 64 << 10 {
		copy(text[at:], fmt.Append(nil, at))
	}
	g := newGrove(t)
	g.apply(func(m *adaptertest.TreeModel) error { return m.Write("large", text, 0, rand.New(rand.NewPCG(1, 1))) })
	id, want := g.cutTree()
	read := new(atomic.Int64)
	ctx, cancel := context.WithCancel(t.Context())
	q := Request{
		Adapter:  countedTrees{g.adapter, read, size * 3 / 4, func() error { cancel(); return nil }},
		Snapshot: id, Repository: g.repo, Budget: Budget{Workers: 2}, Pace: Pace{Time: time.Hour},
	}
	if _, err := Run(ctx, q); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	q.Adapter = countedTrees{g.adapter, read, 0, nil}
	report, err := Run(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	mustHold(t, g.repo, report.Backup, want)
	if report.BytesResumed != repository.SegmentSize || read.Load() > size+repository.SegmentSize {
		t.Errorf("%+v, %d bytes read of %d", report, read.Load(), int64(size))
	}
}

// A backup of a tree that is interrupted, by its user or by the storage, continues: what it had read is neither read nor
// stored again. So it is with a full one and an incremental, in deep and wide directories, and with files of several names.
func TestTreeResume(t *testing.T) {
	t.Parallel()
	g, control := newGrove(t), newWorld(t, 64<<10, 4096)
	rng := rand.New(rand.NewPCG(5, 5))
	text := func() []byte {
		p := make([]byte, 12<<10)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return p
	}
	g.grow(rng, 300)
	for d := range 12 {
		dir := fmt.Sprintf("wide-%02d", d)
		g.apply(func(m *adaptertest.TreeModel) error { return m.Mkdir(dir, rng) })
		g.apply(func(m *adaptertest.TreeModel) error { return m.Mkdir(dir+"/deep", rng) })
	}
	for round := range 2 {
		for d := range 12 {
			for f := 0; f < 30; f += 1 + 2*round {
				at := fmt.Sprintf("wide-%02d/%s%02d", d, []string{"", "deep/"}[f%2], f)
				g.apply(func(m *adaptertest.TreeModel) error { return m.Write(at, text(), 0, rng) })
			}
		}
		id, want := g.cutTree()
		read := new(atomic.Int64)
		request := func(r *repository.Repository, at int64, do func() error) Request {
			return Request{
				Adapter: countedTrees{g.adapter, read, at, do}, Snapshot: id, Repository: r,
				Budget: Budget{Workers: 2}, Pace: Pace{Bytes: 1, Time: time.Nanosecond},
			}
		}
		whole, err := Run(t.Context(), request(control.repo, 0, nil))
		if err != nil {
			t.Fatal(err)
		}
		total := whole.BytesRead
		read.Store(0)
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := Run(ctx, request(g.repo, total/4, func() error { cancel(); return nil })); !errors.Is(err, context.Canceled) {
			t.Fatalf("%v after %d of %d bytes", err, read.Load(), total)
		}
		lost := fault.Errorf(fault.Unavailable, "the storage went away")
		if _, err := Run(t.Context(), request(g.repo, total/2, func() error { return lost })); fault.KindOf(err) != fault.Unavailable {
			t.Fatalf("%v after %d of %d bytes", err, read.Load(), total)
		}
		all, err := g.repo.Checkpoints(t.Context(), repository.Filter{Volume: g.id})
		if err != nil || len(all) != 1 || all[0].Form != adapters.TreeForm {
			t.Fatalf("%+v, %v", all, err)
		}
		if _, err := VerifyAll(t.Context(), VerifyRequest{Repository: g.repo, All: true}); err != nil {
			t.Error(err)
		}
		report, err := Run(t.Context(), request(g.repo, 0, nil))
		if err != nil {
			t.Fatal(err)
		}
		mustHold(t, g.repo, report.Backup, want)
		twice := read.Load() - report.BytesAudited - total
		t.Logf("%s backup of %d bytes: %d resumed, %d read twice (%.1f %%)", report.Kind, total, report.BytesResumed, twice, 100*float64(twice)/float64(total))
		if report.Kind != whole.Kind || report.BytesResumed < total/3 || twice > total/10 {
			t.Errorf("%+v, %d bytes read of %d", report, read.Load(), total)
		}
		if all, err := g.repo.Checkpoints(t.Context(), repository.Filter{Volume: g.id}); err != nil || len(all) > 0 {
			t.Errorf("left: %+v, %v", all, err)
		}
	}
}
