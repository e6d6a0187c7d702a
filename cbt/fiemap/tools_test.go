package fiemap_test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt"
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

func ioctl[T any](f *os.File, request uintptr, arg *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// balance moves every extent of a btrfs.
func balance(t testing.TB, dir string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "btrfs", "balance", "start", "--full-balance", dir).CombinedOutput(); err != nil {
		t.Fatalf("btrfs balance: %v: %s", err, out)
	}
}
