//go:build ceph && cgo

package ceph

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ceph/go-ceph/cephfs"
	fsadmin "github.com/ceph/go-ceph/cephfs/admin"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
)

// fsName is the filesystem of the tests' cluster, fsUser a cephx user with no more than the README asks for.
const (
	fsName = "cephfs"
	fsUser = "stillpoint-fs"
)

// files is what the tests of CephFS have of the shared cluster, once one wanted it.
var files struct {
	once    sync.Once
	err     error
	keyring string // of the limited user
	user    *mount // the administrator's
}

// filesReady makes the limited user, and mounts the filesystem as the administrator, with the caches of a client.
func filesReady(t testing.TB) {
	t.Helper()
	files.once.Do(func() { files.err = makeFiles() })
	must(t, files.err)
}

func makeFiles() error {
	key, err := running.FilesUser(context.Background(), fsUser)
	if err != nil {
		return err
	}
	files.keyring = filepath.Join(filepath.Dir(running.Conf), fsUser+".keyring")
	if err := os.WriteFile(files.keyring, fmt.Appendf(nil, "[client.%s]\n\tkey = %s\n", fsUser, key), 0o600); err != nil {
		return err
	}
	lib, err := cephfs.CreateMountWithId("admin")
	if err != nil {
		return err
	}
	if err := lib.ReadConfigFile(running.Conf); err != nil {
		return err
	}
	if err := lib.SetConfigOption("client_acl_type", "posix_acl"); err != nil {
		return err
	}
	if err := lib.Mount(); err != nil {
		return err
	}
	raw, err := rawOf(lib)
	files.user = &mount{lib: lib, raw: raw, fs: fsName}
	return err
}

// leaveFiles ends the administrator's mount, if there is one.
func leaveFiles() {
	if files.user != nil {
		files.user.lib.Unmount()
		files.user.lib.Release()
	}
}

// userMount is the administrator's mount, through which the tests use trees.
func userMount(t testing.TB) *mount {
	filesReady(t)
	return files.user
}

// openFiles opens the adapter, as the limited user, and closes it at the end of the test.
func openFiles(t testing.TB, more map[string]string) *FSAdapter {
	t.Helper()
	filesReady(t)
	c := adapters.Config{Name: "f", Parameters: map[string]string{"conf": running.Conf, "user": fsUser, "keyring": files.keyring}}
	for k, v := range more {
		c.Parameters[k] = v
	}
	a, err := FS().Open(t.Context(), c)
	must(t, err)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Errorf("closing the adapter: %v", err)
		}
	})
	return a.(*FSAdapter)
}

var treeSerial atomic.Int64

// liveTree is a tree as its user sees it.
type liveTree struct {
	*mount
	name treeName
	root string
}

func freeTree() treeName {
	return treeName{fs: fsName, group: noGroup, subvolume: fmt.Sprint("tree-", treeSerial.Add(1))}
}

func subvolumeAdmin() *fsadmin.FSAdmin { return fsadmin.NewFromConn(running.admin) }

// makeTree makes an empty subvolume. It and all its snapshots are removed at the end.
func makeTree(t testing.TB) *liveTree {
	t.Helper()
	n := freeTree()
	cleanUpTree(t, n)
	must(t, subvolumeAdmin().CreateSubVolume(fsName, "", n.subvolume, nil))
	path, err := subvolumeAdmin().SubVolumePath(fsName, "", n.subvolume)
	must(t, err)
	return &liveTree{userMount(t), n, path}
}

// makeDirectory makes an empty directory that is no subvolume.
func makeDirectory(t testing.TB) *liveTree {
	t.Helper()
	m := userMount(t)
	n := treeName{fs: fsName, dir: fmt.Sprint("/dir-", treeSerial.Add(1))}
	must(t, m.lib.MakeDir(n.dir, 0o755))
	cleanUpTree(t, n)
	return &liveTree{m, n, n.dir}
}

// cleanUpTree removes a tree at the end of the test, if it is there then.
func cleanUpTree(t testing.TB, n treeName) {
	m := userMount(t)
	t.Cleanup(func() {
		names, err := testNames(m, n.snapshot(""))
		if isAbsent(err) {
			return
		}
		must(t, err)
		for _, s := range names {
			must(t, ignore(m.lib.RemoveDir(n.snapshot(s))))
		}
		if n.dir != "" {
			must(t, testRemove(m, n.dir))
			return
		}
		must(t, ignore(subvolumeAdmin().RemoveSubVolume(fsName, n.mgrGroup(), n.subvolume)))
	})
}

func testNames(m *mount, dir string) ([]string, error) {
	d, err := m.lib.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var names []string
	for {
		e, err := d.ReadDir()
		if err != nil || e == nil {
			return names, err
		}
		if e.Name() != "." && e.Name() != ".." && e.Name()[0] != '_' {
			names = append(names, e.Name())
		}
	}
}

func testRemove(m *mount, path string) error {
	st, err := m.stat(path)
	if err != nil {
		return err
	}
	if !st.isDirectory() {
		return m.lib.Unlink(path)
	}
	names, err := testNames(m, path)
	for _, n := range names {
		if err == nil {
			err = testRemove(m, below(path, n))
		}
	}
	if err == nil {
		err = m.lib.RemoveDir(path)
	}
	return err
}

func wrap(err error, what string, paths ...string) error {
	if err != nil {
		err = fmt.Errorf("%s %q: %w", what, paths, err)
	}
	return err
}

func (v *liveTree) at(path string) string { return below(v.root, path) }

func (v *liveTree) ID() adapters.VolumeID { return v.name.id("f") }
func (v *liveTree) Mkdir(path string) error {
	return wrap(v.lib.MakeDir(v.at(path), 0o700), "mkdir", path)
}
func (v *liveTree) Remove(path string) error {
	return wrap(testRemove(v.mount, v.at(path)), "remove", path)
}

func (v *liveTree) Write(path string, p []byte, off int64) error {
	f, err := v.lib.Open(v.at(path), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	for n := 0; n < len(p) && err == nil; {
		var w int
		w, err = f.WriteAt(p[n:], off+int64(n))
		n += w
	}
	return wrap(first(err, f.Close()), "write", path)
}

func (v *liveTree) Truncate(path string, size int64) error {
	return wrap(v.lib.Truncate(v.at(path), size), "truncate", path)
}

func (v *liveTree) Symlink(path, target string) error {
	return wrap(v.lib.Symlink(target, v.at(path)), "symlink", path)
}
func (v *liveTree) Link(old, path string) error {
	return wrap(linkNode(v.raw, v.at(old), v.at(path)), "link", old, path)
}
func (v *liveTree) Rename(old, path string) error {
	return wrap(v.lib.Rename(v.at(old), v.at(path)), "rename", old, path)
}

func (v *liveTree) Special(path string, t adapters.FileType, d adapters.Device) error {
	for mode, kind := range fileTypes {
		if kind == t {
			return makeNode(v.raw, v.at(path), mode|0o600, uint64(d))
		}
	}
	return syscall.EINVAL
}

func (v *liveTree) Describe(path string, e adapters.Entry) error {
	if err := v.dress(v.at(path), e); err != nil {
		return fmt.Errorf("describing %q as %+v: %w", path, e, err)
	}
	return nil
}

// keepable is a time between 1970 and 2106.
func keepable(t time.Time) time.Time {
	return time.Unix(t.Unix()&(1<<32-1), int64(t.Nanosecond())).UTC()
}

func TestFSConformance(t *testing.T) {
	for _, c := range []struct {
		form   string
		make   func(testing.TB) *liveTree
		absent func() treeName
	}{
		{"subvolume", makeTree, freeTree},
		{"directory", makeDirectory, func() treeName { return treeName{fs: fsName, dir: fmt.Sprint("/new-", treeSerial.Add(1))} }},
	} {
		t.Run(c.form, func(t *testing.T) {
			t.Parallel()
			adaptertest.Run(t, adaptertest.Harness{
				Backend:    "f",
				Open:       func(t testing.TB) adapters.Adapter { return openFiles(t, nil) },
				CreateTree: func(t testing.TB) adaptertest.TreeVolume { return c.make(t) },
				AbsentTree: func(t testing.TB) adapters.VolumeID {
					n := c.absent()
					cleanUpTree(t, n)
					return n.id("f")
				},
				Foreign: func(t testing.TB, v adaptertest.Volume, name string) {
					n, err := parseTreeName(v.ID().ID, "")
					must(t, err)
					must(t, userMount(t).lib.MakeDir(n.snapshot(name), 0o755))
				},
				Times: keepable,
				Wrong: []string{
					"", "x", "cephfs/", "/g/s", "a/b/c/d", "cephfs/g/..", "cephfs/_x/s", "cephfs/g/" + growing, "cephfs:", "cephfs:relative", "cephfs:/a//b",
					"cephfs:/a/../b", "cephfs:/volumes/g/s", "cephfs:/a/.snap/b", "cephfs/a\x00b", "cephfs/g/_nogroup", ":/x",
				},
			})
		})
	}
}
