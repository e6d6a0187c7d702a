package repository

import (
	"context"
	"slices"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/fault"
)

// ForgetAtOnce is how many backups are best forgotten in one call, by measurement: a call takes about as long as one
// flush of the medium, whatever the number, and whoever is killed has to forget again at most this many.
const ForgetAtOnce = 64

// ofBackup are the kinds of records whose key is a backup's id. They go with it.
var ofBackup = [...]RecordKind{verifiedRecord, suspectRecord}

// forgottenRecord lists manifests that were deleted, and stay so. Kopia compacts manifests whenever some client reads many,
// and drops the note that one was deleted; if another does the same at that moment and has not seen the note, the
// manifest is back. A manifest's id is never used again. Maintenance deletes what came back, and old records.
const forgottenRecord RecordKind = "forgotten"

// forgottenFor is how long a record of forgotten manifests is kept: longer than a process may have read them before.
const forgottenFor = 90 * 24 * time.Hour

type forgotten struct {
	Time      time.Time     `json:"time"`
	Manifests []manifest.ID `json:"manifests"`
}

// forgottenIn gives what was forgotten.
func (r *Repository) forgottenIn(ctx context.Context, from manifests) (map[manifest.ID]bool, error) {
	found, err := from.FindManifests(ctx, forgottenRecord.labels(""))
	if err != nil {
		return nil, r.corrupt(err)
	}
	all := map[manifest.ID]bool{}
	for _, m := range found {
		var f forgotten
		if _, err := from.GetManifest(ctx, m.ID, &f); err != nil {
			return nil, r.corrupt(err)
		}
		for _, id := range f.Manifests {
			all[id] = true
		}
	}
	return all, nil
}

// Forget deletes the manifests of backups, and what was learnt about them; the data goes with maintenance as far as no
// other backup needs it. It is one change: killed at any point, either all of them are forgotten or none is. NotFound if
// there is no such backup. Unavailable if this machine's clock has not reached the time when a backup was committed: a
// repository goes by the later of two statements, and would list the backup again.
func (r *Repository) Forget(ctx context.Context, ids ...string) error {
	for _, id := range ids {
		if err := CheckID(id); err != nil {
			return err
		}
	}
	if err := r.kopia.Refresh(ctx); err != nil {
		return r.corrupt(err)
	}
	doomed, err := r.manifestsOf(ctx, ids)
	if err != nil {
		return err
	}
	return r.session(ctx, "forget", func(ctx context.Context, w repo.RepositoryWriter) error {
		for _, id := range doomed {
			if err := w.DeleteManifest(ctx, id); err != nil {
				return err
			}
		}
		if len(doomed) == 0 {
			return nil
		}
		_, err := w.PutManifest(ctx, forgottenRecord.labels(string(doomed[0])), forgotten{r.kopia.Time().UTC(), doomed})
		return err
	})
}

// keepForgotten deletes the manifests that came back although they were forgotten, and records of that which are old.
func (r *Repository) keepForgotten(ctx context.Context, w repo.DirectRepositoryWriter) error {
	gone, err := r.forgottenIn(ctx, w)
	if err != nil {
		return err
	}
	all, err := w.FindManifests(ctx, nil)
	if err != nil {
		return err
	}
	for _, m := range all {
		old := m.Labels[manifest.TypeLabelKey] == forgottenRecord.labels("")[manifest.TypeLabelKey] && w.Time().Sub(m.ModTime) > forgottenFor
		if !gone[m.ID] && !old {
			continue
		}
		if err := w.DeleteManifest(ctx, m.ID); err != nil {
			return err
		}
	}
	return w.Flush(ctx)
}

// manifestsOf finds all manifests of backups, of which one id may have two, and of the records about them; also about the
// volumes of which no other backup is left.
func (r *Repository) manifestsOf(ctx context.Context, ids []string) ([]manifest.ID, error) {
	missing := map[string]bool{}
	for _, id := range ids {
		missing[id] = true
	}
	found, err := r.kopia.FindManifests(ctx, map[string]string{manifest.TypeLabelKey: snapshot.ManifestType})
	if err != nil {
		return nil, r.corrupt(err)
	}
	gone, err := r.forgottenIn(ctx, r.kopia)
	if err != nil {
		return nil, err
	}
	var all []manifest.ID
	stays, concerned := map[string]bool{}, map[string]bool{} // volumes of which a backup stays, or goes
	now := r.kopia.Time()
	for _, m := range found {
		id, volume := m.Labels[idLabel], m.Labels[volumeLabel]
		if id == "" || gone[m.ID] {
			continue
		}
		if !slices.Contains(ids, id) {
			stays[volume] = true
			continue
		}
		concerned[volume] = true
		if !now.After(m.ModTime) {
			return nil, fault.Errorf(fault.Unavailable, "backup %s: it was committed at %s, and this machine's clock says %s; set the clock", Handle{r.remote, id},
				m.ModTime.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		}
		delete(missing, id)
		all = append(all, m.ID)
	}
	for id := range missing {
		return nil, r.noBackup(id)
	}
	for _, kind := range append(ofBackup[:], AuditedRecord) {
		records, err := r.kopia.FindManifests(ctx, kind.labels(""))
		if err != nil {
			return nil, r.corrupt(err)
		}
		for _, m := range records {
			key := m.Labels[recordKey]
			if kind == AuditedRecord && concerned[key] && !stays[key] || kind != AuditedRecord && slices.Contains(ids, key) {
				all = append(all, m.ID)
			}
		}
	}
	return all, nil
}
