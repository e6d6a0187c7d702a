//go:build ceph && cgo

package ceph

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/integration/ceph"
)

// site is a cluster with its two users. The adapters are one with no more than the profile rbd; the tests themselves, which
// play the volumes' users, are the administrator.
type site struct {
	*ceph.Cluster
	keyring string // the path of the limited user's
	admin   *rados.Conn
}

// running is the cluster that the tests share. Its OSD is never killed, and stopped for a moment only by tests that run alone:
// other outages have clusters of their own.
var running *site

const testUser = "stillpoint"

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(victimVariable) != "" {
		fmt.Fprintln(os.Stderr, "a process that was to be killed:", victim())
		os.Exit(1)
	}
	os.Exit(withCluster(m))
}

func withCluster(m *testing.M) (code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var err error
	running, err = startSite(ctx, ceph.Options{Files: true, Lease: ceph.NeverKilled})
	if err == nil {
		defer func() {
			if err := running.close(); err != nil && code == 0 {
				fmt.Fprintln(os.Stderr, "the cluster for the tests:", err)
				code = 1
			}
		}()
		err = running.prepare()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "the cluster for the tests:", err)
		return 1
	}
	defer leaveFiles()
	return m.Run()
}

// prepare makes the namespace twin.
func (s *site) prepare() error {
	io, err := s.admin.OpenIOContext("rbd")
	if err != nil {
		return err
	}
	defer io.Destroy()
	return rbd.NamespaceCreate(io, "twin")
}

func startSite(ctx context.Context, o ceph.Options) (*site, error) {
	c, err := ceph.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	s := &site{Cluster: c}
	if err := s.connect(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// connect makes the limited user, and the administrator's connection.
func (s *site) connect(ctx context.Context) error {
	key, err := s.User(ctx, testUser)
	if err != nil {
		return err
	}
	s.keyring = filepath.Join(filepath.Dir(s.Conf), "user-keyring")
	if err := os.WriteFile(s.keyring, fmt.Appendf(nil, "[client.%s]\n\tkey = %s\n", testUser, key), 0o600); err != nil {
		return err
	}
	conn, err := rados.NewConnWithUser("admin")
	if err != nil {
		return err
	}
	if err := conn.ReadConfigFile(s.Conf); err != nil {
		return err
	}
	for _, o := range [][2]string{{"rbd_cache", "false"}, {"rados_osd_op_timeout", "60"}, {"rados_mon_op_timeout", "60"}, {"objecter_timeout", "1"}, {"objecter_tick_interval", "0.5"}} {
		if err := conn.SetConfigOption(o[0], o[1]); err != nil {
			return err
		}
	}
	if err := conn.Connect(); err != nil {
		return err
	}
	s.admin = conn
	return nil
}

func (s *site) close() error {
	if s.admin != nil {
		s.admin.Shutdown()
	}
	return s.Cluster.Close()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// config is that of the backend r, as the limited user.
func (s *site) config(more map[string]string) adapters.Config {
	c := adapters.Config{Name: "r", Parameters: map[string]string{"conf": s.Conf, "user": testUser, "keyring": s.keyring}}
	for k, v := range more {
		c.Parameters[k] = v
	}
	return c
}

// open opens the adapter and closes it at the end of the test.
func open(t testing.TB, more map[string]string) *Adapter { return running.open(t, more) }

func (s *site) open(t testing.TB, more map[string]string) *Adapter {
	t.Helper()
	a, err := RBD().Open(t.Context(), s.config(more))
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
func ioctx(t testing.TB, n imageName) *rados.IOContext { return running.ioctx(t, n) }

func (s *site) ioctx(t testing.TB, n imageName) *rados.IOContext {
	t.Helper()
	io, err := s.admin.OpenIOContext(n.pool)
	must(t, err)
	io.SetNamespace(n.namespace)
	t.Cleanup(io.Destroy)
	return io
}

// order is the size of the tests' objects, as a power of two: 256 KiB, so that small images have many.
const order = 18

// makeImage makes an image. It and all its snapshots are removed at the end.
func makeImage(t testing.TB, n imageName, size int64, options map[rbd.ImageOption]uint64) *volume {
	t.Helper()
	return running.makeImage(t, n, size, options)
}

func (s *site) makeImage(t testing.TB, n imageName, size int64, options map[rbd.ImageOption]uint64) *volume {
	t.Helper()
	io := s.ioctx(t, n)
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
