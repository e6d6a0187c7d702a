package fiemap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/fiemap"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

const block = 4096

// pools are the filesystems that are promised, each mounted in a lab of its own.
var pools = []struct {
	name, fstype string
	compressed   bool
	exact        bool // a block is reported only if it was touched
}{
	{"xfs", "xfs", false, true},
	{"btrfs", "btrfs", false, true},
	{"btrfs-compressed", "btrfs", true, true},
}

func eachPool(t *testing.T, f func(t *testing.T, dir string, exact bool)) {
	for _, p := range pools {
		t.Run(p.name, func(t *testing.T) {
			pool, err := lab.Test(t).Pool(t.Context(), "pool", p.fstype, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			if p.compressed {
				compress(t, pool.Mount)
			}
			f(t, pool.Mount, p.exact)
		})
	}
}

// compress does chattr +c.
func compress(t testing.TB, dir string) {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	const compress = 4 // FS_COMPR_FL
	if err := unix.IoctlSetPointerInt(int(d.Fd()), unix.FS_IOC_SETFLAGS, compress); err != nil {
		t.Fatal(err)
	}
}

func create(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func clone(t testing.TB, f *os.File, path string) *os.File {
	t.Helper()
	c := create(t, path)
	if err := unix.IoctlFileClone(int(c.Fd()), int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	return c
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func content(t testing.TB, f *os.File) []byte {
	t.Helper()
	st, err := f.Stat()
	must(t, err)
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

func list(t testing.TB, d cbt.Delta, from int64) []cbt.Extent {
	t.Helper()
	var all []cbt.Extent
	for e, err := range cbt.Check(d.Extents, from, d.TargetSize) {
		must(t, err)
		if e.Offset != from && e.Offset%d.Granularity != 0 || e.End() != d.TargetSize && e.End()%d.Granularity != 0 {
			t.Fatalf("extent %+v is not of whole blocks of %d", e, d.Granularity)
		}
		all = append(all, e)
	}
	return all
}

// apply overwrites base with target at the extents, as the contract of a delta says.
func apply(t testing.TB, base, target []byte, s []cbt.Extent) []byte {
	t.Helper()
	out := make([]byte, len(target))
	copy(out, base)
	for _, e := range s {
		part := target[e.Offset:e.End()]
		if e.Zero && bytes.ContainsFunc(part, func(r rune) bool { return r != 0 }) {
			t.Fatalf("zero extent %+v holds data", e)
		}
		copy(out[e.Offset:], part)
	}
	return out
}

// history is a live file under random changes. touched says for every block when it was last changed.
type history struct {
	*os.File
	r       *rand.Rand
	size    int64
	step    int
	touched []int
}

const most = 2 << 20 // bytes of a live file

func (h *history) touch(from, to int64) {
	for i := from / block; i < (to+block-1)/block; i++ {
		h.touched[i] = h.step
	}
}

// run picks a range of the file; most are small, some of whole blocks.
func (h *history) run() (from, length int64) {
	from, length = h.r.Int64N(most), 1+h.r.Int64N(1<<(1+h.r.IntN(18)))
	if h.r.IntN(2) == 0 {
		from, length = from/block*block, (length+block-1)/block*block
	}
	return from, min(length, most-from)
}

// change does one random thing to the file. (On btrfs every preallocation also writes the block that the file ends in.)
func (h *history) change(t *testing.T) {
	h.step++
	from, n := h.run()
	fd := int(h.Fd())
	grown := func(to int64) {
		if to > h.size {
			h.touch(h.size, to) // the tail of the old last block, and whatever is new
			h.size = to
		}
	}
	switch op := h.r.IntN(12); {
	case op < 5:
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(h.r.Uint32())
		}
		if h.r.IntN(2) == 0 {
			b = bytes.Repeat([]byte{1 + byte(h.r.IntN(255))}, int(n)) // compresses well
		}
		_, err := h.WriteAt(b, from)
		must(t, err)
		h.touch(from, from+n)
		grown(from + n)
	case op < 7:
		must(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, n))
		h.touch(from, from+n)
	case op == 7:
		must(t, unix.Fallocate(fd, 0, from, n)) // unwritten where nothing was
		h.touch(from, from+n)
		h.touch(h.size, h.size+1)
		grown(from + n)
	case op == 8:
		must(t, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, from, n)) // perhaps behind the end
		h.touch(from, from+n)
		h.touch(h.size, h.size+1)
	case op == 9:
		must(t, unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, from, n))
		h.touch(from, from+n)
		h.touch(h.size, h.size+1)
	case op == 10:
		must(t, h.Truncate(from))
		h.touch(from, max(from, h.size))
		grown(from)
		h.size = from
	default: // a clone within the file: one block at two offsets
		from, n = from/block*block, (n+block-1)/block*block
		to := h.r.Int64N(most/block) * block
		if from+n > h.size || to+n > most || from < to+n && to < from+n {
			return
		}
		must(t, unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{
			Src_fd: int64(fd), Src_offset: uint64(from), Src_length: uint64(n), Dest_offset: uint64(to),
		}))
		h.touch(to, to+n)
		grown(to + n)
	}
}

type point struct {
	*os.File
	step int
	data []byte
}

// For every pair of snapshots of a random history, in both directions and from any offset: base and changed extents
// are target, nothing is reported that was not touched, and what is allocated is all there is.
func TestRandomHistories(t *testing.T) {
	eachPool(t, func(t *testing.T, dir string, exact bool) {
		for seed := range uint64(8) {
			r := rand.New(rand.NewPCG(seed, 7))
			h := &history{File: create(t, filepath.Join(dir, fmt.Sprint("live", seed))), r: r, touched: make([]int, most/block+1)}
			var points []point
			var touched [][]int
			for i := range 7 {
				for range r.IntN(12) {
					h.change(t)
				}
				c := clone(t, h.File, filepath.Join(dir, fmt.Sprintf("snap%d-%d", seed, i)))
				points = append(points, point{c, h.step, content(t, c)})
				touched = append(touched, slices.Clone(h.touched))
			}
			for i, base := range points {
				checkAllocated(t, r, base)
				for j, target := range points {
					s := checkChanged(t, r, base, target)
					newer := max(i, j)
					for _, e := range s {
						for at := e.Offset; exact && at < e.End(); at += block {
							if touched[newer][at/block] <= min(base.step, target.step) {
								t.Fatalf("seed %d, snapshots %d and %d: block at %d is reported and was not touched", seed, i, j, at)
							}
						}
					}
				}
			}
		}
	})
}

func checkChanged(t *testing.T, r *rand.Rand, base, target point) []cbt.Extent {
	t.Helper()
	d, err := fiemap.Changed(t.Context(), base.File, target.File, 0)
	must(t, err)
	if d.BaseSize != int64(len(base.data)) || d.TargetSize != int64(len(target.data)) || d.Confidence != cbt.Exact || d.Granularity != block {
		t.Fatalf("delta %+v of files of %d and %d bytes", d, len(base.data), len(target.data))
	}
	all := list(t, d, 0)
	if !bytes.Equal(apply(t, base.data, target.data, all), target.data) {
		t.Fatalf("%s + changed extents is not %s", base.Name(), target.Name())
	}
	from := r.Int64N(d.TargetSize + 1)
	d, err = fiemap.Changed(t.Context(), base.File, target.File, from)
	must(t, err)
	want, err := collect(cbt.Clip(cbt.Of(all...), from, d.TargetSize))
	must(t, err)
	if got := list(t, d, from); !slices.Equal(got, want) {
		t.Fatalf("from %d: %v, want %v", from, got, want)
	}
	return all
}

func checkAllocated(t *testing.T, r *rand.Rand, p point) {
	t.Helper()
	from := r.Int64N(int64(len(p.data)) + 1)
	d, err := fiemap.Allocated(t.Context(), p.File, from)
	must(t, err)
	if d.BaseSize != 0 || d.TargetSize != int64(len(p.data)) {
		t.Fatalf("delta %+v of a file of %d bytes", d, len(p.data))
	}
	all := list(t, d, from)
	got := apply(t, nil, p.data, all)
	if !bytes.Equal(got[from:], p.data[from:]) {
		t.Fatalf("%s from %d: there is data outside the allocated extents", p.Name(), from)
	}
	var written []cbt.Extent
	for r, err := range fiemap.Extents(t.Context(), p.File, from) {
		must(t, err)
		if r.End() <= from || r.Logical >= d.TargetSize {
			t.Fatalf("%s from %d: record %+v is outside", p.Name(), from, r)
		}
		if !r.Flags.Zero() {
			written = append(written, cbt.Extent{Offset: r.Logical, Length: r.Length})
		}
	}
	written, err = collect(cbt.Clip(cbt.Align(cbt.Of(written...), block, d.TargetSize), from, d.TargetSize))
	must(t, err)
	if !slices.Equal(written, all) {
		t.Fatalf("%s from %d: allocated %v, records %v", p.Name(), from, all, written)
	}
}

func collect(s cbt.Seq) ([]cbt.Extent, error) {
	var all []cbt.Extent
	for e, err := range s {
		if err != nil {
			return all, err
		}
		all = append(all, e)
	}
	return all, nil
}

// Small files of btrfs lie inside its metadata, where no address tells them apart.
func TestInline(t *testing.T) {
	eachPool(t, func(t *testing.T, dir string, _ bool) {
		r := rand.New(rand.NewPCG(3, 4))
		f := create(t, filepath.Join(dir, "live"))
		var points []point
		inline := false
		for i, size := range []int{0, 1, 100, 100, 100, 1000, 2000, 5000, 300, 0, 100} {
			switch i {
			case 4: // nothing
			case 3:
				_, err := f.WriteAt([]byte("other"), 50)
				must(t, err)
			default:
				must(t, f.Truncate(0))
				_, err := f.WriteAt(bytes.Repeat([]byte{byte('a' + i)}, size), 0)
				must(t, err)
			}
			must(t, f.Sync())
			for rec, err := range fiemap.Extents(t.Context(), f, 0) {
				must(t, err)
				inline = inline || rec.Flags&fiemap.Inline != 0
			}
			c := clone(t, f, filepath.Join(dir, fmt.Sprint("snap", i)))
			points = append(points, point{c, i, content(t, c)})
		}
		if want := strings.Contains(t.Name(), "btrfs"); inline != want {
			t.Errorf("inline extents seen: %v", inline)
		}
		for _, base := range points {
			checkAllocated(t, r, base)
			for _, target := range points {
				s := checkChanged(t, r, base, target)
				if bytes.Equal(base.data, target.data) && len(s) > 0 && inline && len(base.data) < 2000 {
					t.Errorf("%s and %s are equal, but %v differs", base.Name(), target.Name(), s)
				}
			}
		}
	})
}

// A compressed extent that a deduplication moved another part of itself into shows the same address and is different.
func TestCompressedExtentsAreComparedByContent(t *testing.T) {
	pool, err := lab.Test(t).Pool(t.Context(), "pool", "btrfs", 512<<20)
	must(t, err)
	compress(t, pool.Mount)
	live := create(t, filepath.Join(pool.Mount, "live"))
	var b []byte
	for i := range 32 {
		b = append(b, bytes.Repeat([]byte{byte('A' + i)}, block)...)
	}
	_, err = live.Write(b)
	must(t, err)
	must(t, live.Sync())
	base := clone(t, live, filepath.Join(pool.Mount, "base"))
	fd := int(live.Fd())
	must(t, unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{Src_fd: int64(fd), Src_offset: 20 * block, Src_length: block, Dest_offset: 0}))
	target := clone(t, live, filepath.Join(pool.Mount, "target"))

	first := func(f *os.File) fiemap.Record {
		for r, err := range fiemap.Extents(t.Context(), f, 0) {
			must(t, err)
			return r
		}
		return fiemap.Record{}
	}
	if x, y := first(base), first(target); x.Physical != y.Physical || x.Flags&y.Flags&fiemap.Encoded == 0 {
		t.Fatalf("no trap was laid: %+v, %+v", x, y)
	}
	direct, err := os.OpenFile(target.Name(), os.O_RDONLY|unix.O_DIRECT, 0)
	must(t, err)
	defer direct.Close()
	for _, target := range []*os.File{target, direct} {
		d, err := fiemap.Changed(t.Context(), base, target, 0)
		must(t, err)
		if got := list(t, d, 0); !slices.Equal(got, []cbt.Extent{{Offset: 0, Length: block}}) {
			t.Errorf("got %v", got)
		}
	}
}

func TestSubvolumesAreOneFilesystem(t *testing.T) {
	pool, err := lab.Test(t).Pool(t.Context(), "pool", "btrfs", 512<<20)
	must(t, err)
	dir, err := os.Open(pool.Mount)
	must(t, err)
	defer dir.Close()
	args := struct {
		_    int64
		name [4088]byte
	}{}
	copy(args.name[:], "sub")
	must(t, ioctl(dir, 0x5000940E, &args)) // BTRFS_IOC_SUBVOL_CREATE
	live := create(t, filepath.Join(pool.Mount, "live"))
	_, err = live.Write(bytes.Repeat([]byte{7}, 1<<20))
	must(t, err)
	c := clone(t, live, filepath.Join(pool.Mount, "sub", "clone"))
	_, err = c.WriteAt([]byte{8}, 5*block)
	must(t, err)
	d, err := fiemap.Changed(t.Context(), live, c, 0)
	must(t, err)
	if got := list(t, d, 0); !slices.Equal(got, []cbt.Extent{{Offset: 5 * block, Length: block}}) {
		t.Errorf("got %v", got)
	}
}

// scattered writes n blocks of 4 KiB, every step bytes.
func scattered(t testing.TB, f *os.File, n int, step int64, salt byte) {
	t.Helper()
	b := bytes.Repeat([]byte{salt}, block)
	for i := range int64(n) {
		b[0], b[1], b[2] = byte(i), byte(i>>8), byte(i>>16)
		if _, err := f.WriteAt(b, i*step); err != nil {
			t.Fatal(err)
		}
	}
	must(t, f.Sync())
}

// More extents than a batch holds, with different numbers on both sides.
func TestManyBatches(t *testing.T) {
	eachPool(t, func(t *testing.T, dir string, _ bool) {
		live := create(t, filepath.Join(dir, "live"))
		must(t, live.Truncate(1<<30))
		scattered(t, live, 5000, 128<<10, 1)
		base := clone(t, live, filepath.Join(dir, "base"))
		var want []cbt.Extent
		for i := int64(0); i < 1<<30; i += 640 << 10 {
			_, err := live.WriteAt([]byte("changed"), i)
			must(t, err)
			want = append(want, cbt.Extent{Offset: i, Length: block})
		}
		must(t, unix.Fallocate(int(live.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 128<<10, block))
		want = slices.Insert(want, 1, cbt.Extent{Offset: 128 << 10, Length: block, Zero: true})
		target := clone(t, live, filepath.Join(dir, "target"))

		if n, err := fiemap.Count(t.Context(), base); err != nil || n < 4900 || n > 5000 {
			t.Errorf("count is %d, %v", n, err)
		}
		d, err := fiemap.Changed(t.Context(), base, target, 0)
		must(t, err)
		if got := list(t, d, 0); !slices.Equal(got, want) {
			t.Errorf("changed: %d extents, want %d: %v", len(got), len(want), got[:min(len(got), 5)])
		}
		empty := create(t, filepath.Join(dir, "empty"))
		must(t, empty.Truncate(1<<30))
		d, err = fiemap.Changed(t.Context(), empty, base, 0)
		must(t, err)
		if got := list(t, d, 0); len(got) != 5000 {
			t.Errorf("against nothing: %d extents, want 5000", len(got))
		}
		d, err = fiemap.Allocated(t.Context(), base, 0)
		must(t, err)
		if got := list(t, d, 0); len(got) != 5000 {
			t.Errorf("allocated: %d extents, want 5000", len(got))
		}
		for name, open := range map[string]func() (cbt.Delta, error){
			"changed":   func() (cbt.Delta, error) { return fiemap.Changed(t.Context(), base, target, 0) },
			"allocated": func() (cbt.Delta, error) { return fiemap.Allocated(t.Context(), base, 0) },
		} {
			if allocs := testing.AllocsPerRun(1, func() {
				d, err := open()
				must(t, err)
				_, err = cbt.Sum(d.Extents)
				must(t, err)
			}); allocs > 100 {
				t.Errorf("%s: %v allocations for 5000 extents", name, allocs)
			}
		}
	})
}

// A balance that moves everything between two batches does not hide a change.
func TestBalanceInBetween(t *testing.T) {
	pool, err := lab.Test(t).Pool(t.Context(), "pool", "btrfs", 1<<30)
	must(t, err)
	live := create(t, filepath.Join(pool.Mount, "live"))
	must(t, live.Truncate(32<<20))
	scattered(t, live, 4000, 8<<10, 1)
	base := clone(t, live, filepath.Join(pool.Mount, "base"))
	scattered(t, live, 100, 320<<10, 2)
	target := clone(t, live, filepath.Join(pool.Mount, "target"))
	before := content(t, base)
	d, err := fiemap.Changed(t.Context(), base, target, 0)
	must(t, err)
	var got []cbt.Extent
	for e, err := range d.Extents {
		must(t, err)
		if got = append(got, e); len(got) == 3 {
			balance(t, pool.Mount)
		}
	}
	if len(got) != 100 || !bytes.Equal(apply(t, before, content(t, target), got), content(t, target)) {
		t.Errorf("%d extents, or base + changed extents is not target", len(got))
	}
}

func TestRefusals(t *testing.T) {
	l := lab.Test(t)
	xfs, err := l.Pool(t.Context(), "one", "xfs", 320<<20)
	must(t, err)
	other, err := l.Pool(t.Context(), "two", "xfs", 320<<20)
	must(t, err)
	ext4, err := l.Pool(t.Context(), "three", "ext4", 64<<20)
	must(t, err)
	shm, err := os.CreateTemp("/dev/shm", "stillpoint-")
	must(t, err)
	defer os.Remove(shm.Name())
	defer shm.Close()
	dir, err := os.Open(xfs.Mount)
	must(t, err)
	defer dir.Close()
	a, b := create(t, xfs.Mount+"/a"), create(t, xfs.Mount+"/b")
	for _, d := range []string{"upper", "work", "merged"} {
		must(t, os.Mkdir(filepath.Join(xfs.Mount, d), 0o700))
	}
	merged := xfs.Mount + "/merged" // the lab unmounts it
	must(t, unix.Mount("overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=%[1]s,upperdir=%[2]s/upper,workdir=%[2]s/work", other.Mount, xfs.Mount)))
	o := create(t, merged+"/o")
	far, e, e2 := create(t, other.Mount+"/far"), create(t, ext4.Mount+"/e"), create(t, ext4.Mount+"/e2")
	for _, f := range []*os.File{a, b, far, e, e2, o} {
		_, err := f.Write(make([]byte, 10000))
		must(t, err)
	}
	drain := func(d cbt.Delta, err error) error {
		if err == nil {
			_, err = collect(d.Extents)
		}
		return err
	}
	allocated := func(f *os.File, from int64) error { return drain(fiemap.Allocated(t.Context(), f, from)) }
	changed := func(a, b *os.File, from int64) error { return drain(fiemap.Changed(t.Context(), a, b, from)) }
	extents := func(f *os.File, from int64) error {
		for _, err := range fiemap.Extents(t.Context(), f, from) {
			if err != nil {
				return err
			}
		}
		return nil
	}
	count := func(f *os.File) error { _, err := fiemap.Count(t.Context(), f); return err }
	for _, c := range []struct {
		name string
		err  error
		kind fault.Kind
		says string
	}{
		{"count on tmpfs", count(shm), fault.Unsupported, shm.Name()},
		{"allocated on tmpfs", allocated(shm, 0), fault.Unsupported, shm.Name()},
		{"extents on tmpfs", extents(shm, 0), fault.Unsupported, shm.Name()},
		{"changed on tmpfs", changed(shm, shm, 0), fault.Unsupported, shm.Name()},
		{"changed on ext4", changed(e, e2, 0), fault.Unsupported, e2.Name()},
		{"changed on overlayfs", changed(o, o, 0), fault.Unsupported, o.Name()},
		{"count of a directory", count(dir), fault.Invalid, dir.Name()},
		{"allocated of a directory", allocated(dir, 0), fault.Invalid, dir.Name()},
		{"changed to a directory", changed(a, dir, 0), fault.Invalid, dir.Name()},
		{"two filesystems", changed(a, far, 0), fault.Invalid, far.Name()},
		{"two kinds of filesystem", changed(a, e, 0), fault.Invalid, e.Name()},
		{"before the start", allocated(a, -1), fault.Invalid, a.Name()},
		{"behind the end", changed(a, b, 10001), fault.Invalid, b.Name()},
		{"extents behind the end", extents(a, 10001), fault.Invalid, a.Name()},
	} {
		if !errors.Is(c.err, c.kind) || !strings.Contains(c.err.Error(), c.says) {
			t.Errorf("%s: %v, want %v", c.name, c.err, c.kind)
		}
	}
	for name, err := range map[string]error{"the very end": allocated(a, 10000), "ext4": allocated(e, 0), "overlayfs": allocated(o, 0), "one file twice": changed(a, a, 0)} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWrittenMeanwhile(t *testing.T) {
	eachPool(t, func(t *testing.T, dir string, _ bool) {
		f := create(t, dir+"/f")
		_, err := f.Write(make([]byte, 1<<20))
		must(t, err)
		c := clone(t, f, dir+"/c")
		d, err := fiemap.Changed(t.Context(), f, c, 0)
		must(t, err)
		_, err = f.WriteAt([]byte{1}, 0)
		must(t, err)
		if _, err := collect(d.Extents); !errors.Is(err, fault.Busy) || !strings.Contains(err.Error(), f.Name()) {
			t.Errorf("changed: %v", err)
		}
		a, err := fiemap.Allocated(t.Context(), c, 0)
		must(t, err)
		must(t, c.Truncate(5))
		if _, err := collect(a.Extents); !errors.Is(err, fault.Busy) || !strings.Contains(err.Error(), c.Name()) {
			t.Errorf("allocated: %v", err)
		}
	})
}

// The longest file there can be, with data in its last block and space preallocated at its end.
func TestLongestFile(t *testing.T) {
	pool, err := lab.Test(t).Pool(t.Context(), "pool", "xfs", 320<<20)
	must(t, err)
	f := create(t, pool.Mount+"/f")
	const size, last = math.MaxInt64, math.MaxInt64 / block * block
	must(t, f.Truncate(size))
	_, err = f.WriteAt([]byte{1}, size-1)
	must(t, err)
	must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, last-10*block, block))
	g := create(t, pool.Mount+"/g")
	must(t, g.Truncate(5000))
	want := []cbt.Extent{{Offset: last, Length: size - last}}
	a, err := fiemap.Allocated(t.Context(), f, 0)
	must(t, err)
	if got := list(t, a, 0); !slices.Equal(got, want) {
		t.Errorf("allocated: %v", got)
	}
	c, err := fiemap.Changed(t.Context(), g, f, 0)
	must(t, err)
	if got := list(t, c, 0); !slices.Equal(got, append([]cbt.Extent{{Offset: block, Length: last - block, Zero: true}}, want...)) {
		t.Errorf("grown: %v", got)
	}
	c, err = fiemap.Changed(t.Context(), f, g, 0)
	must(t, err)
	if got := list(t, c, 0); len(got) != 0 {
		t.Errorf("shrunk: %v", got)
	}
	for r, err := range fiemap.Extents(t.Context(), f, last) {
		must(t, err)
		if r.Logical != last || r.End() != math.MaxInt64 {
			t.Errorf("record %+v", r)
		}
	}
}

// Extents lists live files too.
func TestExtentsOfALiveFile(t *testing.T) {
	pool, err := lab.Test(t).Pool(t.Context(), "pool", "xfs", 320<<20)
	must(t, err)
	f := create(t, pool.Mount+"/f")
	scattered(t, f, 3000, 8192, 1)
	n := 0
	for _, err := range fiemap.Extents(t.Context(), f, 0) {
		must(t, err)
		if n++; n == 1 {
			_, err := f.WriteAt([]byte{1}, 2999*8192+5)
			must(t, err)
		}
	}
	if n < 3000 { // and perhaps what XFS preallocated between
		t.Errorf("%d extents", n)
	}
}

func TestCancel(t *testing.T) {
	pool, err := lab.Test(t).Pool(t.Context(), "pool", "xfs", 320<<20)
	must(t, err)
	f := create(t, pool.Mount+"/f")
	scattered(t, f, 5000, 8192, 1)
	g := create(t, pool.Mount+"/g")
	must(t, g.Truncate(5000*8192))
	for name, open := range map[string]func(context.Context) (cbt.Delta, error){
		"allocated": func(ctx context.Context) (cbt.Delta, error) { return fiemap.Allocated(ctx, f, 0) },
		"changed":   func(ctx context.Context) (cbt.Delta, error) { return fiemap.Changed(ctx, g, f, 0) },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		d, err := open(ctx)
		must(t, err)
		n := 0
		for _, err = range d.Extents {
			cancel()
			n++
		}
		if !errors.Is(err, context.Canceled) || n > 2000 {
			t.Errorf("%s: %v after %d extents", name, err, n)
		}
		if _, err := fiemap.Count(ctx, f); !errors.Is(err, context.Canceled) {
			t.Errorf("count: %v", err)
		}
	}
}
