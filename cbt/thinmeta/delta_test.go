package thinmeta_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/cbt/thinmeta/thinmetatest"
	"stillpoint.io/stillpoint/fault"
)

// inMemory opens a pool's metadata in memory.
func inMemory(t testing.TB, p *thinmetatest.Pool) (*thinmeta.Metadata, *memory) {
	t.Helper()
	image, err := p.Image()
	if err != nil {
		t.Fatal(err)
	}
	source := &memory{image: image}
	m, err := thinmeta.Open(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	return m, source
}

// model is what Changed must yield, from the mappings of both devices; Allocated is that with no base.
func model(base, target map[uint64]uint64, baseSize, targetSize, from, block int64) []cbt.Extent {
	var all []cbt.Extent
	common := targetSize
	if baseSize < targetSize {
		common = baseSize - baseSize%block
	}
	for at := int64(0); at < targetSize; at += block {
		e := cbt.Extent{Offset: at, Length: block}
		b, inBase := base[uint64(at/block)]
		x, inTarget := target[uint64(at/block)]
		switch {
		case at < common && inBase == inTarget && b == x:
			continue
		default:
			e.Zero = !inTarget
		}
		all = append(all, e)
	}
	return slices.Collect(first(cbt.Coalesce(cbt.Clip(cbt.Of(all...), from, targetSize))))
}

func first(s cbt.Seq) func(func(cbt.Extent) bool) {
	return func(yield func(cbt.Extent) bool) {
		for e := range s {
			if !yield(e) {
				return
			}
		}
	}
}

// TestModel compares deltas of all pairs of devices in random pools with a simple model, for sizes that end anywhere,
// grow and shrink, and from offsets on.
func TestModel(t *testing.T) {
	for seed := range 60 {
		r := rand.New(rand.NewPCG(uint64(seed), 2))
		p := history(r)
		m, _ := inMemory(t, p)
		block := m.Superblock().BlockSize
		for _, target := range p.Devices() {
			size := r.Int64N(3000 * block)
			from := r.Int64N(size + 1)
			v := thinmeta.Volume{ID: thinmeta.DeviceID(target), Size: size}
			got := collect(t, allocated(t, m, v, from))
			if want := filled(model(nil, p.Mappings(target), 0, size, from, block)); !slices.Equal(got, want) {
				t.Fatalf("seed %d, device %d of %d bytes from %d:\n%v, not\n%v", seed, target, size, from, got, want)
			}
			for _, base := range p.Devices() {
				baseSize := size
				if r.IntN(2) == 0 {
					baseSize = r.Int64N(3000 * block)
				}
				d, err := m.Changed(t.Context(), thinmeta.Volume{ID: thinmeta.DeviceID(base), Size: baseSize}, v, from)
				if err != nil {
					t.Fatal(err)
				}
				if d.BaseSize != baseSize || d.TargetSize != size || d.Granularity != block || d.Confidence != cbt.Exact {
					t.Fatalf("%+v", d)
				}
				want := model(p.Mappings(base), p.Mappings(target), baseSize, size, from, block)
				for range 2 { // a stream can be ranged over again
					if got := collect(t, cbt.Check(d.Extents, from, size)); !slices.Equal(got, want) {
						t.Fatalf("seed %d, devices %d and %d of %d and %d bytes from %d:\n%v, not\n%v", seed, base, target, baseSize, size, from, got, want)
					}
				}
			}
		}
	}
}

// filled leaves zeros out.
func filled(all []cbt.Extent) []cbt.Extent {
	return slices.DeleteFunc(all, func(e cbt.Extent) bool { return e.Zero })
}

// TestCost counts the blocks of metadata that deltas read: what is shared is not among them.
func TestCost(t *testing.T) {
	const blocks = 100_000 // 397 leaves
	origin := func(p *thinmetatest.Pool) {
		p.Create(1)
		p.Fill(1, 0, blocks, thinmetatest.MaxCapacity)
		p.Snapshot(2, 1)
	}
	for _, c := range []struct {
		name  string
		limit int // of blocks read
		past  func(*thinmetatest.Pool)
	}{
		{"nothing", 4, func(*thinmetatest.Pool) {}},
		{"one block", 20, func(p *thinmetatest.Pool) { p.Write(1, blocks/2) }},
		{"a cluster of 1 %", 60, func(p *thinmetatest.Pool) {
			for b := range uint64(blocks / 100) {
				p.Write(1, blocks/3+b)
			}
		}},
		{"higher", 850, func(p *thinmetatest.Pool) { // the new part has 794 leaves
			for b := range uint64(blocks) {
				p.Write(1, blocks+b)
			}
		}},
		{"lower", 450, func(p *thinmetatest.Pool) {
			for b := range uint64(blocks - 500) {
				p.Discard(1, b)
			}
		}},
		{"before the beginning", 20, func(p *thinmetatest.Pool) {
			p.Discard(1, 0)
			p.Snapshot(3, 1)
			p.Write(2, 0)
		}},
	} {
		p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 1 << 20})
		origin(p)
		c.past(p)
		m, source := inMemory(t, p)
		want := model(p.Mappings(2), p.Mappings(1), 1<<40, 1<<35, 0, 64<<10)
		for _, turn := range [][2]thinmeta.DeviceID{{2, 1}, {1, 2}} {
			source.blocks = 0
			d, err := m.Changed(t.Context(), thinmeta.Volume{ID: turn[0], Size: 1 << 40}, thinmeta.Volume{ID: turn[1], Size: 1 << 35}, 0)
			if err != nil {
				t.Fatal(err)
			}
			total, err := cbt.Sum(d.Extents)
			if err != nil {
				t.Fatal(err)
			}
			expected, _ := cbt.Sum(cbt.Of(want...))
			if total.Data+total.Zero != expected.Data+expected.Zero {
				t.Errorf("%s: %+v, not %+v", c.name, total, expected)
			}
			if source.blocks > c.limit {
				t.Errorf("%s: a delta read %d blocks of metadata, more than %d", c.name, source.blocks, c.limit)
			}
		}
	}
}

// TestNothingSharedIsRead bounds what deltas of random pools read by what is not shared, of which each node is read once
// and as many more at most ahead; and by the way down, twice in each tree of devices and once in each device's.
func TestNothingSharedIsRead(t *testing.T) {
	shared := 0
	for seed := range 100 {
		p := history(rand.New(rand.NewPCG(uint64(seed), 5)))
		m, source := inMemory(t, p)
		for _, base := range p.Devices() {
			for _, target := range p.Devices() {
				source.blocks = 0
				d, err := m.Changed(t.Context(), thinmeta.Volume{ID: thinmeta.DeviceID(base), Size: 1 << 40}, thinmeta.Volume{ID: thinmeta.DeviceID(target), Size: 1 << 40}, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := cbt.Sum(d.Extents); err != nil {
					t.Fatal(err)
				}
				n := p.Unshared(base, target)
				if limit := 2*n + 4 + 10; source.blocks > limit {
					t.Errorf("seed %d: a delta of devices %d and %d read %d blocks; %d nodes are not shared", seed, base, target, source.blocks, n)
				}
				if base != target && n == 0 {
					shared++
				}
			}
		}
	}
	if shared == 0 {
		t.Error("no two devices were equal")
	}
}

// TestSeek resumes behind the middle, without reading what comes before.
func TestSeek(t *testing.T) {
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 1 << 20})
	p.Create(1)
	p.Fill(1, 0, 100_000, thinmetatest.MaxCapacity)
	m, source := inMemory(t, p)
	const size = 100_000 * 64 << 10
	source.blocks = 0
	got := collect(t, allocated(t, m, thinmeta.Volume{ID: 1, Size: size}, size-100_000))
	if want := (cbt.Extent{Offset: size - 100_000, Length: 100_000}); len(got) != 1 || got[0] != want {
		t.Errorf("%v, not %v", got, want)
	}
	if source.blocks > 12 {
		t.Errorf("it read %d blocks to list the last two", source.blocks)
	}
}

// TestNoAllocationPerMapping compares a delta of many mappings with one of few.
func TestNoAllocationPerMapping(t *testing.T) {
	delta := func(blocks uint64) float64 {
		p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 1 << 20})
		p.Create(1)
		p.Fill(1, 0, blocks, thinmetatest.MaxCapacity)
		p.Snapshot(2, 1)
		for b := uint64(0); b < blocks; b += 3 {
			p.Write(2, b)
		}
		m, _ := inMemory(t, p)
		return testing.AllocsPerRun(3, func() {
			d, err := m.Changed(t.Context(), thinmeta.Volume{ID: 1, Size: 1 << 40}, thinmeta.Volume{ID: 2, Size: 1 << 40}, 0)
			if err != nil {
				t.Fatal(err)
			}
			if total, err := cbt.Sum(d.Extents); err != nil || total.Extents == 0 {
				t.Fatal(total, err)
			}
		})
	}
	few, many := delta(300), delta(60_000)
	if many > few+16 { // a level more
		t.Errorf("%v allocations for 60,000 mappings, %v for 300", many, few)
	}
}

func TestRefusals(t *testing.T) {
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 100})
	p.Create(1)
	p.Reserve()
	p.Create(2)
	m, source := inMemory(t, p)
	at := m.Superblock().Snapshot
	held, err := thinmeta.OpenSnapshot(t.Context(), source, at)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	one, two := thinmeta.Volume{ID: 1, Size: 1 << 20}, thinmeta.Volume{ID: 2, Size: 1 << 20}
	if _, err := m.Changed(ctx, one, two, 0); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		kind fault.Kind
		call func() error
	}{
		"no device":               {fault.NotFound, func() error { _, err := m.Allocated(ctx, thinmeta.Volume{ID: 3}, 0); return err }},
		"younger than the held":   {fault.NotFound, func() error { _, err := held.Changed(ctx, one, two, 0); return err }},
		"no details":              {fault.NotFound, func() error { _, err := m.Device(ctx, 3); return err }},
		"no end":                  {fault.NotFound, func() error { _, err := m.End(ctx, 3); return err }},
		"behind the end":          {fault.Invalid, func() error { _, err := m.Allocated(ctx, one, 1<<20+1); return err }},
		"negative":                {fault.Invalid, func() error { _, err := m.Changed(ctx, one, two, -1); return err }},
		"negative size":           {fault.Invalid, func() error { _, err := m.Changed(ctx, thinmeta.Volume{ID: 1, Size: -1}, two, 0); return err }},
		"not the held superblock": {fault.NotFound, func() error { _, err := thinmeta.OpenSnapshot(ctx, source, at-1); return err }},
		"nothing held":            {fault.NotFound, func() error { _, err := thinmeta.OpenSnapshot(ctx, source, 0); return err }},
		"no metadata":             {fault.Corrupt, func() error { _, err := thinmeta.Open(ctx, &memory{image: make([]byte, 8192)}); return err }},
		"empty":                   {fault.Corrupt, func() error { _, err := thinmeta.Open(ctx, &memory{}); return err }},
		"no file":                 {fault.NotFound, func() error { _, err := thinmeta.OpenFile(t.TempDir() + "/x"); return err }},
		"a directory":             {fault.Invalid, func() error { _, err := thinmeta.OpenFile(t.TempDir()); return err }},
	} {
		if err := c.call(); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, not %v", name, err, c.kind)
		}
	}
	cancelled, cancel := context.WithCancel(ctx)
	d, err := m.Allocated(cancelled, one, 0)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := cbt.Sum(d.Extents); !errors.Is(err, context.Canceled) {
		t.Error("after a cancel:", err)
	}
}

// TestReleased releases a metadata snapshot that is being read.
func TestReleased(t *testing.T) {
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 100})
	p.Create(1)
	p.Reserve()
	m, source := inMemory(t, p)
	held, err := thinmeta.OpenSnapshot(t.Context(), source, m.Superblock().Snapshot)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(held.Held(t.Context()), m.Held(t.Context())); err != nil {
		t.Error(err)
	}
	p.Release()
	if source.image, err = p.Image(); err != nil {
		t.Fatal(err)
	}
	if err := held.Held(t.Context()); !errors.Is(err, fault.Busy) {
		t.Error(err)
	}
}

// torn shows a damaged superblock so many times, as one that is being written.
type torn struct {
	memory
	times int
}

func (m *torn) ReadAt(ctx context.Context, p []byte, offset int64) (int, error) {
	n, err := m.memory.ReadAt(ctx, p, offset)
	if offset == 0 && m.times > 0 {
		m.times--
		clear(p[2048:])
		p[48]++
	}
	return n, err
}

func TestSuperblockInFlight(t *testing.T) {
	image := victim(t)
	if _, err := thinmeta.Open(t.Context(), &torn{memory{image: image}, 2}); err != nil {
		t.Error(err)
	}
	if _, err := thinmeta.Open(t.Context(), &torn{memory{image: image}, 1000}); !errors.Is(err, fault.Corrupt) {
		t.Error(err)
	}
}

func Example() {
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 100})
	p.Create(1)
	p.Fill(1, 0, 8, thinmetatest.MaxCapacity)
	p.Snapshot(2, 1)
	p.Write(1, 3)
	p.Discard(1, 7)
	image, err := p.Image()
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	m, err := thinmeta.Open(ctx, &memory{image: image})
	if err != nil {
		fmt.Println(err)
		return
	}
	const size = 8 * 64 << 10 // LVM knows it
	d, err := m.Changed(ctx, thinmeta.Volume{ID: 2, Size: size}, thinmeta.Volume{ID: 1, Size: size}, 0)
	if err != nil {
		fmt.Println(err)
		return
	}
	for e, err := range d.Extents {
		fmt.Println(e, err)
	}
	// Output:
	// {196608 65536 false} <nil>
	// {458752 65536 true} <nil>
}
