package lvmthin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

func TestResolve(t *testing.T) {
	for _, c := range []struct {
		pv   adapters.PersistentVolume
		id   string
		kind fault.Kind
	}{
		{adapters.PersistentVolume{Driver: topoLVM, Handle: "0b3ad2dc-2c15-4c1b-9a9c-7f2d3c1ad6f4"}, "*/0b3ad2dc-2c15-4c1b-9a9c-7f2d3c1ad6f4", 0},
		{adapters.PersistentVolume{Driver: topoLVMOld, Handle: "0b3a"}, "*/0b3a", 0},
		{adapters.PersistentVolume{Driver: csiDriverLVM, Handle: "pvc-1", Attributes: map[string]string{"type": "linear"}}, "*/pvc-1", 0},
		{adapters.PersistentVolume{Driver: openEBSLVM, Handle: "pvc-2", Attributes: map[string]string{"openebs.io/volgroup": "lvmvg", "openebs.io/cas-type": "localpv-lvm"}}, "lvmvg/pvc-2", 0},
		{adapters.PersistentVolume{Driver: openEBSLVM, Handle: "pvc-2"}, "", fault.Invalid},
		{adapters.PersistentVolume{Driver: openEBSLVM, Handle: "pvc-2", Attributes: map[string]string{"openebs.io/volgroup": "a/b"}}, "", fault.Invalid},
		{adapters.PersistentVolume{Driver: topoLVM, Handle: "../etc"}, "", fault.Invalid},
		{adapters.PersistentVolume{Driver: "ebs.csi.aws.com", Handle: "vol-1"}, "", fault.Unsupported},
	} {
		id, err := Kind().VolumeOf(c.pv)
		if id != c.id || fault.KindOf(err) != c.kind {
			t.Errorf("%+v is %q, %v", c.pv, id, err)
		}
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"vol", "a+b_c.d-e", "x", strings.Repeat("n", nameMax), "_vol", "tdata", "snap", "meta_data"} {
		if err := checkVolumeName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", "-x", "a b", "a/b", "ä", "snapshot", "snapshot0", "pvmove", "x_tmeta", "a_rimage_0", "lvol0_pmspare", "x\n", strings.Repeat("n", nameMax+1)} {
		want(t, name, checkVolumeName(name), fault.Invalid)
	}
	for _, ours := range []string{snapshotVolume("vol", "one"), snapshotVolume("vol", strings.Repeat("-", 26)), restoreVolume("vol", "token"), scratchPrefix + "x"} {
		if err := checkVolumeName(ours); err != nil {
			t.Error(err)
		}
		if n := mapperName(strings.Repeat("g", 43), ours); len(n) > nameMax {
			t.Errorf("%q has %d bytes", n, len(n))
		}
	}
	if got := mapperName("a-b", "c-d"); got != "a--b-c--d" {
		t.Error(got)
	}
	if got := mapperUUID("AbCdEf-0123-4567-89aB-cDeF-0123-456789", "zzzzzz-0123-4567-89aB-cDeF-0123-456789", "tpool"); got != "LVM-AbCdEf0123456789aBcDeF0123456789zzzzzz0123456789aBcDeF0123456789-tpool" {
		t.Error(got)
	}
}

// tagAllowed is what LVM takes for a tag.
var tagAllowed = regexp.MustCompile(`^[A-Za-z0-9_+.][A-Za-z0-9_+.\-/=!:&#]*$`)

// Whatever is kept in tags comes back, and LVM takes the tags.
func TestTags(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 500 {
		wanted := make([]byte, 1+r.IntN(wantedMax))
		for i := range wanted {
			wanted[i] = byte(r.IntN(256))
			if n%2 == 0 {
				wanted[i] = "ab=%@\n ,'\"ü"[r.IntN(11)]
			}
		}
		in := record{of: "vol", wanted: string(wanted), mark: adapters.Cutting, created: time.Unix(r.Int64N(1<<32), r.Int64N(1e9)).UTC()}
		tags := append(in.tags(), "somebody", "stillpoint.io/else=1")
		out, ours := readRecord(tags)
		if !ours || fmt.Sprint(out) != fmt.Sprint(in) {
			t.Fatalf("%+v came back as %+v, %v", in, out, ours)
		}
		for round := range 3 {
			notes := adapters.Notes{Cut: strings.Repeat("c", r.IntN(3000)), Instant: "x", Unverified: []string{string(wanted[:min(40, len(wanted))])}}
			notes.Unverified[0] = strings.ToValidUTF8(notes.Unverified[0], "?")
			remove, add, err := published(tags, notes)
			must(t, err)
			tags = append(slices.DeleteFunc(slices.Clone(tags), func(s string) bool { return slices.Contains(remove, s) }), add...)
			out, ours = readRecord(tags)
			if !ours || out.mark != adapters.Verified || fmt.Sprint(out.notes) != fmt.Sprint(notes) || out.wanted != in.wanted {
				t.Fatalf("round %d: %+v came back as %+v, %v", round, notes, out.notes, ours)
			}
		}
		for _, tag := range tags {
			if !tagAllowed.MatchString(tag) || len(tag) > tagMax {
				t.Fatalf("LVM does not take %q", tag)
			}
		}
		shuffled := slices.Clone(tags)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again, ours := readRecord(shuffled); !ours || fmt.Sprint(again) != fmt.Sprint(out) {
			t.Fatal("the order of tags matters")
		}
	}
	_, _, err := published(nil, adapters.Notes{Cut: strings.Repeat("c", notesMax)})
	want(t, "too many notes", err, fault.Invalid)
	good := record{of: "v", wanted: "w", mark: adapters.Verified, created: time.Unix(1, 0)}.tags()
	for _, bad := range [][]string{nil, {"x"}, good[1:], good[:len(good)-1], append(slices.Clone(good), tagMark+"cutting"), append(slices.Clone(good), tagWanted+"2=x"),
		append(slices.Clone(good), tagNotes+"0={"), append(slices.Clone(good[1:]), tagMark+"other"), append(slices.Clone(good[:len(good)-1]), tagWanted+"0=a=1")} {
		if r, ours := readRecord(bad); ours {
			t.Errorf("%q is taken for %+v", bad, r)
		}
	}
}

func TestParsePool(t *testing.T) {
	for _, c := range []struct {
		line  string
		kind  fault.Kind // of room with limits 95 and 90
		words string
		held  uint64
	}{
		{"3 432/4096 1604/16384 - rw no_discard_passdown queue_if_no_space - 1024 ", 0, "", 0},
		{"3 433/4096 1604/16384 95 rw no_discard_passdown queue_if_no_space - 1024", 0, "", 95},
		{"3 433/4096 16000/16384 - rw discard_passdown queue_if_no_space - 1024", fault.Exhausted, "16000 of 16384 (98 %)", 0},
		{"3 3900/4096 1/16384 - rw discard_passdown queue_if_no_space - 1024", fault.Exhausted, "3900 of 4096 (96 %)", 0},
		{"3 3100/4096 1/16384 - rw discard_passdown queue_if_no_space - 1024", fault.Exhausted, "more than 1024", 0},
		{"3 400/512 1/16384 - rw discard_passdown queue_if_no_space - 128", fault.Exhausted, "more than 128", 0},
		{"3 433/4096 16384/16384 - out_of_data_space discard_passdown error_if_no_space - 1024", fault.Exhausted, "out of data space", 0},
		{"3 433/4096 1604/16384 - ro discard_passdown queue_if_no_space needs_check 1024", fault.Corrupt, "needs a check", 0},
		{"3 433/4096 1604/16384 - ro discard_passdown queue_if_no_space - 1024", fault.Unsupported, "read-only", 0},
		{"3 433/4096 1604/16384 - odd discard_passdown queue_if_no_space - 1024", fault.Unsupported, "odd", 0},
		{"Fail", fault.Corrupt, "has failed", 0},
		{"Error", fault.Corrupt, "has failed", 0},
	} {
		p, err := parsePool(c.line)
		must(t, err)
		err = p.room(poolRef{name: "vg/pool"}, limits{data: 95, metadata: 90})
		if fault.KindOf(err) != c.kind || err != nil && (!strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "vg/pool")) || p.held != c.held {
			t.Errorf("%q: %+v, %v", c.line, p, err)
		}
	}
	for _, line := range []string{"", "3", "x 1/2 3/4 - rw a b", "3 1-2 3/4 - rw a b", "3 1/2 3/4 x rw a b", "Failing"} {
		if _, err := parsePool(line); fault.KindOf(err) != fault.Unsupported {
			t.Errorf("%q: %v", line, err)
		}
	}
	for _, l := range []limits{{0, 90}, {95, 101}, {-1, 1}} {
		if l.check() == nil {
			t.Errorf("%+v is accepted", l)
		}
	}
}

const oneReport = `  {"report": [{"vg": [{"vg_name":"vg0", "vg_uuid":"YkynPD-N4DI-iE8I-e8zL-M5bh-cU3r-CIBruP", "vg_seqno":"10", "vg_extent_size":"65536", "vg_exported":"", "vg_partial":""}]
 , "pv": [{"pv_name":"/dev/sdb", "pv_missing":""},{"pv_name":"/dev/sda", "pv_missing":""}]
 , "lv": [{"lv_name":"vol"}] , "pvseg": [{"pvseg_start":"0"}]
 , "seg": [
  {"lv_uuid":"C2GPrI", "lv_name":"clone", "segtype":"thin", "transaction_id":"1", "thin_id":"2", "pool_lv":"pool", "origin":"image", "lv_tags":"a,b=c", "lv_permissions":"writeable", "zero":"zero", "discards":"passdown", "chunk_size":"0", "lv_size":"16777216"},
  {"lv_uuid":"SLpj3h", "lv_name":"snap", "segtype":"thin", "transaction_id":"2", "thin_id":"3", "pool_lv":"pool", "origin":"clone", "lv_tags":"", "lv_permissions":"read-only", "zero":"zero", "discards":"passdown", "chunk_size":"0", "lv_size":"16777216"},
  {"lv_uuid":"X", "lv_name":"free", "segtype":"thin", "transaction_id":"0", "thin_id":"1", "pool_lv":"pool", "origin":"", "lv_tags":"", "lv_permissions":"unknown", "zero":"zero", "discards":"passdown", "chunk_size":"0", "lv_size":"65536"},
  {"lv_uuid":"I", "lv_name":"image", "segtype":"linear", "transaction_id":"", "thin_id":"", "pool_lv":"", "origin":"", "lv_tags":"", "lv_permissions":"read-only", "zero":"unknown", "discards":"", "chunk_size":"0", "lv_size":"65536"},
  {"lv_uuid":"I", "lv_name":"image", "segtype":"linear", "transaction_id":"", "thin_id":"", "pool_lv":"", "origin":"", "lv_tags":"", "lv_permissions":"read-only", "zero":"unknown", "discards":"", "chunk_size":"0", "lv_size":"65536"},
  {"lv_uuid":"LstFGN", "lv_name":"[pool_tmeta]", "segtype":"linear", "transaction_id":"", "thin_id":"", "pool_lv":"", "origin":"", "lv_tags":"", "lv_permissions":"writeable", "zero":"unknown", "discards":"", "chunk_size":"0", "lv_size":"4194304"},
  {"lv_uuid":"OgfZa2", "lv_name":"pool", "segtype":"thin-pool", "transaction_id":"3", "thin_id":"", "pool_lv":"", "origin":"", "lv_tags":"", "lv_permissions":"writeable", "zero":"zero", "discards":"ignore", "chunk_size":"65536", "lv_size":"1073741824"}
 ]}
 , {"vg": [{"vg_name":"", "vg_uuid":""}], "pv": [{"pv_name":"/dev/sdz"}]}
 ]}`

func TestParseReport(t *testing.T) {
	groups, err := parseReport([]byte(oneReport))
	must(t, err)
	if len(groups) != 1 {
		t.Fatalf("%d groups", len(groups))
	}
	g := groups[0]
	if g.name != "vg0" || g.id != "YkynPD-N4DI-iE8I-e8zL-M5bh-cU3r-CIBruP" || g.extent != 65536 || g.exported || g.partial || g.duplicates ||
		!slices.Equal(g.devices, []string{"/dev/sda", "/dev/sdb"}) || len(g.logical) != 6 {
		t.Errorf("%+v", g)
	}
	if l := g.logical["clone"]; l.thin != 2 || l.transaction != 1 || l.pool != "pool" || !slices.Equal(l.tags, []string{"a", "b=c"}) || l.readOnly || l.size != 16<<20 {
		t.Errorf("%+v", l)
	}
	if p := g.logical["pool"]; p.chunk != 65536 || !p.zeroes || p.discards != "ignore" || p.transaction != 3 {
		t.Errorf("%+v", p)
	}
	if !g.logical["pool_tmeta"].hidden || !g.logical["snap"].readOnly {
		t.Error("hidden, or read-only")
	}
	for name, external := range map[string]bool{"clone": true, "snap": true, "free": false} {
		if g.external(g.logical[name]) != external {
			t.Errorf("%s has an external origin: %v", name, !external)
		}
	}
	twice, err := parseReport([]byte(strings.Replace(oneReport, `{"vg": [{"vg_name":"", "vg_uuid":""}]`, `{"vg": [{"vg_name":"vg0", "vg_uuid":"other", "vg_seqno":"1", "vg_extent_size":"1", "vg_partial":"partial", "vg_exported":"exported"}]`, 1)))
	if err != nil || len(twice) != 2 || !twice[0].duplicates || !twice[1].partial || !twice[1].exported {
		t.Errorf("%+v, %v", twice, err)
	}
	for _, bad := range []string{"{", "[]", strings.Replace(oneReport, `"lv_size":"65536"`, `"lv_size":"64k"`, 1), strings.Replace(oneReport, `"thin_id":"2"`, `"thin_id":"-2"`, 1)} {
		if _, err := parseReport([]byte(bad)); fault.KindOf(err) != fault.Unsupported {
			t.Errorf("%.40q…: %v", bad, err)
		}
	}
	if none, err := parseReport(nil); err != nil || len(none) != 0 {
		t.Errorf("%v, %v", none, err)
	}
}

func TestHalfMade(t *testing.T) {
	mark := record{of: "vol", wanted: "one", mark: adapters.Cutting, created: time.Unix(1, 0)}.tags()
	pool := &logical{name: "pool", kind: thinPool, transaction: 8}
	base := logical{name: snapshotVolume("vol", "one"), kind: thinVolume, pool: "pool", transaction: 7, tags: mark}
	groupOf := func(all ...logical) *group {
		g := &group{logical: map[string]*logical{"pool": pool, "old": {name: "old", kind: thinVolume, pool: "pool", transaction: 3}}}
		for _, l := range all {
			g.logical[l.name] = &l
		}
		return g
	}
	verified, foreign, second := base, base, base
	verified.tags = append(slices.Clone(mark[1:]), tagMark+"verified")
	foreign.tags = nil
	second.name = "sp-second"
	restore := logical{name: restoreVolume("v", "t"), kind: thinVolume, pool: "pool", transaction: 7, tags: split(tagRestore, "v")}
	for what, c := range map[string]struct {
		g      *group
		status poolStatus
		half   bool
	}{
		"ours":           {groupOf(base), poolStatus{transaction: 7}, true},
		"a restore":      {groupOf(restore), poolStatus{transaction: 7}, true},
		"finished":       {groupOf(base), poolStatus{transaction: 8}, false},
		"long behind":    {groupOf(base), poolStatus{transaction: 6}, false},
		"verified":       {groupOf(verified), poolStatus{transaction: 7}, false},
		"somebody's":     {groupOf(foreign), poolStatus{transaction: 7}, false},
		"two":            {groupOf(base, second), poolStatus{transaction: 7}, false},
		"another's turn": {groupOf(), poolStatus{transaction: 7}, false},
		"a failed pool":  {groupOf(base), poolStatus{transaction: 7, failed: true}, false},
	} {
		if half := halfMade(c.g, pool, c.status); (half != nil) != c.half {
			t.Errorf("%s: %+v", what, half)
		}
	}
}

func TestOpenParameters(t *testing.T) {
	for _, p := range []map[string]string{
		{"groups": "vg0,"}, {"groups": "a/b"}, {"devices": "sda"}, {"devices": "/dev/sda /dev/sdb"}, {"data-limit": "0"}, {"metadata-limit": "200"},
		{"lock-wait": "soon"}, {"state": "run"}, {"nonsense": "x"},
	} {
		_, err := Kind().Open(t.Context(), adapters.Config{Name: "l", Parameters: p})
		want(t, fmt.Sprint(p), err, fault.Invalid)
	}
}

func TestScript(t *testing.T) {
	q := &request{p: place{group: &group{name: "vg0"}}, volume: &logical{name: "vol"}, name: "sp-x.one",
		record: record{of: "vol", wanted: "it's a \"name\" with\nlines", mark: adapters.Cutting, created: time.Unix(1, 0)}}
	s := script([]*request{q, q}, []string{"--config", "global{wait_for_locks=0}backup{backup=0 archive=0}"})
	lines := strings.Split(strings.TrimSuffix(s, "\n"), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines: %s", len(lines), s)
	}
	for _, line := range lines {
		words := strings.Split(strings.TrimSuffix(strings.TrimPrefix(line, "'"), "' "), "' '")
		if want := append(createArgs(q), "--config", "global{wait_for_locks=0}backup{backup=0 archive=0}"); !slices.Equal(words, want) {
			t.Errorf("%q instead of %q", words, want)
		}
		for _, w := range words {
			if strings.ContainsAny(w, "'\n") {
				t.Errorf("%q cannot be quoted", w)
			}
		}
	}
	made := &command{stdout: []byte("  Logical volume \"sp-x.one\" created.\n")}
	if err := outcome(q, made, nil); err != nil {
		t.Error(err)
	}
	want(t, "not made", outcome(q, &command{stdout: []byte("Logical volume \"sp-x.one2\" created.\n"), stderr: "  Can't get lock for vg0.\n"}, nil), fault.Busy)
	if err := explain(q, errors.New(`Logical Volume "sp-x.one" already exists in volume group "vg0"`)); !errors.Is(err, errTaken) || fault.KindOf(err) != fault.Busy {
		t.Error(err)
	}
}

func TestComplaints(t *testing.T) {
	for words, kind := range map[string]fault.Kind{
		"  device-mapper: suspend ioctl on  (254:4) failed: Device or resource busy\n": fault.Busy,
		"  Can't get lock for vg0.\n": fault.Busy,
		"  /run/lock/lvm/P_global:aux: flock failed: Resource temporarily unavailable\n":   fault.Busy,
		"  Logical volume vg0/snap in use.\n":                                              fault.Busy,
		"  Names including \"_tmeta\" are reserved.\n":                                     fault.Invalid,
		"  Full LV name \"vg0/xxx\" is too long.\n":                                        fault.Invalid,
		"  Failed to find logical volume \"vg0/nonexist\"\n":                               fault.NotFound,
		"  Volume group \"nonexist\" not found\n":                                          fault.Unavailable,
		"  Free space in pool vg0/pool is above threshold, new volumes are not allowed.\n": fault.Exhausted,
		"  something new\n": fault.Internal,
	} {
		if got := complaint(words); got != kind {
			t.Errorf("%q is %v", words, got)
		}
	}
	if got := gist("  WARNING: This metadata update is NOT backed up.\n  One.\n\n  Two.\n  Run `lvcreate --help' for more information.\n"); got != "One; Two" {
		t.Errorf("%q", got)
	}
}

func TestParseHeader(t *testing.T) {
	h := make([]byte, headerSize)
	copy(h[4:], headerMagic)
	h[20], h[40], h[41] = 1, 0, 2
	// LVM's calc_crc: the table-driven CRC-32 of zlib, begun with INITIAL_CRC, without its inversions.
	crc := uint32(headerSeed)
	for _, b := range h[4:] {
		crc ^= uint32(b)
		for range 8 {
			crc = crc>>1 ^ 0xedb88320*(crc&1)
		}
	}
	binary.LittleEndian.PutUint32(h, crc)
	got, err := parseHeader(h)
	if err != nil || !bytes.Equal(got, h) || !upToDate(got) {
		t.Errorf("%v, %v", got, err)
	}
	h[60] = 1 // ignored, and the checksum no longer right
	if got, err := parseHeader(h); err == nil || got != nil || upToDate(h) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := parseHeader(make([]byte, headerSize)); got != nil || err != nil || upToDate(got) {
		t.Errorf("%v, %v", got, err)
	}
}

// Whichever of LVM's locks it is that a command could not have, it is run again.
func TestLocked(t *testing.T) {
	for words, is := range map[string]bool{
		"  /run/lock/lvm/V_vg0: flock failed: Resource temporarily unavailable\n  Can't get lock for vg0\n":                     true,
		"  /run/lock/lvm/P_global:aux: flock failed: Resource temporarily unavailable\n  Failed to get a lock on everything.\n": true,
		"  Volume group \"nonexist\" not found\n": false,
	} {
		if got := (&command{stderr: words, code: 5}).locked(); got != is {
			t.Errorf("%q is locked: %v", words, got)
		}
	}
}
