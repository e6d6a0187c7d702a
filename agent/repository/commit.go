package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"path"
	"strings"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/blob/readonly"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

const (
	imageName       = "disk.img"
	treeName        = "tree"
	descriptionName = "volume.json"
)

// Commit makes the backup be, in this order: all data and indexes are made durable; what describes the backup, its
// whole top level is read back from the medium, by a reader that knows nothing of what was written; check is given the
// image as that reader has it, and is expected to read a sample of it; the manifest is written and made durable; it is
// read back the same way. An error of check is returned and nothing is committed. If another process committed the same
// id meanwhile, its backup is returned when it is of the same snapshot, and the error is Busy when it is not.
func (w *Writer) Commit(ctx context.Context, b Backup, check func(ctx context.Context, back *Image) error) (got Backup, err error) {
	return w.commit(ctx, b, func(ctx context.Context, back *reader, b Backup) error { return back.check(ctx, b, check) })
}

// commit commits with whatever check there is of what was read back.
func (w *Writer) commit(ctx context.Context, b Backup, check func(context.Context, *reader, Backup) error) (got Backup, err error) {
	err = within(ctx, func(ctx context.Context) error {
		got, err = w.commitWithin(ctx, b, check)
		return err
	})
	return got, err
}

func (w *Writer) commitWithin(ctx context.Context, b Backup, check func(context.Context, *reader, Backup) error) (Backup, error) {
	s := w.use()
	defer s.users.Done()
	m, err := w.r.describe(ctx, s, &b)
	if err != nil {
		return Backup{}, err
	}
	if err := s.kopia.Flush(ctx); err != nil {
		return Backup{}, w.r.at.fault("writing to", err)
	}
	back, err := w.r.reopen(ctx)
	if err != nil {
		return Backup{}, err
	}
	defer back.close(ctx)
	if err := check(ctx, back, b); err != nil {
		// What was stored a moment ago and does not come back is not to be taken for stored by whoever tries again.
		return Backup{}, errors.Join(fmt.Errorf("reading back backup %s: %w", b.ID, err), w.r.NoteDamageOf(context.WithoutCancel(ctx), err))
	}
	if err := w.sound(ctx, back, b); err != nil {
		return Backup{}, fmt.Errorf("backup %s: %w", b.ID, err)
	}
	if err := w.confirm(ctx, s, back, b); err != nil {
		return Backup{}, fmt.Errorf("backup %s: %w", b.ID, err)
	}
	if err := w.r.dropCheckpoints(ctx, s, b); err != nil {
		return Backup{}, err
	}
	id, err := snapshot.SaveSnapshot(ctx, s.kopia, m)
	if err == nil {
		err = s.kopia.Flush(ctx)
	}
	if err != nil {
		return Backup{}, w.r.at.fault("writing to", err)
	}
	if err := back.contents.Refresh(ctx); err != nil {
		return Backup{}, w.r.corrupt(err)
	}
	got, err := w.r.lookup(ctx, back, b.ID)
	switch {
	case err != nil:
		return Backup{}, fmt.Errorf("reading back backup %s: %w", b.ID, err)
	case got.manifest == id:
		return got, nil
	}
	if err := w.r.deleteManifest(ctx, id); err != nil {
		return Backup{}, err
	}
	if got.Snapshot != b.Snapshot {
		return Backup{}, fault.Errorf(fault.Busy, "backup %s: somebody else used this id for %s meanwhile; choose another", got.Handle, got.Snapshot)
	}
	return got, nil
}

// describe writes volume.json and the directory, and makes the manifest.
func (r *Repository) describe(ctx context.Context, s *session, b *Backup) (*snapshot.Manifest, error) {
	b.Handle, b.Standing = Handle{}, Standing{}
	text, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, text, "", "  "); err != nil {
		return nil, err
	}
	pretty.WriteByte('\n')
	file, err := s.put(ctx, pretty.Bytes(), "", content.NoCompression)
	if err != nil {
		return nil, err
	}
	files := []*snapshot.DirEntry{{Name: descriptionName, FileSize: int64(pretty.Len()), ObjectID: object.DirectObjectID(file)}}
	if b.tree == nil {
		files = append([]*snapshot.DirEntry{{Name: imageName, FileSize: b.Size, ObjectID: b.Image.id}}, files...)
	}
	m, err := r.directory(ctx, s, b, files)
	if err != nil {
		return nil, err
	}
	m.Description = "Stillpoint backup of " + b.Snapshot.Full()
	m.EndTime = fs.UTCTimestampFromTime(b.Finished)
	m.Tags = map[string]string{idLabel: b.ID, volumeLabel: b.Volume.String(), descriptionLabel: string(text)}
	return m, nil
}

// directory writes a folder of files, and of the backup's tree if there is one, and makes a manifest of the backup's source
// with the folder as its root.
func (r *Repository) directory(ctx context.Context, s *session, b *Backup, files []*snapshot.DirEntry) (*snapshot.Manifest, error) {
	at := fs.UTCTimestampFromTime(b.Created)
	summary := &fs.DirectorySummary{TotalFileCount: int64(len(files)), TotalDirCount: 1, MaxModTime: at}
	entries := []any{}
	if b.tree != nil {
		text, err := b.tree.encode()
		if err != nil {
			return nil, err
		}
		entries = append(entries, json.RawMessage(text))
		addSummary(summary, *b.tree)
	}
	for _, f := range files {
		entries = append(entries, f)
		f.Type, f.Permissions, f.ModTime = snapshot.EntryTypeFile, 0o600, at
		summary.TotalFileSize += f.FileSize
	}
	text, err := json.Marshal(struct {
		Stream  string               `json:"stream"`
		Entries []any                `json:"entries"`
		Summary *fs.DirectorySummary `json:"summary"`
	}{"kopia:directory", entries, summary})
	if err != nil {
		return nil, err
	}
	root, err := s.put(ctx, append(text, '\n'), "k", indexCompressor)
	if err != nil {
		return nil, err
	}
	b.root = object.DirectObjectID(root)
	return &snapshot.Manifest{
		Source:    snapshot.SourceInfo{Host: r.host, UserName: userName, Path: "/" + b.Volume.Backend + "/" + strings.TrimPrefix(b.Volume.ID, "/")},
		StartTime: at, // kopia orders and expires by it
		Stats:     snapshot.Stats{TotalFileSize: summary.TotalFileSize, TotalFileCount: int32(min(summary.TotalFileCount, math.MaxInt32)), TotalDirectoryCount: int32(min(summary.TotalDirCount, math.MaxInt32))},
		RootEntry: &snapshot.DirEntry{Name: path.Base(b.Volume.ID), Type: snapshot.EntryTypeDirectory, Permissions: 0o700, ModTime: at, ObjectID: b.root, DirSummary: summary},
	}, nil
}

// reader reads the repository from its medium, with no memory and no cache in between.
type reader struct {
	r        *Repository
	shared   *content.SharedManager
	contents *content.WriteManager
	*manifestReader
}

type manifestReader struct{ m *manifest.Manager }

func (m *manifestReader) FindManifests(ctx context.Context, labels map[string]string) ([]*manifest.EntryMetadata, error) {
	return m.m.Find(ctx, labels)
}

func (m *manifestReader) GetManifest(ctx context.Context, id manifest.ID, data any) (*manifest.EntryMetadata, error) {
	return m.m.Get(ctx, id, data)
}

func (r *Repository) reopen(ctx context.Context) (*reader, error) {
	shared, err := content.NewSharedManager(ctx, readonly.NewWrapper(r.medium), r.kopia.FormatManager(), nil, nil, nil, nil)
	if err != nil {
		return nil, r.at.fault("opening", err)
	}
	contents := content.NewWriteManager(ctx, shared, content.SessionOptions{}, "")
	m, err := manifest.NewManager(ctx, contents, manifest.ManagerOptions{AutoCompactionThreshold: math.MaxInt}, nil)
	if err != nil {
		return nil, errors.Join(r.at.fault("opening", err), shared.CloseShared(ctx))
	}
	return &reader{r, shared, contents, &manifestReader{m}}, nil
}

func (b *reader) close(ctx context.Context) error { return b.shared.CloseShared(ctx) }

// check reads the directory, the description and the top level of a backup, and has its image checked.
func (b *reader) check(ctx context.Context, want Backup, check func(ctx context.Context, back *Image) error) error {
	if err := b.r.checkDescription(ctx, b.contents, want); err != nil {
		return err
	}
	image, err := b.r.openImage(ctx, b.contents, want)
	if err != nil {
		return err
	}
	return check(ctx, image)
}

// CheckDescription makes sure that what the repository says about a backup in three places (manifest, directory,
// volume.json) is one and the same. Corrupt if it is not.
func (r *Repository) CheckDescription(ctx context.Context, b Backup) error {
	return within(ctx, func(ctx context.Context) error { return r.checkDescription(ctx, r.kopia.ContentReader(), b) })
}

func (r *Repository) checkDescription(ctx context.Context, from content.Reader, b Backup) error {
	var directory snapshot.DirManifest
	if err := r.readJSON(ctx, from, b.root, &directory); err != nil {
		return err
	}
	objects := map[string]object.ID{}
	for _, e := range directory.Entries {
		objects[e.Name] = e.ObjectID
	}
	name, id := imageName, b.Image.id
	if b.Form == adapters.TreeForm {
		name, id = treeName, b.Tree.id
	}
	if len(objects) != 2 || objects[name] != id {
		return fault.Errorf(fault.Corrupt, "backup %s: its directory does not hold %s as its %s", b.ID, id, name)
	}
	var stored Backup
	if err := r.readJSON(ctx, from, objects[descriptionName], &stored); err != nil {
		return err
	}
	b.Handle, b.Standing = Handle{}, Standing{}
	want, err := json.Marshal(b)
	if err != nil {
		return err
	}
	got, err := json.Marshal(stored)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fault.Errorf(fault.Corrupt, "backup %s: volume.json says %s, the manifest %s", b.ID, got, want)
	}
	return nil
}

func (r *Repository) readJSON(ctx context.Context, from content.Reader, id object.ID, v any) error {
	cid, _, ok := id.ContentID()
	if !ok {
		return fault.Errorf(fault.Corrupt, "object %s is not one that Stillpoint writes", id)
	}
	p, err := r.read(ctx, from, cid)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(p, v); err != nil {
		return fault.Errorf(fault.Corrupt, "object %s: %w", id, err)
	}
	return nil
}
