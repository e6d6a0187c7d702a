package repository

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/format"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// ChangePassphrase makes another passphrase open the repository, and the present one no longer. Killed at any point, one of
// the two opens it. Who has it open goes on, for a quarter of an hour at most: then kopia reads kopia.repository again. A
// backup that fails by that is continued with the new passphrase. The key that data is encrypted with stays: whoever knew the old
// passphrase and kept a copy of kopia.repository can still read the blobs.
func (r *Repository) ChangePassphrase(ctx context.Context, old, next adapters.Secret) error {
	if next.Reveal() == "" {
		return fault.Errorf(fault.Invalid, "repository %s: the new passphrase is empty", r.at)
	}
	config, err := r.kopia.FormatManager().BlobCfgBlob(ctx)
	if err != nil {
		return r.corrupt(err)
	}
	if config.IsRetentionEnabled() {
		return fault.Errorf(fault.Unsupported, "repository %s: its blobs are locked against changes; kopia's own `kopia repository change-password` knows how to", r.at)
	}
	// Kopia writes kopia.blobcfg first and kopia.repository second, both encrypted by the passphrase: killed in between,
	// it would open with neither. So its writes are held back, and put where they belong in an order that can be cut
	// anywhere: a missing kopia.blobcfg says the same as one without retention, and no copy is better than one that the old passphrase
	// opens.
	held := &holding{Storage: r.medium, blobs: map[blob.ID][]byte{}}
	m, err := format.NewManager(ctx, held, "", format.DefaultRepositoryBlobCacheDuration, old.Reveal(), time.Now)
	if err != nil {
		return fault.Errorf(fault.Invalid, "repository %s: the present passphrase does not open it: %w", r.at, err)
	}
	if err := m.ChangePassword(ctx, next.Reveal()); err != nil {
		return r.at.fault("changing the passphrase of", err)
	}
	if len(held.blobs) != 2 {
		return fmt.Errorf("kopia changed %d blobs, not the two that are known", len(held.blobs))
	}
	for _, id := range []blob.ID{format.KopiaBlobCfgBlobID, formatCopyID} {
		if err == nil {
			err = r.medium.DeleteBlob(ctx, id)
		}
	}
	for _, id := range []blob.ID{format.KopiaRepositoryBlobID, formatCopyID, format.KopiaBlobCfgBlobID} {
		text := held.blobs[id]
		if id == formatCopyID {
			text = held.blobs[format.KopiaRepositoryBlobID]
		}
		if err == nil {
			err = r.medium.PutBlob(ctx, id, slice(text), blob.PutOptions{})
		}
	}
	return r.at.fault("changing the passphrase of", err)
}

// holding holds back what is written.
type holding struct {
	blob.Storage
	blobs map[blob.ID][]byte
}

func (h *holding) PutBlob(_ context.Context, id blob.ID, data blob.Bytes, _ blob.PutOptions) error {
	var text bytes.Buffer
	in := data.Reader()
	defer in.Close()
	if _, err := io.Copy(&text, in); err != nil {
		return err
	}
	h.blobs[id] = text.Bytes()
	return nil
}
