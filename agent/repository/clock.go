package repository

import (
	"context"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// skews are how far the clocks of a repository are ahead of this machine's: kopia's, and the medium's, which dates blobs.
// They are 0 outside of tests, in which days pass in seconds.
type skews struct{ kopia, medium time.Duration }

// Skewed is for tests: kopia's clock and the medium's are ahead of this machine's by that much, or behind.
func (o OpenOptions) Skewed(kopia, medium time.Duration) OpenOptions {
	o.skews = skews{kopia, medium}
	return o
}

// now is kopia's clock, nil where it is this machine's.
func (s skews) now() func() time.Time {
	if s.kopia == 0 {
		return nil
	}
	return func() time.Time { return time.Now().Round(0).Add(s.kopia) }
}

// ahead is a bucket whose clock is ahead, for tests. No store can be told when an object was written: what was not written
// through this one shows the store's own time, and looks older than it is.
type ahead struct {
	blob.Storage
	skew    time.Duration
	written sync.Map // blob.ID
}

func (a *ahead) date(m *blob.Metadata) {
	if _, ok := a.written.Load(m.BlobID); ok {
		m.Timestamp = m.Timestamp.Add(a.skew)
	}
}

func (a *ahead) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, o blob.PutOptions) error {
	a.written.Store(id, nil)
	err := a.Storage.PutBlob(ctx, id, data, o)
	if err == nil && o.GetModTime != nil {
		*o.GetModTime = o.GetModTime.Add(a.skew)
	}
	return err
}

func (a *ahead) GetMetadata(ctx context.Context, id blob.ID) (blob.Metadata, error) {
	m, err := a.Storage.GetMetadata(ctx, id)
	a.date(&m)
	return m, err
}

func (a *ahead) ListBlobs(ctx context.Context, prefix blob.ID, callback func(blob.Metadata) error) error {
	return a.Storage.ListBlobs(ctx, prefix, func(m blob.Metadata) error {
		a.date(&m)
		return callback(m)
	})
}
