package lvmthin

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/fault"
)

// held is the block of a pool's metadata snapshot.
func held(t testing.TB, a *Adapter, group string) uint64 {
	t.Helper()
	status, err := a.mapper.poolStatus(poolNamed(t, a, group))
	must(t, err)
	return status.held
}

func poolNamed(t testing.TB, a *Adapter, group string) poolRef {
	t.Helper()
	g := fullReport(t, a, group)
	return poolRef{name: group + "/pool", uuid: mapperUUID(g.id, g.logical["pool"].id, "tpool")}
}

// snap makes a published snapshot that is deleted at the end.
func snap(t testing.TB, a *Adapter, v live, name string) adapters.Snapshot {
	t.Helper()
	s, err := a.CreateSnapshot(t.Context(), v.ID(), name)
	must(t, err)
	t.Cleanup(func() { must(t, a.DeleteSnapshot(context.Background(), s.ID)) })
	must(t, a.Publish(t.Context(), s.ID, adapters.Notes{Cut: name}))
	return s
}

func extents(t testing.TB, d cbt.Delta) (all []cbt.Extent) {
	t.Helper()
	for e, err := range d.Extents {
		must(t, err)
		all = append(all, e)
	}
	return all
}

// A process that dies with the metadata snapshot reserved leaves it so until the next reader, which releases it; one
// that somebody else reserved is neither released nor trusted.
func TestGuestMetadataSnapshot(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 1<<20)
	_, err := v.WriteAt(bytes.Repeat([]byte{1}, chunk), chunk)
	must(t, err)
	one := snap(t, a, v, "one")
	_, err = v.WriteAt([]byte{2}, 3*chunk)
	must(t, err)
	two := snap(t, a, v, "two")
	changed := func() []cbt.Extent {
		t.Helper()
		d, err := a.Changed(t.Context(), one.ID, two.ID, 0)
		must(t, err)
		return extents(t, d)
	}
	expected := fmt.Sprint([]cbt.Extent{{Offset: 3 * chunk, Length: chunk}})
	if got := fmt.Sprint(changed()); got != expected {
		t.Errorf("%s instead of %s", got, expected)
	}
	if b := held(t, a, vgOne); b != 0 {
		t.Fatalf("the metadata snapshot is reserved, at block %d", b)
	}

	h := startHelper(t, "hold", v.path())
	h.says(t, "held")
	if held(t, a, vgOne) == 0 {
		t.Fatal("the helper reserved nothing")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*1e6)
	_, err = a.Allocated(ctx, one.ID, 0)
	cancel()
	want(t, "while another process of ours reads", err, fault.Unavailable)
	h.kill(t)
	if held(t, a, vgOne) == 0 {
		t.Fatal("the reservation went with the process: the test shows nothing")
	}
	if got := fmt.Sprint(changed()); got != expected {
		t.Errorf("%s instead of %s", got, expected)
	}
	if b := held(t, a, vgOne); b != 0 {
		t.Errorf("the metadata snapshot is still reserved, at block %d", b)
	}

	uuid := poolNamed(t, a, vgOne).uuid
	message := func(m string) { t.Helper(); run(t, "dmsetup", "message", "-u", uuid, "0", m) }
	message("reserve_metadata_snap")
	before := held(t, a, vgOne)
	_, err = a.Changed(t.Context(), one.ID, two.ID, 0)
	want(t, "reserved by somebody else", err, fault.Busy)
	if now := held(t, a, vgOne); now != before {
		t.Errorf("somebody else's reservation is at %d instead of %d", now, before)
	}
	message("release_metadata_snap")
	d, err := a.Changed(t.Context(), one.ID, two.ID, 0)
	must(t, err)
	message("reserve_metadata_snap")
	for _, err := range d.Extents {
		want(t, "a stream that begins when somebody else has it", err, fault.Busy)
	}
	message("release_metadata_snap")
	if got := fmt.Sprint(extents(t, d)); got != expected {
		t.Errorf("%s instead of %s", got, expected)
	}
	for range d.Extents { // a consumer that stops half-way, and one that dawdles, hold nothing
		if held(t, a, vgOne) != 0 {
			t.Error("the metadata snapshot is reserved while a consumer works")
		}
		break
	}
}

// The machine goes down while the metadata snapshot is reserved: the pool remembers it, and what was in memory is gone. The
// first who reads after that releases it, and nobody else's.
func TestGuestMetadataSnapshotOfAnEarlierBoot(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 1<<20)
	one := snap(t, a, v, "one")
	pool := poolNamed(t, a, vgOne)
	afterReboot := func() *Adapter {
		t.Helper()
		must(t, a.Close())
		must(t, os.RemoveAll(stateOf(t)))
		return newAdapter(t)
	}
	h := startHelper(t, "hold", v.path())
	h.says(t, "held")
	h.kill(t)
	if held(t, a, vgOne) == 0 {
		t.Fatal("nothing is reserved: the test shows nothing")
	}
	next := afterReboot()
	_, err := next.Allocated(t.Context(), one.ID, 0)
	must(t, err)
	if b := held(t, next, vgOne); b != 0 {
		t.Errorf("still reserved, at block %d", b)
	}

	// A process that dies before it reserves leaves a mark only, which the next one takes.
	must(t, a.mapper.message(pool.uuid, fmt.Sprintf("create_thin %d", markDevice)))
	_, err = afterReboot().Allocated(t.Context(), one.ID, 0)
	must(t, err)

	must(t, a.mapper.message(pool.uuid, "reserve_metadata_snap"))
	before := held(t, a, vgOne)
	_, err = afterReboot().Allocated(t.Context(), one.ID, 0)
	want(t, "somebody else's, of an earlier boot perhaps", err, fault.Busy)
	if now := held(t, a, vgOne); now != before {
		t.Errorf("somebody else's reservation is at %d instead of %d", now, before)
	}
	must(t, a.mapper.message(pool.uuid, "release_metadata_snap"))
	if err := a.mapper.message(pool.uuid, fmt.Sprintf("delete %d", markDevice)); err == nil {
		t.Error("the mark is in the pool still")
	}
}

// A stream whose snapshot is deleted meanwhile, with its number in the pool given to another, ends in an error.
func TestGuestChangedMeanwhile(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 1<<20)
	must(t, func() error { _, err := v.WriteAt([]byte{1}, 0); return err }())
	one := snap(t, a, v, "one")
	two, err := a.CreateSnapshot(t.Context(), v.ID(), "two")
	must(t, err)
	must(t, a.Publish(t.Context(), two.ID, adapters.Notes{}))
	d, err := a.Changed(t.Context(), one.ID, two.ID, 0)
	must(t, err)
	must(t, a.DeleteSnapshot(t.Context(), two.ID))
	ended := fault.Internal
	for _, err := range d.Extents {
		ended = fault.KindOf(err)
	}
	if ended != fault.NotFound {
		t.Errorf("after the deletion the stream ended with %v", ended)
	}
	three := snap(t, a, v, "three")
	g := fullReport(t, a, vgOne)
	if l := g.logical[snapshotVolume(v.name, "three")]; l == nil {
		t.Fatal(three)
	}
	ended = fault.Internal
	for _, err := range d.Extents {
		ended = fault.KindOf(err)
	}
	if ended != fault.Unavailable && ended != fault.NotFound {
		t.Errorf("with another device under its number the stream ended with %v", ended)
	}
}

// Many read at once while snapshots come and go, in this process and in another, and what they read is what the
// snapshots differ in, byte by byte.
func TestGuestConcurrentDeltas(t *testing.T) {
	guest(t)
	a, b := newAdapter(t), newAdapter(t)
	v := borrowLive(t, vgOne, 4<<20)
	r := random(1)
	var snaps []adapters.Snapshot
	var images [][]byte
	for n := range 3 {
		for range 10 {
			p := make([]byte, 1+r.IntN(3*chunk))
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			_, err := v.WriteAt(p, r.Int64N(4<<20-int64(len(p))))
			must(t, err)
		}
		must(t, v.Zero(int64(r.IntN(30))*chunk, 5*chunk))
		s := snap(t, a, v, fmt.Sprint("moment-", n))
		snaps, images = append(snaps, s), append(images, readAll(t, a, s.ID))
	}
	var wg sync.WaitGroup
	errs := make([]error, 12)
	for w := range errs {
		x := []*Adapter{a, b}[w%2]
		wg.Go(func() {
			for i := range 4 {
				base, target := (w+i)%3, (w+2*i+1)%3
				d, err := x.Changed(t.Context(), snaps[base].ID, snaps[target].ID, 0)
				if err != nil {
					errs[w] = err
					return
				}
				if err := compare(d, images[base], images[target]); err != nil {
					errs[w] = fmt.Errorf("%d to %d: %w", base, target, err)
					return
				}
			}
		})
	}
	for n := range 2 {
		s, err := b.CreateSnapshot(t.Context(), v.ID(), fmt.Sprint("passing-", n))
		must(t, err)
		must(t, b.Publish(t.Context(), s.ID, adapters.Notes{}))
		d, err := b.Changed(t.Context(), snaps[2].ID, s.ID, 0)
		must(t, err)
		if all := extents(t, d); len(all) != 0 {
			t.Errorf("nothing was written, and %v changed", all)
		}
		must(t, b.DeleteSnapshot(t.Context(), s.ID))
	}
	wg.Wait()
	for _, err := range errs {
		must(t, err)
	}
	if b := held(t, a, vgOne); b != 0 {
		t.Errorf("the metadata snapshot is still reserved, at block %d", b)
	}
}

// compare applies a delta, and demands that what it lists as data differs in each chunk that was written, or was
// written with what it held.
func compare(d cbt.Delta, base, target []byte) error {
	image := bytes.Clone(base)
	for e, err := range d.Extents {
		if err != nil {
			return err
		}
		if e.Zero {
			clear(image[e.Offset:e.End()])
		} else {
			copy(image[e.Offset:e.End()], target[e.Offset:e.End()])
		}
	}
	if !bytes.Equal(image, target) {
		return fmt.Errorf("base with the delta is not target")
	}
	return nil
}

// What is listed of a pool at work is what thin_delta and thin_dump list, and what cmp finds rounded to chunks.
func TestGuestDeltaAgainstBytes(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 8<<20)
	r := random(2)
	_, err := v.WriteAt(bytes.Repeat([]byte{1}, 8<<20), 0)
	must(t, err)
	one := snap(t, a, v, "one")
	for range 20 {
		_, err := v.WriteAt([]byte{byte(2 + r.IntN(250))}, r.Int64N(8<<20))
		must(t, err)
	}
	must(t, v.Zero(17*chunk, 3*chunk))
	two := snap(t, a, v, "two")
	x, y := readAll(t, a, one.ID), readAll(t, a, two.ID)
	d, err := a.Changed(t.Context(), one.ID, two.ID, 0)
	must(t, err)
	listed := map[int64]bool{}
	for _, e := range extents(t, d) {
		for off := e.Offset; off < e.End(); off += chunk {
			listed[off/chunk] = true
		}
	}
	for i := range int64(len(x) / chunk) {
		if differs := !bytes.Equal(x[i*chunk:(i+1)*chunk], y[i*chunk:(i+1)*chunk]); differs != listed[i] {
			t.Errorf("chunk %d: differs %v, listed %v", i, differs, listed[i])
		}
	}
	g, pool := fullReport(t, a, vgOne), poolNamed(t, a, vgOne)
	thin := func(name string) string { return fmt.Sprint(g.logical[snapshotVolume(v.name, name)].thin) }
	path := "/dev/mapper/" + mapperName(vgOne, "pool_tmeta")
	must(t, a.metadata.read(t.Context(), pool, func(*thinmeta.Metadata) error { return nil }, func(*thinmeta.Metadata) error {
		var delta struct {
			Diff struct {
				Runs []thinRun `xml:",any"`
			} `xml:"diff"`
		}
		tool(t, &delta, "thin_delta", "--metadata-snap", "--snap1", thin("one"), "--snap2", thin("two"), path)
		var changed []cbt.Extent
		for _, r := range delta.Diff.Runs {
			if kind := r.XMLName.Local; kind != "same" {
				changed = append(changed, cbt.Extent{Offset: r.Begin * chunk, Length: r.Length * chunk, Zero: kind == "left_only"})
			}
		}
		same(t, "changed, by thin_delta", d, changed)
		var dump struct {
			Devices []struct {
				ID   string    `xml:"dev_id,attr"`
				Runs []thinRun `xml:",any"`
			} `xml:"device"`
		}
		tool(t, &dump, "thin_dump", "--metadata-snap", path)
		for name, id := range map[string]adapters.SnapshotID{"one": one.ID, "two": two.ID} {
			var mapped []cbt.Extent
			for _, device := range dump.Devices {
				for _, r := range device.Runs {
					if device.ID != thin(name) {
						continue
					}
					if r.XMLName.Local == "single_mapping" {
						r.OriginBegin, r.Length = r.OriginBlock, 1
					}
					mapped = append(mapped, cbt.Extent{Offset: r.OriginBegin * chunk, Length: r.Length * chunk})
				}
			}
			allocated, err := a.Allocated(t.Context(), id, 0)
			must(t, err)
			same(t, "allocated of "+name+", by thin_dump", allocated, mapped)
		}
		return nil
	}))
}

// thinRun is a run of chunks as thin_delta or thin_dump prints it.
type thinRun struct {
	XMLName     xml.Name
	Begin       int64 `xml:"begin,attr"`
	Length      int64 `xml:"length,attr"`
	OriginBegin int64 `xml:"origin_begin,attr"`
	OriginBlock int64 `xml:"origin_block,attr"`
}

// tool reads what a program of thin-provisioning-tools prints.
func tool(t testing.TB, into any, args ...string) {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).Output()
	must(t, err)
	must(t, xml.Unmarshal(out, into))
}

// same demands that a stream is what another program listed.
func same(t testing.TB, what string, d cbt.Delta, theirs []cbt.Extent) {
	t.Helper()
	want := cbt.Delta{Extents: cbt.Coalesce(cbt.Of(theirs...))}
	got := cbt.Delta{Extents: cbt.Coalesce(d.Extents)}
	if x, y := fmt.Sprint(extents(t, got)), fmt.Sprint(extents(t, want)); x != y || len(theirs) == 0 {
		t.Errorf("%s: %s instead of %s", what, x, y)
	}
}

// A reader that dies leaves its snapshot active, which the next who opens the backend ends; two readers share, and the
// last one deactivates.
func TestGuestReaders(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 1<<20)
	s := snap(t, a, v, "read")
	l := fullReport(t, a, vgOne).logical[snapshotVolume(v.name, "read")]
	uuid := mapperUUID(fullReport(t, a, vgOne).id, l.id, "")
	active := func() bool {
		d, err := a.mapper.find(uuid)
		must(t, err)
		return d != nil
	}
	h := startHelper(t, "read", v.path(), "read")
	h.says(t, "open")
	i, err := a.Open(t.Context(), s.ID)
	must(t, err)
	must(t, i.Close())
	if !active() {
		t.Error("deactivated while another process reads")
	}
	want(t, "deleting what is being read", a.DeleteSnapshot(t.Context(), s.ID), fault.Busy)
	h.kill(t)
	if !active() {
		t.Fatal("inactive when its reader died: the test shows nothing")
	}
	_, err = newAdapter(t).Gate(t.Context(), []adapters.VolumeID{v.ID()})
	must(t, err)
	if active() {
		t.Error("still active")
	}
	readAll(t, a, s.ID)
	if active() {
		t.Error("still active after the last reader closed")
	}
	// A process that dies between making the device and giving it a table.
	_, _, err = a.mapper.do(mapperCall{request: unix.DM_DEV_CREATE, name: mapperName(vgOne, l.name), uuid: uuid})
	must(t, err)
	if got := readAll(t, a, s.ID); len(got) != 1<<20 || active() {
		t.Errorf("%d bytes of a device without a table, active %v", len(got), active())
	}
	left, err := a.state.list(activePrefix)
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// A restore whose process dies is found again with what it wrote.
func TestGuestKilledRestore(t *testing.T) {
	guest(t)
	a, name := newAdapter(t), fresh("restored")
	id := typed(vgOne + "/" + name)
	t.Cleanup(func() { removeIfThere(t, vgOne, name) })
	h := startHelper(t, "restore", id.ID)
	h.says(t, "written")
	spec := adapters.VolumeSpec{ID: id, Size: 4 * chunk, Token: "killed"}
	_, err := a.Begin(t.Context(), spec)
	want(t, "while another process writes", err, fault.Busy)
	h.kill(t)
	target, err := a.Begin(t.Context(), spec)
	must(t, err)
	p := make([]byte, chunk)
	must(t, target.ReadAt(t.Context(), p, 0))
	if target.Fresh() || !bytes.Equal(p, bytes.Repeat([]byte{7}, chunk)) {
		t.Errorf("fresh %v, %v…", target.Fresh(), p[:4])
	}
	vol, err := target.Commit(t.Context())
	must(t, err)
	if l := fullReport(t, a, vgOne).logical[name]; l == nil || len(l.tags) > 0 || vol.Size != 4*chunk {
		t.Errorf("%+v, %+v", l, vol)
	}
	skips, err := exec.Command("lvs", "--noheadings", "-o", "lv_skip_activation", vgOne+"/"+name).Output()
	must(t, err)
	if len(bytes.TrimSpace(skips)) > 0 {
		t.Errorf("after a reboot it will not be active: %s", skips)
	}
	if _, err := os.Stat(vol.Path); err != nil {
		t.Error(err)
	}
}
