package mem_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/mem"
)

// live is a volume for the suite.
type live struct{ *mem.Volume }

func (v live) ID() adapters.VolumeID { return adapters.VolumeID{Backend: "mem", ID: v.Volume.ID()} }

func harness(store *mem.Store) adaptertest.Harness {
	var n atomic.Int64
	make := func(t testing.TB, id string, size int64) adaptertest.Volume {
		v, err := store.Create(id, size)
		if err != nil {
			t.Fatal(err)
		}
		return live{v}
	}
	return adaptertest.Harness{
		Backend:   "mem",
		Step:      1,
		Open:      func(testing.TB) adapters.Adapter { return store.Adapter("mem") },
		Provision: func(testing.TB) adapters.Adapter { return store.Adapter("mem") },
		Create: func(t testing.TB, size int64) adaptertest.Volume {
			return make(t, fmt.Sprintf("volume@%d", n.Add(1)), size)
		},
		Absent: func(testing.TB) adapters.VolumeID {
			return adapters.VolumeID{Backend: "mem", ID: fmt.Sprintf("local/absent-%d", n.Add(1))}
		},
		Twin: func(t testing.TB, v adaptertest.Volume, size int64) adaptertest.Volume {
			return make(t, "far"+v.ID().ID[len(mem.Local):], size)
		},
		Unreachable: func(testing.TB) adapters.VolumeID { return adapters.VolumeID{Backend: "mem", ID: "nowhere/x"} },
		Foreign:     func(_ testing.TB, v adaptertest.Volume, name string) { store.Foreign(v.(live).Volume, name) },
		Use:         func(_ testing.TB, v adaptertest.Volume) func() { return v.(live).Use() },
		Staged:      func(testing.TB, adaptertest.Volume) int { return store.Staged() },
		Wrong:       []string{"", "/x", "x/", "a\nb"},
	}
}

func TestConformance(t *testing.T) { adaptertest.Run(t, harness(new(mem.Store))) }

func TestConformancePending(t *testing.T) {
	adaptertest.Run(t, harness(&mem.Store{Pending: 5 * time.Millisecond}))
}
