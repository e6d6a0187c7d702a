package thinmeta_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/cbt/thinmeta/thinmetatest"
	"stillpoint.io/stillpoint/fault"
)

// victim is a small image with everything in it: shared subtrees, three levels, a metadata snapshot. Devices 1 and 2.
func victim(t testing.TB) []byte {
	t.Helper()
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 1000, MetadataBlocks: 120, Capacity: thinmetatest.MinCapacity})
	p.Create(1)
	p.Fill(1, 10, 100, 5)
	p.Snapshot(2, 1)
	p.Reserve()
	for b := uint64(20); b < 60; b += 7 {
		p.Write(1, b)
		p.Discard(2, b+2)
	}
	p.Write(1, 1)
	image, err := p.Image()
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// everything reads all there is to read in an image. It returns what it found, up to the first error.
func everything(ctx context.Context, source *memory) (found []cbt.Extent, err error) {
	live, err := thinmeta.Open(ctx, source)
	if err != nil {
		return nil, err
	}
	all := []*thinmeta.Metadata{live}
	if at := live.Superblock().Snapshot; at != 0 {
		held, err := thinmeta.OpenSnapshot(ctx, source, at)
		if err != nil {
			return nil, err
		}
		all = append(all, held)
	}
	const size = 200 * 64 << 10
	for _, m := range all {
		for d, err := range m.Devices(ctx) {
			if err != nil {
				return found, err
			}
			found = append(found, cbt.Extent{Offset: int64(d.ID), Length: int64(d.Mapped)})
		}
		for id := thinmeta.DeviceID(1); id <= 2; id++ {
			end, err := m.End(ctx, id)
			if err != nil {
				return found, err
			}
			found = append(found, cbt.Extent{Offset: end})
			for x, err := range m.Mappings(ctx, id) {
				if err != nil {
					return found, err
				}
				found = append(found, cbt.Extent{Offset: int64(x.Block), Length: int64(x.Data)})
			}
			a, err := m.Allocated(ctx, thinmeta.Volume{ID: id, Size: size}, 0)
			if err != nil {
				return found, err
			}
			b, err := m.Changed(ctx, thinmeta.Volume{ID: id, Size: size}, thinmeta.Volume{ID: 3 - id, Size: size + 1}, 100)
			if err != nil {
				return found, err
			}
			for _, s := range []cbt.Seq{cbt.Check(a.Extents, 0, size), cbt.Check(b.Extents, 100, size+1)} {
				for e, err := range s {
					if err != nil {
						return found, err
					}
					found = append(found, e)
				}
			}
		}
	}
	return found, nil
}

// endure reads a damaged image and fails the test if that is not bounded, or ends in an error of another kind than
// damage has.
func endure(t *testing.T, image []byte) ([]cbt.Extent, error) {
	t.Helper()
	source := &memory{image: image}
	found, err := everything(t.Context(), source)
	if err != nil && !errors.Is(err, fault.Corrupt) && !errors.Is(err, fault.NotFound) && !errors.Is(err, fault.Unsupported) {
		t.Fatalf("damage ends in %v: %v", fault.KindOf(err), err)
	}
	// Each of 14 streams reads a node of each of its trees once, and finds no more than 252 entries in it.
	if blocks := len(image) / 4096; source.blocks > 14*2*(blocks+64) || len(found) > 14*252*(blocks+64) {
		t.Fatalf("reading %d blocks of damaged metadata took %d reads and found %d things", blocks, source.blocks, len(found))
	}
	return found, err
}

// TestDamage changes bytes at random. Damage that checksums show is never taken for content; where they are made right
// again, reading ends all the same.
func TestDamage(t *testing.T) {
	image := victim(t)
	want, err := everything(t.Context(), &memory{image: image})
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(3, 3))
	kinds := map[bool]int{}
	for range 2500 {
		damaged := slices.Clone(image)
		sealed := r.IntN(4) > 0
		for range 1 + r.IntN(3) {
			block := r.IntN(len(image) / 4096)
			mutate(r, damaged[block*4096:][:4096], image)
			if sealed {
				reseal(damaged, block)
			}
		}
		if r.IntN(20) == 0 {
			damaged = damaged[:r.IntN(len(damaged))]
		}
		found, err := endure(t, damaged)
		if !sealed && err == nil && !slices.Equal(found, want) {
			t.Fatal("damage was taken for content")
		}
		if !sealed && err != nil && !errors.Is(err, fault.Corrupt) {
			t.Fatal(err)
		}
		kinds[err == nil]++
	}
	if kinds[false] < 250 || kinds[true] < 250 {
		t.Errorf("read and refused: %v: the mutations are not worth much", kinds)
	}
}

// mutate changes a block a little.
func mutate(r *rand.Rand, page, image []byte) {
	le := binary.LittleEndian
	word := func() []byte { // of the superblock's, a header's, one of the first keys or values of a small node
		at := []int{0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 200, 320, 328, 336, 1040, 1048, 2048, 2056}
		return page[at[r.IntN(len(at))]:]
	}
	switch r.IntN(6) {
	case 0:
		page[r.IntN(len(page))] ^= 1 << r.IntN(8)
	case 1:
		le.PutUint64(word(), r.Uint64N(uint64(len(image)/4096)+2)) // another block, another key
	case 2:
		le.PutUint64(word(), r.Uint64())
	case 3:
		w := word()
		le.PutUint64(w, le.Uint64(w)+1)
	case 4:
		from := r.IntN(len(image) / 4096)
		copy(page[16:], image[from*4096+16:][:4080]) // another block's content
	case 5:
		a, b := word(), word()
		copy(a[:8], b[:8])
	}
}

// reseal makes a block's checksum right, and its number if it is a node.
func reseal(image []byte, block int) {
	page := image[block*4096:][:4096]
	if block == 0 || binary.LittleEndian.Uint64(page[32:]) == 27022010 {
		thinmetatest.SealSuperblock(page)
		return
	}
	thinmetatest.SealNode(page)
}

// TestHostile forges metadata with good checksums.
func TestHostile(t *testing.T) {
	le := binary.LittleEndian
	image := victim(t)
	super := image[:4096]
	page := func(image []byte, block uint64) []byte { return image[block*4096:][:4096] }
	// The trees' nodes by level, from the tree of device 1. In a node of MinCapacity values begin at 80.
	devices := le.Uint64(super[320:])
	top := le.Uint64(page(image, devices)[32+8*252:])
	middle := le.Uint64(page(image, top)[80:])
	leaf := le.Uint64(page(image, middle)[80:])
	for _, c := range []struct {
		name  string
		block uint64
		forge func(p []byte)
		want  string // in the error
	}{
		{"a circle to itself", top, func(p []byte) { le.PutUint64(p[80:], top) }, "above"},
		{"a circle over two", middle, func(p []byte) { le.PutUint64(p[80:], top) }, "above"},
		{"a circle that keys allow", top, func(p []byte) { le.PutUint32(p[16:], 1); le.PutUint64(p[80:], top) }, "deeper than"},
		{"a circle further on", middle, func(p []byte) { le.PutUint64(p[88:], top) }, "depth"},
		{"one child many times", middle, func(p []byte) {
			for i := 1; i < 6; i++ {
				le.PutUint64(p[80+8*i:], leaf)
				le.PutUint64(p[32+8*i:], le.Uint64(p[32:])+uint64(i))
			}
			le.PutUint32(p[16:], 6)
		}, "where its parent says"},
		{"a leaf too high", top, func(p []byte) { le.PutUint64(p[88:], leaf) }, "depth"},
		{"keys out of order", leaf, func(p []byte) { le.PutUint64(p[40:], 0) }, "follows the key"},
		{"keys twice", leaf, func(p []byte) { copy(p[40:48], p[32:40]) }, "follows the key"},
		{"keys before the parent's", leaf, func(p []byte) { le.PutUint64(p[32:], 0) }, "below"},
		{"keys behind the parent's", leaf, func(p []byte) { n := le.Uint32(p[16:]); le.PutUint64(p[32+8*(n-1):], 1<<50) }, "above"},
		{"a child outside", middle, func(p []byte) { le.PutUint64(p[80:], 1<<60) }, "metadata block 1152921504606846976"},
		{"data outside", leaf, func(p []byte) { le.PutUint64(p[80:], 1000<<24) }, "to block 1000 of the data device"},
		{"too many entries", leaf, func(p []byte) { le.PutUint32(p[16:], 7) }, "claims"},
		{"too large a node", leaf, func(p []byte) { le.PutUint32(p[20:], 1<<31) }, "claims"},
		{"values of another size", leaf, func(p []byte) { le.PutUint32(p[24:], 24) }, "values"},
		{"empty", leaf, func(p []byte) { le.PutUint32(p[16:], 0) }, "empty"},
		{"neither leaf nor not", leaf, func(p []byte) { le.PutUint32(p[4:], 3) }, "not a btree node"},
		{"another block's number", leaf, func(p []byte) { le.PutUint64(p[8:], leaf+1) }, "says that it is block"},
		{"a root outside", devices, func(p []byte) { le.PutUint64(p[32+8*252:], 120) }, "metadata block 120"},
		{"the superblock as a node", devices, func(p []byte) { le.PutUint64(p[32+8*252:], 0) }, "metadata block 0"},
		{"no block size", 0, func(p []byte) { le.PutUint32(p[336:], 0) }, "block size"},
		{"an odd block size", 0, func(p []byte) { le.PutUint32(p[336:], 129) }, "block size"},
		{"metadata blocks of 8 KiB", 0, func(p []byte) { le.PutUint32(p[340:], 16) }, "block size"},
		{"more used than there is", 0, func(p []byte) { le.PutUint64(p[72:], 1001) }, "used"},
		{"another magic number", 0, func(p []byte) { p[32]++ }, "magic"},
		{"another place", 0, func(p []byte) { p[8]++ }, "lies at"},
	} {
		forged := slices.Clone(image)
		p := page(forged, c.block)
		c.forge(p)
		if c.block == 0 {
			thinmetatest.SealSuperblock(p)
		} else {
			thinmetatest.SealNode(p)
		}
		_, err := endure(t, forged)
		if !errors.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "metadata block ") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	for name, forge := range map[string]func(p []byte){
		"a later version": func(p []byte) { p[40] = 3 },
		"a new feature":   func(p []byte) { p[360] = 1 },
	} {
		forged := slices.Clone(image)
		forge(forged)
		thinmetatest.SealSuperblock(forged[:4096])
		if _, err := endure(t, forged); !errors.Is(err, fault.Unsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzMetadata applies patches to an image, each a block, an offset of a 64-bit word in it, and a value, and makes the
// checksums right again. Whatever comes out, reading it ends, and in no other error than damage has.
func FuzzMetadata(f *testing.F) {
	image := victim(f)
	r := rand.New(rand.NewPCG(4, 4))
	f.Add([]byte{})
	for range 50 {
		var patch []byte
		for range 1 + r.IntN(3) {
			patch = append(patch, byte(r.IntN(len(image)/4096)))
			patch = binary.LittleEndian.AppendUint16(patch, uint16(r.IntN(60)))
			patch = binary.LittleEndian.AppendUint64(patch, r.Uint64N(300))
		}
		f.Add(patch)
	}
	f.Fuzz(func(t *testing.T, patches []byte) {
		forged := slices.Clone(image)
		for patch := range slices.Chunk(patches[:min(len(patches), 110)], 11) {
			if len(patch) < 11 {
				break
			}
			block, word := int(patch[0])%(len(image)/4096), int(binary.LittleEndian.Uint16(patch[1:]))%512
			copy(forged[block*4096+8*word:][:8], patch[3:])
			reseal(forged, block)
		}
		endure(t, forged)
	})
}
