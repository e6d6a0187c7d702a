//go:build ceph && cgo

package ceph

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"syscall"
	"time"

	fsadmin "github.com/ceph/go-ceph/cephfs/admin"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// CreateSnapshot makes a snapshot with its tag. One that was abandoned half-way is there, cutting, or is not.
func (a *FSAdapter) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	if wanted == "" || len(wanted) > wantedMax {
		return adapters.Snapshot{}, fault.Errorf(fault.Invalid, "volume %s: a snapshot's wanted name has 1 to %d bytes, not %d", id, wantedMax, len(wanted))
	}
	return callFS(ctx, a, id, "", func(one *call, m *mount, name treeName) (adapters.Snapshot, error) {
		if _, err := m.locate(name); err != nil {
			return adapters.Snapshot{}, err
		}
		for {
			if err := one.wanted(); err != nil {
				return adapters.Snapshot{}, err
			}
			f, err := m.find(name, adapters.Name(wanted))
			if err == nil && f == nil {
				f, err = m.create(one, name, wanted)
			}
			switch {
			case errors.Is(err, errTaken):
				continue // somebody else was quicker: theirs is the snapshot, unless it is gone again
			case err != nil:
				return adapters.Snapshot{}, err
			case !f.mine:
				return adapters.Snapshot{}, fault.Errorf(fault.Busy, "the name %s is taken by a snapshot that is not ours; choose another", f.name)
			case f.wanted != wanted:
				return adapters.Snapshot{}, fault.Errorf(fault.Busy, "the name %s is taken by the snapshot %q; choose another", f.name, f.wanted)
			}
			return f.snapshot(name.id(a.backend)), nil
		}
	})
}

// create writes the key by which the snapshot is listed, and makes it.
func (m *mount) create(one *call, name treeName, wanted string) (*fsFound, error) {
	io, err := m.records()
	if err != nil {
		return nil, err
	}
	defer io.Destroy()
	if err := io.SetOmap(snapshotsObject, map[string][]byte{name.key(adapters.Name(wanted)): nil}); err != nil {
		return nil, err
	}
	if err := one.wanted(); err != nil {
		return nil, err
	}
	switch err := makeSnapshot(m.raw, name.top(), adapters.Name(wanted), encodeTag(wanted)); {
	case errnoOf(err) == syscall.EEXIST:
		return nil, errTaken
	case err != nil:
		return nil, err
	}
	f, err := m.find(name, adapters.Name(wanted))
	switch {
	case err == nil && f == nil:
		err = errTaken
	case err == nil && !f.mine:
		err = fault.Errorf(fault.Unsupported, "the metadata server does not keep metadata of snapshots, which it does since pacific; delete the snapshot %s by hand", f.name)
	}
	return f, err
}

// find looks a snapshot up; nil if there is none of that name.
func (m *mount) find(name treeName, snapshot string) (*fsFound, error) {
	path := name.snapshot(snapshot)
	number, text, err := snapshotTag(m.raw, path)
	if isAbsent(err) || errnoOf(err) == syscall.ENOTDIR {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := &fsFound{number: number, name: snapshot}
	tag, ok := decodeTag(text)
	if !ok {
		return f, nil
	}
	f.mine, f.wanted = true, tag.Wanted
	if f.created, err = m.time(path, "ceph.snap.btime"); err != nil {
		return nil, ignore(err)
	}
	io, err := m.records()
	if err != nil {
		return nil, err
	}
	defer io.Destroy()
	key := name.markKey(snapshot, number)
	values, err := io.GetOmapValues(snapshotsObject, "", key, 1)
	if ignore(err) != nil {
		return nil, err
	}
	mark, ok := decodeMark(values[key])
	if f.published = ok; ok {
		f.notes = mark.Notes
	}
	return f, nil
}

// time reads one of CephFS's own times.
func (m *mount) time(path, attribute string) (time.Time, error) {
	text, err := m.lib.LgetXattr(path, attribute)
	if err != nil {
		return time.Time{}, err
	}
	return parseCephTime(string(text))
}

// ours finds a snapshot of ours. NotFound if there is none.
func (m *mount) ours(name treeName, id adapters.SnapshotID) (*fsFound, error) {
	if err := checkName(id); err != nil {
		return nil, err
	}
	f, err := m.find(name, id.Name)
	if err == nil && (f == nil || !f.mine) {
		err = notFound()
	}
	return f, err
}

// Publish writes the mark with the notes. RADOS has made it durable when it answers; the snapshot is in the journal of the
// metadata server since it was made.
func (a *FSAdapter) Publish(ctx context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	_, err := callFS(ctx, a, id.Volume, "publishing the snapshot "+id.String(), func(one *call, m *mount, name treeName) (none, error) {
		f, err := m.ours(name, id)
		if err != nil {
			return none{}, err
		}
		mark, err := encodeMark(notes)
		if err != nil {
			return none{}, err
		}
		io, err := m.records()
		if err != nil {
			return none{}, err
		}
		defer io.Destroy()
		key := name.markKey(f.name, f.number)
		if err := io.SetOmap(snapshotsObject, map[string][]byte{name.key(f.name): nil, key: mark}); err != nil {
			return none{}, err
		}
		// It may have been deleted in between.
		again, err := m.find(name, id.Name)
		if err == nil && (again == nil || again.number != f.number) {
			err = first(notFound(), io.RmOmapKeys(snapshotsObject, []string{key}))
		}
		return none{}, err
	})
	return err
}

// Snapshot looks a snapshot up.
func (a *FSAdapter) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	return callFS(ctx, a, id.Volume, "snapshot "+id.String(), func(_ *call, m *mount, name treeName) (adapters.Snapshot, error) {
		f, err := m.ours(name, id)
		if err != nil {
			return adapters.Snapshot{}, err
		}
		return f.snapshot(name.id(a.backend)), nil
	})
}

// deletions are made one after the other, by all backends of this process: libcephfs never gives back a name that it was to
// remove when the snapshot was gone already, and then never unmounts (Client::_rmdir of pacific, the reference taken for
// CEPH_MDS_OP_RMSNAP before the look-up).
var deletions = newTurns[treeName]()

// DeleteSnapshot removes a snapshot. A subvolume's is removed by the manager, which knows of clones that are still being
// copied: then it is Busy.
func (a *FSAdapter) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	_, err := callFS(ctx, a, id.Volume, "deleting the snapshot "+id.String(), func(one *call, m *mount, name treeName) (none, error) {
		if err := checkName(id); err != nil {
			return none{}, err
		}
		if err := deletions.take(one, name); err != nil {
			return none{}, err
		}
		f, err := m.find(name, id.Name)
		switch {
		case err != nil:
			return none{}, err
		case f == nil:
			return none{}, nil
		case !f.mine:
			return none{}, fault.Errorf(fault.Invalid, "it is not ours and stays")
		}
		if err := one.wanted(); err != nil {
			return none{}, err
		}
		if name.dir != "" {
			err = m.lib.RemoveDir(name.snapshot(id.Name))
		} else {
			err = fsadmin.NewFromConn(m.connection.rados).RemoveSubVolumeSnapshot(name.fs, name.mgrGroup(), name.subvolume, id.Name)
			if errnoOf(err) == syscall.EAGAIN {
				err = fault.Errorf(fault.Busy, "%w; a clone of it is still being copied: `ceph fs clone status` tells how far it is", err)
			}
		}
		if ignore(err) != nil {
			return none{}, err
		}
		io, err := m.records()
		if err != nil {
			return none{}, err
		}
		defer io.Destroy()
		return none{}, ignore(io.RmOmapKeys(snapshotsObject, []string{name.key(id.Name), name.markKey(id.Name, f.number)}))
	})
	return err
}

// pageRecords is how many keys a listing asks for at once.
const pageRecords = 512

// Snapshots lists snapshots of ours: those that the records of a filesystem name and that are there, a page at a time.
func (a *FSAdapter) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		if f.Volume != (adapters.VolumeID{}) {
			name, err := parseTreeName(f.Volume.ID, a.fs)
			if err == nil && f.Volume.Backend != a.backend {
				err = fault.Errorf(fault.Invalid, "volume %s is not of the backend %s", f.Volume, a.backend)
			}
			if err != nil {
				yield(adapters.Snapshot{}, err)
				return
			}
			a.listFS(ctx, name.fs, name.key(""), f, yield)
			return
		}
		all, err := a.filesystems(ctx)
		if err != nil {
			yield(adapters.Snapshot{}, err)
			return
		}
		for _, fs := range all {
			if !a.listFS(ctx, fs, "", f, yield) {
				return
			}
		}
	}
}

// filesystems lists the filesystems that the backend's volumes can be in.
func (a *FSAdapter) filesystems(ctx context.Context) ([]string, error) {
	if a.fs != "" {
		return []string{a.fs}, nil
	}
	began := time.Now()
	all, err := do(ctx, a.cluster.calls, func(one *call) ([]string, error) {
		n, err := a.cluster.connection(one)
		if err != nil {
			return nil, err
		}
		pools, err := fsadmin.NewFromConn(n.rados).ListFileSystems()
		var names []string
		for _, p := range pools {
			names = append(names, p.Name)
		}
		return names, err
	})
	if err != nil {
		err = a.cluster.fsFailure(err, began, "backend %s: listing filesystems", a.backend)
	}
	return all, err
}

// listFS lists what the records of a filesystem name under a prefix, and reports whether more is wanted.
func (a *FSAdapter) listFS(ctx context.Context, fs, prefix string, f adapters.Filter, yield func(adapters.Snapshot, error) bool) bool {
	type page struct {
		snapshots []adapters.Snapshot
		last      string
		more      bool
	}
	for last, more := "", true; more; {
		p, err := callMounted(ctx, a, fs, fmt.Sprintf("backend %s: listing snapshots in the filesystem %s", a.backend, fs), func(one *call, m *mount) (page, error) {
			keys, err := m.keysAfter(last, prefix, a.page)
			p := page{last: last, more: int64(len(keys)) == a.page}
			if err != nil {
				return p, ignore(err)
			}
			for _, key := range keys {
				p.last = key
				if err := one.wanted(); err != nil {
					return p, err
				}
				n, name, ok := parseKey(key)
				if !ok || key != n.key(name) || n.fs != fs {
					continue // of a mark
				}
				found, err := m.find(n, name)
				if err != nil {
					return p, fmt.Errorf("%s: %w", n, err)
				}
				if found != nil && found.mine && (found.published || f.Cutting) {
					p.snapshots = append(p.snapshots, found.snapshot(n.id(a.backend)))
				}
			}
			return p, nil
		})
		if err != nil {
			if fault.KindOf(err) == fault.NotFound {
				return true // the filesystem is gone
			}
			return yield(adapters.Snapshot{}, err)
		}
		if !each(p.snapshots, yield) {
			return false
		}
		last, more = p.last, p.more
	}
	return true
}

func (m *mount) keysAfter(last, prefix string, most int64) ([]string, error) {
	io, err := m.records()
	if err != nil {
		return nil, err
	}
	defer io.Destroy()
	values, err := io.GetOmapValues(snapshotsObject, last, prefix, most)
	return slices.Sorted(maps.Keys(values)), err
}

// Gate checks that every tree is there, and that the metadata pool takes a record.
func (a *FSAdapter) Gate(ctx context.Context, ids []adapters.VolumeID) (adapters.Forecast, error) {
	var took time.Duration
	for _, id := range ids {
		_, err := callFS(ctx, a, id, "", func(_ *call, m *mount, name treeName) (none, error) {
			began := time.Now()
			if _, err := m.locate(name); err != nil {
				return none{}, err
			}
			io, err := m.records()
			if err != nil {
				return none{}, err
			}
			defer io.Destroy()
			err = io.SetOmap(snapshotsObject, map[string][]byte{})
			took = max(took, time.Since(began))
			full, e := m.connection.full()
			if err = errors.Join(err, e); err == nil && full != "" {
				err = fault.Errorf(fault.Exhausted, "the cluster is full (%s): add OSDs or delete something", full)
			}
			return none{}, err
		})
		if err != nil {
			return adapters.Forecast{}, err
		}
	}
	return adapters.Forecast{Frozen: snapshotShare * took}, nil
}

// snapshotShare is how many times longer a snapshot takes than what Gate does, at the most seen.
const snapshotShare = 4
