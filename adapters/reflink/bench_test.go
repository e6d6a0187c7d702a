package reflink

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/integration/lab"
)

// BenchmarkFrozen measures CreateSnapshot, the part of a snapshot that runs while the volume's filesystem is frozen, by
// the number of the volume's extents, with and without Stage; 100 blocks are written between Stage and CreateSnapshot.
func BenchmarkFrozen(b *testing.B) {
	for _, fstype := range []string{"xfs", "btrfs"} {
		for _, extents := range []int{1000, 10_000, 100_000} {
			for _, staged := range []bool{false, true} {
				b.Run(fmt.Sprintf("%s/extents=%d/staged=%v", fstype, extents, staged), func(b *testing.B) {
					l := lab.Test(b)
					fs, err := l.Pool(b.Context(), "pool", fstype, 4<<30)
					must(b, err)
					a := newAdapter(b)
					at := filepath.Join(fs.Mount, "v")
					scatter(b, at, extents)
					v, err := a.Volume(b.Context(), typed(at))
					must(b, err)
					block := make([]byte, 4096)
					for n := 0; b.Loop(); n++ {
						b.StopTimer()
						f, err := os.OpenFile(at, os.O_RDWR, 0)
						must(b, err)
						if staged {
							must(b, a.Stage(b.Context(), v.ID, "s"))
						}
						for i := range 100 {
							block[0] = byte(n)
							_, err := f.WriteAt(block, int64(i*(extents/100))*8192)
							must(b, err)
						}
						must(b, f.Sync()) // as the cut's pre-sync does
						must(b, f.Close())
						b.StartTimer()
						s, err := a.CreateSnapshot(b.Context(), v.ID, "s")
						b.StopTimer()
						must(b, err)
						must(b, a.DeleteSnapshot(b.Context(), s.ID))
						b.StartTimer()
					}
				})
			}
		}
	}
}

// BenchmarkStall measures how long a writer of the volume waits at most while the volume is staged, beside a clone in
// one piece.
func BenchmarkStall(b *testing.B) {
	const extents = 100_000
	for _, piecewise := range []bool{false, true} {
		b.Run(fmt.Sprintf("xfs/extents=%d/piecewise=%v", extents, piecewise), func(b *testing.B) {
			l := lab.Test(b)
			fs, err := l.Pool(b.Context(), "pool", "xfs", 4<<30)
			must(b, err)
			a := newAdapter(b)
			at := filepath.Join(fs.Mount, "v")
			scatter(b, at, extents)
			v, err := a.Volume(b.Context(), typed(at))
			must(b, err)
			var worst time.Duration
			for b.Loop() {
				ctx, stop := context.WithCancel(b.Context())
				waited := make(chan time.Duration)
				go func() { waited <- longestWrite(ctx, at) }()
				if piecewise {
					must(b, a.Stage(b.Context(), v.ID, "s"))
					must(b, a.Unstage(b.Context(), v.ID, "s"))
				} else {
					s, err := a.CreateSnapshot(b.Context(), v.ID, "s")
					must(b, err)
					must(b, a.DeleteSnapshot(b.Context(), s.ID))
				}
				stop()
				worst = max(worst, <-waited)
			}
			b.ReportMetric(float64(worst.Microseconds())/1000, "ms-stalled")
		})
	}
}

func longestWrite(ctx context.Context, at string) (worst time.Duration) {
	f, err := os.OpenFile(at, os.O_RDWR, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	for ctx.Err() == nil {
		start := time.Now()
		f.WriteAt([]byte("w"), 4096)
		worst = max(worst, time.Since(start))
		time.Sleep(time.Millisecond)
	}
	return worst
}

// BenchmarkRead measures reads of an image past the page cache.
func BenchmarkRead(b *testing.B) {
	l := lab.Test(b)
	fs, err := l.Pool(b.Context(), "pool", "xfs", 1<<30)
	must(b, err)
	x := fixture{Adapter: newAdapter(b), fs: fs, lab: l}
	_, id := x.volume(b, "v", 256<<20)
	s, err := x.CreateSnapshot(b.Context(), id, "s")
	must(b, err)
	must(b, x.Publish(b.Context(), s.ID, adapters.Notes{}))
	i, err := x.Open(b.Context(), s.ID)
	must(b, err)
	defer i.Close()
	p := aligned(1 << 20)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	for n := int64(0); b.Loop(); n++ {
		_, err := i.ReadAt(b.Context(), p, n%256<<20)
		must(b, err)
	}
}
