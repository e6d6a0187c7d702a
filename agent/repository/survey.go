package repository

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/readonly"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/index"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/maintenance"
)

// Rot is something wrong with a blob that no backup reads by itself.
type Rot struct {
	Blob string `json:"blob"`
	Why  string `json:"why"`
}

// String is a sentence.
func (r Rot) String() string { return r.Blob + ": " + r.Why }

// maintenanceBlob is where kopia keeps when maintenance ran.
const maintenanceBlob = "kopia.maintenance"

// Survey looks at the blobs that are neither backups nor what backups read: kopia's configuration of blobs, its schedule
// of maintenance, the markers of sessions and of epochs; and it finds the traces of indexes that are gone. Kopia takes a
// missing index for one that never was: the backups in it would be lost in silence.
func (m *Medium) Survey(ctx context.Context) ([]Rot, error) {
	var rot []Rot
	in := m.in
	if _, err := in.GetMetadata(ctx, format.KopiaBlobCfgBlobID); errors.Is(err, blob.ErrBlobNotFound) {
		rot = append(rot, Rot{format.KopiaBlobCfgBlobID, "missing; kopia goes on as if no retention had been configured"})
	} else if err != nil {
		return nil, m.r.at.fault("reading", err)
	}
	if stale, err := copyFormat(ctx, readonly.NewWrapper(m.r.medium), format.BlobStorageConfiguration{}, true); err != nil {
		return nil, m.r.at.fault("reading", err)
	} else if stale {
		rot = append(rot, Rot{formatCopyID, "not the same as " + format.KopiaRepositoryBlobID + ", which nobody can do without"})
	}
	if _, err := maintenance.GetSchedule(ctx, m.r.kopia); err != nil {
		if err = m.r.corrupt(err); !isCorrupt(err) {
			return nil, err
		}
		rot = append(rot, Rot{maintenanceBlob, fmt.Sprintf("%v; no maintenance can run", err)})
	}
	sessions, err := m.sessions(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range sessions {
		if s.err != nil {
			rot = append(rot, Rot{string(s.blob.BlobID), fmt.Sprintf("%v; no maintenance can remove what killed backups left", s.err)})
		}
	}
	epochs, err := m.epochRot(ctx)
	if err != nil {
		return nil, err
	}
	rot = append(rot, epochs...)
	lost, err := m.unclaimed(ctx, sessions)
	if err != nil {
		return nil, err
	}
	for _, l := range lost {
		rot = append(rot, Rot{string(l.pack), l.String()})
	}
	return rot, nil
}

// sessionMarker is a blob by which a session says that it is under way.
type sessionMarker struct {
	blob blob.Metadata
	id   content.SessionID
	err  error // why it cannot be read
}

// sessions lists the markers. Kopia reads all of them or none.
func (m *Medium) sessions(ctx context.Context) ([]sessionMarker, error) {
	listed, err := blob.ListAllBlobs(ctx, m.in, content.BlobIDPrefixSession)
	if err != nil {
		return nil, m.r.at.fault("listing", err)
	}
	var all []sessionMarker
	for _, b := range listed {
		s := sessionMarker{blob: b, id: content.SessionIDFromBlobID(b.BlobID)}
		err := m.r.checkNamed(ctx, m.in, m.back.contents.ContentFormat().Encryptor(), b.BlobID)
		if errors.Is(err, blob.ErrBlobNotFound) {
			continue // the session has ended since
		}
		if err = m.r.corrupt(err); err != nil && !isCorrupt(err) {
			return nil, err
		}
		s.err = err
		all = append(all, s)
	}
	return all, nil
}

// The names of kopia's epochs, which are internal to it (internal/epoch).
const (
	epochMarkerPrefix    = "xe"
	epochIndexPrefix     = "xn"
	epochCompactedPrefix = "xs"
)

func epochOf(id blob.ID, prefix string) (int, bool) {
	rest, ok := strings.CutPrefix(string(id), prefix)
	number, _, _ := strings.Cut(rest, "_")
	var n int
	_, err := fmt.Sscanf(number, "%d", &n)
	return n, ok && err == nil
}

// epochRot finds that the marker of the current epoch is gone: indexes of later epochs than the one after it are not
// read by anybody.
func (m *Medium) epochRot(ctx context.Context) ([]Rot, error) {
	missing, err := missingEpoch(ctx, m.in)
	if err != nil || missing == 0 {
		return nil, m.r.at.fault("listing", err)
	}
	return []Rot{{fmt.Sprint(epochMarkerPrefix, missing), "the marker of the current epoch is missing; kopia overlooks newer indexes, and the backups in them"}}, nil
}

// missingEpoch is the newest epoch that has indexes, if its marker is not there; 0 if nothing is missing.
func missingEpoch(ctx context.Context, in blob.Lister) (int, error) {
	marked, used := 0, 0
	err := in.ListBlobs(ctx, "x", func(b blob.Metadata) error {
		if n, ok := epochOf(b.BlobID, epochMarkerPrefix); ok {
			marked = max(marked, n)
		}
		if n, ok := epochOf(b.BlobID, epochIndexPrefix); ok {
			used = max(used, n)
		}
		return nil
	})
	if used > marked {
		return used, err
	}
	return 0, err
}

// unclaimed is a pack with contents that no index knows, though the session that wrote it has ended: an index is lost.
type unclaimed struct {
	pack     blob.ID
	length   int64
	contents []content.Info // that no index knows; nil if the pack does not say what is in it
	err      error
}

func (u unclaimed) String() string {
	if u.err != nil {
		return fmt.Sprintf("in no index, and cannot say what is in it: %v", u.err)
	}
	manifests := 0
	for _, i := range u.contents {
		if i.ContentID.Prefix() == "m" {
			manifests++
		}
	}
	s := fmt.Sprintf("%d contents of it are in no index, though its session has ended: an index blob is missing", len(u.contents))
	if manifests > 0 {
		s += ", and the backups committed with it are not listed"
	}
	return s
}

// unclaimed finds the traces of lost indexes. Packs that no index names are also left by killed sessions, whose markers
// stay until maintenance, and by maintenance, until it deletes them: what those held is known to the indexes, be it as
// deleted or in another pack.
func (m *Medium) unclaimed(ctx context.Context, sessions []sessionMarker) ([]unclaimed, error) {
	open := map[content.SessionID]bool{}
	for _, s := range sessions {
		open[s.id] = true
	}
	if err := m.back.contents.Refresh(ctx); err != nil { // what was committed since the packs were listed
		return nil, m.r.corrupt(err)
	}
	claimed := map[blob.ID]bool{}
	err := m.back.contents.IterateContents(ctx, content.IterateOptions{IncludeDeleted: true}, func(i content.Info) error {
		claimed[i.PackBlobID] = true
		return nil
	})
	if err != nil {
		return nil, m.r.corrupt(err)
	}
	var all []unclaimed
	wanted := map[content.ID]bool{}
	for pack, length := range m.packs {
		if claimed[pack] || open[content.SessionIDFromBlobID(pack)] {
			continue
		}
		u := unclaimed{pack: pack, length: length}
		infos, err := m.back.contents.RecoverIndexFromPackBlob(ctx, pack, length, false)
		if err != nil {
			if err = m.r.corrupt(err); !isCorrupt(err) {
				return nil, err
			}
			u.err = err
		}
		for _, i := range infos {
			if i.PackBlobID != pack || i.Deleted {
				continue
			}
			if _, err := m.back.contents.ContentInfo(ctx, i.ContentID); errors.Is(err, content.ErrContentNotFound) {
				u.contents = append(u.contents, i)
				wanted[i.ContentID] = true
			} else if err != nil {
				return nil, m.r.corrupt(err)
			}
		}
		if len(u.contents) > 0 || u.err != nil {
			all = append(all, u)
		}
	}
	if len(wanted) > 0 {
		if err := m.forgetDropped(ctx, wanted); err != nil {
			return nil, err
		}
	}
	all = slices.DeleteFunc(all, func(u unclaimed) bool {
		return u.err == nil && !slices.ContainsFunc(u.contents, func(i content.Info) bool { return wanted[i.ContentID] })
	})
	for n := range all {
		all[n].contents = slices.DeleteFunc(all[n].contents, func(i content.Info) bool { return !wanted[i.ContentID] })
	}
	slices.SortFunc(all, func(a, b unclaimed) int { return strings.Compare(string(a.pack), string(b.pack)) })
	return all, nil
}

// forgetDropped takes out of wanted what the index blobs do know, as deleted so long ago that kopia does not show it.
func (m *Medium) forgetDropped(ctx context.Context, wanted map[content.ID]bool) error {
	active, err := m.back.shared.IndexBlobs(ctx, false)
	if err != nil {
		return m.r.at.fault("listing", err)
	}
	for _, b := range active {
		infos, err := loadIndex(ctx, m.back.shared.LoadIndexBlob, b.BlobID)
		if err != nil {
			if err = m.r.corrupt(err); isCorrupt(err) {
				continue // it is told elsewhere
			}
			return err
		}
		for _, i := range infos {
			delete(wanted, i.ContentID)
		}
	}
	return nil
}

// loadIndex reads an index blob into a buffer of kopia's own.
func loadIndex[Buffer any](ctx context.Context, load func(context.Context, blob.ID, *Buffer) ([]index.Info, error), id blob.ID) ([]index.Info, error) {
	return load(ctx, id, new(Buffer))
}
