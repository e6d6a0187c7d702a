package reflink

import (
	"context"
	"errors"
	"iter"
	"os"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Snapshots lists the snapshots in the folders that are in the roots of this node's mounts or, with a volume in the
// filter, in all folders above it. A folder or file that cannot be read does not hide the others: its error comes last.
func (a *Adapter) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		sites, err := a.sites(ctx, f)
		failures := []error{err}
		for _, s := range sites {
			folder, err := s.at.folder(s.dir)
			if folder == nil && err == nil {
				continue
			}
			if err == nil {
				err = s.doubt
			}
			if err != nil {
				failures = append(failures, err)
				folder.Close()
				continue
			}
			for r, err := range s.records(ctx, folder, f) {
				if err != nil {
					failures = append(failures, err)
				} else if !yield(r.snapshot(a.backend), nil) {
					folder.Close()
					return
				}
			}
			folder.Close()
		}
		if err := errors.Join(failures...); err != nil {
			yield(adapters.Snapshot{}, failed(err, "listing snapshots"))
		}
	}
}

// site is a folder of a filesystem in which a snapshot folder may be. If there is one, doubt says why it must not be
// read.
type site struct {
	at    place
	dir   string
	doubt error
}

// sites are where the snapshots that match a filter may be.
func (a *Adapter) sites(ctx context.Context, f adapters.Filter) ([]site, error) {
	var sites []site
	if f.Volume != (adapters.VolumeID{}) {
		at, err := a.locate(ctx, f.Volume)
		for _, dir := range ancestors(at.path) {
			sites = append(sites, site{at: at, dir: dir})
		}
		return sites, err
	}
	pools, err := a.discover()
	if err != nil {
		return nil, err
	}
	for i, p := range pools {
		var doubt error
		if slices.ContainsFunc(slices.Delete(slices.Clone(pools), i, i+1), func(q pool) bool { return q.uuid == p.uuid }) {
			doubt = fault.Errorf(fault.Invalid, "the filesystem at %s has the same UUID (%s) as another mounted one; unmount the copy or give it another UUID", p.mounts[0].point, p.uuid)
		}
		var roots []string
		for _, m := range p.mounts {
			roots = append(roots, m.root)
		}
		slices.Sort(roots)
		for _, root := range slices.Compact(roots) {
			sites = append(sites, site{at: place{pool: p, shown: showing(p.mounts, root)}, dir: root, doubt: doubt})
		}
	}
	return sites, nil
}

// records yields the records in a snapshot folder that belong there and match the filter.
func (s site) records(ctx context.Context, folder *os.File, f adapters.Filter) iter.Seq2[record, error] {
	return func(yield func(record, error) bool) {
		names, err := folder.Readdirnames(-1)
		if err != nil {
			yield(record{}, failed(errno(err), "the snapshot folder in %s of the filesystem %s", s.dir, s.at.pool.uuid))
			return
		}
		for _, name := range names {
			if f.Volume.ID != "" && !strings.HasPrefix(name, adapters.ShortName(s.at.id.ID)+".") {
				continue
			}
			if err := ctx.Err(); err != nil {
				yield(record{}, err)
				return
			}
			e, err := openEntry(folder, name)
			if err != nil {
				if !yield(record{}, failed(err, "the snapshot file %s", name)) {
					return
				}
				continue
			}
			if e == nil {
				continue // deleted meanwhile
			}
			e.file.Close()
			if e.ours && s.matches(e.record, f) && !yield(e.record, nil) {
				return
			}
		}
	}
}

// matches reports whether a snapshot that was found here belongs here and is asked for.
func (s site) matches(r record, f adapters.Filter) bool {
	uuid, inside, _ := strings.Cut(r.Volume, "/")
	_, below := under("/"+inside, s.dir)
	return uuid == s.at.pool.uuid && below &&
		(f.Volume.ID == "" || s.at.id.ID == r.Volume) &&
		(f.Cutting || r.Mark != adapters.Cutting)
}
