package repository

import (
	"context"
	"fmt"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/manifest"

	"stillpoint.io/stillpoint/fault"
)

// RecordKind says what a record is about. A record is a small JSON document that the repository keeps beside its backups,
// as a manifest of type stillpoint-KIND: what was verified when, what is distrusted. There is one of a kind for each
// key. Records go with kopia's maintenance like backups do, and kopia's own commands leave them alone.
type RecordKind string

// AuditedRecord is the kind of records about volumes, by their handles: what was compared with snapshots. It goes with the
// last backup of its volume.
const AuditedRecord RecordKind = "audited"

// recordKey is the label that holds a record's key.
const recordKey = "key"

func (k RecordKind) labels(key string) map[string]string {
	l := map[string]string{manifest.TypeLabelKey: settingsType + "-" + string(k)}
	if key != "" {
		l[recordKey] = key
	}
	return l
}

// PutRecord stores v, which encodes to JSON, in place of what the key had. It is durable when it returns. Of two that are
// put at one moment by two processes, the later counts.
func (r *Repository) PutRecord(ctx context.Context, kind RecordKind, key string, v any) error {
	if key == "" {
		return fmt.Errorf("a record of kind %s without a key", kind)
	}
	return r.session(ctx, "record "+string(kind), func(ctx context.Context, w repo.RepositoryWriter) error {
		_, err := w.ReplaceManifests(ctx, kind.labels(key), v)
		return err
	})
}

// DeleteRecord removes a record. One that does not exist is success.
func (r *Repository) DeleteRecord(ctx context.Context, kind RecordKind, key string) error {
	return within(ctx, func(ctx context.Context) error { return r.deleteRecord(ctx, kind, key) })
}

func (r *Repository) deleteRecord(ctx context.Context, kind RecordKind, key string) error {
	found, err := r.kopia.FindManifests(ctx, kind.labels(key))
	if err != nil {
		return r.corrupt(err)
	}
	if key == "" || len(found) == 0 {
		return nil
	}
	return r.session(ctx, "record "+string(kind), func(ctx context.Context, w repo.RepositoryWriter) error {
		for _, m := range found {
			if err := w.DeleteManifest(ctx, m.ID); err != nil {
				return err
			}
		}
		return nil
	})
}

// Records reads all records of a kind, by key. T is what they decode to. It sees what other processes put as far as the
// repository was refreshed: Backups does that.
func Records[T any](ctx context.Context, r *Repository, kind RecordKind) (map[string]T, error) {
	return records[T](ctx, r, kind, "")
}

// Record reads one record, if there is one.
func Record[T any](ctx context.Context, r *Repository, kind RecordKind, key string) (v T, found bool, err error) {
	all, err := records[T](ctx, r, kind, key)
	v, found = all[key]
	return v, found, err
}

func records[T any](ctx context.Context, r *Repository, kind RecordKind, key string) (all map[string]T, err error) {
	err = within(ctx, func(ctx context.Context) error {
		all, err = recordsWithin[T](ctx, r, kind, key)
		return err
	})
	return all, err
}

func recordsWithin[T any](ctx context.Context, r *Repository, kind RecordKind, key string) (map[string]T, error) {
	found, err := r.kopia.FindManifests(ctx, kind.labels(key))
	if err != nil {
		return nil, r.corrupt(err)
	}
	all, newest := map[string]T{}, map[string]*manifest.EntryMetadata{}
	for _, m := range found {
		key := m.Labels[recordKey]
		if n := newest[key]; n != nil && (n.ModTime.After(m.ModTime) || n.ModTime.Equal(m.ModTime) && n.ID > m.ID) {
			continue
		}
		newest[key] = m
		var v T
		if _, err := r.kopia.GetManifest(ctx, m.ID, &v); err != nil {
			return nil, r.corrupt(fmt.Errorf("record %s of %s: %w", kind, key, err))
		}
		all[key] = v
	}
	return all, nil
}

// session changes manifests and makes that durable.
func (r *Repository) session(ctx context.Context, purpose string, change func(context.Context, repo.RepositoryWriter) error) error {
	err := within(ctx, func(ctx context.Context) error {
		return repo.WriteSession(ctx, r.kopia, repo.WriteSessionOptions{Purpose: "stillpoint " + purpose}, change)
	})
	if fault.KindOf(err) == fault.Internal {
		return r.at.fault("writing to", err)
	}
	return err
}
