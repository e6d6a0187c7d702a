package reflink

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt/fiemap"
	"stillpoint.io/stillpoint/fault"
)

// draft is a clone that has no name yet. The kernel removes it when it is closed, also by the death of the process.
type draft struct {
	folder, file *os.File
	of           *os.File        // the volume, when staged: by O_PATH, which pins the file's number and does not count as a use of it
	size         int64           // of the clone, bytes
	block        int64           // of the filesystem, bytes
	moves        bool            // the filesystem may move the blocks of a file that nobody writes to
	extents      []fiemap.Record // where its blocks were when it was last made equal to the volume
}

// pieceExtents is how many extents Stage clones at once, in some ten milliseconds: a clone locks the volume.
const pieceExtents = 1000

// newDraft makes an empty draft that can be a clone of source, in a folder, which belongs to the draft then; on an error
// the folder is closed.
func newDraft(folder, source *os.File) (*draft, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(folder.Fd()), &fs); err != nil {
		folder.Close()
		return nil, err
	}
	fd, err := unix.Openat(int(folder.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o400)
	if err != nil {
		folder.Close()
		return nil, err
	}
	d := &draft{
		folder: folder,
		file:   os.NewFile(uintptr(fd), folder.Name()+"/draft"),
		block:  fs.Bsize,
		moves:  fs.Type == unix.BTRFS_SUPER_MAGIC,
	}
	if err := likeSource(d.file, source); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// close lets go of a draft; nothing for nil and for one that is closed.
func (d *draft) close() {
	if d == nil {
		return
	}
	d.file.Close()
	d.folder.Close()
	d.of.Close() // nil is fine
}

// clone makes the draft a clone of the volume at one instant.
func (d *draft) clone(source *os.File) error {
	st, err := stat(source)
	if err != nil {
		return err
	}
	d.size = st.Size
	return d.cloneRange(source, 0, d.size)
}

// cloneAhead clones the volume piece by piece: not one instant, but never in its writers' way for long.
func (d *draft) cloneAhead(ctx context.Context, source *os.File) error {
	st, err := stat(source)
	if err != nil {
		return err
	}
	d.size = st.Size
	extents, err := collect(ctx, 0, source)
	if err != nil {
		return err
	}
	at := int64(0)
	for i := pieceExtents; at < d.size; i += pieceExtents {
		end := d.size
		if i < len(extents) {
			end = min(end, extents[i].Logical/d.block*d.block)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := d.cloneRange(source, at, end-at); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// cloneRange is the function of that name, with a better word for a volume that became smaller meanwhile.
func (d *draft) cloneRange(source *os.File, offset, length int64) error {
	err := cloneRange(d.file, source, offset, length)
	if err != nil {
		if st, e := stat(source); e == nil && st.Size < d.size {
			return fault.Errorf(fault.Unavailable, "it was cut from %d to %d bytes meanwhile; try again", d.size, st.Size)
		}
	}
	return err
}

// list remembers where the draft's blocks are, for the next refresh.
func (d *draft) list(ctx context.Context) (err error) {
	d.extents, err = collect(ctx, len(d.extents), d.file)
	return err
}

// refresh makes the draft equal to the volume again, by cloning the ranges whose blocks are not the same. If the volume
// is left alone during the call, the result is the volume at that instant.
//
// What proves equality is that a block has one content as long as the draft holds it. On XFS the draft's blocks stay
// where they are, so the listing made while staging is good. btrfs may move them (a balance) and give their addresses to
// others: there the draft is listed once more after the volume, and a block counts as the same only if it had the
// volume's address both before and after.
func (d *draft) refresh(ctx context.Context, source *os.File) error {
	st, err := stat(source)
	if err != nil {
		return err
	}
	if st.Size != d.size {
		if (st.Size|d.size)%d.block != 0 {
			// The last block has bytes behind the end, which a change of size would turn into a write.
			if err := d.file.Truncate(0); err != nil {
				return errno(err)
			}
			return d.clone(source)
		}
		if err := d.file.Truncate(st.Size); err != nil {
			return errno(err)
		}
		d.size = st.Size
	}
	live, err := collect(ctx, len(d.extents), source)
	if err != nil {
		return err
	}
	listings := [][]fiemap.Record{live, d.extents}
	if d.moves {
		after, err := collect(ctx, len(d.extents), d.file)
		if err != nil {
			return err
		}
		listings = append(listings, after)
	}
	for _, s := range differing(d.size, d.block, listings...) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := d.cloneRange(source, s.from, s.to-s.from); err != nil {
			return err
		}
	}
	return nil
}

// collect lists a file's extents, of which there are about n.
func collect(ctx context.Context, n int, f *os.File) ([]fiemap.Record, error) {
	records := make([]fiemap.Record, 0, n+n/8)
	for r, err := range fiemap.Extents(ctx, f, 0) {
		if err != nil {
			return nil, err
		}
		records = append(records, r)
	}
	return records, nil
}

// span is the bytes [from, to).
type span struct{ from, to int64 }

// differing returns the ranges of a file of size bytes in which its listings do not prove it equal, rounded outward to
// blocks and merged. Listings are ascending; what they do not mention is a hole.
func differing(size, block int64, listings ...[]fiemap.Record) []span {
	var spans []span
	for at := int64(0); at < size; {
		var first run
		end, equal := size, true
		for i, rest := range listings {
			r, rest := nextRun(rest, at, size)
			if i == 0 {
				first = r
			}
			listings[i], end, equal = rest, min(end, r.end), equal && r.equals(first)
		}
		if !equal {
			s := span{at / block * block, min(size, (end+block-1)/block*block)}
			if n := len(spans); n > 0 && spans[n-1].to >= s.from {
				spans[n-1].to = s.to
			} else {
				spans = append(spans, s)
			}
		}
		at = end
	}
	return spans
}

// run is what a listing says about the bytes up to end: zeros, or blocks at an address that is shift more than the
// offset, or nothing that proves anything.
type run struct {
	end   int64
	zero  bool
	plain bool
	shift uint64
}

func (r run) equals(o run) bool {
	return r.zero && o.zero || r.plain && o.plain && r.shift == o.shift
}

// nextRun returns what a listing says about at, and the rest of the listing that is still needed behind it.
func nextRun(records []fiemap.Record, at, size int64) (run, []fiemap.Record) {
	for len(records) > 0 && records[0].End() <= at {
		records = records[1:]
	}
	if len(records) == 0 || records[0].Logical >= size {
		return run{end: size, zero: true}, records
	}
	r := records[0]
	if r.Logical > at {
		return run{end: r.Logical, zero: true}, records
	}
	return run{
		end:   min(r.End(), size),
		zero:  r.Flags.Zero(),
		plain: r.Flags.Plain(),
		shift: r.Physical - uint64(r.Logical),
	}, records
}
