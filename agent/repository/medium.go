package repository

import (
	"context"
	"errors"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/throttling"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Medium is a repository as it lies on its medium: there is no cache in between, and nothing is known of what this
// process wrote. It is for whoever wants to know whether what is stored is sound. It sees what was committed before it
// was opened. Its methods are safe in parallel. Close it.
type Medium struct {
	r     *Repository
	in    blob.Reader
	back  *reader
	packs map[blob.ID]int64 // every pack that there is, with its length in bytes
}

// OpenMedium loads all indexes anew and lists all packs. An index that cannot be read is Corrupt, and named.
func (r *Repository) OpenMedium(ctx context.Context) (*Medium, error) {
	back, err := r.reopen(ctx)
	if err != nil {
		return nil, r.corrupt(err)
	}
	in, err := r.limited()
	if err != nil {
		return nil, errors.Join(err, back.close(ctx))
	}
	m := &Medium{r: r, in: in, back: back, packs: map[blob.ID]int64{}}
	if err := m.listPacks(ctx); err != nil {
		return nil, errors.Join(err, back.close(ctx))
	}
	return m, nil
}

// limited is the medium within the bandwidth that the repository was opened with. Kopia has a limit of its own.
func (r *Repository) limited() (blob.Reader, error) {
	l := r.kopia.ClientOptions().Throttling
	if l == nil || l.DownloadBytesPerSecond == 0 {
		return r.medium, nil
	}
	const window, filled = time.Minute, 0.1 // as kopia has them
	t, err := throttling.NewThrottler(throttling.Limits{DownloadBytesPerSecond: l.DownloadBytesPerSecond}, window, filled)
	return throttling.NewWrapper(r.medium, t), err
}

// listPacks comes after the indexes are loaded, so that each pack they name is listed.
func (m *Medium) listPacks(ctx context.Context) error {
	for _, prefix := range content.PackBlobIDPrefixes {
		err := m.in.ListBlobs(ctx, prefix, func(b blob.Metadata) error {
			m.packs[b.BlobID] = b.Length
			return nil
		})
		if err != nil {
			return m.r.at.fault("listing", err)
		}
	}
	return nil
}

// Close releases the indexes.
func (m *Medium) Close(ctx context.Context) error { return m.r.at.fault("closing", m.back.close(ctx)) }

// Repository is the one that lies there.
func (m *Medium) Repository() *Repository { return m.r }

// Backups lists the backups whose manifests are on the medium, newest snapshot first, without their standing. A manifest
// that cannot be read is Corrupt, and the blob it lies in is named: no backup is left out in silence.
func (m *Medium) Backups(ctx context.Context) ([]Backup, error) {
	return m.r.find(ctx, m.back, map[string]string{})
}

// OpenImage opens a backup's image. Its top level has been read and checked then.
func (m *Medium) OpenImage(ctx context.Context, b Backup) (*Image, error) {
	if err := b.isImage(); err != nil {
		return nil, err
	}
	return m.r.openImage(ctx, m.back.contents, b)
}

// OpenTree opens a backup's tree.
func (m *Medium) OpenTree(ctx context.Context, b Backup) (*Tree, error) {
	return m.r.openTree(ctx, m.back.contents, b)
}

// Check reads a content and makes sure that it is what its name says. quick is satisfied if it is there, as in Locate. It
// returns how many bytes it read.
func (m *Medium) Check(ctx context.Context, c Chunk, quick bool) (int64, error) {
	if _, err := m.locate(ctx, c.id); err != nil || quick {
		return 0, err
	}
	p, err := m.r.read(ctx, m.back.contents, c.id)
	return int64(len(p)), err
}

// CheckDescription is Repository.CheckDescription on the medium.
func (m *Medium) CheckDescription(ctx context.Context, b Backup) error {
	return m.r.checkDescription(ctx, m.back.contents, b)
}

// CheckSegment reads a segment's index and makes sure that it is what its id says; what is in it is Image.Chunks'
// business.
func (m *Medium) CheckSegment(ctx context.Context, s Segment) error {
	_, err := m.r.read(ctx, m.back.contents, s.id)
	return err
}

// Locate is nil if a chunk is in the index and its bytes are within a pack that is there. Nothing is read. What is
// missing is Corrupt.
func (m *Medium) Locate(ctx context.Context, c Chunk) error {
	_, err := m.locate(ctx, c.id)
	return err
}

func (m *Medium) locate(ctx context.Context, id content.ID) (content.Info, error) {
	info, err := m.back.contents.ContentInfo(ctx, id)
	switch {
	case errors.Is(err, content.ErrContentNotFound):
		return info, fault.Errorf(fault.Corrupt, "content %s: in no index", id)
	case err != nil:
		return info, m.r.corrupt(err)
	}
	// One that is marked as deleted is there. A maintenance that ran before the backup was committed left the mark, and the
	// next takes it away.
	length, ok := m.packs[info.PackBlobID]
	if end := int64(info.PackOffset) + int64(info.PackedLength); !ok {
		return info, fault.Errorf(fault.Corrupt, "content %s: blob %s is missing", id, info.PackBlobID)
	} else if end > length {
		return info, fault.Errorf(fault.Corrupt, "content %s: blob %s has %d bytes, the index says at least %d", id, info.PackBlobID, length, end)
	}
	return info, nil
}

// Parts names the contents of a backup that are neither segments nor chunks, as far as they can be known: its directory,
// its description, and its top level.
func (m *Medium) Parts(ctx context.Context, b Backup) []Chunk {
	var parts []Chunk
	add := func(id object.ID) {
		if c, _, ok := id.ContentID(); ok {
			parts = append(parts, Chunk{c})
		}
	}
	add(b.root)
	var directory snapshot.DirManifest
	if err := m.r.readJSON(ctx, m.back.contents, b.root, &directory); err == nil {
		for _, e := range directory.Entries {
			add(e.ObjectID)
		}
	}
	if made, err := m.r.description(ctx, b); err == nil {
		for _, p := range made {
			parts = append(parts, Chunk{p.id})
		}
	}
	if b.Form == adapters.TreeForm {
		return parts
	}
	top := b.Image.id
	if index, ok := top.IndexObjectID(); ok {
		top = index
	}
	if index, ok := top.IndexObjectID(); ok { // of a top level in several contents
		top = index
		var pieces struct {
			Entries []object.IndirectObjectEntry `json:"entries"`
		}
		if err := m.r.readJSON(ctx, m.back.contents, index, &pieces); err == nil {
			for _, e := range pieces.Entries {
				add(e.Object)
			}
		}
	}
	add(top)
	return parts
}
