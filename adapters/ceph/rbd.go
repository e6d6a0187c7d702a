//go:build ceph && cgo

package ceph

// #cgo LDFLAGS: -ldl
// #define _GNU_SOURCE
// #include <dlfcn.h>
//
// // ceph_release is Ceph's version as its own library tells it: ceph_version_to_str() of src/common/version.h, which
// // librados does not pass on. NULL if that library has it no more.
// static const char *ceph_release(void) {
// 	const char *(*version)(void) = (const char *(*)(void))dlsym(RTLD_DEFAULT, "_Z19ceph_version_to_strv");
// 	return version ? version() : (const char *)0;
// }
import "C"

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

const lacking = ""

// Adapter is a backend of RBD images.
type Adapter struct {
	backend string
	pool    string // the backend is limited to it; empty: it is not
	exact   bool   // never trusts an object map
	fuse    []fuseFolder
	nbd     bool // what rbd-nbd has mapped is of this cluster
	cluster *cluster
	// turns keep apart the changes of an image: Ceph would have them take its exclusive lock from each other, which takes longer
	// than the changes.
	turns *turns[imageName]
	pace  pace
	page  int64 // images that a listing asks for at once
	// keepTwoLevel makes tests trust object maps over a shrink too.
	keepTwoLevel bool
}

// openRBD checks the settings. It does not connect: that is for the first call, so that an agent whose cluster is away
// starts all the same.
func openRBD(_ context.Context, c adapters.Config) (adapters.Adapter, error) {
	p, err := RBD().Params(c)
	if err != nil {
		return nil, err
	}
	s, wrong := readSettings(p, c.Name)
	pool, diff := p.String("pool", ""), p.String("diff", "auto")
	nbd := p.Bool("nbd", false)
	fuse, fuseErr := parseFuse(p.String("fuse", ""))
	switch err := p.Err(); {
	case err != nil:
		return nil, err
	case wrong != nil:
		return nil, wrong
	case diff != "auto" && diff != "exact":
		return nil, fault.Errorf(fault.Invalid, "backend %s: diff: %q is neither auto nor exact", c.Name, diff)
	case strings.ContainsAny(pool, "/@"):
		return nil, fault.Errorf(fault.Invalid, "backend %s: pool: %q is not a pool's name", c.Name, pool)
	case fuseErr != nil:
		return nil, fault.Errorf(fault.Invalid, "backend %s: fuse: %w", c.Name, fuseErr)
	}
	return &Adapter{backend: c.Name, pool: pool, exact: diff == "exact", fuse: fuse, nbd: nbd, cluster: newCluster(s), page: pageImages, turns: newTurns[imageName]()}, nil
}

// Capabilities describes the adapter.
func (a *Adapter) Capabilities() adapters.Capabilities {
	changed := "object maps find the objects that changed, and asking those objects' snapshots the bytes; every object is asked where an image has no valid object map, is striped, or shrank in between"
	if a.exact {
		changed = "every object's snapshots are asked for the bytes that changed"
	}
	return adapters.Capabilities{
		Quiesce:     "the filesystem on the image is frozen by the cut; the snapshot of one image is one instant, because the holder of its exclusive lock pauses writes for it",
		Changed:     changed,
		PointInTime: "the return of rbd_snap_create(): the OSDs keep what later writes replace (librbd.h)",
		Confidence:  cbt.Superset,
		Source:      audit.Source{Name: audit.RBDFastDiff, Version: release(), Tracked: !a.exact},
	}
}

// release is the version of Ceph's libraries, empty if they do not tell.
func release() string {
	if s := C.ceph_release(); s != nil {
		return C.GoString(s)
	}
	return ""
}

// Close ends the connection. Unavailable if calls hang.
func (a *Adapter) Close() error { return a.cluster.close() }

// Volume looks an image up.
func (a *Adapter) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	return callOn(ctx, a, id, "", func(one *call, name imageName) (adapters.Volume, error) {
		return a.volume(one, name)
	})
}

func (a *Adapter) volume(one *call, name imageName) (adapters.Volume, error) {
	m, err := a.cluster.open(one, name, forReading)
	if err != nil {
		return adapters.Volume{}, err
	}
	one.later(m.release)
	size, err := m.rbd.GetSize()
	if err != nil {
		return adapters.Volume{}, err
	}
	v := adapters.Volume{ID: name.id(a.backend), Form: adapters.BlockForm, Size: int64(size), Freeze: adapters.FreezeNests}
	fsid, err := m.connection.rados.GetFSID()
	if err != nil {
		return v, err
	}
	maps, err := a.mapped()
	if err != nil {
		return v, err
	}
	on := slices.DeleteFunc(maps, func(d mapping) bool { return !d.shows(fsid, name) })
	if len(on) > 0 {
		v.Device, v.Path = on[0].device, on[0].path
	}
	if len(on) > 1 { // whoever writes to it through the one device is not seen through the other
		v.Freeze = adapters.FreezeNone
	}
	return v, nil
}

// mapped lists the images that are block devices of this node.
func (a *Adapter) mapped() ([]mapping, error) {
	all, err := mappings(sysRBD)
	if err != nil {
		return nil, err
	}
	onLoops, err := fuseMappings(sysBlock, a.fuse)
	if err != nil || !a.nbd {
		return append(all, onLoops...), err
	}
	served, err := nbdMappings(sysBlock, "/proc")
	return slices.Concat(all, onLoops, served), err
}

// callOn makes a call that is about a volume, and gives its error a kind and a name: what, or else the volume.
func callOn[T any](ctx context.Context, a *Adapter, id adapters.VolumeID, what string, f func(*call, imageName) (T, error)) (T, error) {
	var none T
	if what == "" {
		what = "volume " + id.String()
	}
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	at, err := a.parse(id)
	if err != nil {
		return none, err
	}
	began := time.Now()
	v, err := do(ctx, a.cluster.calls, func(one *call) (T, error) {
		name, err := at(one)
		if err != nil {
			return none, err
		}
		return f(one, name)
	})
	if err != nil {
		return v, a.cluster.failure(err, began, "%s", what)
	}
	return v, nil
}

// parse reads a volume's id; what it answers with finds the image's name, by asking the cluster where the id is a handle
// of ceph-csi.
func (a *Adapter) parse(id adapters.VolumeID) (func(*call) (imageName, error), error) {
	if id.Backend != a.backend {
		return nil, fault.Errorf(fault.Invalid, "volume %s is not of the backend %s", id, a.backend)
	}
	if h, ok := parseCSIHandle(id.ID); ok {
		return func(one *call) (imageName, error) { return a.locate(one, h) }, nil
	}
	name, err := parseImageName(id.ID, a.pool)
	return func(*call) (imageName, error) { return name, nil }, err
}

// resolve finds the image of a volume's id within a call.
func (a *Adapter) resolve(one *call, id adapters.VolumeID) (imageName, error) {
	at, err := a.parse(id)
	if err != nil {
		return imageName{}, err
	}
	return at(one)
}

// locate finds the image of a handle of ceph-csi.
func (a *Adapter) locate(one *call, h csiHandle) (imageName, error) {
	n, err := a.cluster.connection(one)
	if err != nil {
		return imageName{}, err
	}
	pool, err := n.rados.GetPoolByID(h.pool)
	if err != nil {
		return imageName{}, fmt.Errorf("its pool, number %d: %w", h.pool, err)
	}
	return parseImageName(pool+"/"+csiImagePrefix+h.uuid, a.pool)
}

// failure gives an error of a call its kind. After a time-out, and after Ceph shut the client out, the next call connects
// anew.
func (c *cluster) failure(err error, began time.Time, format string, args ...any) error {
	if e := errnoOf(err); e == syscall.ESHUTDOWN || e == syscall.ETIMEDOUT {
		c.renew()
	}
	if errnoOf(err) == 0 && fault.KindOf(err) == fault.Internal { // a context's end, with its own identity
		return fmt.Errorf(format+": %w", append(args, err)...)
	}
	return failed(err, time.Since(began), c.timeout, format, args...)
}

func (n *connection) failure(err error, began time.Time, format string, args ...any) error {
	return n.cluster.failure(err, began, format, args...)
}

func checkName(id adapters.SnapshotID) error {
	if id.Name == "" || adapters.Name(id.Name) != id.Name {
		return fault.Errorf(fault.Invalid, "%q is not the name of a snapshot of ours: at most %d of [a-z0-9-]", id.Name, adapters.NameMax)
	}
	return nil
}

func notFound() error {
	return fault.Errorf(fault.NotFound, "there is none of ours")
}
