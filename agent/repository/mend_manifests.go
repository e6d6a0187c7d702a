package repository

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/index"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/adapters"
)

// manifests takes the contents with manifests that cannot be read out of the index, after the manifests of backups that
// were in them have been made again from the directories, which hold the same description. A forgotten backup that
// maintenance has not yet taken out of the repository looks like one whose manifest is lost, and comes back; nothing else
// could be told from what is left. Records that were in a lost content are lost.
func (d *mender) manifests(ctx context.Context, m *Medium) error {
	bad, err := badManifests(ctx, m)
	if err != nil || len(bad) == 0 {
		return err
	}
	manager, err := manifestsOf(ctx, m.back.contents, bad)
	if err != nil {
		return d.at.fault("opening", err)
	}
	from := &manifestReader{manager}
	known, err := m.r.find(ctx, from, map[string]string{})
	if err != nil {
		return err
	}
	found, err := describedBackups(ctx, m)
	if err != nil {
		return err
	}
	var back []string
	size := int64(0)
	for _, b := range append(slices.Clone(known), found...) {
		size = b.ChunkSize
	}
	host, err := hostOf(ctx, from, d.options.Host)
	if err != nil {
		return m.r.corrupt(err)
	}
	m.r.host = host
	for _, b := range found {
		if slices.ContainsFunc(known, func(k Backup) bool { return k.ID == b.ID }) {
			continue
		}
		_, err := m.OpenTree(ctx, b)
		if b.Form != adapters.TreeForm {
			_, err = m.OpenImage(ctx, b)
		}
		if isCorrupt(err) {
			continue
		} else if err != nil {
			return err
		}
		made, ok, err := m.r.manifestOf(ctx, b)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if _, err := snapshot.SaveSnapshot(ctx, manifestWriter{m: manager}, made); err != nil {
			return d.at.fault("writing to", err)
		}
		known = append(known, b)
		back = append(back, Handle{m.r.remote, b.ID}.String())
	}
	if err := d.restoreSettings(ctx, manager, size); err != nil {
		return err
	}
	done := "taken out of the index; no backup was found that it alone knew"
	if len(back) > 0 {
		done = fmt.Sprintf("taken out of the index, and %d backups listed again: those that had been forgotten lately are among them", len(back))
	}
	for _, id := range sortedIDs(bad) {
		info, err := m.back.contents.ContentInfo(ctx, id)
		if err != nil {
			return m.r.corrupt(err)
		}
		d.note(Mended{Blob: string(info.PackBlobID), Was: fmt.Sprintf("manifests in it cannot be read: %v", bad[id]),
			Done: done + "; what was noted there of verified and suspect backups is lost", Backups: back})
		back = nil
		if !d.dry {
			if err := m.back.contents.DeleteContent(ctx, id); err != nil {
				return d.at.fault("writing to", err)
			}
		}
	}
	if d.dry {
		return nil
	}
	if err := manager.Flush(ctx); err != nil {
		return d.at.fault("writing to", err)
	}
	return d.at.fault("writing to", m.back.contents.Flush(ctx)) // all of it in one index
}

// badManifests finds the contents with manifests that cannot be read, and why.
func badManifests(ctx context.Context, m *Medium) (map[content.ID]error, error) {
	bad := map[content.ID]error{}
	err := m.back.contents.IterateContents(ctx, content.IterateOptions{Range: index.PrefixRange(manifest.ContentPrefix)}, func(i content.Info) error {
		p, err := m.r.read(ctx, m.back.contents, i.ContentID)
		if err == nil {
			err = m.r.corrupt(readManifests(p))
		}
		if isCorrupt(err) {
			bad[i.ContentID] = err
			return nil
		}
		return err
	})
	return bad, err
}

func readManifests(p []byte) error {
	in, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		return err
	}
	var all struct {
		Entries []json.RawMessage `json:"entries"`
	}
	return json.NewDecoder(in).Decode(&all)
}

func sortedIDs(m map[content.ID]error) []content.ID {
	var all []content.ID
	for id := range m {
		all = append(all, id)
	}
	slices.SortFunc(all, func(a, b content.ID) int { return strings.Compare(a.String(), b.String()) })
	return all
}

// describedBackups finds backups by their directories. Directories that are not of a backup, or cannot be read, are
// passed over.
func describedBackups(ctx context.Context, m *Medium) ([]Backup, error) {
	var found []Backup
	err := m.back.contents.IterateContents(ctx, content.IterateOptions{Range: index.PrefixRange("k")}, func(i content.Info) error {
		var directory snapshot.DirManifest
		root := object.DirectObjectID(i.ContentID)
		if err := m.r.readJSON(ctx, m.back.contents, root, &directory); isCorrupt(err) {
			return nil
		} else if err != nil {
			return err
		}
		for _, e := range directory.Entries {
			if e.Name != descriptionName {
				continue
			}
			var b Backup
			if err := m.r.readJSON(ctx, m.back.contents, e.ObjectID, &b); isCorrupt(err) {
				continue
			} else if err != nil {
				return err
			}
			b.root = root
			found = append(found, b)
		}
		return nil
	})
	slices.SortFunc(found, func(a, b Backup) int { return a.Finished.Compare(b.Finished) })
	return found, err
}

// manifestOf makes the manifest of a backup anew. ok says that its directory comes out as it is.
func (r *Repository) manifestOf(ctx context.Context, b Backup) (m *snapshot.Manifest, ok bool, err error) {
	again := b
	m, err = r.describe(ctx, r.imagination(nil), &again)
	return m, again.root == b.root, err
}

// hostOf is the host that backups are filed under.
func hostOf(ctx context.Context, from manifests, otherwise string) (string, error) {
	entries, err := from.FindManifests(ctx, map[string]string{manifest.TypeLabelKey: snapshot.ManifestType})
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if e.Labels[descriptionLabel] != "" {
			return e.Labels[snapshot.HostnameLabel], nil
		}
	}
	return otherwise, nil
}

// restoreSettings makes the manifest anew by which a kopia repository is one of ours.
func (d *mender) restoreSettings(ctx context.Context, m *manifest.Manager, chunk int64) error {
	found, err := m.Find(ctx, map[string]string{manifest.TypeLabelKey: settingsType})
	if err != nil || len(found) > 0 {
		return d.at.fault("reading", err)
	}
	if chunk == 0 {
		chunk = DefaultChunkSize // no backup says anything else
	}
	_, err = m.Put(ctx, map[string]string{manifest.TypeLabelKey: settingsType}, settings{Version: layoutVersion, ChunkSize: chunk})
	return d.at.fault("writing to", err)
}

// manifestWriter is the part of kopia's repository that SaveSnapshot uses.
type manifestWriter struct {
	repo.RepositoryWriter
	m *manifest.Manager
}

func (w manifestWriter) PutManifest(ctx context.Context, labels map[string]string, payload any) (manifest.ID, error) {
	return w.m.Put(ctx, labels, payload)
}
