//go:build ceph && cgo

package ceph

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/integration/ceph"
)

// The tests share one cluster. The adapters are a cephx user with no more than the profile rbd; the tests themselves, which
// play the volumes' users, are the administrator.
var (
	running *ceph.Cluster
	keyring string // the path of the limited user's
	admin   *rados.Conn

	fsKeyring string // of the limited user of CephFS
	user      *mount // the administrator's, once a test wanted it
	userOnce  sync.Once
)

const testUser = "stillpoint"

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(withCluster(m))
}

func withCluster(m *testing.M) (code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "the cluster for the tests:", err)
		return 1
	}
	var err error
	if running, err = ceph.Start(ctx, ceph.Options{Files: true}); err != nil {
		return fail(err)
	}
	defer func() {
		if err := running.Close(); err != nil && code == 0 {
			code = fail(err)
		}
	}()
	for user, at := range map[string]struct {
		path *string
		key  func(context.Context, string) (string, error)
	}{testUser: {&keyring, running.User}, fsUser: {&fsKeyring, running.FilesUser}} {
		key, err := at.key(ctx, user)
		if err != nil {
			return fail(err)
		}
		*at.path = filepath.Join(filepath.Dir(running.Conf), user+".keyring")
		if err := os.WriteFile(*at.path, fmt.Appendf(nil, "[client.%s]\n\tkey = %s\n", user, key), 0o600); err != nil {
			return fail(err)
		}
	}
	if admin, err = connectAdmin(); err != nil {
		return fail(err)
	}
	defer admin.Shutdown()
	io, err := admin.OpenIOContext("rbd")
	if err != nil {
		return fail(err)
	}
	defer io.Destroy()
	if err := rbd.NamespaceCreate(io, "twin"); err != nil {
		return fail(err)
	}
	defer func() {
		if user != nil {
			user.lib.Unmount()
			user.lib.Release()
		}
	}()
	return m.Run()
}

func connectAdmin() (*rados.Conn, error) {
	conn, err := rados.NewConnWithUser("admin")
	if err != nil {
		return nil, err
	}
	if err := conn.ReadConfigFile(running.Conf); err != nil {
		return nil, err
	}
	for _, o := range [][2]string{{"rbd_cache", "false"}, {"rados_osd_op_timeout", "60"}, {"rados_mon_op_timeout", "60"}, {"objecter_timeout", "1"}, {"objecter_tick_interval", "0.5"}} {
		if err := conn.SetConfigOption(o[0], o[1]); err != nil {
			return nil, err
		}
	}
	return conn, conn.Connect()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// config is that of the backend r, as the limited user.
func config(more map[string]string) adapters.Config {
	c := adapters.Config{Name: "r", Parameters: map[string]string{"conf": running.Conf, "user": testUser, "keyring": keyring}}
	for k, v := range more {
		c.Parameters[k] = v
	}
	return c
}

// open opens the adapter and closes it at the end of the test.
func open(t testing.TB, more map[string]string) *Adapter {
	t.Helper()
	a, err := RBD().Open(t.Context(), config(more))
	must(t, err)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Errorf("closing the adapter: %v", err)
		}
	})
	return a.(*Adapter)
}

// volume is an image as its user sees it. It stays open, as a mapped one does.
type volume struct {
	name imageName
	io   *rados.IOContext
	rbd  *rbd.Image
}

var images atomic.Int64

// freeName is another name each time.
func freeName(pool, namespace string) imageName {
	return imageName{pool, namespace, fmt.Sprintf("vol-%d", images.Add(1))}
}

// ioctx opens a pool until the end of the test.
func ioctx(t testing.TB, n imageName) *rados.IOContext {
	t.Helper()
	io, err := admin.OpenIOContext(n.pool)
	must(t, err)
	io.SetNamespace(n.namespace)
	t.Cleanup(io.Destroy)
	return io
}

// order is the size of the tests' objects, as a power of two: 256 KiB, so that small images have many.
const order = 18

// make makes an image. It and all its snapshots are removed at the end.
func makeImage(t testing.TB, n imageName, size int64, options map[rbd.ImageOption]uint64) *volume {
	t.Helper()
	io := ioctx(t, n)
	o := rbd.NewRbdImageOptions()
	defer o.Destroy()
	must(t, o.SetUint64(rbd.ImageOptionOrder, order))
	for k, v := range options {
		must(t, o.SetUint64(k, v))
	}
	must(t, rbd.CreateImage(io, n.image, uint64(size), o))
	cleanUp(t, io, n)
	return openVolume(t, io, n)
}

// openVolume opens an image for a change until the end of the test.
func openVolume(t testing.TB, io *rados.IOContext, n imageName) *volume {
	t.Helper()
	img, err := rbd.OpenImage(io, n.image, rbd.NoSnapshot)
	must(t, err)
	v := &volume{n, io, img}
	t.Cleanup(v.close)
	return v
}

func (v *volume) close() {
	if v.rbd != nil {
		v.rbd.Close()
		v.rbd = nil
	}
}

// cleanUp removes an image at the end of the test, if it is there then.
func cleanUp(t testing.TB, io *rados.IOContext, n imageName) {
	t.Cleanup(func() {
		if err := removeImage(io, n.image); err != nil && !isAbsent(err) {
			t.Errorf("removing %s: %v", n, err)
		}
	})
}

// removeImage removes an image with its snapshots.
func removeImage(io *rados.IOContext, name string) error {
	img, err := rbd.OpenImage(io, name, rbd.NoSnapshot)
	if err != nil {
		return err
	}
	snaps, err := img.GetSnapshotNames()
	for _, s := range snaps {
		if protected, e := img.GetSnapshot(s.Name).IsProtected(); e == nil && protected {
			err = first(img.GetSnapshot(s.Name).Unprotect(), nil)
		}
		if e := img.RemoveSnapByID(s.Id); e != nil && !isAbsent(e) {
			err = e
		}
	}
	img.Close()
	if err != nil {
		return err
	}
	return rbd.RemoveImage(io, name)
}

func (v *volume) ID() adapters.VolumeID { return v.name.id("r") }

func (v *volume) WriteAt(p []byte, off int64) (int, error) { return v.rbd.WriteAt(p, off) }

// Zero discards whole objects, which leaves a hole, and writes zeros for the rest.
func (v *volume) Zero(off, length int64) error {
	if off%(1<<order) == 0 && length%(1<<order) == 0 {
		_, err := v.rbd.Discard(uint64(off), uint64(length))
		return err
	}
	_, err := v.rbd.WriteAt(make([]byte, length), off)
	return err
}

func (v *volume) Resize(size int64) error { return v.rbd.Resize(uint64(size)) }

func TestConformance(t *testing.T) {
	t.Parallel()
	adaptertest.Run(t, adaptertest.Harness{
		Backend: "r",
		Open:    func(t testing.TB) adapters.Adapter { return open(t, nil) },
		Create: func(t testing.TB, size int64) adaptertest.Volume {
			return lazy(t, makeImage(t, freeName("rbd", ""), size, nil))
		},
		Absent: func(t testing.TB) adapters.VolumeID {
			n := freeName("rbd", "")
			cleanUp(t, ioctx(t, n), n)
			return n.id("r")
		},
		Twin: func(t testing.TB, v adaptertest.Volume, size int64) adaptertest.Volume {
			n := imageOf(t, v.ID())
			n.namespace = "twin"
			return lazy(t, makeImage(t, n, size, nil))
		},
		Foreign: func(t testing.TB, v adaptertest.Volume, name string) {
			w := v.(*lazyVolume)
			w.use()
			_, err := w.rbd.CreateSnapshot(name)
			must(t, err)
		},
		Use: func(t testing.TB, v adaptertest.Volume) func() {
			w := v.(*lazyVolume)
			w.use()
			return w.close
		},
		Wrong: []string{"", "rbd/", "/x", "a//b", "a/b/c/d", "rbd/x@y", "rbd/a\x00b", "rbd/" + targetPrefix + "x"},
		Step:  512,
	})
}

// lazyVolume closes its image after every use, so that a restore finds it unused.
type lazyVolume struct {
	*volume
	t testing.TB
}

func lazy(t testing.TB, v *volume) *lazyVolume {
	v.close()
	return &lazyVolume{v, t}
}

func (v *lazyVolume) use() {
	if v.rbd == nil {
		*v.volume = *openVolume(v.t, v.io, v.name)
	}
}

func (v *lazyVolume) WriteAt(p []byte, off int64) (int, error) {
	v.use()
	defer v.close()
	return v.volume.WriteAt(p, off)
}

func (v *lazyVolume) Zero(off, length int64) error {
	v.use()
	defer v.close()
	return v.volume.Zero(off, length)
}

func (v *lazyVolume) Resize(size int64) error {
	v.use()
	defer v.close()
	return v.volume.Resize(size)
}

func randomBytes(n int) []byte {
	p := make([]byte, n)
	rand.Read(p)
	return p
}
