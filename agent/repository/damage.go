package repository

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// damagedRecord lists contents that were found to be damaged, each with the pack in which it was. It holds as long as
// kopia's index says that the content is there: what was stored anew is in another pack, and what maintenance dropped in
// none. So a record that is out of date does no harm, and nobody has to take it back at the right moment. Kopia knows
// nothing of all this, and would dedupe the next backup against what is damaged.
const damagedRecord RecordKind = "damaged"

type damagedContents struct {
	Time     time.Time        `json:"time"` // when it was found
	Contents []damagedContent `json:"contents"`
}

type damagedContent struct {
	ID   content.ID `json:"content"`
	Pack blob.ID    `json:"pack"`
}

// damageAtOnce is how many contents a record lists at most: of each about 150 bytes.
const damageAtOnce = 10_000

// infos is what knows where contents are.
type infos interface {
	ContentInfo(ctx context.Context, id content.ID) (content.Info, error)
}

// NoteDamage records that these contents are damaged or that their packs are missing, so that whoever backs up the same
// bytes stores them anew, and that no backup relies on them. Those that are in no index need no record: they are stored
// anew in any case.
func (m *Medium) NoteDamage(ctx context.Context, bad []Chunk) error {
	return within(ctx, func(ctx context.Context) error { return m.r.noteDamage(ctx, m.back.contents, bad) })
}

// NoteDamageOf does that for what an error of this package names, if it names a content.
func (r *Repository) NoteDamageOf(ctx context.Context, err error) error {
	d, ok := errors.AsType[*damagedError](err)
	if !ok || r.kopia.ClientOptions().ReadOnly {
		return nil
	}
	return within(ctx, func(ctx context.Context) error {
		if err := r.kopia.Refresh(ctx); err != nil { // it may have been stored a moment ago
			return r.corrupt(err)
		}
		return r.noteDamage(ctx, r.kopia.ContentReader(), []Chunk{{d.id}})
	})
}

func (r *Repository) noteDamage(ctx context.Context, from infos, bad []Chunk) error {
	if len(bad) == 0 {
		return nil
	}
	known, err := r.damage(ctx, r.kopia, from)
	if err != nil {
		return err
	}
	var fresh []damagedContent
	for _, c := range bad {
		if _, ok := known[c.id]; ok {
			continue
		}
		info, err := from.ContentInfo(ctx, c.id)
		if errors.Is(err, content.ErrContentNotFound) {
			continue
		} else if err != nil {
			return r.corrupt(err)
		}
		fresh = append(fresh, damagedContent{c.id, info.PackBlobID})
	}
	slices.SortFunc(fresh, func(a, b damagedContent) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	for part := range slices.Chunk(fresh, damageAtOnce) {
		if err := r.PutRecord(ctx, damagedRecord, damageKey(part), damagedContents{time.Now().UTC(), part}); err != nil {
			return err
		}
	}
	return nil
}

// damageKey is the same for the same damage, so that two who find it at once make one record.
func damageKey(all []damagedContent) string {
	h := sha256.New()
	for _, d := range all {
		h.Write([]byte(d.ID.String() + " " + string(d.Pack) + "\n"))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// damage is what is recorded as damaged and still is what the index names.
func (r *Repository) damage(ctx context.Context, records manifests, from infos) (map[content.ID]struct{}, error) {
	found, err := records.FindManifests(ctx, damagedRecord.labels(""))
	if err != nil {
		return nil, r.corrupt(err)
	}
	bad := map[content.ID]struct{}{}
	for _, m := range found {
		var d damagedContents
		if _, err := records.GetManifest(ctx, m.ID, &d); err != nil {
			return nil, r.corrupt(err)
		}
		for _, c := range d.Contents {
			if still, err := c.still(ctx, from); err != nil {
				return nil, r.corrupt(err)
			} else if still {
				bad[c.ID] = struct{}{}
			}
		}
	}
	return bad, nil
}

// still says that the index names what was found to be damaged.
func (c damagedContent) still(ctx context.Context, from infos) (bool, error) {
	info, err := from.ContentInfo(ctx, c.ID)
	if errors.Is(err, content.ErrContentNotFound) {
		return false, nil
	}
	return err == nil && info.PackBlobID == c.Pack, err
}

// dropHealed deletes the records of damage of which nothing is left.
func (r *Repository) dropHealed(ctx context.Context, w repo.DirectRepositoryWriter) error {
	found, err := w.FindManifests(ctx, damagedRecord.labels(""))
	if err != nil {
		return err
	}
	for _, m := range found {
		var d damagedContents
		if _, err := w.GetManifest(ctx, m.ID, &d); err != nil {
			return err
		}
		left := false
		for _, c := range d.Contents {
			still, err := c.still(ctx, w.ContentManager())
			if err != nil {
				return err
			}
			left = left || still
		}
		if !left {
			if err := w.DeleteManifest(ctx, m.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// damagedError is a content that is not what it must be.
type damagedError struct {
	id content.ID
	error
}

func (e *damagedError) Unwrap() error { return e.error }

// damaged names a content in an error of kind Corrupt.
func damaged(id content.ID, err error) error {
	if fault.KindOf(err) != fault.Corrupt {
		return err
	}
	return &damagedError{id, err}
}

// Hurt says why a backup, or the part of one that a checkpoint has, is not to be built upon: it refers to contents that are
// known to be damaged. It is empty when nothing is known, and reads indexes only if anything at all is known to be damaged.
func (r *Repository) Hurt(ctx context.Context, b Backup) (why string, err error) {
	err = within(ctx, func(ctx context.Context) error {
		bad, err := r.damage(ctx, r.kopia, r.kopia.ContentReader())
		if err == nil {
			err = r.relies(ctx, r.kopia.ContentReader(), b, bad)
		}
		return err
	})
	if fault.KindOf(err) == fault.Corrupt {
		return err.Error(), nil
	}
	return "", err
}

// relies is Corrupt if a backup refers to one of the bad contents.
func (r *Repository) relies(ctx context.Context, from content.Reader, b Backup, bad map[content.ID]struct{}) error {
	if len(bad) == 0 {
		return nil
	}
	return r.eachContent(ctx, from, b, func(_ context.Context, id content.ID) error {
		if _, ok := bad[id]; ok {
			return fault.Errorf(fault.Corrupt, "content %s is known to be damaged", id)
		}
		return nil
	})
}

// eachContent visits the contents that a backup refers to, in parallel: of an image those of its index and all that they
// name, of a tree every directory and every file; each distinct segment, directory and file once.
func (r *Repository) eachContent(ctx context.Context, from content.Reader, b Backup, visit func(context.Context, content.ID) error) error {
	if b.Form == adapters.TreeForm {
		return r.eachOfTree(ctx, from, b, visit)
	}
	return r.eachOfImage(ctx, from, b, visit)
}

// renewal is how a writer stores anew what is known to be damaged. Nearly always nothing is.
type renewal struct {
	left atomic.Int64 // how many of bad there are
	mu   sync.Mutex
	bad  map[content.ID]struct{}
}

func (n *renewal) begin(bad map[content.ID]struct{}) {
	n.bad = bad
	n.left.Store(int64(len(bad)))
}

// any says that something is left to be stored anew, perhaps.
func (n *renewal) any() bool { return n.left.Load() > 0 }

// has says that the repository's content of that name is damaged, and was not stored anew yet.
func (n *renewal) has(id content.ID) bool {
	if !n.any() {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.bad[id]
	return ok
}

// store stores a content by put. One that is damaged is marked as deleted first, without which kopia would not take it,
// and both become part of the index at once.
func (n *renewal) store(ctx context.Context, m *content.WriteManager, id content.ID, put func() (content.ID, error)) (content.ID, error) {
	n.mu.Lock()
	if _, ok := n.bad[id]; !ok {
		n.mu.Unlock()
		return put()
	}
	defer n.mu.Unlock() // who stores the same waits: kopia would take its word for it
	m.DisableIndexFlush(ctx)
	defer m.EnableIndexFlush(ctx)
	if err := m.DeleteContent(ctx, id); err != nil && !errors.Is(err, content.ErrContentNotFound) {
		return content.EmptyID, err
	}
	id, err := put()
	if err == nil {
		delete(n.bad, id)
		n.left.Add(-1)
	}
	return id, err
}

// sound makes sure, before a backup is committed, that it refers to nothing that is known to be damaged: somebody may have
// found that out while it was made.
func (w *Writer) sound(ctx context.Context, back *reader, b Backup) error {
	bad, err := w.r.damage(ctx, back, back.contents)
	if err == nil {
		err = w.r.relies(ctx, back.contents, b, bad)
	}
	if fault.KindOf(err) == fault.Corrupt {
		return fault.Errorf(fault.Corrupt, "what it reuses turned out to be damaged while it was made: %w; back up again", err)
	}
	return err
}
