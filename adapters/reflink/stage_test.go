package reflink

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt/fiemap"
	"stillpoint.io/stillpoint/fault"
)

// TestStagedIsTheVolume: whatever happens to the volume between Stage and CreateSnapshot, the snapshot is the volume at
// CreateSnapshot.
func TestStagedIsTheVolume(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at, id := x.volume(t, "v", 4<<20)
		f, err := os.OpenFile(at, os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		for round := range 60 {
			r := rand.New(rand.NewPCG(uint64(round), 4))
			name := fmt.Sprintf("s%d", round)
			for range r.IntN(3) { // staged up to three times, or not at all
				must(t, x.Stage(ctx, id, name))
				for range r.IntN(12) {
					mutate(t, f, r, round%2 == 1)
				}
				if r.IntN(4) == 0 {
					must(t, f.Sync())
				}
			}
			s, err := x.CreateSnapshot(ctx, id, name)
			must(t, err)
			live, err := os.ReadFile(at)
			must(t, err)
			must(t, x.Publish(ctx, s.ID, s.Notes))
			if got := x.read(t, s.ID); !bytes.Equal(got, live) {
				t.Fatalf("round %d: the snapshot is not the volume (%d bytes, volume %d)", round, len(got), len(live))
			}
			if r.IntN(2) == 0 {
				must(t, x.DeleteSnapshot(ctx, s.ID))
			}
		}
		if n := drafts(t, x.fs.Mount); n != 0 {
			t.Errorf("%d drafts are left open", n)
		}
	})
}

// drafts counts the unnamed files of this process in a pool's snapshot folder.
func drafts(t testing.TB, mount string) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	n := 0
	for _, fd := range fds {
		if at, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			if below, ok := under(at, mount+"/"+folderName); ok && below != "" && bytes.HasSuffix([]byte(at), []byte(" (deleted)")) {
				n++
			}
		}
	}
	return n
}

// TestStagedMoves: a balance that moves blocks while a snapshot is staged, and compressed extents, change nothing.
func TestStagedMoves(t *testing.T) {
	x := newFixture(t, "btrfs")
	ctx := t.Context()
	at, id := x.volume(t, "v", 4<<20)
	f, err := os.OpenFile(at, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	r := random(3)
	for round := range 6 {
		name := fmt.Sprint(round)
		must(t, x.Stage(ctx, id, name))
		if round%2 == 0 {
			command(t, "btrfs", "balance", "start", "--full-balance", x.fs.Mount)
		} else {
			_, err := f.WriteAt(make([]byte, 1<<20), int64(round)<<18+100) // compressible
			must(t, err)
			command(t, "btrfs", "filesystem", "defragment", "-f", "-czstd", at)
		}
		for range 8 {
			mutate(t, f, r, false)
		}
		s := x.cut(t, id, name)
		live, err := os.ReadFile(at)
		must(t, err)
		if got := x.read(t, s.ID); !bytes.Equal(got, live) {
			t.Fatalf("round %d: the snapshot is not the volume", round)
		}
	}
}

func TestUnstage(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at, id := x.volume(t, "v", 1<<20)
		for range 2 {
			must(t, x.Stage(ctx, id, "s"))
		}
		if n := drafts(t, x.fs.Mount); n != 1 {
			t.Errorf("%d drafts after two times staging", n)
		}
		for range 2 {
			must(t, x.Unstage(ctx, id, "s"))
		}
		if n := drafts(t, x.fs.Mount); n != 0 {
			t.Errorf("%d drafts after unstaging", n)
		}
		must(t, x.Stage(ctx, id, "s"))
		must(t, os.Rename(at, at+".old"))
		must(t, os.WriteFile(at, []byte("another"), 0o600))
		_, err := x.CreateSnapshot(ctx, id, "s")
		want(t, "the file was replaced", err, fault.Unavailable)
		s, err := x.CreateSnapshot(ctx, id, "s")
		must(t, err)
		if s.Size != 7 {
			t.Errorf("size %d", s.Size)
		}
	})
}

// TestDiffering compares the extents' comparison with one byte after the other.
func TestDiffering(t *testing.T) {
	const block, size = 4, 61
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		x, y, z := randomListing(r, size), randomListing(r, size), randomListing(r, size)
		if seed%3 == 0 {
			y = slices.Clone(x)
			if len(y) > 0 {
				y = slices.Delete(y, 0, 1)
			}
			z = slices.Clone(x)
		}
		wantDiffer := make([]bool, size)
		for at := range int64(size) {
			p := contentAt(x, at)
			if p != contentAt(y, at) || p != contentAt(z, at) || p == "?" {
				for b := at / block * block; b < min(size, at/block*block+block); b++ {
					wantDiffer[b] = true
				}
			}
		}
		got := make([]bool, size)
		last := int64(-1)
		for _, s := range differing(size, block, x, y, z) {
			if s.from <= last || s.to <= s.from || s.to > size {
				t.Fatalf("seed %d: span %v after %d", seed, s, last)
			}
			last = s.to
			for b := s.from; b < s.to; b++ {
				got[b] = true
			}
		}
		if !slices.Equal(got, wantDiffer) {
			t.Fatalf("seed %d:\n%v\n%v\n%v\ngot  %v\nwant %v", seed, x, y, z, got, wantDiffer)
		}
	}
}

func randomListing(r *rand.Rand, size int64) []fiemap.Record {
	var rs []fiemap.Record
	for at := int64(r.IntN(6)); at < size; at += int64(r.IntN(5)) {
		e := fiemap.Record{Logical: at, Length: int64(1 + r.IntN(12)), Physical: uint64(at) + 100*uint64(r.IntN(2))}
		e.Flags = []fiemap.Flags{0, 0, 0, fiemap.Shared, fiemap.Unwritten, fiemap.Encoded}[r.IntN(6)]
		rs = append(rs, e)
		at = e.End()
	}
	return rs
}

// contentAt names what a listing says about a byte: "zeros", an address, or "?".
func contentAt(rs []fiemap.Record, at int64) string {
	for _, e := range rs {
		switch {
		case at < e.Logical || at >= e.End():
		case e.Flags.Zero():
			return "zeros"
		case !e.Flags.Plain():
			return "?"
		default:
			return fmt.Sprint(e.Physical + uint64(at-e.Logical))
		}
	}
	return "zeros"
}

func TestGate(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at, id := x.volume(t, "v", 4096)
		scatter(t, at, 2000)
		f, err := x.Gate(ctx, ids(id, id))
		must(t, err)
		// XFS allocates ahead of the writes, and what it allocated in vain are extents too.
		if low, high := 2*(perSnapshot+2000*perExtent), 2*(perSnapshot+4100*perExtent); f.Frozen < low || f.Frozen > high {
			t.Errorf("two snapshots of 2000 extents: forecast %v, want %v to %v", f.Frozen, low, high)
		}
		must(t, x.Stage(ctx, id, "s"))
		if f, err = x.Gate(ctx, ids(id)); err != nil || f.Frozen > perSnapshot+4100*perStagedExtent {
			t.Errorf("staged: forecast %v, %v", f.Frozen, err)
		}
		_, err = x.Gate(ctx, ids(id, typed(x.uuid(t)+"/missing")))
		want(t, "a volume that is missing", err, fault.NotFound)

		must(t, x.Unstage(ctx, id, "s"))
		must(t, unix.Mount("", x.fs.Mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		_, err = x.Gate(ctx, ids(id))
		want(t, "read-only: gate", err, fault.Unsupported)
		_, err = x.CreateSnapshot(ctx, id, "s")
		want(t, "read-only: create", err, fault.Unsupported)
		want(t, "read-only: stage", x.Stage(ctx, id, "s"), fault.Unsupported)
		must(t, unix.Mount("", x.fs.Mount, "", unix.MS_REMOUNT, ""))

		x.occupy(t, 60<<20)
		_, err = x.Gate(ctx, ids(id))
		want(t, "nearly full", err, fault.Exhausted)
	})
	if leastFree(1<<40) != (1<<40)/100 || leastFree(1) != 64<<20 {
		t.Error("the least free space is not 1 %, at least 64 MiB")
	}
}
