//go:build ceph && cgo

package ceph

import (
	"context"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/cephfs"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// FSAdapter is a backend of trees in CephFS.
type FSAdapter struct {
	backend string
	fs      string // the backend is limited to it; empty: it is not
	lag     time.Duration
	cluster *cluster
	mounts  *mounts
	page    int64 // keys of records that a listing asks for at once
}

// openFS checks the settings. It does not connect: that is for the first call.
func openFS(_ context.Context, c adapters.Config) (adapters.Adapter, error) {
	p, err := FS().Params(c)
	if err != nil {
		return nil, err
	}
	s, wrong := readSettings(p, c.Name)
	fs, lag := p.String("fs", ""), p.Duration("lag", time.Minute)
	switch err := p.Err(); {
	case err != nil:
		return nil, err
	case wrong != nil:
		return nil, wrong
	case lag < 0:
		return nil, fault.Errorf(fault.Invalid, "backend %s: lag: %v is negative", c.Name, lag)
	case strings.ContainsAny(fs, "/:@"):
		return nil, fault.Errorf(fault.Invalid, "backend %s: fs: %q is not a filesystem's name", c.Name, fs)
	}
	k := newCluster(s)
	return &FSAdapter{backend: c.Name, fs: fs, lag: lag, cluster: k, mounts: newMounts(k), page: pageRecords}, nil
}

// Capabilities describes the adapter.
func (a *FSAdapter) Capabilities() adapters.Capabilities {
	return adapters.Capabilities{
		Quiesce:     "nothing is frozen: other nodes' clients write to the same tree; the snapshot has what each client had written when it heard of it (`ceph fs quiesce`, since squid, is not used)",
		Changed:     "recursive times of change tell directories apart that changed, by a rule with a margin (parameter lag); times and versions of inodes tell files apart; compared in full every few backups",
		PointInTime: "the return of ceph_mksnap(): the metadata server has told all clients of the snapshot (libcephfs.h)",
		Confidence:  cbt.Superset,
		Source:      audit.Source{Name: "cephfs-rctime", Version: release()},
	}
}

// Close ends the mounts and the connection. Unavailable if calls hang.
func (a *FSAdapter) Close() error {
	a.cluster.wait(closePatience)
	a.mounts.close()
	return a.cluster.close()
}

// callFS makes a call that is about a volume, and gives its error a kind and a name: what, or else the volume.
func callFS[T any](ctx context.Context, a *FSAdapter, id adapters.VolumeID, what string, f func(*call, *mount, treeName) (T, error)) (T, error) {
	var none T
	if what == "" {
		what = "volume " + id.String()
	}
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	if id.Backend != a.backend {
		return none, fault.Errorf(fault.Invalid, "%s is not of the backend %s", what, a.backend)
	}
	name, err := parseTreeName(id.ID, a.fs)
	if err != nil {
		return none, err
	}
	return callMounted(ctx, a, name.fs, what, func(one *call, m *mount) (T, error) { return f(one, m, name) })
}

// callMounted makes a call that needs a filesystem.
func callMounted[T any](ctx context.Context, a *FSAdapter, fs, what string, f func(*call, *mount) (T, error)) (T, error) {
	began := time.Now()
	v, err := do(ctx, a.cluster.calls, func(one *call) (T, error) {
		m, err := a.mounts.get(one, fs)
		if err != nil {
			var none T
			return none, err
		}
		v, err := f(one, m)
		if isShutOut(err) {
			m.lose()
		}
		return v, err
	})
	if err != nil {
		return v, a.cluster.fsFailure(err, began, "%s", what)
	}
	return v, nil
}

// isShutOut reports whether an error says that the metadata servers, or the OSDs, do not know the client any more.
func isShutOut(err error) bool {
	e := errnoOf(err)
	return e == syscall.ENOTCONN || e == syscall.ESHUTDOWN
}

// fsFailure is failure with what an errno means to a filesystem.
func (c *cluster) fsFailure(err error, began time.Time, format string, args ...any) error {
	if fault.KindOf(err) == fault.Internal {
		switch errnoOf(err) {
		case syscall.ENOTDIR, syscall.ELOOP:
			err = fault.Errorf(fault.NotFound, "%w", err)
		case syscall.EROFS:
			err = fault.Errorf(fault.Invalid, "%w; a snapshot is read-only", err)
		case syscall.EMLINK:
			err = fault.Errorf(fault.Exhausted, "%w; the directory has as many snapshots as CephFS allows (mds_max_snaps_per_dir)", err)
		case syscall.EPERM, syscall.EACCES:
			err = fault.Errorf(fault.Unsupported, "%w; the cephx user may not do this: see the README's list of capabilities for ceph-fs", err)
		case syscall.EBADF, syscall.EXDEV, syscall.EISDIR:
			err = fault.Errorf(fault.Invalid, "%w", err)
		}
	}
	return c.failure(err, began, format, args...)
}

// Volume looks a tree up.
func (a *FSAdapter) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	return callFS(ctx, a, id, "", func(one *call, m *mount, name treeName) (adapters.Volume, error) {
		if _, err := m.locate(name); err != nil {
			return adapters.Volume{}, err
		}
		return a.volume(name), nil
	})
}

func (a *FSAdapter) volume(name treeName) adapters.Volume {
	return adapters.Volume{ID: name.id(a.backend), Form: adapters.TreeForm, Freeze: adapters.FreezeNone}
}

// locate finds a volume's data: the path below its top, empty if it is the top itself.
func (m *mount) locate(name treeName) (data string, err error) {
	if st, err := m.stat(name.top()); err != nil {
		return "", err
	} else if !st.isDirectory() {
		return "", fault.Errorf(fault.Unsupported, "it is no directory")
	}
	if name.dir != "" {
		return "", nil
	}
	d, err := m.describe(name, name.top())
	switch {
	case err != nil:
		return "", err
	case d.state != complete:
		return "", fault.Errorf(fault.Unsupported, "the subvolume's state is %q: a clone, if it is one, must be complete first (`ceph fs clone status`)", d.state)
	}
	st, err := m.stat(below(name.top(), d.data))
	if err == nil && isRestoring(st) {
		err = fault.Errorf(fault.NotFound, "it is an unfinished restore")
	}
	return d.data, err
}

// describe reads the file in which the manager keeps what it knows of a subvolume, in its top directory or in a snapshot of
// it. A subvolume from before there were such files has none, and is its own data. Source:
// src/pybind/mgr/volumes/fs/operations/versions/metadata_manager.py.
func (m *mount) describe(name treeName, top string) (description, error) {
	text, err := m.readSmall(below(top, ".meta"))
	if isAbsent(err) {
		return description{state: complete}, nil
	}
	if err != nil {
		return description{}, err
	}
	return parseDescription(name, text)
}

// readSmall reads the start of a file, at most recordMax bytes.
func (m *mount) readSmall(path string) (string, error) {
	f, err := m.lib.Open(path, syscall.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	p := make([]byte, recordMax)
	for n := 0; ; {
		r, err := f.ReadAt(p[n:], int64(n))
		n += r
		switch {
		case err == io.EOF || err == nil && (r == 0 || n == len(p)):
			return string(p[:n]), nil
		case err != nil:
			return "", err
		}
	}
}

// wantedStat is what is asked of an inode.
const wantedStat = cephfs.StatxBasicStats | cephfs.StatxVersion

// stat describes what is at a path, itself if it is a link.
func (m *mount) stat(path string) (node, error) {
	s, err := m.lib.Statx(path, wantedStat, cephfs.AtSymlinkNofollow)
	if err != nil {
		return node{}, err
	}
	return nodeOf(s), nil
}

func nodeOf(s *cephfs.CephStatx) node {
	return node{
		number: uint64(s.Inode), size: s.Size, version: s.Version, device: s.Rdev, links: s.Nlink, uid: s.Uid, gid: s.Gid, mode: s.Mode,
		modified: time.Unix(s.Mtime.Sec, s.Mtime.Nsec).UTC(), changed: time.Unix(s.Ctime.Sec, s.Ctime.Nsec).UTC(),
	}
}

func (n node) isDirectory() bool { return uint32(n.mode)&syscall.S_IFMT == syscall.S_IFDIR }
