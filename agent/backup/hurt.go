package backup

import (
	"context"
	"fmt"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// Hurt is what is wrong with a backup.
type Hurt struct {
	Part   Part
	Offset int64 // of the volume, in bytes
	Length int64 // bytes of the volume that cannot be restored
	Why    string

	data    int64 // of Length, how many are data in a chunk
	chunk   repository.Chunk
	segment int
	path    string               // in a tree
	entry   repository.TreeEntry // what is hurt there
}

// Part says which part of a backup is hurt.
type Part string

const (
	ChunkPart       Part = "chunk"
	SegmentPart     Part = "segment" // the index of a segment
	TopPart         Part = "index"   // the top level
	DescriptionPart Part = "description"
	ZerosPart       Part = "zeros" // what stands for zeros: only kopia reads it
)

// String is a sentence with the offset.
func (h Hurt) String() string {
	switch h.Part {
	case DescriptionPart:
		return "its description: " + h.Why
	case ZerosPart:
		return "what stands for zeros, which a restore by kopia needs: " + h.Why
	case FilePart, DirectoryPart:
		return fmt.Sprintf("%d bytes of the %s %s", h.Length, h.Part, h.Why)
	case ChunkPart:
		return fmt.Sprintf("%d bytes at %d: %s", h.Length, h.Offset, h.Why)
	}
	return fmt.Sprintf("%d bytes at %d, by their %s: %s", h.Length, h.Offset, h.Part, h.Why)
}

// hurts finds where in an image the bad contents are that are known by now.
func (c *checker) hurts(ctx context.Context, image *repository.Image) ([]Hurt, error) {
	if len(c.broken)+len(c.bad) == 0 {
		return nil, nil
	}
	var hurts, others []Hurt
	zeros := map[string]bool{}
	size := c.m.Repository().ChunkSize()
	for n := range image.Segments() {
		s, zero := image.Segment(n)
		start := int64(n) * repository.SegmentSize
		if why, ok := c.broken[s]; ok && !zero {
			hurts = append(hurts, Hurt{Part: SegmentPart, Offset: start, Length: s.Length, Why: why, segment: n})
			continue
		} else if ok && !zeros[why] {
			zeros[why] = true
			others = append(others, Hurt{Part: ZerosPart, Offset: start, Why: why, segment: n})
		}
		if len(c.bad) == 0 {
			continue
		}
		chunks, err := image.Chunks(ctx, n)
		if err != nil {
			return nil, err
		}
		for i, k := range chunks {
			why, ok := c.bad[k]
			if !ok {
				continue
			}
			off := int64(i) * size
			length := min(size, s.Length-off)
			if k != c.m.Repository().ZeroChunk(length) {
				hurts = append(hurts, Hurt{Part: ChunkPart, Offset: start + off, Length: length, Why: why, data: length, chunk: k, segment: n})
			} else if !zeros[why] {
				zeros[why] = true
				others = append(others, Hurt{Part: ZerosPart, Offset: start + off, Why: why, chunk: k, segment: n})
			}
		}
	}
	return append(hurts, others...), nil
}

// known finds what hurts a backup of what is known to be bad, without reading its chunks.
func (c *checker) known(ctx context.Context, b repository.Backup) ([]Hurt, error) {
	if b.Form == adapters.TreeForm {
		t, err := c.m.OpenTree(ctx, b)
		if fault.KindOf(err) == fault.Corrupt {
			return []Hurt{{Part: TopPart, Length: b.Size, Why: err.Error()}}, nil
		} else if err != nil {
			return nil, err
		}
		return c.treeHurts(ctx, t)
	}
	image, err := c.m.OpenImage(ctx, b)
	if fault.KindOf(err) == fault.Corrupt {
		return []Hurt{{Part: TopPart, Length: b.Size, Why: err.Error()}}, nil
	} else if err != nil {
		return nil, err
	}
	defer image.Close()
	for n := range image.Segments() { // whatever was not looked at yet
		s, _ := image.Segment(n)
		if _, ok := c.segments[s]; ok {
			continue
		}
		if _, err := image.Chunks(ctx, n); fault.KindOf(err) == fault.Corrupt {
			c.breaks(s, err)
		} else if err != nil {
			return nil, err
		}
	}
	return c.hurts(ctx, image)
}
