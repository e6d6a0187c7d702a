package backup

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// VerifyRequest asks whether a backup can be restored.
type VerifyRequest struct {
	Repository *repository.Repository
	ID         string
	Budget     Budget
	Progress   *Progress // may be nil
}

// VerifyReport is what a verification found. Counts are bytes.
type VerifyReport struct {
	Backup        string   `json:"backup"`
	Size          int64    `json:"size"`
	BytesVerified int64    `json:"bytes_verified"` // in chunks that were read, decrypted and compared with their hash
	BytesBad      int64    `json:"bytes_bad"`      // of the volume, that cannot be restored
	Bad           []string `json:"bad,omitempty"`  // what is wrong, by offset; the first hundred
	Seconds       float64  `json:"seconds"`
}

const badMax = 100 // so many of what is wrong are reported in words

// Verify reads every chunk of a backup and checks it, and that its index and its description fit together. A backup
// that cannot be restored bit for bit is a report together with an error of kind Corrupt.
func Verify(ctx context.Context, q VerifyRequest) (VerifyReport, error) {
	started := time.Now()
	b, err := q.Repository.Backup(ctx, q.ID)
	if err != nil {
		return VerifyReport{}, err
	}
	if b.Form == adapters.TreeForm {
		return verifyTree(ctx, q, b)
	}
	v := &verifier{r: q.Repository, progress: q.Progress, report: VerifyReport{Backup: b.Handle.String(), Size: b.Size}}
	if v.progress == nil {
		v.progress = new(Progress)
	}
	if err := v.run(ctx, b, q.Budget); err != nil {
		return VerifyReport{}, fmt.Errorf("verifying %s: %w", b.Handle, err)
	}
	v.report.BytesVerified, v.report.Seconds = v.verified.Load(), time.Since(started).Seconds()
	if v.wrong > 0 {
		return v.report, fault.Errorf(fault.Corrupt, "backup %s is damaged: %s (%d faults, %d bytes cannot be restored); back the volume up again", b.Handle, v.report.Bad[0], v.wrong, v.report.BytesBad)
	}
	return v.report, nil
}

type verifier struct {
	r        *repository.Repository
	image    *repository.Image
	progress *Progress
	verified atomic.Int64
	data     atomic.Int64

	mu     sync.Mutex
	report VerifyReport
	wrong  int
}

// run returns an error only if the verification could not be done.
func (v *verifier) run(ctx context.Context, b repository.Backup, budget Budget) error {
	if err := v.judge(v.r.CheckDescription(ctx, b), 0, 0); err != nil {
		return err
	}
	image, err := v.r.OpenImage(ctx, b)
	if err != nil {
		return v.judge(err, 0, b.Size)
	}
	defer image.Close()
	v.image = image
	v.progress.Total.Store(b.Data)

	g, ctx := errgroup.WithContext(ctx)
	segments := make(chan int)
	g.Go(func() error {
		defer close(segments)
		for n := range image.Segments() {
			if _, zero := image.Segment(n); zero {
				continue
			}
			select {
			case segments <- n:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range budget.workers(v.r.ChunkSize() + readMemory(v.r.ChunkSize())) {
		g.Go(func() error {
			p := make([]byte, v.r.ChunkSize())
			for n := range segments {
				if err := v.segment(ctx, n, p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if v.wrong == 0 && v.data.Load() != b.Data {
		return v.judge(fault.Errorf(fault.Corrupt, "the image has %d bytes of data, its description says %d", v.data.Load(), b.Data), 0, 0)
	}
	return nil
}

// segment reads all chunks of a segment.
func (v *verifier) segment(ctx context.Context, n int, p []byte) error {
	start := int64(n) * repository.SegmentSize
	s, _ := v.image.Segment(n)
	chunks, err := v.image.Chunks(ctx, n)
	if err != nil {
		return v.judge(err, start, s.Length)
	}
	v.data.Add(v.image.DataIn(n, chunks))
	for i, c := range chunks {
		off := int64(i) * int64(len(p))
		length := min(int64(len(p)), s.Length-off)
		if c == v.r.ZeroChunk(length) {
			continue
		}
		if _, err := v.image.ReadAt(ctx, p[:length], start+off); err != nil {
			if err := v.judge(err, start+off, length); err != nil {
				return err
			}
		} else {
			v.verified.Add(length)
		}
		v.progress.Done.Add(length)
	}
	return nil
}

// judge notes a fault of the backup, and returns an error that is not one.
func (v *verifier) judge(err error, off, length int64) error {
	if err == nil || fault.KindOf(err) != fault.Corrupt {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.wrong++
	v.report.BytesBad += length
	if len(v.report.Bad) < badMax {
		v.report.Bad = append(v.report.Bad, fmt.Sprintf("%d bytes at %d: %v", length, off, err))
	}
	return nil
}
