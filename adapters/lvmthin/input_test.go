package lvmthin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/vm"
)

const vgBad = "stillpoint-bad"

// badGroup makes a group of its own for a test that breaks it, with a volume of 1 MiB in a pool of a few MiB.
func badGroup(t testing.TB) live {
	t.Helper()
	guest(t)
	run(t, "vgcreate", "-q", "-y", "-s", "64k", vgBad, vm.Disks()[2])
	t.Cleanup(func() { run(t, "vgremove", "-q", "-f", "-y", vgBad) })
	run(t, "lvcreate", "-q", "-y", "--type", "thin-pool", "-L", "4M", "-c", "64k", "--poolmetadatasize", "2M", "-Zy", "-n", "pool", vgBad)
	run(t, "lvcreate", "-q", "-y", "-V", "1M", "--thinpool", "pool", "-n", "vol", vgBad)
	return live{vgBad, "vol"}
}

// says demands an error of a kind, with words that help.
func says(t testing.TB, what string, err error, kind fault.Kind, words ...string) {
	t.Helper()
	want(t, what, err, kind)
	for _, w := range words {
		if err != nil && !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

func gate(t testing.TB, a *Adapter, v live) error {
	t.Helper()
	_, err := a.Gate(t.Context(), []adapters.VolumeID{v.ID()})
	return err
}

func snapshotError(t testing.TB, a *Adapter, v live) error {
	t.Helper()
	_, err := a.CreateSnapshot(t.Context(), v.ID(), "bad")
	return err
}

func TestGuestNotAVolume(t *testing.T) {
	v := badGroup(t)
	a := newAdapter(t)
	run(t, "lvcreate", "-q", "-y", "-L", "64k", "-n", "linear", vgBad)
	says(t, "not thin", snapshotError(t, a, live{vgBad, "linear"}), fault.Unsupported, "linear", "not a thin volume")
	says(t, "a pool", gate(t, a, live{vgBad, "pool"}), fault.Unsupported, "thin pool")
	says(t, "no such volume", gate(t, a, live{vgBad, "nothing"}), fault.NotFound, "nothing")
	says(t, "no such group", gate(t, a, live{"stillpoint-bat", "vol"}), fault.Unavailable, "did you mean stillpoint-bad")

	s := snap(t, a, v, "one")
	says(t, "a snapshot of a snapshot", snapshotError(t, a, live{vgBad, snapshotVolume("vol", "one")}), fault.Unsupported, "snapshot of ours")
	run(t, "lvchange", "-q", "-prw", vgBad+"/"+snapshotVolume("vol", "one"))
	_, err := a.Open(t.Context(), s.ID)
	says(t, "a snapshot that was made writable", err, fault.Corrupt, "writable")
	if now, err := a.Snapshot(t.Context(), s.ID); err != nil || now.State != adapters.Failed {
		t.Errorf("%+v, %v", now, err)
	}

	vol, err := a.Volume(t.Context(), adapters.VolumeID{Backend: "l", ID: "*/vol"})
	must(t, err)
	if vol.ID != canonicalID(t, a, v) {
		t.Errorf("*/vol is %v", vol.ID)
	}
}

func TestGuestPoolStates(t *testing.T) {
	v := badGroup(t)
	run(t, "lvchange", "-q", "--errorwhenfull", "y", vgBad+"/pool")
	a := newAdapter(t)
	must(t, gate(t, a, v))
	_, err := v.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0)
	must(t, err)
	says(t, "the limit of data", gate(t, newAdapter(t, "data-limit", "1"), v), fault.Exhausted, "data-limit is 1 %", "16 of 64")
	says(t, "the limit of metadata", gate(t, newAdapter(t, "metadata-limit", "1"), v), fault.Exhausted, "metadata-limit is 1 %", "of 512")

	run(t, "lvcreate", "-q", "-y", "-V", "8M", "--thinpool", "pool", "-n", "greedy", vgBad)
	greedy := live{vgBad, "greedy"}
	if _, err := greedy.WriteAt(bytes.Repeat([]byte{1}, 8<<20), 0); err == nil {
		t.Error("the pool took more than it has")
	}
	says(t, "out of data", gate(t, a, v), fault.Exhausted, "out of data space", "64 of 64")
	says(t, "out of data", snapshotError(t, a, v), fault.Exhausted)
	_, err = a.Begin(t.Context(), adapters.VolumeSpec{ID: typed(vgBad + "/new"), Size: chunk, Token: "t"})
	says(t, "a restore into a full pool", err, fault.Exhausted)

	pool := poolNamed(t, a, vgBad)
	table, err := a.mapper.table(pool.uuid)
	must(t, err)
	reload := func(table string) {
		t.Helper()
		run(t, "dmsetup", "reload", "-u", pool.uuid, "--table", "0 8192 thin-pool "+table)
		run(t, "dmsetup", "suspend", "-u", pool.uuid)
		run(t, "dmsetup", "resume", "-u", pool.uuid)
	}
	words := strings.Fields(table)
	reload(strings.Join(words[:4], " ") + " 1 read_only")
	says(t, "read-only", gate(t, a, v), fault.Unsupported, "read-only")
	says(t, "read-only", snapshotError(t, a, v), fault.Unsupported, "read-only")
	reload(strings.Join(words[:4], " ") + " 0")

	run(t, "lvchange", "-q", "-an", vgBad+"/greedy", vgBad+"/vol", vgBad+"/pool")
	says(t, "inactive", gate(t, a, v), fault.Unavailable, "not active", "lvchange -ay")
	says(t, "inactive", snapshotError(t, a, v), fault.Unavailable, "not active")
	run(t, "vgexport", "-q", vgBad)
	says(t, "exported", gate(t, newAdapter(t), v), fault.Unavailable, "exported", "vgimport")
	says(t, "exported", gate(t, a, v), fault.Unavailable, "exported")
	says(t, "deleting in an exported group", a.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: v.ID(), Name: "x"}), fault.Unavailable)
	run(t, "vgimport", "-q", vgBad)
}

// A pool whose metadata device fails has failed, for good if it cannot even be read; if only writes fail, the kernel
// notes that it needs a check.
func TestGuestMetadataFails(t *testing.T) {
	for what, fails := range map[string]struct {
		table []string // of the device, whose superblock takes 8 sectors, on %s
		words string
	}{
		"all":    {[]string{"0 4096 error"}, "has failed"},
		"writes": {[]string{"0 8 linear %s", "8 4088 flakey %s 0 1 1 error_writes"}, "needs a check"},
	} {
		t.Run(what, func(t *testing.T) {
			v := badGroup(t)
			a := newAdapter(t)
			must(t, gate(t, a, v))
			g := fullReport(t, a, vgBad)
			metadata := mapperUUID(g.id, g.logical["pool_tmeta"].id, "tmeta")
			table, err := a.mapper.table(metadata)
			must(t, err)
			var disk string
			var start int
			_, err = fmt.Sscan(table, &disk, &start)
			must(t, err)
			reload := func(lines ...string) {
				t.Helper()
				for i, line := range lines {
					var first int
					_, err := fmt.Sscan(line, &first)
					must(t, err)
					lines[i] = strings.ReplaceAll(line, "%s", fmt.Sprintf("%s %d", disk, start+first))
				}
				c := exec.Command("dmsetup", "reload", "-u", metadata)
				c.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
				out, err := c.CombinedOutput()
				if err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				run(t, "dmsetup", "suspend", "--noflush", "-u", metadata)
				run(t, "dmsetup", "resume", "-u", metadata)
			}
			reload(fails.table...)
			v.WriteAt([]byte{1}, 0) // it fails, now or at its commit
			reload("0 4096 linear %s")
			says(t, "after an error of its metadata", gate(t, a, v), fault.Corrupt, fails.words, "lvconvert --repair")
			says(t, "after an error of its metadata", snapshotError(t, a, v), fault.Corrupt, fails.words)
			_, err = a.Begin(t.Context(), adapters.VolumeSpec{ID: typed(vgBad + "/new"), Size: chunk, Token: "t"})
			says(t, "a restore after an error of its metadata", err, fault.Corrupt, fails.words)
		})
	}
}

// A pool whose metadata fill up: refused with the numbers before, and after the kernel has made it read-only and wants it
// checked.
func TestGuestMetadataFull(t *testing.T) {
	v := badGroup(t)
	a := newAdapter(t)
	must(t, gate(t, a, v))
	s, err := a.CreateSnapshot(t.Context(), v.ID(), "before") // it cannot be deleted in the end, and goes with the group
	must(t, err)
	must(t, a.Publish(t.Context(), s.ID, adapters.Notes{}))
	pool := poolNamed(t, a, vgBad)
	for id := 1000; ; id++ { // a thin device takes a block of metadata or more
		status, err := a.mapper.poolStatus(pool)
		must(t, err)
		if status.metadata.free() < heldBlocks {
			break
		}
		must(t, a.mapper.message(pool.uuid, fmt.Sprintf("create_thin %d", id)))
	}
	says(t, "metadata nearly full", gate(t, a, v), fault.Exhausted, "metadata-limit is 90 %", "of 512")
	says(t, "metadata nearly full", snapshotError(t, a, v), fault.Exhausted, "of 512", "--poolmetadatasize")
	_, err = a.Allocated(t.Context(), s.ID, 0)
	says(t, "reading metadata that are nearly full", err, fault.Exhausted, "too few to reserve")
	_, err = a.Begin(t.Context(), adapters.VolumeSpec{ID: typed(vgBad + "/new"), Size: chunk, Token: "t"})
	says(t, "a restore into metadata that are nearly full", err, fault.Exhausted, "of 512")

	for id := 2000; err != nil && id < 2000+512; id++ {
		if a.mapper.message(pool.uuid, fmt.Sprintf("create_thin %d", id)) != nil {
			break
		}
	}
	status, err := a.mapper.poolStatus(pool)
	must(t, err)
	t.Logf("%+v", status)
	if status.mode == "rw" && !status.needsCheck {
		t.Fatal("the pool's metadata are full, and it works: the test shows nothing")
	}
	kind, words := fault.Unsupported, "read-only"
	if status.needsCheck {
		kind, words = fault.Corrupt, "needs a check"
	}
	says(t, "metadata full", gate(t, a, v), kind, words, "stillpoint-bad/pool")
	says(t, "metadata full", snapshotError(t, a, v), kind, words)
	_, err = a.Allocated(t.Context(), s.ID, 0)
	says(t, "reading a pool whose metadata are full", err, kind, words)
	if held(t, a, vgBad) != 0 {
		t.Error("something is reserved")
	}
}

// A group of which a physical volume is missing.
func TestGuestPartial(t *testing.T) {
	guest(t)
	disk := vm.Disks()[3]
	run(t, "vgcreate", "-q", "-y", "-s", "64k", vgBad, vm.Disks()[2], disk)
	t.Cleanup(func() { run(t, "vgremove", "-q", "-f", "-y", vgBad) })
	run(t, "lvcreate", "-q", "-y", "--type", "thin-pool", "-L", "4M", "-c", "64k", "--poolmetadatasize", "2M", "-n", "pool", vgBad)
	run(t, "lvcreate", "-q", "-y", "-V", "1M", "--thinpool", "pool", "-n", "vol", vgBad)
	v := live{vgBad, "vol"}
	must(t, gate(t, newAdapter(t), v))
	half := newAdapter(t, "devices", vm.Disks()[2])
	says(t, "half of a group", gate(t, half, v), fault.Unavailable, "lacks a physical volume")
	says(t, "deleting in half of a group", half.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: v.ID(), Name: "x"}), fault.Unavailable)
}

// A group that is extended, renamed or changed behind our back is seen as it is.
func TestGuestChangedGroup(t *testing.T) {
	v := badGroup(t)
	a := newAdapter(t)
	id := canonicalID(t, a, v)
	first := fullReport(t, a, vgBad)
	if first.print == "" || fullReport(t, a, vgBad) != first {
		t.Error("a group that did not change was reported anew")
	}
	run(t, "lvchange", "-q", "--addtag", "new", v.path())
	if now := fullReport(t, a, vgBad); now == first || len(now.logical["vol"].tags) != 1 {
		t.Error("a tag was not seen")
	}
	run(t, "vgextend", "-q", "-y", vgBad, vm.Disks()[3])
	s := snap(t, a, v, "extended")
	run(t, "lvcreate", "-q", "-y", "-L", "64k", "-n", "on-the-new-one", vgBad, vm.Disks()[3])
	must(t, gate(t, a, v))
	run(t, "vgrename", "-q", vgBad, vgBad+"-renamed")
	vol, err := a.Volume(t.Context(), id)
	must(t, err)
	if vol.ID != id || vol.Path != "/dev/"+vgBad+"-renamed/vol" {
		t.Errorf("%+v", vol)
	}
	readAll(t, a, s.ID)
	run(t, "vgrename", "-q", vgBad+"-renamed", vgBad)
	run(t, "lvrename", "-q", vgBad, "vol", "moved")
	_, err = a.Volume(t.Context(), id)
	want(t, "renamed", err, fault.NotFound)
	run(t, "lvrename", "-q", vgBad, "moved", "vol")
	run(t, "lvextend", "-q", "-L", "2M", v.path())
	if vol, err = a.Volume(t.Context(), id); err != nil || vol.Size != 2<<20 {
		t.Errorf("%+v, %v", vol, err)
	}
}

// A thin volume with an external origin: its snapshots can be read, and not compared.
func TestGuestExternalOrigin(t *testing.T) {
	badGroup(t)
	a := newAdapter(t)
	run(t, "lvcreate", "-q", "-y", "-L", "1M", "-n", "image", vgBad)
	image := live{vgBad, "image"}
	_, err := image.WriteAt(bytes.Repeat([]byte{9}, 1<<20), 0)
	must(t, err)
	run(t, "lvchange", "-q", "-an", vgBad+"/image")
	run(t, "lvchange", "-q", "-pr", vgBad+"/image")
	run(t, "lvcreate", "-q", "-y", "-s", "--thinpool", vgBad+"/pool", "-n", "clone", vgBad+"/image")
	run(t, "lvchange", "-q", "-ay", "-K", vgBad+"/clone")
	clone := live{vgBad, "clone"}
	s := snap(t, a, clone, "one")
	_, err = a.Allocated(t.Context(), s.ID, 0)
	says(t, "an external origin", err, fault.Unsupported, "external origin")
	_, err = a.Changed(t.Context(), s.ID, s.ID, 0)
	says(t, "an external origin", err, fault.Unsupported, "external origin")
	if got := readAll(t, a, s.ID); !bytes.Equal(got, bytes.Repeat([]byte{9}, 1<<20)) {
		t.Error("the snapshot does not show the origin")
	}
	target, err := a.Begin(t.Context(), adapters.VolumeSpec{ID: clone.ID(), Size: 1 << 20, Token: "t", Overwrite: true})
	must(t, err)
	must(t, target.Zero(t.Context(), 0, 1<<20))
	p := make([]byte, 1<<20)
	must(t, target.ReadAt(t.Context(), p, 0))
	if !bytes.Equal(p, make([]byte, 1<<20)) {
		t.Error("Zero brought the origin's bytes back")
	}
	must(t, target.Close())
}

// A pool that does not zero: the rest of a chunk written in part is what was there, and the target says so.
func TestGuestPoolWithoutZeroing(t *testing.T) {
	v := badGroup(t)
	run(t, "lvchange", "-q", "-Zn", vgBad+"/pool")
	_, err := v.WriteAt(bytes.Repeat([]byte{0xA5}, 1<<20), 0)
	must(t, err)
	must(t, v.Zero(0, 1<<20)) // its chunks, full of 0xA5, are free again
	a := newAdapter(t)
	target, err := a.Begin(t.Context(), adapters.VolumeSpec{ID: typed(vgBad + "/new"), Size: 1 << 20, Token: "t"})
	must(t, err)
	if target.ReadsZero() {
		t.Error("it says that it reads as zeros")
	}
	must(t, target.Zero(t.Context(), 0, 1<<20))
	for off := int64(0); off < 1<<20; off += chunk {
		must(t, target.WriteAt(t.Context(), []byte{1}, off))
	}
	p := make([]byte, 1<<20)
	must(t, target.ReadAt(t.Context(), p, 0))
	for i, b := range p {
		if b != 0 && i%chunk != 0 {
			t.Fatalf("the byte at %d is %#x", i, b)
		}
	}
	must(t, target.Abort(t.Context()))
}

// Programs that are missing and rights that are missing are named.
func TestGuestMissing(t *testing.T) {
	guest(t)
	describe := func(program string, args ...string) string {
		c := exec.Command(args[0], args[1:]...)
		c.Env = append(os.Environ(), helperEnv+"="+program)
		out, _ := c.CombinedOutput()
		return string(out)
	}
	out := describe("describe", "unshare", "-m", "sh", "-c", "mount --bind /dev/null $(command -v lvm) && exec "+os.Args[0]+" "+vgOne+"/x")
	if !strings.Contains(out, "lvm2") {
		t.Errorf("without lvm: %s", out)
	}
	if out := describe("unprivileged", os.Args[0], vgOne+"/x"); !strings.Contains(out, "need root") {
		t.Errorf("without rights: %s", out)
	}
}

// A group snapshot: requests that come together are made together, and are idempotent together.
func TestGuestTogether(t *testing.T) {
	guest(t)
	a := newAdapter(t)
	var volumes []live
	for range 4 {
		volumes = append(volumes, borrowLive(t, vgOne, 1<<20))
	}
	for round := range 2 {
		errs := make(chan error, len(volumes))
		for i, v := range volumes {
			go func() {
				s, err := a.CreateSnapshot(context.Background(), v.ID(), "together")
				if err == nil && (s.Size != 1<<20 || s.Mark != adapters.Cutting) {
					err = fmt.Errorf("volume %d: %+v", i, s)
				}
				errs <- err
			}()
		}
		for range volumes {
			if err := <-errs; err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
	}
	var failures []error
	for _, v := range volumes {
		failures = append(failures, a.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: v.ID(), Name: "together"}))
	}
	must(t, errors.Join(failures...))
}
