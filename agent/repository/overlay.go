package repository

import (
	"context"
	"math"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
)

// manifestsOf opens the manifests, but for those that are passed over.
func manifestsOf(ctx context.Context, c *content.WriteManager, but map[content.ID]error) (*manifest.Manager, error) {
	return manifest.NewManager(ctx, tolerant{c, but}, manifest.ManagerOptions{AutoCompactionThreshold: math.MaxInt}, nil)
}

// tolerant shows kopia's manager of manifests all contents but the bad ones: it would show nothing because of one.
type tolerant struct {
	*content.WriteManager
	but map[content.ID]error
}

func (t tolerant) IterateContents(ctx context.Context, o content.IterateOptions, f content.IterateCallback) error {
	return t.WriteManager.IterateContents(ctx, o, func(i content.Info) error {
		if t.but[i.ContentID] != nil {
			return nil
		}
		return f(i)
	})
}

// overlay is a storage in which some blobs are other than they are; nil: they are not there.
type overlay struct {
	blob.Storage
	blobs map[blob.ID][]byte
}

func (o overlay) GetBlob(ctx context.Context, id blob.ID, off, length int64, out blob.OutputBuffer) error {
	text, ok := o.blobs[id]
	switch {
	case !ok:
		return o.Storage.GetBlob(ctx, id, off, length, out)
	case text == nil:
		return blob.ErrBlobNotFound
	case length < 0:
		off, length = 0, int64(len(text))
	case off+length > int64(len(text)):
		return blob.ErrInvalidRange
	}
	out.Reset()
	_, err := out.Write(text[off : off+length])
	return err
}

func (o overlay) ListBlobs(ctx context.Context, prefix blob.ID, f func(blob.Metadata) error) error {
	for id, text := range o.blobs {
		if strings.HasPrefix(string(id), string(prefix)) && text != nil {
			if err := f(blob.Metadata{BlobID: id, Length: int64(len(text)), Timestamp: time.Now()}); err != nil {
				return err
			}
		}
	}
	return o.Storage.ListBlobs(ctx, prefix, f)
}
