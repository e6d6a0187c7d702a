package repository

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// disk is a volume whose chunks each begin with a number, and go on with zeros or with what does not compress; 0 is a
// chunk of zeros.
type disk struct {
	name   string
	chunks []uint64
	random bool
}

func (d *disk) fill(p []byte, n uint64) {
	clear(p)
	binary.LittleEndian.PutUint64(p, n)
	if d.random && n != 0 { // by a cipher: the race detector looks on at all that a generator of numbers does
		var key [16]byte
		binary.LittleEndian.PutUint64(key[:], n)
		block, err := aes.NewCipher(key[:])
		if err != nil {
			panic(err) // of the key's length
		}
		cipher.NewCTR(block, make([]byte, aes.BlockSize)).XORKeyStream(p[8:], p[8:])
	}
}

// store writes the disk as an image, its segments in whole as one that has no base does.
func (d *disk) store(ctx context.Context, w *Writer, x *Index) error {
	unit, each := w.r.ChunkSize(), int(SegmentSize/w.r.ChunkSize())
	p := make([]byte, unit)
	for part := range slices.Chunk(d.chunks, each) {
		var chunks []Chunk
		for _, n := range part {
			c := w.r.ZeroChunk(unit)
			if n == 0 {
				if _, err := w.WriteZero(ctx, unit); err != nil {
					return err
				}
			} else {
				d.fill(p, n)
				var err error
				if c, _, err = w.Write(ctx, p); err != nil {
					return err
				}
			}
			chunks = append(chunks, c)
		}
		s, err := w.WriteSegment(ctx, chunks, int64(len(part))*unit)
		if err == nil {
			err = x.Add(s)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// backup commits the disk as it is.
func (d *disk) backup(ctx context.Context, r *Repository, id string, at time.Time) (Backup, error) {
	w, err := r.NewWriter(ctx)
	if err != nil {
		return Backup{}, err
	}
	defer w.Close(ctx)
	x := w.NewIndex(int64(len(d.chunks)) * w.r.ChunkSize())
	if err := d.store(ctx, w, x); err != nil {
		return Backup{}, err
	}
	image, err := x.Finish(ctx)
	if err != nil {
		return Backup{}, err
	}
	b := d.describe(r, id, at)
	b.Image = image
	return w.Commit(ctx, b, readsBack(0))
}

func (d *disk) describe(r *Repository, id string, at time.Time) Backup {
	v := adapters.VolumeID{Backend: "mem", ID: "local/" + d.name}
	size := int64(len(d.chunks)) * r.ChunkSize()
	return Backup{
		ID: id, Volume: v, Snapshot: adapters.SnapshotID{Volume: v, Name: id}, Kind: Full, Size: size, ChunkSize: r.ChunkSize(),
		Created: at, Started: at, Finished: at,
	}
}

// checkpoint leaves an unfinished backup of the disk.
func (d *disk) checkpoint(ctx context.Context, r *Repository, id string, at time.Time, base *Backup) error {
	w, err := r.NewWriter(ctx)
	if err != nil {
		return err
	}
	defer w.Close(ctx)
	x := w.NewIndex(int64(len(d.chunks)) * w.r.ChunkSize())
	if err := d.store(ctx, w, x); err != nil {
		return err
	}
	return w.Checkpoint(ctx, d.describe(r, id, at), x.Part(), base)
}

// check reads an image and compares it with the disk.
func (d *disk) check(ctx context.Context, r *Repository, b Backup) error {
	image, err := r.OpenImage(ctx, b)
	if err != nil {
		return err
	}
	defer image.Close()
	p, want := make([]byte, r.ChunkSize()), make([]byte, r.ChunkSize())
	for i, n := range d.chunks {
		if _, err := image.ReadAt(ctx, p, int64(i)*r.ChunkSize()); err != nil {
			return fmt.Errorf("chunk %d: %w", i, err)
		}
		d.fill(want, n)
		if string(p) != string(want) {
			return fmt.Errorf("%s: chunk %d differs", b.ID, i)
		}
	}
	return nil
}

func (d *disk) clone() *disk { return &disk{d.name, slices.Clone(d.chunks), d.random} }

// reached is what kopia says that every snapshot refers to, by its name.
func reached(t *testing.T, r *Repository) map[string]map[content.ID]bool {
	t.Helper()
	all, err := r.loadSnapshots(t.Context(), r.kopia)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]map[content.ID]bool{}
	for _, s := range all {
		set := map[content.ID]bool{}
		found[s.name()] = set
		add := func(id object.ID) {
			ids, err := r.kopia.VerifyObject(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range ids {
				set[c] = true
			}
		}
		add(s.manifest.RootObjectID())
		refs := references{r: r, from: viewOf{r.kopia, r.kopia.ContentReader().(objectReader)}}
		children, err := refs.folder(t.Context(), s.manifest.RootObjectID())
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range children {
			add(e.ObjectID)
		}
	}
	return found
}

// Space is what counting every content of every backup by kopia's own means comes to.
func TestSpace(t *testing.T) {
	t.Parallel()
	r := mustOpen(t, mustInit(t, MinChunkSize), OpenOptions{})
	rng := rand.New(rand.NewPCG(1, 2))
	at := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	one, other := &disk{name: "one", chunks: make([]uint64, 2300)}, &disk{name: "other", chunks: make([]uint64, 1100)}
	var last Backup
	for n := range 12 {
		d := one
		if n%3 == 2 {
			d = other
		}
		for range 40 {
			d.chunks[rng.IntN(len(d.chunks))] = rng.Uint64N(60) // also what another has, and zeros
		}
		d.chunks[n] = uint64(1000 + n)
		var err error
		if last, err = d.backup(t.Context(), r, fmt.Sprint("b", n), at.Add(time.Duration(n)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"b0", "b4", "b5"} {
		if err := r.Forget(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	unfinished := other.clone()
	unfinished.chunks[1050], unfinished.chunks[7] = 5000, 5001
	if err := unfinished.checkpoint(t.Context(), r, "c", at.Add(100*time.Hour), &last); err != nil {
		t.Fatal(err)
	}

	got, err := r.Space(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sets := reached(t, r)
	if len(sets) != 10 {
		t.Fatalf("%d snapshots", len(sets))
	}
	volume := map[string]string{}
	for _, v := range got.Volumes {
		for _, b := range v.Backups {
			volume["backup "+b.Backup.ID] = v.Volume.String()
		}
	}
	unique, shared, stored, alone, want := map[string]int64{}, map[string]int64{}, map[string]int64{}, map[string]int64{}, Space{}
	err = r.kopia.ContentReader().IterateContents(t.Context(), content.IterateOptions{}, func(c content.Info) error {
		var users []string
		volumes := map[string]bool{}
		for name, set := range sets {
			if set[c.ContentID] {
				users = append(users, name)
				volumes[volume[name]] = true
			}
		}
		n := int64(c.PackedLength)
		switch {
		case c.ContentID.Prefix() == "m":
			want.Manifests += n
		case len(users) == 0:
			want.Reclaimable += n
		case volumes[""] && len(volumes) == 1:
			want.Unfinished += n
		default:
			want.Backups += n
		}
		for _, u := range users {
			if len(users) == 1 {
				unique[u] += n
			} else {
				shared[u] += n
			}
		}
		for v := range volumes {
			stored[v] += n
			if len(volumes) == 1 {
				alone[v] += n
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got.Backups != want.Backups || got.Unfinished != want.Unfinished || got.Manifests != want.Manifests || got.Reclaimable != want.Reclaimable {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if want.Backups == 0 || want.Unfinished == 0 || want.Reclaimable == 0 || got.Medium < got.Backups+got.Unfinished+got.Manifests+got.Reclaimable {
		t.Errorf("not all of it was there: %+v", got)
	}
	seen := 0
	for _, v := range got.Volumes {
		name := v.Volume.String()
		if v.Stored != stored[name] || v.Unique != alone[name] || v.Stored == 0 || v.Logical == 0 {
			t.Errorf("%s: %d stored, %d unique; want %d, %d", name, v.Stored, v.Unique, stored[name], alone[name])
		}
		for i, b := range v.Backups {
			user := "backup " + b.Backup.ID
			seen++
			if b.Unique != unique[user] || b.Shared != shared[user] || b.Unique == 0 || b.Shared == 0 {
				t.Errorf("%s: %d unique, %d shared; want %d, %d", user, b.Unique, b.Shared, unique[user], shared[user])
			}
			if i > 0 && b.Backup.Created.After(v.Backups[i-1].Backup.Created) {
				t.Errorf("%s: not newest first", name)
			}
		}
	}
	if seen != 9 || len(got.Volumes) != 2 {
		t.Errorf("%d backups of %d volumes, want 9 of 2", seen, len(got.Volumes))
	}

	// What is said to be unique is what forgetting frees.
	b := got.Volumes[0].Backups[3]
	if err := r.Forget(t.Context(), b.Backup.ID); err != nil {
		t.Fatal(err)
	}
	after, err := r.Space(t.Context())
	if err != nil || after.Reclaimable != got.Reclaimable+b.Unique {
		t.Errorf("%d bytes are reclaimable after forgetting %d unique ones, before %d: %v", after.Reclaimable, b.Unique, got.Reclaimable, err)
	}
}

// A backup that refers to what is not there is named.
func TestSpaceOfADamagedRepository(t *testing.T) {
	t.Parallel()
	r := mustOpen(t, mustInit(t, MinChunkSize), OpenOptions{})
	d := &disk{name: "v", chunks: []uint64{1, 2, 3}}
	b, err := d.backup(t.Context(), r, "hurt", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	from := viewOf{r.kopia, r.kopia.ContentReader().(objectReader)}
	all, err := r.loadSnapshots(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	image, err := r.OpenImage(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	chunks, err := image.Chunks(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, missing := range []content.ID{chunks[1].id, image.segments[0]} {
		_, err := r.refer(t.Context(), without{from, missing}, all, func(int) int { return 0 })
		if fault.KindOf(err) != fault.Corrupt || !strings.Contains(err.Error(), "backup hurt") || !strings.Contains(err.Error(), missing.String()) {
			t.Errorf("without %s: %v", missing, err)
		}
	}
}

// without is a view in which a content is missing.
type without struct {
	viewOf
	missing content.ID
}

func (w without) IterateContents(ctx context.Context, o content.IterateOptions, f content.IterateCallback) error {
	return w.viewOf.IterateContents(ctx, o, func(c content.Info) error {
		if c.ContentID == w.missing {
			return nil
		}
		return f(c)
	})
}

// Sets of members behave like sets.
func TestMemberSets(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	sets := newMemberSets()
	model := map[setID]map[int]bool{0: {}}
	ids := []setID{0}
	for range 3000 {
		a, b := ids[rng.IntN(len(ids))], ids[rng.IntN(len(ids))]
		want := map[int]bool{}
		var got setID
		if rng.IntN(4) == 0 {
			m := []int{0, 1, 63, 64, 65, 700}[rng.IntN(6)] + rng.IntN(3)
			got, want[m] = sets.single(m), true
		} else {
			got = sets.union(a, b)
			for _, id := range []setID{a, b} {
				for m := range model[id] {
					want[m] = true
				}
			}
		}
		members := slices.Collect(sets.members(got))
		if len(members) != len(want) || !slices.IsSorted(members) {
			t.Fatalf("members %v, want %v", members, want)
		}
		for _, m := range members {
			if !want[m] {
				t.Fatalf("members %v, want %v", members, want)
			}
		}
		for id, set := range model {
			same := len(set) == len(want)
			for m := range set {
				same = same && want[m]
			}
			if same != (id == got) {
				t.Fatalf("sets %v and %v have ids %d and %d", set, want, id, got)
			}
		}
		if model[got] == nil {
			model[got] = want
			ids = append(ids, got)
		}
	}
}
