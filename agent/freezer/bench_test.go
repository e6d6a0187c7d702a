package freezer

import (
	"slices"
	"testing"
	"time"
)

// BenchmarkFreezeThaw measures an empty lease over one idle ext4: the whole call, and how long it was frozen.
func BenchmarkFreezeThaw(b *testing.B) {
	r := newRig(b)
	fs := r.volume("v", "ext4")
	c, q := r.connect(), r.request(10*time.Second, fs)
	var frozen []time.Duration
	for b.Loop() {
		l := r.freeze(c, q)
		rep, err := l.Thaw(b.Context())
		if err != nil || !rep.Held() {
			b.Fatal(rep, err)
		}
		frozen = append(frozen, rep[0].Duration)
		r.rested()
	}
	slices.Sort(frozen)
	b.ReportMetric(float64(frozen[len(frozen)/2].Microseconds()), "µs-frozen-p50")
	b.ReportMetric(float64(frozen[len(frozen)*99/100].Microseconds()), "µs-frozen-p99")
}
