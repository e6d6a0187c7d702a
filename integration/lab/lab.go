// Package lab makes real filesystems for tests, the demo and the benchmarks: pools (a filesystem in a sparse file) and
// volumes (a file in a pool, on a loop device, with a filesystem of its own). It works only on files, devices and
// mounts that it made, and leaves none behind: what a killed process left is taken down by the next lab that opens.
//
// It needs root, loop devices, and mkfs for the filesystems wanted; under `go test -short` tests that ask for a lab
// are skipped, otherwise a missing piece fails them.
package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Base is the folder under which labs live. It must be on a filesystem that holds sparse files.
const Base = "/var/tmp/stillpoint-lab"

// Lab is a folder with what was made in it. Methods are not safe in parallel.
type Lab struct {
	Dir  string // for the test's own files
	lock *os.File
	thin []ThinVolume
}

// Filesystem is a mounted filesystem in a file, or on a thin volume.
type Filesystem struct {
	File   string // the file that holds it, if one does
	Device string // the loop device, or the thin volume's
	Mount  string // where it is mounted
	Type   string
	Thin   ThinVolume // what it is on, if it is on one
}

// Test opens a lab for a test and closes it at the end.
func Test(t testing.TB) *Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("needs real filesystems: left out by -short, `make test` runs it")
	}
	l, err := Open(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, t.Name()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
	})
	return l
}

// Open makes a lab, after taking down those whose owners are gone.
func Open(name string) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("real filesystems need root: loop devices and mount(2)")
	}
	if err := os.MkdirAll(Base, 0o700); err != nil {
		return nil, err
	}
	if err := sweep(); err != nil {
		return nil, fmt.Errorf("taking down a dead lab: %w", err)
	}
	dir, err := os.MkdirTemp(Base, name+"-")
	if err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, err
	}
	return &Lab{Dir: dir, lock: lock}, nil
}

// Close thaws, unmounts and removes everything.
func (l *Lab) Close() error {
	err := takeDown(l.Dir)
	for _, v := range l.thin {
		err = errors.Join(err, v.remove())
	}
	if err == nil {
		os.Remove(l.Dir + ".lock")
	}
	l.lock.Close()
	return err
}

// Pool makes a filesystem of size bytes in a sparse file: "xfs" (with reflink), "btrfs", "ext4", … It stands for one on
// a disk: its loop device bypasses the page cache of the filesystem below, where that is possible.
func (l *Lab) Pool(ctx context.Context, name, fstype string, size int64) (*Filesystem, error) {
	return l.make(ctx, l.Dir, name, fstype, size, unix.LO_FLAGS_DIRECT_IO)
}

// Volume makes a filesystem of size bytes in a sparse file in a folder (usually a pool's mount point).
func (l *Lab) Volume(ctx context.Context, folder, name, fstype string, size int64) (*Filesystem, error) {
	return l.make(ctx, folder, name, fstype, size, 0)
}

func (l *Lab) make(ctx context.Context, folder, name, fstype string, size int64, flags uint32) (*Filesystem, error) {
	file := filepath.Join(folder, name+".img")
	if err := Sparse(file, size); err != nil {
		return nil, err
	}
	return l.in(ctx, file, name, fstype, flags)
}

// In makes a filesystem in a file that there is.
func (l *Lab) In(ctx context.Context, file, name, fstype string) (*Filesystem, error) {
	return l.in(ctx, file, name, fstype, 0)
}

func (l *Lab) in(ctx context.Context, file, name, fstype string, flags uint32) (*Filesystem, error) {
	fs := &Filesystem{File: file, Mount: filepath.Join(l.Dir, "mnt-"+name), Type: fstype}
	if err := Mkfs(ctx, fstype, fs.File); err != nil {
		return nil, err
	}
	return fs, fs.up(flags)
}

// Up mounts it; a file is attached to a loop device before.
func (fs *Filesystem) Up() error { return fs.up(0) }

func (fs *Filesystem) up(flags uint32) error {
	if fs.File != "" {
		device, f, err := attach(fs.File, flags)
		if err != nil {
			return err
		}
		defer f.Close() // the mount keeps the device from here on
		fs.Device = device
	}
	if err := os.MkdirAll(fs.Mount, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(fs.Device, fs.Mount, fs.Type, 0, ""); err != nil {
		return fmt.Errorf("mounting %s%s (%s): %w", fs.File, fs.Device, fs.Type, err)
	}
	return nil
}

// Down thaws and unmounts; the loop device goes with the last user.
func (fs *Filesystem) Down() error { return unmount(fs.Mount) }

// Mkfs makes a filesystem in a file or device.
func Mkfs(ctx context.Context, fstype, file string) error {
	args := map[string][]string{
		"xfs":   {"-q", "-f", "-m", "reflink=1"},
		"ext4":  {"-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"},
		"btrfs": {"-q", "-f"},
		"f2fs":  {"-q", "-f"},
	}[fstype]
	out, err := exec.CommandContext(ctx, "mkfs."+fstype, append(args, file)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.%s %s: %w: %s", fstype, file, err, out)
	}
	return nil
}

// Sparse makes a file of size bytes with nothing in it.
func Sparse(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// Loop attaches a file to a free loop device, which detaches by itself when the returned descriptor and every other
// user of it is gone.
func Loop(path string) (string, *os.File, error) { return attach(path, 0) }

func attach(path string, flags uint32) (string, *os.File, error) {
	backing, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	defer control.Close()
	for range 100 { // another process may take the same free one
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", nil, fmt.Errorf("no free loop device: %w", err)
		}
		device := fmt.Sprintf("/dev/loop%d", n)
		f, err := os.OpenFile(device, os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", nil, err
		}
		c := unix.LoopConfig{Fd: uint32(backing.Fd())}
		c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | flags
		copy(c.Info.File_name[:len(c.Info.File_name)-1], path)
		err = unix.IoctlLoopConfigure(int(f.Fd()), &c)
		if err == nil {
			return device, f, nil
		}
		f.Close()
		if !errors.Is(err, unix.EBUSY) {
			return "", nil, fmt.Errorf("attaching %s to %s: %w", path, device, err)
		}
		time.Sleep(time.Millisecond)
	}
	return "", nil, errors.New("no free loop device in 100 tries")
}

// sweep takes down the labs whose owners are gone.
func sweep() error {
	locks, err := filepath.Glob(Base + "/*.lock")
	if err != nil {
		return err
	}
	for _, path := range locks {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			if err = takeDown(strings.TrimSuffix(path, ".lock")); err == nil {
				os.Remove(path)
			}
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// takeDown unmounts whatever is mounted on or stored in dir, newest first, and removes dir. A filesystem that was
// unmounted while frozen keeps its loop device busy; it is mounted once more to be thawed.
func takeDown(dir string) error {
	mountOrphans(dir)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	for _, m := range mounts { // oldest first: the thaw of one stored on another can wait for that other
		thaw(m.Mountpoint)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unmount(mounts[i].Mountpoint); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// mountOrphans mounts every loop device whose file lies in dir once more, below dir, so that takeDown finds it.
func mountOrphans(dir string) {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		backing := strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)")
		device := "/dev/" + strings.Split(f, "/")[3]
		if !strings.HasPrefix(backing, dir+"/") {
			continue
		}
		at := filepath.Join(dir, "orphan-"+filepath.Base(device))
		os.MkdirAll(at, 0o700)
		for _, fstype := range []string{"xfs", "ext4", "btrfs", "f2fs"} {
			if unix.Mount(device, at, fstype, 0, "") == nil {
				break
			}
		}
	}
}

// thaw thaws what we may have left frozen. Nobody else's freeze is at stake: the lab made it.
func thaw(path string) {
	if f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		for unix.IoctlSetInt(int(f.Fd()), fithaw, 0) == nil {
		}
		f.Close()
	}
}

// unmount thaws and unmounts.
func unmount(path string) error {
	thaw(path)
	var err error
	for range 100 { // a writer that was just killed may hold it for a moment
		if err = unix.Unmount(path, 0); err == nil || errors.Is(err, unix.EINVAL) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("unmounting %s: %w", path, err)
}

const fithaw = 0xC0045878 // linux/fs.h: FITHAW
