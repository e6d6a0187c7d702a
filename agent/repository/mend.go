package repository

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/readonly"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/maintenance"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Mended is a blob that was damaged or missing, and what became of it.
type Mended struct {
	Blob string `json:"blob"`
	Was  string `json:"was"`            // what was wrong with it
	Done string `json:"done"`           // what was done about it, or would be
	Left bool   `json:"left,omitempty"` // nothing could be done
	// Backups are the handles of those that were not listed because of it, and are now.
	Backups []string `json:"backups,omitempty"`
}

// Mend puts in order what makes a repository one: kopia's format and configuration, the indexes of all contents, the
// markers of epochs and sessions, the manifests. It works where Open fails, and Open works after it. What is damaged is
// made again from what else the repository has:
//
//   - kopia.repository from its copy, which Init makes;
//   - an index from the packs, each of which ends with an index of its own;
//   - manifests of backups from the directories that they point at.
//
// What is made again is durable before anything takes its place, so that whoever is killed here can begin anew. A damaged
// index is kept under another name that kopia does not look at. A dry run changes nothing, and says what would be done.
func Mend(ctx context.Context, at Location, passphrase adapters.Secret, o OpenOptions, dry bool) (mended []Mended, err error) {
	if o.Host, err = hostOr(o.Host); err != nil {
		return nil, err
	}
	st, err := at.open(ctx)
	if err != nil {
		return nil, at.fault("opening", err)
	}
	defer func() { err = errors.Join(err, at.fault("closing", st.Close(context.WithoutCancel(ctx)))) }()
	d := &mender{at: at, st: st, options: o, passphrase: passphrase, dry: dry}
	if dry {
		d.st = readonly.NewWrapper(st)
	}
	if err := d.everything(ctx); err != nil {
		return d.mended, err
	}
	if dry && len(d.mended) > 0 {
		return d.mended, nil
	}
	err = d.housekeeping(ctx)
	return d.mended, err
}

// diagnosed explains why a repository could not be opened, if it is damaged. What kopia says then may be something else: a
// byte that changed in kopia.repository looks like a wrong passphrase, an index that is gone like an empty repository.
func diagnosed(ctx context.Context, at Location, medium blob.Storage, passphrase adapters.Secret, o OpenOptions, failed error) error {
	switch fault.KindOf(failed) {
	case fault.Internal, fault.Corrupt, fault.Invalid, fault.NotFound:
	default:
		return failed
	}
	d := &mender{at: at, st: readonly.NewWrapper(medium), options: o, passphrase: passphrase, dry: true}
	if err := d.everything(ctx); len(d.mended) == 0 {
		if isCorrupt(err) {
			return err
		}
		return failed
	}
	first := d.mended[0]
	return fault.Errorf(fault.Corrupt, "repository %s is damaged: %s: %s (%d blobs; `stillpoint repair --all --dry-run` lists them and what can be done): %w", at, first.Blob, first.Was, len(d.mended), failed)
}

// mender is a repository under repair.
type mender struct {
	at         Location
	st         blob.Storage
	options    OpenOptions
	passphrase adapters.Secret
	dry        bool
	mended     []Mended
}

func (d *mender) note(m Mended) { d.mended = append(d.mended, m) }

// everything mends what Open needs, from the bottom to the top.
func (d *mender) everything(ctx context.Context) error {
	f, err := d.format(ctx)
	if err != nil {
		return err
	}
	if err := d.epoch(ctx); err != nil {
		return err
	}
	r := &Repository{at: d.at, remote: cmp.Or(d.options.Remote, "default"), host: d.options.Host, medium: d.st, hash: f.HashFunc()}
	shared, err := content.NewSharedManager(ctx, d.st, f, nil, &content.ManagerOptions{PermissiveCacheLoading: true}, nil, nil)
	if err != nil {
		return d.at.fault("opening", err)
	}
	contents := content.NewWriteManager(ctx, shared, content.SessionOptions{SessionUser: userName, SessionHost: d.options.Host}, "")
	m := &Medium{r: r, in: d.st, back: &reader{r: r, shared: shared, contents: contents}, packs: map[blob.ID]int64{}}
	defer m.back.close(context.WithoutCancel(ctx))
	if err := m.listPacks(ctx); err != nil {
		return err
	}
	if err := d.indexes(ctx, m); err != nil {
		return err
	}
	return d.manifests(ctx, m)
}

// epoch puts the marker of the current epoch back.
func (d *mender) epoch(ctx context.Context) error {
	n, err := missingEpoch(ctx, d.st)
	if err != nil || n == 0 {
		return d.at.fault("listing", err)
	}
	id := fmt.Sprint(epochMarkerPrefix, n)
	d.note(Mended{Blob: id, Was: "the marker of the current epoch is missing; kopia overlooks newer indexes", Done: "put back"})
	if d.dry {
		d.st = overlay{Storage: d.st, blobs: map[blob.ID][]byte{blob.ID(id): []byte("epoch-marker")}}
		return nil
	}
	return d.at.fault("writing to", d.st.PutBlob(ctx, blob.ID(id), slice("epoch-marker"), blob.PutOptions{}))
}

// indexes makes a new index of what the damaged and the missing ones knew, and moves the damaged ones away.
func (d *mender) indexes(ctx context.Context, m *Medium) error {
	active, err := m.back.shared.IndexBlobs(ctx, false)
	if err != nil {
		return d.at.fault("listing", err)
	}
	bad := map[blob.ID]error{}
	for _, b := range active {
		err := m.r.checkNamed(ctx, d.st, m.back.contents.ContentFormat().Encryptor(), b.BlobID)
		if err = m.r.corrupt(err); isCorrupt(err) {
			bad[b.BlobID] = err
		} else if err != nil {
			return err
		}
	}
	sessions, err := m.sessions(ctx)
	if err != nil {
		return err
	}
	lost, err := m.unclaimed(ctx, sessions)
	if err != nil {
		return err
	}
	for _, u := range lost {
		if u.err != nil {
			d.note(Mended{Blob: string(u.pack), Was: u.String(), Done: "nothing; what it holds stays unknown", Left: true})
			continue
		}
		if _, err := m.back.contents.RecoverIndexFromPackBlob(ctx, u.pack, u.length, true); err != nil {
			return m.r.corrupt(err)
		}
		d.note(Mended{Blob: string(u.pack), Was: u.String(), Done: fmt.Sprintf("%d contents indexed again", len(u.contents))})
	}
	if !d.dry && len(lost) > 0 {
		if err := m.back.contents.Flush(ctx); err != nil {
			return d.at.fault("writing to", err)
		}
	}
	for id, was := range bad {
		d.note(Mended{Blob: string(id), Was: was.Error(), Done: "kept as " + damagedName(id) + ", which kopia does not look at"})
		if !d.dry {
			if err := d.moveAway(ctx, id); err != nil {
				return err
			}
		}
	}
	return nil
}

func damagedName(id blob.ID) string { return "damaged-" + string(id) }

func (d *mender) moveAway(ctx context.Context, id blob.ID) error {
	var text blobBytes
	err := d.st.GetBlob(ctx, id, 0, -1, &text)
	if err == nil {
		err = d.st.PutBlob(ctx, blob.ID(damagedName(id)), slice(text.Bytes()), blob.PutOptions{})
	}
	if err == nil {
		err = d.st.DeleteBlob(ctx, id)
	}
	return d.at.fault("writing to", err)
}

// housekeeping mends what an open repository can do without.
func (d *mender) housekeeping(ctx context.Context) (err error) {
	r, err := Open(ctx, d.at, d.passphrase, d.options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close(context.WithoutCancel(ctx))) }()
	retain, err := r.kopia.FormatManager().BlobCfgBlob(ctx)
	if err != nil {
		return r.corrupt(err)
	}
	stale, err := copyFormat(ctx, d.st, retain, d.dry)
	if err != nil {
		return d.at.fault("writing to", err)
	}
	if stale {
		d.note(Mended{Blob: formatCopyID, Was: "not the same as " + format.KopiaRepositoryBlobID, Done: "written anew"})
	}
	m, err := r.OpenMedium(ctx)
	if err != nil {
		return err
	}
	defer m.Close(context.WithoutCancel(ctx))
	sessions, err := m.sessions(ctx)
	if err != nil {
		return err
	}
	for _, s := range sessions {
		if s.err == nil {
			continue
		}
		age, expired := time.Since(s.blob.Timestamp), maintenance.SafetyFull.SessionExpirationAge
		if age < expired {
			d.note(Mended{Blob: string(s.blob.BlobID), Was: s.err.Error(), Left: true,
				Done: fmt.Sprintf("nothing: its session may be under way; it can be removed when it is %s old, now it is %s", expired, age.Round(time.Second))})
			continue
		}
		d.note(Mended{Blob: string(s.blob.BlobID), Was: s.err.Error(), Done: "removed: its session ended long ago"})
		if !d.dry {
			if err := d.st.DeleteBlob(ctx, s.blob.BlobID); err != nil {
				return d.at.fault("writing to", err)
			}
		}
	}
	if _, err := maintenance.GetSchedule(ctx, r.kopia); err != nil {
		if err = r.corrupt(err); !isCorrupt(err) {
			return err
		}
		d.note(Mended{Blob: maintenanceBlob, Was: err.Error(), Done: "written anew: maintenance is due"})
		if err := d.change(ctx, r, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return maintenance.SetSchedule(ctx, w, &maintenance.Schedule{})
		}); err != nil {
			return err
		}
	}
	p, err := maintenance.GetParams(ctx, r.kopia)
	if err != nil {
		return r.corrupt(err)
	}
	if p.Owner == "" {
		d.note(Mended{Blob: "the parameters of maintenance", Was: "missing", Done: "written anew, owned by this host"})
		return d.change(ctx, r, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			p := maintenance.DefaultParams()
			p.Owner = r.kopia.ClientOptions().UsernameAtHost()
			return maintenance.SetParams(ctx, w, &p)
		})
	}
	return nil
}

func (d *mender) change(ctx context.Context, r *Repository, f func(context.Context, repo.DirectRepositoryWriter) error) error {
	if d.dry {
		return nil
	}
	return r.at.fault("writing to", repo.DirectWriteSession(ctx, r.kopia, repo.WriteSessionOptions{Purpose: "stillpoint repair"}, f))
}
