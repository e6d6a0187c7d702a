package lvmthin

import (
	"fmt"
	"os/exec"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
)

// BenchmarkSnapshot takes a snapshot through the adapter and one with plain lvcreate -s, in turns, and reports their
// ratio. With more than one volume, those of one group at once, against as many lvcreates side by side.
func BenchmarkSnapshot(b *testing.B) {
	guest(b)
	for _, n := range []int{1, 4} {
		b.Run(fmt.Sprintf("volumes=%d", n), func(b *testing.B) {
			a := newAdapter(b)
			var volumes []live
			var ids []adapters.VolumeID
			for range n {
				v := borrowLive(b, vgOne, 1<<20)
				volumes, ids = append(volumes, v), append(ids, v.ID())
			}
			var ours, plain time.Duration
			for i := 0; b.Loop(); i++ {
				_, err := a.Gate(b.Context(), ids) // a cut does that before it freezes
				must(b, err)
				ours += together(b, volumes, func(v live) error {
					_, err := a.CreateSnapshot(b.Context(), v.ID(), "bench")
					return err
				})
				plain += together(b, volumes, func(v live) error {
					out, err := exec.Command("lvcreate", "-q", "-s", "-n", v.name+"-plain", v.path()).CombinedOutput()
					if err != nil {
						err = fmt.Errorf("%w: %s", err, out)
					}
					return err
				})
				for _, v := range volumes {
					must(b, a.DeleteSnapshot(b.Context(), adapters.SnapshotID{Volume: v.ID(), Name: "bench"}))
					run(b, "lvremove", "-q", "-f", "-y", v.path()+"-plain")
				}
			}
			b.ReportMetric(float64(ours.Milliseconds())/float64(b.N), "adapter-ms")
			b.ReportMetric(float64(plain.Milliseconds())/float64(b.N), "lvcreate-ms")
			b.ReportMetric(float64(ours)/float64(plain), "ratio")
		})
	}
}

// together does something to all volumes at once, and returns how long all of it took.
func together(b *testing.B, volumes []live, do func(live) error) time.Duration {
	b.Helper()
	start := time.Now()
	errs := make(chan error, len(volumes))
	for _, v := range volumes {
		go func() { errs <- do(v) }()
	}
	for range volumes {
		must(b, <-errs)
	}
	return time.Since(start)
}
