package adaptertest

import (
	"testing"

	"stillpoint.io/stillpoint/adapters"
)

// onTrees lets the tests that want a volume of any form have trees, where the harness makes nothing else: the volume's bytes
// are those of a file. Nobody counts what is in a tree, so its size is 0.
func (h *Harness) onTrees() {
	h.Create = func(t testing.TB, size int64) Volume {
		v := wood{h.CreateTree(t)}
		if err := v.Write(woodFile, make([]byte, size), 0); err != nil {
			t.Fatal(err)
		}
		return v
	}
	h.Absent = func(t testing.TB) adapters.VolumeID { return h.AbsentTree(t) }
}

// wood is a tree that looks like a volume of bytes.
type wood struct{ TreeVolume }

const woodFile = "bytes"

func (w wood) WriteAt(p []byte, off int64) (int, error) { return len(p), w.Write(woodFile, p, off) }
func (w wood) Zero(off, length int64) error             { return w.Write(woodFile, make([]byte, length), off) }
func (w wood) Resize(size int64) error                  { return w.Truncate(woodFile, size) }
