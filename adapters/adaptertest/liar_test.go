package adaptertest_test

import (
	"context"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/cbt"
)

// lieVariable names the lie that TestConformance tells in a child process.
const lieVariable = "STILLPOINT_ADAPTERTEST_LIE"

// lies are adapters that break one promise each, and the promise that the suite must name.
var lies = map[string]struct {
	lie     func(*mem.Adapter, *mem.Store) adapters.Adapter
	promise string
}{
	"missing-extent":  {stream(func(n int, e cbt.Extent) []cbt.Extent { return only(n != 1, e) }), "base overwritten with the target's bytes"},
	"wrong-order":     {stream(swap()), "a delta is ascending"},
	"beyond-target":   {stream(func(n int, e cbt.Extent) []cbt.Extent { e.Length += 1 << 20; return []cbt.Extent{e} }), "a delta is ascending"},
	"false-zero":      {stream(func(n int, e cbt.Extent) []cbt.Extent { e.Zero = true; return []cbt.Extent{e} }), "a Zero extent reads as zeros"},
	"ignores-from":    {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return ignoresFrom{a} }, "a delta is ascending"},
	"lists-cutting":   {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return listsCutting{a} }, "Snapshots skips those still cutting"},
	"creates-anew":    {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return createsAnew{a} }, "CreateSnapshot of a name that exists returns it as it is"},
	"forgets-notes":   {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return forgetsNotes{a} }, "Publish stores the notes"},
	"delete-unknown":  {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return deleteFails{a} }, "deleting what does not exist is success"},
	"deaf-to-cancel":  {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return deaf{a} }, "a method whose context has ended"},
	"silent-eof":      {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return images{a, silentEOF} }, "ReadAt is safe in parallel and follows io.ReaderAt"},
	"shared-buffer":   {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return images{a, firstBytes} }, "an image is the volume at its instant"},
	"reads-zero":      {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return readsZero{a} }, "a restored volume is what was written, holes included"},
	"always-fresh":    {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return targets{a, alwaysFresh} }, "Fresh is true of a target's first Begin only"},
	"reads-nothing":   {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return targets{a, readsNothing} }, "ReadAt reads what a target holds"},
	"leaks-on-close":  {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return leaks{a} }, "Close succeeds when everything opened was closed"},
	"lists-foreign":   {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return listsForeign{a} }, "an unmarked snapshot is never listed"},
	"all-unchanged":   {entries(func(e *adapters.Entry) { e.Unchanged = true }), "a tree is the volume at its instant, and unchanged is only what is"},
	"names-unchanged": {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return comparesNames{a} }, "a tree is the volume at its instant, and unchanged is only what is"},
	"loses-attribute": {entries(func(e *adapters.Entry) { e.Attributes = nil }), "a tree is the volume at its instant, and unchanged is only what is"},
	"forgets-links":   {entries(func(e *adapters.Entry) { e.Link = 0 }), "a tree is the volume at its instant, and unchanged is only what is"},
	"false-hole":      {bentTree(func(t adapters.Tree) adapters.Tree { return falseHoles{t} }), "a tree is the volume at its instant, and unchanged is only what is"},
	"by-name-only":    {bentTree(func(t adapters.Tree) adapters.Tree { return byName{t} }), "a tree is the volume at its instant, and unchanged is only what is"},
	"follows-links":   {bentTree(func(t adapters.Tree) adapters.Tree { return followsLinks{t} }), "what is not in the tree is not found in it"},
	"early-tree":      {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return earlyTree{a} }, "a target is not a volume until Commit"},
	"stale-tree":      {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return staleTree{a} }, "Create takes over the bytes of a file that was left"},
	"gone-if-unreach": {func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return deletesAll{a} }, "what is out of reach is Unavailable"},
}

type live struct{ *mem.Volume }

func (v live) ID() adapters.VolumeID { return adapters.VolumeID{Backend: "mem", ID: v.Volume.ID()} }

type liveTree struct{ *mem.Grove }

func (v liveTree) ID() adapters.VolumeID { return adapters.VolumeID{Backend: "mem", ID: v.Grove.ID()} }

// TestConformance runs the suite on an honest adapter; or, in a child of TestSuiteCatchesLies, on one that lies.
func TestConformance(t *testing.T) {
	store, n := new(mem.Store), atomic.Int64{}
	open := func() adapters.Adapter { return store.Adapter("mem") }
	if name := os.Getenv(lieVariable); name != "" {
		open = func() adapters.Adapter { return lies[name].lie(store.Adapter("mem"), store) }
	}
	adaptertest.Run(t, adaptertest.Harness{
		Backend: "mem",
		Size:    1 << 20,
		Open:    func(testing.TB) adapters.Adapter { return open() },
		Create: func(t testing.TB, size int64) adaptertest.Volume {
			v, err := store.Create(fmt.Sprint("volume-", n.Add(1)), size)
			if err != nil {
				t.Fatal(err)
			}
			return live{v}
		},
		Absent: func(testing.TB) adapters.VolumeID {
			return adapters.VolumeID{Backend: "mem", ID: fmt.Sprint("local/absent-", n.Add(1))}
		},
		CreateTree: func(t testing.TB) adaptertest.TreeVolume {
			v, err := store.CreateTree(fmt.Sprint("tree-", n.Add(1)))
			if err != nil {
				t.Fatal(err)
			}
			return liveTree{v}
		},
		AbsentTree: func(testing.TB) adapters.VolumeID {
			return adapters.VolumeID{Backend: "mem", ID: fmt.Sprint("local/absent-tree-", n.Add(1))}
		},
		Unreachable: func(testing.TB) adapters.VolumeID { return adapters.VolumeID{Backend: "mem", ID: "nowhere/x"} },
		Foreign:     func(_ testing.TB, v adaptertest.Volume, name string) { store.Foreign(v.(live).Volume, name) },
	})
}

func TestSuiteCatchesLies(t *testing.T) {
	for name, l := range lies {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestConformance$")
			c.Env = append(os.Environ(), lieVariable+"="+name)
			out, err := c.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "broken promise: "+l.promise) {
				t.Errorf("the suite did not say that this is broken: %s\n%s", l.promise, out)
			}
		})
	}
}

func only(keep bool, e cbt.Extent) []cbt.Extent {
	if keep {
		return []cbt.Extent{e}
	}
	return nil
}

// swap holds the first extent of a stream back behind the second.
func swap() func(int, cbt.Extent) []cbt.Extent {
	var mu sync.Mutex
	var held cbt.Extent
	return func(n int, e cbt.Extent) []cbt.Extent {
		mu.Lock()
		defer mu.Unlock()
		switch n {
		case 0:
			held = e
			return nil
		case 1:
			return []cbt.Extent{e, held}
		}
		return []cbt.Extent{e}
	}
}

// stream tells a lie about every extent of Changed.
func stream(lie func(n int, e cbt.Extent) []cbt.Extent) func(*mem.Adapter, *mem.Store) adapters.Adapter {
	return func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return bent{a, lie} }
}

type bent struct {
	*mem.Adapter
	lie func(int, cbt.Extent) []cbt.Extent
}

func (b bent) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	d, err := b.Adapter.Changed(ctx, base, target, from)
	honest := d.Extents
	d.Extents = func(yield func(cbt.Extent, error) bool) {
		n := 0
		for e, err := range honest {
			for _, e := range b.lie(n, e) {
				if !yield(e, err) {
					return
				}
			}
			n++
		}
	}
	return d, err
}

type ignoresFrom struct{ *mem.Adapter }

func (a ignoresFrom) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	if _, err := a.Adapter.Changed(ctx, base, target, from); err != nil {
		return cbt.Delta{}, err
	}
	return a.Adapter.Changed(ctx, base, target, 0)
}

type listsCutting struct{ *mem.Adapter }

func (a listsCutting) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	f.Cutting = true
	return a.Adapter.Snapshots(ctx, f)
}

type listsForeign struct{ *mem.Adapter }

func (a listsForeign) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		for s, err := range a.Adapter.Snapshots(ctx, f) {
			if !yield(s, err) {
				return
			}
			if s.Wanted == "ours" {
				s.ID.Name = "theirs"
				if !yield(s, nil) {
					return
				}
			}
		}
	}
}

type createsAnew struct{ *mem.Adapter }

func (a createsAnew) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	if s, err := a.Adapter.CreateSnapshot(ctx, id, wanted); err == nil {
		a.DeleteSnapshot(ctx, s.ID)
	}
	return a.Adapter.CreateSnapshot(ctx, id, wanted)
}

type forgetsNotes struct{ *mem.Adapter }

func (a forgetsNotes) Publish(ctx context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	notes.Unverified = nil
	return a.Adapter.Publish(ctx, id, notes)
}

type deleteFails struct{ *mem.Adapter }

func (a deleteFails) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	if _, err := a.Snapshot(ctx, id); err != nil {
		return err
	}
	return a.Adapter.DeleteSnapshot(ctx, id)
}

type deletesAll struct{ *mem.Adapter }

func (a deletesAll) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	if strings.HasPrefix(id.Volume.ID, "nowhere/") {
		return nil
	}
	return a.Adapter.DeleteSnapshot(ctx, id)
}

type deaf struct{ *mem.Adapter }

func (a deaf) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	return a.Adapter.Volume(context.WithoutCancel(ctx), id)
}

// images bends what images read.
type images struct {
	*mem.Adapter
	bend func(p []byte, off int64, n int, err error) (int, error)
}

func (a images) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	img, err := a.Adapter.Open(ctx, id)
	if err != nil {
		return nil, err
	}
	return bentImage{img, a.bend}, nil
}

type bentImage struct {
	adapters.Image
	bend func(p []byte, off int64, n int, err error) (int, error)
}

func (b bentImage) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := b.Image.ReadAt(ctx, p, off)
	return b.bend(p, off, n, err)
}

func silentEOF(p []byte, _ int64, n int, err error) (int, error) {
	if n < len(p) && n > 0 {
		return n, nil
	}
	return n, err
}

func firstBytes(p []byte, off int64, n int, err error) (int, error) {
	if n > 100 && off == 0 {
		p[99] ^= 1
	}
	return n, err
}

// readsZero says of every target that it reads as zero, and leaves old bytes in it.
type readsZero struct{ *mem.Adapter }

func (a readsZero) Begin(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	t, err := a.Adapter.Begin(ctx, spec)
	if err != nil {
		return nil, err
	}
	if !spec.Overwrite && spec.Token != "token: resume" {
		t.WriteAt(ctx, []byte{0xA5}, spec.Size*3/4) // in the middle of a hole
	}
	return t, nil
}

// targets bends what restores write to.
type targets struct {
	*mem.Adapter
	bend func(adapters.Target) adapters.Target
}

func (a targets) Begin(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	t, err := a.Adapter.Begin(ctx, spec)
	if err != nil {
		return nil, err
	}
	return a.bend(t), nil
}

func alwaysFresh(t adapters.Target) adapters.Target { return fresh{t} }

type fresh struct{ adapters.Target }

func (fresh) Fresh() bool { return true }

func readsNothing(t adapters.Target) adapters.Target { return blind{t} }

type blind struct{ adapters.Target }

func (b blind) ReadAt(ctx context.Context, p []byte, off int64) error {
	err := b.Target.ReadAt(ctx, p, off)
	clear(p)
	return err
}

type leaks struct{ *mem.Adapter }

func (a leaks) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	a.Adapter.Open(ctx, base)
	return a.Adapter.Changed(ctx, base, target, from)
}
