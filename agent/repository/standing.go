package repository

import (
	"context"
	"time"

	"github.com/kopia/kopia/repo"
)

// Standing is what was learnt about a backup after it was made. It is kept in records, by the backup's id.
type Standing struct {
	Verified time.Time // when every byte of it was last read back and found right; zero: never
	Suspect  string    // why it may differ from its snapshot; empty: no reason to think so
}

const (
	verifiedRecord RecordKind = "verified"
	suspectRecord  RecordKind = "suspect"
)

type verification struct {
	Time time.Time `json:"time"`
}

type suspicion struct {
	Time time.Time `json:"time"`
	Why  string    `json:"why"`
}

// MarkVerified notes that every byte of the backup was read back and found right at that time.
func (r *Repository) MarkVerified(ctx context.Context, id string, at time.Time) error {
	return r.PutRecord(ctx, verifiedRecord, id, verification{at.UTC()})
}

// MarkAllVerified does that for several backups at once, which costs as many blobs as for one.
func (r *Repository) MarkAllVerified(ctx context.Context, ids []string, at time.Time) error {
	return r.session(ctx, "record verified", func(ctx context.Context, w repo.RepositoryWriter) error {
		for _, id := range ids {
			if _, err := w.ReplaceManifests(ctx, verifiedRecord.labels(id), verification{at.UTC()}); err != nil {
				return err
			}
		}
		return nil
	})
}

// ClearSuspect takes a suspicion back.
func (r *Repository) ClearSuspect(ctx context.Context, id string) error {
	return r.DeleteRecord(ctx, suspectRecord, id)
}

// MarkSuspect notes that the backup may differ from the snapshot it was made of. Nothing takes it for a base again, and a
// restore of it has to be insisted on.
func (r *Repository) MarkSuspect(ctx context.Context, id, why string) error {
	return r.PutRecord(ctx, suspectRecord, id, suspicion{time.Now().UTC(), why})
}

// KnownSound is when the backup was last known to be whole: verified, or, if it never was, made.
func (b Backup) KnownSound() time.Time {
	if b.Verified.IsZero() {
		return b.Finished
	}
	return b.Verified
}

// standing sums up what was learnt about the backups.
func (s *Status) standing(all []Backup) {
	for _, b := range all {
		if since := b.KnownSound(); s.Unverified == nil || since.Before(s.UnverifiedSince) {
			s.Unverified, s.UnverifiedSince = &b.Handle, since
		}
		if b.Verified.IsZero() {
			s.NeverVerified++
		}
		if b.Suspect != "" {
			s.Suspect++
		}
	}
}

// standings fills in what was learnt about backups.
func (r *Repository) standings(ctx context.Context, all []Backup) error {
	verified, err := Records[verification](ctx, r, verifiedRecord)
	if err != nil {
		return err
	}
	suspect, err := Records[suspicion](ctx, r, suspectRecord)
	if err != nil {
		return err
	}
	for i := range all {
		all[i].Standing = Standing{verified[all[i].ID].Time, suspect[all[i].ID].Why}
	}
	return nil
}
