//go:build ceph && cgo

package ceph

import (
	"crypto/rand"
	"strings"
	"sync"
	"syscall"
)

// What a dead process left of a tree is moved into a directory of its root, and the tree is made from nothing beside it, as
// package treefs does it: a regular file that is made again, at the same path and of the same size, is moved back. Nothing
// but bytes is ever taken over, and the rest goes at the end.

const (
	// leftPrefix begins the name of that directory. The rest is random: no tree that is restored has it.
	leftPrefix = ".stillpoint-left-"
	// leftMax is how many interruptions are looked back upon. What is older only goes at the end.
	leftMax = 16
)

// leftTree is what dead processes left of a target. A nil one is nothing.
type leftTree struct {
	path string
	dirs []string // a root for each process, the last one's first

	mu    sync.Mutex
	taken map[uint64]bool // numbers of files with several names
}

// names lists a directory.
func (m *mount) names(one *call, dir string) ([]string, error) {
	d, err := m.lib.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var names []string
	for {
		if err := one.wanted(); err != nil {
			return nil, err
		}
		e, err := d.ReadDir()
		if err != nil || e == nil {
			return names, err
		}
		if e.Name() != "." && e.Name() != ".." {
			names = append(names, e.Name())
		}
	}
}

// setAside moves everything in a root into a directory of it.
func (m *mount) setAside(one *call, root string) (*leftTree, error) {
	names, err := m.names(one, root)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	l := &leftTree{path: below(root, leftPrefix+rand.Text()), taken: map[uint64]bool{}}
	if len(names) == 1 && strings.HasPrefix(names[0], leftPrefix) { // the last process made nothing
		err = m.lib.Rename(below(root, names[0]), l.path)
	} else {
		err = m.lib.MakeDir(l.path, 0o700)
		for _, name := range names {
			if err == nil {
				err = m.lib.Rename(below(root, name), below(l.path, name))
			}
		}
	}
	if err != nil {
		return nil, err
	}
	l.dirs = []string{l.path}
	for i := 0; i < len(l.dirs); i++ {
		names, err := m.names(one, l.dirs[i])
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			at := below(l.dirs[i], name)
			if !strings.HasPrefix(name, leftPrefix) || len(l.dirs) == leftMax {
				continue
			}
			if st, err := m.stat(at); err == nil && st.isDirectory() { // what is no directory has only the name
				l.dirs = append(l.dirs, at)
			}
		}
	}
	return l, nil
}

// take moves a regular file that was left at a path, and has the size, to a place where nothing is, and makes it like a new
// one. It reports whether there was one that can be.
func (l *leftTree) take(m *mount, path string, size int64, to string) (bool, error) {
	if l == nil || size == 0 {
		return false, nil
	}
	if _, err := m.stat(to); err == nil {
		return false, libError(syscall.EEXIST)
	} else if !isAbsent(err) {
		return false, err
	}
	for _, dir := range l.dirs {
		st, err := m.walk(dir, path)
		if err != nil || uint32(st.mode)&syscall.S_IFMT != syscall.S_IFREG || int64(st.size) != size || !l.first(st) {
			continue
		}
		at := below(dir, path)
		if m.lib.Chmod(at, 0o600) == nil && m.setAttributes(at, nil) == nil && m.lib.Rename(at, to) == nil {
			return true, nil
		}
	}
	return false, nil
}

// first reports whether no other name of the file was taken: what had several names may be several files now.
func (l *leftTree) first(st node) bool {
	if st.links == 1 {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.taken[st.number]
	l.taken[st.number] = true
	return !was
}

// remove removes what was not taken.
func (l *leftTree) remove(one *call, m *mount) error {
	if l == nil {
		return nil
	}
	return m.removeAll(one, l.path)
}

// removeAll removes what is at a path, with all below it. It follows no link.
func (m *mount) removeAll(one *call, path string) error {
	if err := one.wanted(); err != nil {
		return err
	}
	st, err := m.stat(path)
	if err != nil {
		return ignore(err)
	}
	if !st.isDirectory() {
		return ignore(m.lib.Unlink(path))
	}
	names, err := m.names(one, path)
	if err != nil {
		return ignore(err)
	}
	for _, name := range names {
		if err := m.removeAll(one, below(path, name)); err != nil {
			return err
		}
	}
	return ignore(m.lib.RemoveDir(path))
}
