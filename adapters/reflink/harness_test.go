package reflink

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

const poolSize = 1 << 30

// fixture is a pool of a test and a backend that is limited to it: other tests have pools on this machine too.
type fixture struct {
	*Adapter
	fs  *lab.Filesystem
	lab *lab.Lab
}

// onPools runs a test on a fresh XFS and on a fresh btrfs.
func onPools(t *testing.T, test func(t *testing.T, x fixture)) {
	for _, fstype := range []string{"xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) { test(t, newFixture(t, fstype)) })
	}
}

func newFixture(t testing.TB, fstype string) fixture {
	l := lab.Test(t)
	fs, err := l.Pool(context.Background(), "pool", fstype, poolSize)
	if err != nil {
		t.Fatal(err)
	}
	return fixture{Adapter: newAdapter(t, fs.Mount), fs: fs, lab: l}
}

// newAdapter opens a backend, limited to some mount points if there are any.
func newAdapter(t testing.TB, pools ...string) *Adapter {
	c := adapters.Config{Name: "r"}
	if len(pools) > 0 {
		c.Parameters = map[string]string{"pools": strings.Join(pools, ",")}
	}
	a, err := Kind().Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a.(*Adapter)
}

// typed is the id that a person writes for a path.
func typed(path string) adapters.VolumeID { return adapters.VolumeID{Backend: "r", ID: path} }

// volume makes a file of random bytes in the pool and returns its path and canonical id.
func (x fixture) volume(t testing.TB, name string, size int64) (string, adapters.VolumeID) {
	t.Helper()
	at := filepath.Join(x.fs.Mount, name)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	fill(b, rand.New(rand.NewPCG(1, uint64(len(name)))))
	if err := os.WriteFile(at, b, 0o600); err != nil {
		t.Fatal(err)
	}
	v, err := x.Volume(t.Context(), typed(at))
	if err != nil {
		t.Fatal(err)
	}
	return at, v.ID
}

func fill(b []byte, r *rand.Rand) {
	for i := range b {
		b[i] = byte(r.Uint32()) | 1
	}
}

// file is where a snapshot's file is.
func (x fixture) file(id adapters.SnapshotID) string {
	return filepath.Join(x.fs.Mount, folderName, fileName(id.Volume.ID, id.Name))
}

// cut makes and publishes a snapshot.
func (x fixture) cut(t testing.TB, id adapters.VolumeID, name string) adapters.Snapshot {
	t.Helper()
	s, err := x.CreateSnapshot(t.Context(), id, name)
	if err == nil {
		err = x.Publish(t.Context(), s.ID, adapters.Notes{Cut: name, Consistency: adapters.CrashConsistent})
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (x fixture) read(t testing.TB, id adapters.SnapshotID) []byte {
	t.Helper()
	i, err := x.Open(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	b := make([]byte, i.Size())
	if n, err := i.ReadAt(t.Context(), b, 0); err != nil || int64(n) != i.Size() {
		t.Fatalf("reading %s: %d bytes, %v", id, n, err)
	}
	return b
}

func want(t testing.TB, what string, err error, kind fault.Kind) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind {
		t.Errorf("%s: got %v (%v), want %v", what, err, fault.KindOf(err), kind)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mutate does something to a file that changes its content or its extents.
func mutate(t testing.TB, f *os.File, r *rand.Rand, resize bool) {
	t.Helper()
	st, err := f.Stat()
	must(t, err)
	size := st.Size()
	off := r.Int64N(size)
	length := min(1+r.Int64N(200<<10), size-off)
	if r.IntN(2) == 0 {
		off, length = off&^4095, (length+4095)&^4095
	}
	fd := int(f.Fd())
	switch op := r.IntN(10); {
	case op < 5:
		b := make([]byte, min(length, max(size-off, 1)))
		fill(b, r)
		_, err = f.WriteAt(b, off)
	case op < 7:
		err = unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	case op < 8:
		err = unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	case op < 9:
		err = unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, length)
	case resize:
		size += r.Int64N(2<<20) - 1<<20
		if r.IntN(4) > 0 {
			size &^= 4095
		}
		err = f.Truncate(max(size, 4096))
	}
	must(t, err)
}

// readAll reads an image in pieces of every alignment.
func readAll(t testing.TB, i adapters.Image, r *rand.Rand) []byte {
	t.Helper()
	var out bytes.Buffer
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		p := buf[r.IntN(8192):]
		p = p[:1+r.IntN(len(p)-1)]
		n, err := i.ReadAt(t.Context(), p, off)
		out.Write(p[:n])
		off += int64(n)
		if errors.Is(err, io.EOF) {
			return out.Bytes()
		}
		must(t, err)
	}
}

func ids(ids ...adapters.VolumeID) []adapters.VolumeID { return ids }

// scatter makes a file of n extents of one block each.
func scatter(t testing.TB, at string, n int) {
	t.Helper()
	f, err := os.OpenFile(at, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	must(t, err)
	defer f.Close()
	b := bytes.Repeat([]byte{3}, 4096)
	for i := range n {
		_, err := f.WriteAt(b, int64(i)*8192)
		must(t, err)
	}
	must(t, f.Truncate(int64(n)*8192))
	must(t, f.Sync())
}

func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// aligned returns n bytes at an aligned address.
func aligned(n int) []byte {
	b := make([]byte, n+adapters.ImageAlign)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (adapters.ImageAlign - 1)
	return b[skip:][:n]
}
