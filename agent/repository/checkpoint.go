package repository

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Checkpoint is how far an unfinished backup came. To kopia it is an incomplete snapshot, so that its maintenance leaves
// alone what the checkpoint refers to: the segments that are done, and all of the base. It ends with the backup, with a
// newer backup of the volume, or with a maintenance some days later. Backups does not list it.
type Checkpoint struct {
	Backup           // as far as it is known: Image or Tree is of the part that is done, Data counts what is known of the whole
	Done   int64     // bytes from the image's start that are done, a multiple of SegmentSize, or all of Size; of a tree, in files
	Taken  time.Time // when it was taken
}

// Labels of a checkpoint's manifest, beside volumeLabel.
const (
	checkpointLabel     = "tag:checkpoint" // the backup's id
	checkpointTextLabel = "tag:stillpoint-checkpoint"
)

// stored is a checkpoint in JSON.
type stored struct {
	Done   int64     `json:"done"`
	Taken  time.Time `json:"taken"`
	Root   string    `json:"root"` // kopia's id of the directory
	Backup Backup    `json:"backup"`
}

// baseName is the file by which a checkpoint holds on to the base.
const baseName = "base.img"

// Checkpoint makes what was written so far durable, and notes that done is the image's start. It replaces the writer's
// checkpoint before. Others may write meanwhile: what they write belongs to the next one. It must not run in parallel
// with itself or with Commit.
func (w *Writer) Checkpoint(ctx context.Context, b Backup, done Part, base *Backup) error {
	return w.keep(ctx, b, done.Size, func(s *session, b *Backup) (files []*snapshot.DirEntry, err error) {
		if base != nil {
			files = append(files, &snapshot.DirEntry{Name: baseName, FileSize: base.Size, ObjectID: base.Image.id})
		}
		b.Image, err = done.store(ctx, s.put)
		return append(files, &snapshot.DirEntry{Name: imageName, FileSize: done.Size, ObjectID: b.Image.id}), err
	})
}

// CheckpointTree is Checkpoint for a backup of the form tree, of which bytes are in files that are done.
func (w *Writer) CheckpointTree(ctx context.Context, b Backup, done *TreePart, bytes int64) error {
	return w.keep(ctx, b, bytes, func(s *session, b *Backup) ([]*snapshot.DirEntry, error) {
		part, err := done.store(ctx, s.put)
		part.Name = treeName
		b.Form, b.tree = adapters.TreeForm, &part
		return nil, err
	})
}

// keep makes a checkpoint of what store stores in the session that ends with it, and notes in the backup. It names the
// other files of the checkpoint's directory.
func (w *Writer) keep(ctx context.Context, b Backup, done int64, store func(*session, *Backup) ([]*snapshot.DirEntry, error)) (err error) {
	next, err := w.begin(ctx)
	if err != nil {
		return err
	}
	w.mu.Lock()
	s := w.current
	w.current = next
	w.mu.Unlock()
	s.users.Wait()
	defer func() { err = errors.Join(err, w.r.at.fault("closing", s.kopia.Close(context.WithoutCancel(ctx)))) }()

	files, err := store(s, &b)
	if err != nil {
		return err
	}
	m, err := w.r.directory(ctx, s, &b, files)
	if err != nil {
		return err
	}
	c := stored{Done: done, Taken: time.Now().UTC(), Root: b.root.String(), Backup: b}
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	m.Description = "Stillpoint's unfinished backup of " + b.Snapshot.Full()
	m.IncompleteReason = "checkpoint"
	m.EndTime = fs.UTCTimestampFromTime(c.Taken)
	m.Tags = map[string]string{checkpointLabel: b.ID, volumeLabel: b.Volume.String(), checkpointTextLabel: string(text)}
	if w.checkpoint != "" {
		if err := s.kopia.DeleteManifest(ctx, w.checkpoint); err != nil {
			return w.r.at.fault("writing to", err)
		}
	}
	if w.checkpoint, err = snapshot.SaveSnapshot(ctx, s.kopia, m); err != nil {
		return w.r.at.fault("writing to", err)
	}
	return w.r.at.fault("writing to", s.kopia.Flush(ctx))
}

// Resume makes the writer's next checkpoint take the place of one that an earlier writer left.
func (w *Writer) Resume(c Checkpoint) { w.checkpoint, w.resumed = c.manifest, true }

// Checkpoints lists the unfinished backups, of one volume or of all. Of several with one id the one that came farthest
// counts.
func (r *Repository) Checkpoints(ctx context.Context, f Filter) ([]Checkpoint, error) {
	labels := map[string]string{manifest.TypeLabelKey: snapshot.ManifestType}
	if f.Volume != (adapters.VolumeID{}) {
		labels[volumeLabel] = f.Volume.String()
	}
	found, err := r.kopia.FindManifests(ctx, labels)
	if err != nil {
		return nil, r.corrupt(err)
	}
	var all []Checkpoint
	at := map[string]int{}
	for _, e := range found {
		text := e.Labels[checkpointTextLabel]
		if text == "" {
			continue
		}
		var c stored
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			if fault.KindOf(err) == fault.Unsupported {
				continue // a newer program's: it is for that one to continue
			}
			return nil, fault.Errorf(fault.Corrupt, "repository %s: checkpoint %s: %w", r.at, e.ID, err)
		}
		c.Backup.Handle = Handle{r.remote, c.Backup.ID}
		c.Backup.manifest = e.ID
		if c.Backup.root, err = object.ParseID(c.Root); err != nil {
			return nil, fault.Errorf(fault.Corrupt, "repository %s: checkpoint %s: %w", r.at, e.ID, err)
		}
		i, ok := at[c.Backup.ID]
		if !ok {
			at[c.Backup.ID] = len(all)
			all = append(all, Checkpoint{c.Backup, c.Done, c.Taken})
		} else if all[i].Done < c.Done {
			all[i] = Checkpoint{c.Backup, c.Done, c.Taken}
		}
	}
	return all, nil
}

// OpenPart opens the image of a checkpoint: the first Done bytes.
func (r *Repository) OpenPart(ctx context.Context, c Checkpoint) (*Image, error) {
	part := c.Backup
	part.Size = c.Done
	return r.OpenImage(ctx, part)
}

// GiveUp deletes the checkpoints of a backup that is not to be continued.
func (r *Repository) GiveUp(ctx context.Context, id string) error {
	found, err := r.kopia.FindManifests(ctx, map[string]string{manifest.TypeLabelKey: snapshot.ManifestType, checkpointLabel: id})
	if err != nil {
		return r.corrupt(err)
	}
	for _, e := range found {
		if err := r.deleteManifest(ctx, e.ID); err != nil {
			return err
		}
	}
	return nil
}

// dropCheckpoints deletes, in a session that is about to commit b, the checkpoints that b makes worthless: its own, and
// those of older snapshots of the volume.
func (r *Repository) dropCheckpoints(ctx context.Context, s *session, b Backup) error {
	found, err := s.kopia.FindManifests(ctx, map[string]string{manifest.TypeLabelKey: snapshot.ManifestType, volumeLabel: b.Volume.String()})
	if err != nil {
		return r.corrupt(err)
	}
	for _, e := range found {
		id, ok := e.Labels[checkpointLabel]
		if !ok {
			continue
		}
		var c stored
		if err := json.Unmarshal([]byte(e.Labels[checkpointTextLabel]), &c); err == nil && id != b.ID && c.Backup.Created.After(b.Created) {
			continue
		}
		if err := s.kopia.DeleteManifest(ctx, e.ID); err != nil {
			return r.at.fault("writing to", err)
		}
	}
	return nil
}
