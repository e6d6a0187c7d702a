package fiemap_test

import (
	"path/filepath"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/fiemap"
	"stillpoint.io/stillpoint/integration/lab"
)

// BenchmarkSparse asks about a file of 1 TiB with 100,000 extents of 4 KiB, and a clone of it in which every tenth of
// them was written again.
func BenchmarkSparse(b *testing.B) {
	const size, extents = 1 << 40, 100_000
	for _, fstype := range []string{"xfs", "btrfs"} {
		pool, err := lab.Test(b).Pool(b.Context(), "pool-"+fstype, fstype, 4<<30)
		must(b, err)
		base := create(b, filepath.Join(pool.Mount, "base"))
		must(b, base.Truncate(size))
		scattered(b, base, extents, size/extents/block*block, 1)
		target := clone(b, base, filepath.Join(pool.Mount, "target"))
		scattered(b, target, extents/10, size/extents/block*block*10, 2)

		sum := func(want int64, open func() (cbt.Delta, error)) func(*testing.B) {
			return func(b *testing.B) {
				var allocs float64
				for b.Loop() {
					allocs = testing.AllocsPerRun(1, func() {
						d, err := open()
						must(b, err)
						n, err := cbt.Sum(d.Extents)
						must(b, err)
						if n.Extents != want {
							b.Fatalf("%d extents, want %d", n.Extents, want)
						}
					})
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/2/extents, "ns/extent") // AllocsPerRun runs it twice
				b.ReportMetric(allocs/extents, "allocs/extent")
			}
		}
		b.Run(fstype+"/Changed", sum(extents/10, func() (cbt.Delta, error) { return fiemap.Changed(b.Context(), base, target, 0) }))
		b.Run(fstype+"/Allocated", sum(extents, func() (cbt.Delta, error) { return fiemap.Allocated(b.Context(), base, 0) }))
		b.Run(fstype+"/Count", func(b *testing.B) {
			for b.Loop() {
				n, err := fiemap.Count(b.Context(), base)
				must(b, err)
				if n != extents {
					b.Fatalf("count is %d", n)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/extents, "ns/extent")
		})
	}
}
