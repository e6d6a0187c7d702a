package fiemap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
