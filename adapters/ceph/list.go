//go:build ceph && cgo

package ceph

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Snapshots lists snapshots of ours. Without a volume in the filter it goes through the directories of all pools and
// namespaces, a page of images at a time, and opens only the images whose metadata have a record.
func (a *Adapter) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		if f.Volume != (adapters.VolumeID{}) {
			all, err := callOn(ctx, a, f.Volume, "", func(one *call, name imageName) ([]adapters.Snapshot, error) {
				return a.of(one, name, f)
			})
			if err != nil && fault.KindOf(err) != fault.NotFound {
				yield(adapters.Snapshot{}, err)
				return
			}
			each(all, yield)
			return
		}
		places, err := listing(ctx, a, a.places)
		if err != nil {
			yield(adapters.Snapshot{}, err)
			return
		}
		for _, p := range places {
			for last, more := "", true; more; {
				page, err := listing(ctx, a, func(one *call) (page, error) { return a.pageOf(one, p, last, f) })
				if err != nil {
					yield(adapters.Snapshot{}, err)
					return
				}
				if !each(page.snapshots, yield) {
					return
				}
				last, more = page.last, page.more
			}
		}
	}
}

func each(all []adapters.Snapshot, yield func(adapters.Snapshot, error) bool) bool {
	for _, s := range all {
		if !yield(s, nil) {
			return false
		}
	}
	return true
}

func listing[T any](ctx context.Context, a *Adapter, f func(*call) (T, error)) (T, error) {
	began := time.Now()
	v, err := do(ctx, a.cluster.calls, f)
	if err != nil {
		err = a.cluster.failure(err, began, "backend %s: listing", a.backend)
	}
	return v, err
}

// of lists an image's snapshots.
func (a *Adapter) of(one *call, name imageName, f adapters.Filter) ([]adapters.Snapshot, error) {
	m, err := a.cluster.open(one, name, forReading)
	if err != nil {
		return nil, err
	}
	defer m.release()
	all, err := m.numbers()
	if err != nil {
		return nil, err
	}
	var out []adapters.Snapshot
	for _, s := range all {
		if err := one.wanted(); err != nil {
			return nil, err
		}
		found, err := m.inspect(s)
		if err != nil {
			return nil, err
		}
		if found != nil && found.passes(f) {
			out = append(out, found.snapshot(name.id(a.backend)))
		}
	}
	return out, nil
}

// place is a pool and a namespace in it.
type place struct{ pool, namespace string }

// places lists where images can be.
func (a *Adapter) places(one *call) ([]place, error) {
	n, err := a.cluster.connection(one)
	if err != nil {
		return nil, err
	}
	pools := []string{a.pool}
	if a.pool == "" {
		if pools, err = n.rados.ListPools(); err != nil {
			return nil, err
		}
	}
	var all []place
	for _, p := range pools {
		if err := one.wanted(); err != nil {
			return nil, err
		}
		spaces, err := namespaces(n, p)
		if err != nil {
			if a.pool == "" && (isAbsent(err) || isForbidden(err)) {
				continue // deleted meanwhile, or a pool that this user may not see
			}
			return nil, err
		}
		for _, s := range append([]string{""}, spaces...) {
			all = append(all, place{p, s})
		}
	}
	return all, nil
}

func namespaces(n *connection, pool string) ([]string, error) {
	io, err := n.pool(pool, "")
	if err != nil {
		return nil, err
	}
	defer io.Destroy()
	return rbd.NamespaceList(io)
}

// page is what a part of a place's images gave.
type page struct {
	snapshots []adapters.Snapshot
	last      string // the key after which the next one begins
	more      bool
}

const (
	pageImages = 256 // as many as are asked for at once
	pageAtOnce = 8   // images that are looked at in parallel
)

// The directory of a place's images is the omap of an object: a key for each name with the image's internal id, and
// others. The header of an image is one too, with its metadata. Source: src/include/rbd_types.h and
// src/cls/rbd/cls_rbd.cc of Ceph.
const (
	directoryObject = "rbd_directory"
	directoryKey    = "name_"
	headerObject    = "rbd_header."
	metadataKey     = "metadata_"
)

// pageOf looks at the next images of a place.
func (a *Adapter) pageOf(one *call, p place, last string, f adapters.Filter) (page, error) {
	n, err := a.cluster.connection(one)
	if err != nil {
		return page{}, err
	}
	io, err := n.pool(p.pool, p.namespace)
	if err != nil {
		return page{}, ignore(err)
	}
	defer io.Destroy()
	names, err := io.GetOmapValues(directoryObject, last, directoryKey, a.page)
	if err != nil {
		if isAbsent(err) || isForbidden(err) && a.pool == "" {
			err = nil // no images here, or none that this user may see
		}
		return page{}, err
	}
	out := page{last: last, more: int64(len(names)) == a.page}
	var mu sync.Mutex
	var group sync.WaitGroup
	turns := make(chan struct{}, pageAtOnce)
	for key, value := range names {
		out.last = max(out.last, key)
		group.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			found, e := a.marked(one, io, imageName{p.pool, p.namespace, strings.TrimPrefix(key, directoryKey)}, value, f)
			mu.Lock()
			defer mu.Unlock()
			out.snapshots = append(out.snapshots, found...)
			if err == nil {
				err = e
			}
		})
	}
	group.Wait()
	return out, err
}

// marked lists an image's snapshots if its header has a record of ours.
func (a *Adapter) marked(one *call, io *rados.IOContext, name imageName, id []byte, f adapters.Filter) ([]adapters.Snapshot, error) {
	if err := one.wanted(); err != nil {
		return nil, err
	}
	if strings.HasPrefix(name.image, targetPrefix) {
		return nil, nil
	}
	if len(id) < 4 || int64(binary.LittleEndian.Uint32(id)) != int64(len(id)-4) {
		return nil, fault.Errorf(fault.Corrupt, "image %s: its entry in the pool's directory is damaged", name)
	}
	records, err := io.GetOmapValues(headerObject+string(id[4:]), "", metadataKey+recordPrefix, 1)
	if err != nil || len(records) == 0 {
		return nil, ignore(err)
	}
	all, err := a.of(one, name, f)
	if err != nil {
		if isAbsent(err) {
			return nil, nil // deleted or renamed meanwhile
		}
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	return all, nil
}

// Volumes lists the images that are block devices of this node.
func (a *Adapter) Volumes(ctx context.Context) iter.Seq2[adapters.Volume, error] {
	return func(yield func(adapters.Volume, error) bool) {
		maps, err := a.mapped()
		if err != nil {
			yield(adapters.Volume{}, fmt.Errorf("backend %s: listing mapped images: %w", a.backend, err))
			return
		}
		maps = slices.DeleteFunc(maps, func(m mapping) bool { return !m.live || a.pool != "" && m.name.pool != a.pool })
		if len(maps) == 0 {
			return
		}
		fsid, err := listing(ctx, a, func(one *call) (string, error) {
			n, err := a.cluster.connection(one)
			if err != nil {
				return "", err
			}
			return n.rados.GetFSID()
		})
		if err != nil {
			yield(adapters.Volume{}, err)
			return
		}
		seen := map[imageName]bool{}
		for _, m := range maps {
			if !m.shows(fsid, m.name) || seen[m.name] {
				continue // of another cluster, or mapped twice
			}
			seen[m.name] = true
			v, err := a.Volume(ctx, m.name.id(a.backend))
			if fault.KindOf(err) == fault.NotFound {
				continue
			}
			if !yield(v, err) || err != nil {
				return
			}
		}
	}
}
