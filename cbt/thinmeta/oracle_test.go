package thinmeta_test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/cbt/thinmeta/thinmetatest"
	"stillpoint.io/stillpoint/fault"
)

// tool runs a program of thin-provisioning-tools and returns what it prints.
func tool(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	c := exec.CommandContext(t.Context(), name, args...)
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %v: %v: %s%s", name, args, err, out, stderr.Bytes())
	}
	return out
}

// histories is how many random histories the oracle tests try.
func histories(t *testing.T, usual int) int {
	if s := os.Getenv("STILLPOINT_HISTORIES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return usual
}

// xmlMapping is a mapping as thin_dump prints it.
type xmlMapping struct {
	XMLName xml.Name
	Begin   uint64 `xml:"origin_begin,attr"`
	Data    uint64 `xml:"data_begin,attr"`
	Length  uint64 `xml:"length,attr"`
	Block   uint64 `xml:"origin_block,attr"`
	Single  uint64 `xml:"data_block,attr"`
	Time    uint32 `xml:"time,attr"`
}

type xmlDump struct {
	Time        uint32 `xml:"time,attr"`
	Transaction uint64 `xml:"transaction,attr"`
	BlockSize   int64  `xml:"data_block_size,attr"`
	Blocks      uint64 `xml:"nr_data_blocks,attr"`
	Devices     []struct {
		ID          thinmeta.DeviceID `xml:"dev_id,attr"`
		Mapped      uint64            `xml:"mapped_blocks,attr"`
		Transaction uint64            `xml:"transaction,attr"`
		Created     uint32            `xml:"creation_time,attr"`
		Snapped     uint32            `xml:"snap_time,attr"`
		Mappings    []xmlMapping      `xml:",any"`
	} `xml:"device"`
}

// compareDump compares all that thin_dump prints of an image with what we read. It returns the devices' numbers.
func compareDump(t *testing.T, path string, m *thinmeta.Metadata, snapshot bool) (ids []thinmeta.DeviceID) {
	t.Helper()
	args := []string{path}
	if snapshot {
		args = []string{"--metadata-snap", path}
	}
	var dump xmlDump
	if err := xml.Unmarshal(tool(t, "thin_dump", args...), &dump); err != nil {
		t.Fatal(err)
	}
	s := m.Superblock()
	if s.Time != dump.Time || s.Transaction != dump.Transaction || s.BlockSize != dump.BlockSize*512 || s.Data.Blocks != dump.Blocks {
		t.Errorf("superblock %+v, thin_dump says %d %d %d %d", s, dump.Time, dump.Transaction, dump.BlockSize, dump.Blocks)
	}
	var devices []thinmeta.Device
	for d, err := range m.Devices(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		devices = append(devices, d)
	}
	if len(devices) != len(dump.Devices) {
		t.Fatalf("devices %v, thin_dump has %d", devices, len(dump.Devices))
	}
	for i, want := range dump.Devices {
		d := devices[i]
		ids = append(ids, d.ID)
		if d != (thinmeta.Device{ID: want.ID, Mapped: want.Mapped, Transaction: want.Transaction, Created: want.Created, Snapshotted: want.Snapped}) {
			t.Errorf("device %+v, thin_dump says %+v", d, want)
		}
		if one, err := m.Device(t.Context(), d.ID); err != nil || one != d {
			t.Errorf("device %d alone: %+v, %v", d.ID, one, err)
		}
		var theirs, ours []thinmeta.Mapping
		for _, x := range want.Mappings {
			if x.XMLName.Local == "single_mapping" {
				x.Begin, x.Data, x.Length = x.Block, x.Single, 1
			}
			theirs = append(theirs, thinmeta.Mapping{Block: x.Begin, Data: x.Data, Length: x.Length, Time: x.Time})
		}
		for x, err := range m.Mappings(t.Context(), d.ID) {
			if err != nil {
				t.Fatal(err)
			}
			ours = append(ours, x)
		}
		if !slices.Equal(ours, theirs) {
			t.Errorf("device %d: mappings %v, thin_dump says %v", d.ID, ours, theirs)
		}
		var mapped int64
		end := int64(0)
		for _, x := range theirs {
			mapped += int64(x.Length) * s.BlockSize
			end = int64(x.Block+x.Length) * s.BlockSize
		}
		if got, err := m.End(t.Context(), d.ID); err != nil || got != end {
			t.Errorf("device %d ends at %d, %v, not at %d", d.ID, got, err, end)
		}
		total, err := cbt.Sum(allocated(t, m, thinmeta.Volume{ID: d.ID, Size: end}, 0))
		if err != nil || total.Data != mapped || total.Zero != 0 {
			t.Errorf("device %d: %+v allocated, %v, not %d", d.ID, total, err, mapped)
		}
	}
	return ids
}

func allocated(t *testing.T, m *thinmeta.Metadata, v thinmeta.Volume, from int64) cbt.Seq {
	t.Helper()
	d, err := m.Allocated(t.Context(), v, from)
	if err != nil {
		t.Fatal(err)
	}
	return cbt.Check(d.Extents, from, v.Size)
}

// thinDelta is what thin_delta finds between two devices, as extents.
func thinDelta(t *testing.T, path string, blockSize int64, base, target thinmeta.DeviceID, snapshot bool) (all []cbt.Extent) {
	t.Helper()
	args := []string{"--snap1", fmt.Sprint(base), "--snap2", fmt.Sprint(target), path}
	if snapshot {
		args = append([]string{"--metadata-snap"}, args...)
	}
	var x struct {
		Diff struct {
			Runs []struct {
				XMLName xml.Name
				Begin   int64 `xml:"begin,attr"`
				Length  int64 `xml:"length,attr"`
			} `xml:",any"`
		} `xml:"diff"`
	}
	if err := xml.Unmarshal(tool(t, "thin_delta", args...), &x); err != nil {
		t.Fatal(err)
	}
	for _, r := range x.Diff.Runs {
		switch r.XMLName.Local {
		case "same":
		case "different", "right_only", "left_only":
			all = append(all, cbt.Extent{Offset: r.Begin * blockSize, Length: r.Length * blockSize, Zero: r.XMLName.Local == "left_only"})
		default:
			t.Fatalf("thin_delta says <%s>", r.XMLName.Local)
		}
	}
	return collect(t, cbt.Coalesce(cbt.Of(all...)))
}

func collect(t testing.TB, s cbt.Seq) (all []cbt.Extent) {
	t.Helper()
	for e, err := range s {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

// compareDeltas compares our deltas with thin_delta's for some pairs of devices, also from an offset on.
func compareDeltas(t *testing.T, r *rand.Rand, path string, m *thinmeta.Metadata, ids []thinmeta.DeviceID, snapshot bool) {
	t.Helper()
	if len(ids) == 0 {
		return
	}
	blockSize := m.Superblock().BlockSize
	for range 3 {
		base, target := ids[r.IntN(len(ids))], ids[r.IntN(len(ids))]
		want := thinDelta(t, path, blockSize, base, target, snapshot)
		const size = 1 << 40
		from := int64(0)
		for range 4 {
			d, err := m.Changed(t.Context(), thinmeta.Volume{ID: base, Size: size}, thinmeta.Volume{ID: target, Size: size}, from)
			if err != nil {
				t.Fatal(err)
			}
			got, expected := collect(t, cbt.Check(d.Extents, from, size)), collect(t, cbt.Clip(cbt.Of(want...), from, size))
			if !slices.Equal(got, expected) {
				t.Fatalf("%s: delta of %d and %d from %d:\n%v\nthin_delta says\n%v", path, base, target, from, got, expected)
			}
			from = r.Int64N(2000 * blockSize)
		}
	}
}

// TestOracle compares all we read with thin_dump and thin_delta, for random histories of writes, discards, snapshots and
// deletions, in pools whose devices share subtrees; thin_check approves of the images. Then, for some, the same after
// thin_restore has made new metadata of the dump, in which nothing is shared.
func TestOracle(t *testing.T) {
	needTools(t)
	for seed := range histories(t, 40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(uint64(seed), 1))
			path := filepath.Join(t.TempDir(), "image")
			image, err := history(r).Image()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, image, 0o600); err != nil {
				t.Fatal(err)
			}
			tool(t, "thin_check", path)
			m := open(t, path)
			ids := compareDump(t, path, m, false)
			compareDeltas(t, r, path, m, ids, false)
			if at := m.Superblock().Snapshot; at != 0 {
				held := openHeld(t, path, at)
				compareDeltas(t, r, path, held, compareDump(t, path, held, true), true)
				if err := held.Held(t.Context()); err != nil {
					t.Error(err)
				}
			}
			if seed%4 != 0 {
				return
			}
			restored := restore(t, path)
			m = open(t, restored)
			compareDump(t, restored, m, false)
			compareDeltas(t, r, restored, m, ids, false)
		})
	}
}

// TestManyDevices compares the same for as many devices as fill one leaf of the details (126) or one of the roots (252), for
// one more, and for one more than fill a node above the leaves of the details: the two trees that lead to the devices
// have one to three levels.
func TestManyDevices(t *testing.T) {
	needTools(t)
	for _, n := range []int{126, 127, 252, 253, 31753} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 1000, Capacity: thinmetatest.MaxCapacity})
			id := func(i int) uint64 { return uint64(10 + 3*i) } // so that there are gaps
			p.Create(id(0))
			p.Write(id(0), 7)
			for i := 1; i < n; i++ {
				p.Snapshot(id(i), id(0))
			}
			for _, i := range []int{1, n / 2, n - 1} {
				p.Write(id(i), uint64(i))
			}
			path := filepath.Join(t.TempDir(), "image")
			image, err := p.Image()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, image, 0o600); err != nil {
				t.Fatal(err)
			}
			tool(t, "thin_check", path)
			paths := []string{path}
			if n < 1000 { // thin_restore gives every device a tree of its own
				paths = append(paths, restore(t, path))
			}
			for _, path := range paths {
				m := open(t, path)
				if ids := compareDump(t, path, m, false); len(ids) != n {
					t.Errorf("%d devices of %d", len(ids), n)
				}
				for _, pair := range [][2]int{{0, n - 1}, {1, n / 2}, {n - 1, n - 2}} {
					base, target := thinmeta.DeviceID(id(pair[0])), thinmeta.DeviceID(id(pair[1]))
					const size = 1 << 40
					d, err := m.Changed(t.Context(), thinmeta.Volume{ID: base, Size: size}, thinmeta.Volume{ID: target, Size: size}, 0)
					if err != nil {
						t.Fatal(err)
					}
					if got, want := collect(t, d.Extents), thinDelta(t, path, 64<<10, base, target, false); !slices.Equal(got, want) {
						t.Errorf("delta of %d and %d: %v, thin_delta says %v", base, target, got, want)
					}
				}
				for _, absent := range []uint64{0, 9, 11, id(n/2) - 1, id(n-1) + 1, 1<<24 - 1} {
					if _, err := m.Device(t.Context(), thinmeta.DeviceID(absent)); !errors.Is(err, fault.NotFound) {
						t.Errorf("device %d, which there is not: %v", absent, err)
					}
				}
			}
		})
	}
}

// restore makes new metadata of an image's dump.
func restore(t *testing.T, path string) string {
	t.Helper()
	dump, restored := path+".xml", path+".restored"
	if err := os.WriteFile(dump, tool(t, "thin_dump", path), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(restored, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "thin_restore", "-i", dump, "-o", restored)
	return restored
}

// history makes a pool with a random past.
func history(r *rand.Rand) *thinmetatest.Pool {
	capacities := []int{6, 9, 30, thinmetatest.MaxCapacity}
	capacity := capacities[r.IntN(len(capacities))]
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10 * (1 + r.Int64N(4)), DataBlocks: 40000, Capacity: capacity})
	fill := func() int { return capacity - r.IntN(capacity/3+1) }
	blocks := uint64(1 + r.IntN(2000))
	next := uint64(1)
	create := func() {
		p.Create(next)
		if r.IntN(2) == 0 {
			p.Fill(next, r.Uint64N(blocks), 1+r.Uint64N(blocks), fill())
		}
		next++
	}
	create()
	for range r.IntN(40) {
		ids := p.Devices()
		slices.Sort(ids)
		if len(ids) == 0 {
			create()
			continue
		}
		id := ids[r.IntN(len(ids))]
		switch r.IntN(12) {
		case 0:
			create()
		case 1, 2, 3:
			p.Snapshot(next, id)
			next++
		case 4:
			p.Delete(id)
		case 5:
			p.Rebuild(id, fill())
		case 6:
			p.Reclaim()
		case 7:
			p.Reserve()
		case 8, 9:
			start, length := r.Uint64N(blocks), 1+r.Uint64N(blocks)
			for b := range length {
				p.Discard(id, start+b)
			}
		default:
			start, length, step := r.Uint64N(blocks), 1+r.Uint64N(100), 1+r.Uint64N(20)
			for b := range length {
				p.Write(id, start+b*step)
			}
		}
	}
	return p
}
