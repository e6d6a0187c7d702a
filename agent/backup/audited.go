package backup

import (
	"context"
	"errors"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// audited is the repository's record of what was looked at of a volume, an AuditedRecord. The coverage's instants are those of the snapshots that were read, by the backend's clock.
type audited struct {
	Coverage *audit.Coverage `json:"coverage"`
	Scrubbed time.Time       `json:"scrubbed,omitzero"` // when the volume was last scrubbed
}

// loadAudited reads a volume's record. Without one (or with one that cannot be read, which is no reason to fail) it says
// what the backups prove: at least what the last full backup did not read was never looked at.
func loadAudited(ctx context.Context, r *repository.Repository, volume adapters.VolumeID) (audited, error) {
	a, found, err := repository.Record[audited](ctx, r, repository.AuditedRecord, volume.String())
	switch {
	case errors.Is(err, fault.Corrupt), errors.Is(err, fault.Unsupported):
		found = false
	case err != nil:
		return audited{}, err
	}
	if found && a.Coverage != nil {
		a.Coverage.NotAfter(time.Now())
		return a, nil
	}
	a = audited{Coverage: new(audit.Coverage)}
	all, err := r.Backups(ctx, repository.Filter{Volume: volume})
	if err != nil {
		return audited{}, err
	}
	for _, b := range all { // newest first
		a.Coverage = new(audit.Coverage)
		a.resize(b.Size, b.Created)
		if b.Kind == repository.Full && b.Suspect == "" {
			break
		}
	}
	return a, nil
}

// resize fits the record to a snapshot's size. What is new counts as not looked at, since just before.
func (a *audited) resize(size int64, instant time.Time) {
	a.Coverage.Resize(size, instant.Add(-time.Second))
}

// putAudited notes that these extents of a snapshot were read, on top of what others noted meanwhile.
func putAudited(ctx context.Context, r *repository.Repository, s adapters.Snapshot, read func(mark func(cbt.Extent)), scrubbed time.Time) (audited, error) {
	a, err := loadAudited(ctx, r, s.ID.Volume)
	if err != nil {
		return a, err
	}
	a.resize(s.Size, s.Created)
	read(func(e cbt.Extent) { a.Coverage.Mark(e.Offset, e.End(), s.Created) })
	if !scrubbed.IsZero() {
		a.Scrubbed = scrubbed.UTC()
	}
	return a, r.PutRecord(ctx, repository.AuditedRecord, s.ID.Volume.String(), a)
}
