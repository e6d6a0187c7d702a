package treefs

import (
	"crypto/rand"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// What a dead process left of a target is moved into a directory of its root, and the tree is made from nothing beside
// it. A regular file that is made again, at the same path and of the same size, is moved back. So nothing but bytes is
// ever taken over, nothing is kept beside the tree to know what they are, and the rest goes at the end.

const (
	// leftPrefix begins the name of that directory. The rest is random: no tree that is restored has it.
	leftPrefix = ".stillpoint-left-"
	// leftMax is how many interruptions are looked back upon. What is older only goes at the end.
	leftMax = 16
)

// leftover is what dead processes left of a target. A nil one is nothing.
type leftover struct {
	name string     // in the target's root
	dirs []*os.File // a root for each process, the last one's first

	mu    sync.Mutex
	taken map[uint64]bool // numbers of files with several names
}

// isPrivate reports whether nobody else could come below a root: it was never described.
func isPrivate(root *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(root.Fd()), &st) == nil && st.Mode&0o7777 == 0o700 && int(st.Uid) == os.Geteuid()
}

// setAside moves everything in a root into a directory of it.
func setAside(root *os.File) (*leftover, error) {
	names, err := root.Readdirnames(-1)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	l, fd := &leftover{name: leftPrefix + rand.Text(), taken: map[uint64]bool{}}, int(root.Fd())
	if len(names) == 1 && strings.HasPrefix(names[0], leftPrefix) { // the last process made nothing
		err = unix.Renameat2(fd, names[0], fd, l.name, unix.RENAME_NOREPLACE)
	} else {
		err = unix.Mkdirat(fd, l.name, 0o700)
		for _, name := range names {
			if err == nil {
				err = unix.Renameat2(fd, name, fd, l.name+"/"+name, unix.RENAME_NOREPLACE)
			}
		}
	}
	if err == nil {
		err = l.open(root)
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// open opens the directory, and in it those of earlier processes.
func (l *leftover) open(root *os.File) error {
	const flags = os.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW
	d, err := OpenBeneath(root, l.name, flags)
	if err != nil {
		return err
	}
	l.dirs = append(l.dirs, d)
	for i := 0; i < len(l.dirs); i++ {
		names, err := l.dirs[i].Readdirnames(-1)
		if err != nil {
			return err
		}
		for _, name := range names {
			if !strings.HasPrefix(name, leftPrefix) || len(l.dirs) == leftMax {
				continue
			}
			if d, err := OpenBeneath(l.dirs[i], name, flags); err == nil { // what is no directory has only the name
				l.dirs = append(l.dirs, d)
			}
		}
	}
	return nil
}

// take moves a regular file that was left at a path, and has the size, into a directory, and opens it. It is nil if there
// is none, or none that can be made like a new one.
func (l *leftover) take(path string, size int64, dir int) *os.File {
	if l == nil || size == 0 {
		return nil
	}
	in, name := split(path)
	for _, d := range l.dirs {
		parent, err := OpenBeneath(d, in, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			continue
		}
		f := l.takeFrom(parent, name, size, dir)
		parent.Close()
		if f != nil {
			return f
		}
	}
	return nil
}

func (l *leftover) takeFrom(parent *os.File, name string, size int64, dir int) *os.File {
	var st unix.Stat_t // before it is opened: to open a device or a pipe would have effects
	if unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG ||
		st.Size != size || !l.first(&st) {
		return nil
	}
	f, err := OpenBeneath(parent, name, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK)
	if err != nil {
		return nil
	}
	if strip(f, size) != nil || unix.Renameat2(int(parent.Fd()), name, dir, name, unix.RENAME_NOREPLACE) != nil {
		f.Close()
		return nil
	}
	return f
}

// first reports whether no other name of the file was taken: what had several names may be several files now.
func (l *leftover) first(st *unix.Stat_t) bool {
	if st.Nlink == 1 {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.taken[st.Ino]
	l.taken[st.Ino] = true
	return !was
}

// strip takes from a file what Describe might leave, and makes sure that holes can be made in it.
func strip(f *os.File, size int64) error {
	path := procPath(f, "")
	if err := f.Chmod(0o600); err != nil {
		return err
	}
	if err := setAttributes(path, true, nil); err != nil {
		return err
	}
	left, err := attributes(path, true)
	if err != nil {
		return err
	}
	for _, a := range left {
		unix.Removexattr(path, a.Name) // a label that the system insists on, a new file would have too
	}
	return punch(f, size, holeUnit)
}

// holeUnit is the largest block, in bytes, in which filesystems keep holes.
const holeUnit = 4096

func punch(f *os.File, off, length int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

// remove removes what was not taken.
func (l *leftover) remove(root *os.File) error {
	if l == nil {
		return nil
	}
	return removeAll(root, l.name)
}

func (l *leftover) close() {
	if l == nil {
		return
	}
	for _, d := range l.dirs {
		d.Close()
	}
}
