package treefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"iter"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
)

// Options are what a Reader has to know beside its root. The zero Options read everything and compare nothing.
type Options struct {
	// What names the tree in errors.
	What string
	// Hidden is a name in the root that is not of the tree.
	Hidden string
	// Hollow says of a directory, by its inode number, that it only stands where something else is (a nested subvolume): it
	// is shown as empty, with a time of 0, for its own has no meaning.
	Hollow func(ino uint64) bool
	// Same is asked for each directory that is listed, with its inode number; the function that it gives says of a name in
	// it and an inode number whether that is certainly the same in the base. nil: nothing is.
	Same func(dir string, ino uint64) (func(name string, ino uint64) bool, error)
	// RootSame says that the whole tree is.
	RootSame bool
}

// Reader reads a tree: it is an adapters.Tree. What it reads must not change meanwhile.
type Reader struct {
	root *os.File
	o    Options
}

// NewReader reads the tree below a directory, which belongs to it then.
func NewReader(root *os.File, o Options) *Reader { return &Reader{root, o} }

// Close closes the root.
func (r *Reader) Close() error { return r.root.Close() }

func (r *Reader) failed(err error, path string) error {
	return failed(err, "%s: %q", r.o.What, path)
}

// enter opens the directory above a path.
func (r *Reader) enter(ctx context.Context, path string) (*os.File, string, error) {
	err := ctx.Err()
	if err == nil {
		err = checkPath(path)
	}
	if err != nil {
		return nil, "", err
	}
	if first, _, _ := strings.Cut(path, "/"); first == r.o.Hidden && first != "" {
		return nil, "", unix.ENOENT
	}
	dir, name := split(path)
	f, err := OpenBeneath(r.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	return f, name, err
}

// Stat describes what is at a path.
func (r *Reader) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	parent, name, err := r.enter(ctx, path)
	if err != nil {
		return adapters.Entry{}, r.failed(err, path)
	}
	defer parent.Close()
	e, ino, err := r.entry(parent, name)
	if err == nil && name == "" {
		e.Unchanged = r.o.RootSame
	} else if err == nil && r.o.Same != nil {
		dir, _ := split(path)
		var st unix.Stat_t
		var same func(string, uint64) bool
		if err = unix.Fstat(int(parent.Fd()), &st); err == nil {
			same, err = r.o.Same(dir, st.Ino)
		}
		e.Unchanged = err == nil && same != nil && same(name, ino)
	}
	if err != nil {
		return adapters.Entry{}, r.failed(err, path)
	}
	return e, nil
}

// batch is how many entries are described while their directory is open.
const batch = 256

// name is what a directory says of an entry by itself.
type name struct {
	name string
	dir  bool
}

// Entries lists a directory.
func (r *Reader) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		names, same, err := r.names(ctx, dir)
		for ; err == nil && len(names) > 0; names = names[min(batch, len(names)):] {
			var entries []adapters.Entry
			if entries, err = r.describe(ctx, dir, names[:min(batch, len(names))], same); err != nil {
				break
			}
			for _, e := range entries {
				if !yield(e, nil) {
					return
				}
			}
		}
		if err != nil {
			yield(adapters.Entry{}, r.failed(err, dir))
		}
	}
}

// names reads all names in a directory and orders them.
func (r *Reader) names(ctx context.Context, dir string) ([]name, func(string, uint64) bool, error) {
	parent, last, err := r.enter(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	defer parent.Close()
	f, err := OpenBeneath(parent, last, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, nil, err
	}
	if r.hollow(st.Ino) {
		return nil, nil, nil
	}
	names, err := readNames(ctx, f)
	if err != nil {
		return nil, nil, err
	}
	if dir == "" && r.o.Hidden != "" {
		names = slices.DeleteFunc(names, func(n name) bool { return n.name == r.o.Hidden })
	}
	slices.SortFunc(names, func(a, b name) int {
		if a.dir != b.dir {
			if a.dir {
				return -1
			}
			return 1
		}
		return strings.Compare(a.name, b.name)
	})
	if r.o.Same == nil {
		return names, nil, nil
	}
	same, err := r.o.Same(dir, st.Ino)
	return names, same, err
}

func (r *Reader) hollow(ino uint64) bool { return r.o.Hollow != nil && r.o.Hollow(ino) }

// readNames reads struct linux_dirent64, see getdents64(2).
func readNames(ctx context.Context, f *os.File) ([]name, error) {
	var names []name
	buf := make([]byte, 64<<10)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := unix.Getdents(int(f.Fd()), buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return names, err
		}
		const typeAt, nameAt = 18, 19
		for p := buf[:n]; len(p) > nameAt; {
			length := binary.NativeEndian.Uint16(p[16:])
			s, _, _ := bytes.Cut(p[nameAt:length], []byte{0})
			kind := p[typeAt]
			p = p[length:]
			if string(s) == "." || string(s) == ".." {
				continue
			}
			isDir := kind == unix.DT_DIR
			if kind == unix.DT_UNKNOWN {
				var st unix.Stat_t
				if err := unix.Fstatat(int(f.Fd()), string(s), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
					return nil, err
				}
				isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
			}
			names = append(names, name{string(s), isDir})
		}
	}
}

func (r *Reader) describe(ctx context.Context, dir string, names []name, same func(string, uint64) bool) ([]adapters.Entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := OpenBeneath(r.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries := make([]adapters.Entry, 0, len(names))
	for _, n := range names {
		e, ino, err := r.entry(f, n.name)
		if err != nil {
			return nil, failed(err, "%q", n.name)
		}
		e.Unchanged = same != nil && same(n.name, ino)
		entries = append(entries, e)
	}
	return entries, nil
}

// entry describes a name in an open directory, or with an empty name the directory itself.
func (r *Reader) entry(dir *os.File, name string) (adapters.Entry, uint64, error) {
	var st unix.Statx_t
	flags := unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if err := unix.Statx(int(dir.Fd()), name, flags, unix.STATX_BASIC_STATS, &st); err != nil {
		return adapters.Entry{}, 0, err
	}
	e := adapters.Entry{
		Name: name, Type: types[uint32(st.Mode)&unix.S_IFMT], Mode: uint32(st.Mode) & 0o7777, UID: st.Uid, GID: st.Gid,
		Modified: time.Unix(st.Mtime.Sec, int64(st.Mtime.Nsec)).UTC(),
	}
	if e.Type == adapters.Directory && r.hollow(st.Ino) {
		e.Modified = time.Unix(0, 0).UTC()
		return e, st.Ino, nil
	}
	if e.Type != adapters.Directory && st.Nlink > 1 {
		e.Link = st.Ino
	}
	switch e.Type {
	case adapters.RegularFile:
		e.Size = int64(st.Size)
	case adapters.CharDevice, adapters.BlockDevice:
		e.Device = adapters.Device(unix.Mkdev(st.Rdev_major, st.Rdev_minor))
	case adapters.Symlink:
		e.Mode = 0o777
		target := make([]byte, 4096) // PATH_MAX, with its NUL
		n, err := unix.Readlinkat(int(dir.Fd()), name, target)
		if err != nil {
			return e, 0, err
		}
		e.Target = string(target[:n])
	}
	var err error
	e.Attributes, err = attributes(procPath(dir, name), name == "")
	return e, st.Ino, err
}
