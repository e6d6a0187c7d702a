package lvmthin

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/vm"
)

// helperEnv makes the test binary one of the programs of kill_test.go instead.
const helperEnv = "STILLPOINT_LVMTHIN_HELPER"

func TestMain(m *testing.M) {
	vm.Init()
	if program, ok := os.LookupEnv(helperEnv); ok {
		if err := helpers[program](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, program+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := vm.Main(m, vm.Config{Disks: []int64{1 << 30, 1 << 30, 64 << 20, 64 << 20}, Modules: []string{"dm-flakey"}})
	if vm.Inside() {
		removeGroups()
		if left := leftPaths(); len(left) > 0 && code == 0 {
			fmt.Fprintln(os.Stderr, "the groups are removed, and these paths are left:", left)
			code = 1
		}
	}
	os.Exit(code)
}

const (
	chunk = 64 << 10 // of the pools, and the extent of their groups
	vgOne = "stillpoint-one"
	vgTwo = "stillpoint-two"
)

// groupsOnce makes the two volume groups, each with a pool, that tests share.
var groupsOnce = sync.OnceValue(func() error {
	for i, g := range []string{vgOne, vgTwo} {
		if err := makeGroup(g, vm.Disks()[i]); err != nil {
			return err
		}
	}
	return nil
})

func makeGroup(name, disk string) error {
	for _, c := range [][]string{
		{"vgcreate", "-q", "-y", "-s", "64k", name, disk},
		{"lvcreate", "-q", "-y", "--type", "thin-pool", "-L", "600M", "-c", "64k", "--poolmetadatasize", "16M", "-Zy", "-n", "pool", name},
	} {
		if err := sh(c...); err != nil {
			return err
		}
	}
	return nil
}

func removeGroups() {
	out, err := exec.Command("vgs", "--noheadings", "-o", "vg_name").Output()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vgs:", err)
	}
	for g := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(g, "stillpoint-") {
			if err := sh("vgremove", "-q", "-f", "-y", g); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	}
}

// leftPaths are those in /dev that belong to no device any more.
func leftPaths() (left []string) {
	for _, pattern := range []string{"/dev/stillpoint-*", "/dev/stillpoint-*/*", "/dev/mapper/stillpoint--*"} {
		paths, _ := filepath.Glob(pattern)
		left = append(left, paths...)
	}
	return left
}

func sh(args ...string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// run runs a program of the test's own.
func run(t testing.TB, args ...string) {
	t.Helper()
	must(t, sh(args...))
}

// guest skips what needs device-mapper under -short, and gives the groups to the rest.
func guest(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs device-mapper: left out by -short, `make test` runs it")
	}
	must(t, groupsOnce())
}

// newAdapter opens a backend, with more parameters if there are any: key, value, and so on.
func newAdapter(t testing.TB, parameters ...string) *Adapter {
	t.Helper()
	p := map[string]string{"state": stateOf(t)}
	for i := 0; i < len(parameters); i += 2 {
		p[parameters[i]] = parameters[i+1]
	}
	a, err := Kind().Open(context.Background(), adapters.Config{Name: "l", Parameters: p})
	must(t, err)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Errorf("closing the adapter: %v", err)
		}
	})
	return a.(*Adapter)
}

// stateOf is the folder of records that all of a guest share.
func stateOf(testing.TB) string { return "/run/stillpoint/lvm-thin" }

func typed(id string) adapters.VolumeID { return adapters.VolumeID{Backend: "l", ID: id} }

var serial atomic.Int64

func fresh(prefix string) string { return fmt.Sprintf("%s%d", prefix, serial.Add(1)) }

// live is a thin volume as its user sees it.
type live struct{ group, name string }

// spare are volumes that tests gave back as they got them: a discard is much quicker than LVM.
var spare = map[string][]live{}

// newLive makes a thin volume that reads as zeros, and removes it at the end.
func newLive(t testing.TB, group, name string, size int64) live {
	t.Helper()
	run(t, "lvcreate", "-q", "-y", "-V", fmt.Sprintf("%db", size), "--thinpool", "pool", "-n", name, group)
	v := live{group, name}
	t.Cleanup(func() { run(t, "lvremove", "-q", "-f", "-y", v.path()) })
	return v
}

// borrowLive gives a thin volume that reads as zeros, and takes it back at the end, if it has kept its size.
func borrowLive(t testing.TB, group string, size int64) live {
	t.Helper()
	kind := fmt.Sprintf("%s %d", group, size)
	v := live{group, fresh("vol-")}
	if n := len(spare[kind]); n > 0 {
		v, spare[kind] = spare[kind][n-1], spare[kind][:n-1]
		must(t, v.Zero(0, size))
	} else {
		run(t, "lvcreate", "-q", "-y", "-V", fmt.Sprintf("%db", size), "--thinpool", "pool", "-n", v.name, group)
	}
	t.Cleanup(func() {
		if now, err := v.size(); err == nil && now == size {
			spare[kind] = append(spare[kind], v)
		}
	})
	return v
}

func (v live) size() (n int64, err error) {
	f, err := os.Open(v.device())
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, 2)
}

func (v live) path() string          { return v.group + "/" + v.name }
func (v live) device() string        { return "/dev/" + v.path() }
func (v live) ID() adapters.VolumeID { return typed(v.path()) }

func (v live) open(do func(*os.File) error) error {
	f, err := os.OpenFile(v.device(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := do(f); err != nil {
		return err
	}
	return f.Sync()
}

func (v live) WriteAt(p []byte, off int64) (n int, err error) {
	err = v.open(func(f *os.File) error {
		n, err = f.WriteAt(p, off)
		return err
	})
	return n, err
}

// Zero discards whole chunks, and writes zeros at the edges.
func (v live) Zero(off, length int64) error {
	return v.open(func(f *os.File) error {
		first, last := (off+chunk-1)/chunk*chunk, (off+length)/chunk*chunk
		if first >= last {
			_, err := f.WriteAt(make([]byte, length), off)
			return err
		}
		if _, err := f.WriteAt(make([]byte, first-off), off); err != nil {
			return err
		}
		if _, err := f.WriteAt(make([]byte, off+length-last), last); err != nil {
			return err
		}
		return discard(f, first, last-first)
	})
}

func discard(f *os.File, off, length int64) error {
	span := [2]uint64{uint64(off), uint64(length)}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span))); e != 0 {
		return e
	}
	return nil
}

func (v live) Resize(size int64) error {
	var now int64
	err := v.open(func(f *os.File) (err error) {
		if now, err = f.Seek(0, 2); err == nil && now > size {
			err = discard(f, size, now-size)
		}
		return err
	})
	switch {
	case err != nil:
		return err
	case size > now:
		return sh("lvextend", "-q", "-y", "-L", fmt.Sprintf("%db", size), v.path())
	case size < now:
		return sh("lvreduce", "-q", "-f", "-y", "-L", fmt.Sprintf("%db", size), v.path())
	}
	return nil
}

var _ adaptertest.Volume = live{}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func want(t testing.TB, what string, err error, kind fault.Kind) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind {
		t.Errorf("%s: got %v (%v), want %v", what, err, fault.KindOf(err), kind)
	}
}

func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }
