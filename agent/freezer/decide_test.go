package freezer

import (
	"slices"
	"testing"
	"time"
)

const second = int64(time.Second)

func TestDecide(t *testing.T) {
	const until = 100 * second
	early, due, late := until-1, until, until+int64(guardGrace)
	for _, row := range []struct {
		name string
		role role
		v    view
		want action
	}{
		{"before its time nothing is thawed", asHolder, view{state: frozen, now: early}, nothing},
		{"the holder thaws when it is due", asHolder, view{state: frozen, now: due}, take},
		{"the guard a little later", asGuard, view{state: frozen, now: due}, nothing},
		{"but it does", asGuard, view{state: frozen, now: late}, take},
		{"without a guard the holder thaws at once", asHolder, view{state: frozen, now: early, finished: true}, take},
		{"without a holder the guard does", asGuard, view{state: frozen, now: early, finished: true}, take},
		{"a stall before its time thaws nothing", asGuard, view{state: frozen, now: early, stalled: true}, nothing},

		{"the holder dooms a late freeze", asHolder, view{state: freezing, now: due}, doom},
		{"and leaves it to its thread", asHolder, view{state: doomed, now: late}, nothing},
		{"even without a guard", asHolder, view{state: doomed, now: late, finished: true}, nothing},
		{"the guard leaves a late freeze to a living holder", asGuard, view{state: freezing, now: late}, nothing},
		{"and a doomed one", asGuard, view{state: doomed, now: late}, nothing},
		{"kills a holder that stands still with one", asGuard, view{state: doomed, now: late, stalled: true}, fence},
		{"but not before its time", asGuard, view{state: freezing, now: early, stalled: true}, nothing},
		{"waits for a dead holder's thread", asGuard, view{state: freezing, now: late, finished: true}, nothing},
		{"and then thaws", asGuard, view{state: freezing, now: late, finished: true, threadGone: true}, take},
		{"doomed or not", asGuard, view{state: doomed, now: early, finished: true, threadGone: true}, take},

		{"the guard respects the holder's claim", asGuard, view{state: thawingHolder, now: late}, nothing},
		{"kills a holder that stands still on its claim", asGuard, view{state: thawingHolder, now: late, stalled: true}, fence},
		{"and takes over from a dead one", asGuard, view{state: thawingHolder, now: early, finished: true}, take},
		{"the holder respects the guard's claim", asHolder, view{state: thawingGuard, now: late}, nothing},
		{"kills a guard that stands still on its claim", asHolder, view{state: thawingGuard, now: late, stalled: true}, fence},
		{"and takes over from a dead one, too", asHolder, view{state: thawingGuard, now: late, finished: true}, take},
		{"nobody takes over from himself", asGuard, view{state: thawingGuard, now: late, finished: true, stalled: true}, nothing},
	} {
		row.v.until = until
		if got := decide(row.role, row.v); got != row.want {
			t.Errorf("%s: got %d, want %d", row.name, got, row.want)
		}
	}
	for s := range unfrozen + 1 {
		if !s.settled() {
			continue
		}
		for _, r := range []role{asHolder, asGuard} {
			if got := decide(r, view{state: s, now: late, until: until, finished: true, stalled: true, threadGone: true}); got != nothing {
				t.Errorf("%v, which is settled, is acted on: %d", s, got)
			}
		}
	}
}

// Random walks of both processes over one entry, with either killed at any point: at most one FITHAW takes effect,
// none is sent into what is not ours, and nothing stays frozen when somebody is left to look.
func TestDecideNeverThawsTwice(t *testing.T) {
	for seed := range uint64(20000) {
		r := seed*6364136223846793005 + 1442695040888963407
		next := func(n uint64) uint64 { r = r*6364136223846793005 + 1442695040888963407; return (r >> 33) % n }
		s, dead := frozen, map[string]bool{}
		claims, effects := map[state]bool{}, 0
		var now int64
		for step := range 200 {
			now += second / 20
			if step < 100 && len(dead) == 0 && next(60) == 0 {
				dead[[]string{"holder", "guard"}[next(2)]] = true
			}
			who, role, other := "holder", asHolder, "guard"
			if next(2) == 0 {
				who, role, other = "guard", asGuard, "holder"
			}
			if dead[who] {
				continue
			}
			if claims[role.mine] && s == role.mine { // its thread gets to run
				s, effects = thawed, effects+1
				continue
			}
			if decide(role, view{state: s, now: now, until: second, finished: dead[other], threadGone: dead[other]}) == take {
				s = role.mine
				claims[role.mine] = true
			}
		}
		if s != thawed || effects != 1 {
			t.Fatalf("seed %d: %v after %d thaws, dead %v", seed, s, effects, dead)
		}
	}
}

func TestThawsGoInReverseOrder(t *testing.T) {
	l := &ledger{data: make([]byte, ledgerSize)}
	for i := range 3 {
		l.entry(i).State.Store(uint32(frozen))
	}
	l.entry(2).claim(frozen, thawingHolder, 10*second)
	if ordered(l, 1, 10*second+1) || !ordered(l, 2, 10*second+1) {
		t.Error("the last must come first")
	}
	if !ordered(l, 1, 10*second+int64(patience)) {
		t.Error("a thaw that hangs holds up the others")
	}
	l.entry(2).State.Store(uint32(thawed))
	if !ordered(l, 1, 10*second+1) {
		t.Error("a thaw that is done holds up the others")
	}
}

func TestRestLeft(t *testing.T) {
	if got := restLeft(time.Second, 10*second, 12*second); got != 3*time.Second {
		t.Error(got)
	}
	if got := restLeft(time.Second, 10*second, 15*second); got != 0 {
		t.Error(got)
	}
}

// A beat does not revive a lease that has run out, nor does it move the deadline; a Thaw that comes too late is no Thaw.
func TestLeaseRunsOut(t *testing.T) {
	l := &ledger{data: make([]byte, ledgerSize)}
	g := newGrant(Request{MaxFreeze: time.Hour, Heartbeat: time.Hour}, boottime())
	g.entries = []int{0}
	g.beat(l)
	if until := l.entry(0).Until.Load(); until != g.deadline {
		t.Errorf("until %d, deadline %d", until, g.deadline)
	}
	g = newGrant(Request{MaxFreeze: time.Hour, Heartbeat: time.Second}, boottime()-2*second)
	g.beat(l)
	if left, _ := g.left(boottime()); left > 0 {
		t.Error("revived")
	}
	g.end(l, "asked", true)
	if g.asked || g.why == "asked" {
		t.Error("a late Thaw counts")
	}
}

func FuzzMounts(f *testing.F) {
	f.Add("22 27 0:21 / /proc rw,relatime - proc proc rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n", "/proc/x")
	f.Add("1 1 0:1 / / rw - a b\n2 1 0:1 / /a\\040b rw - a b\n", "/a b")
	f.Fuzz(func(t *testing.T, info, path string) {
		mounts, err := parseMounts([]byte(info))
		if err != nil {
			return
		}
		for _, m := range route(mounts, path) {
			if !within(path, m.Point) {
				t.Errorf("%q is not within %q", path, m.Point)
			}
		}
	})
}

func TestRoute(t *testing.T) {
	mounts := []mount{
		{ID: 1, Parent: 0, Point: "/", Type: "ext4", Device: 1},
		{ID: 2, Parent: 1, Point: "/a", Type: "nfs4", Device: 2},
		{ID: 3, Parent: 2, Point: "/a/b", Type: "ext4", Device: 3},
		{ID: 4, Parent: 1, Point: "/ab", Type: "xfs", Device: 4},
		{ID: 5, Parent: 4, Point: "/ab", Type: "btrfs", Device: 5}, // over the one before
		{ID: 6, Parent: 9, Point: "/hidden", Type: "xfs", Device: 6},
	}
	for path, want := range map[string][]int{
		"/": {1}, "/x": {1}, "/a": {1, 2}, "/a/b/c": {1, 2, 3}, "/ab": {1, 4, 5}, "/abc": {1}, "/hidden": {1},
	} {
		var got []int
		for _, m := range route(mounts, path) {
			got = append(got, m.ID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
}

// Decisions over a made-up machine: what lies behind a network, what holds the system, and what is stored on what.
func TestAccept(t *testing.T) {
	mounts := []mount{
		{ID: 1, Point: "/", Type: "overlay", Device: 1},
		{ID: 2, Parent: 1, Point: "/etc/hosts", Type: "ext4", Device: 2}, // the kubelet's
		{ID: 3, Parent: 1, Point: "/net", Type: "nfs4", Device: 3},
		{ID: 4, Parent: 3, Point: "/net/v", Type: "ext4", Device: 4},
		{ID: 5, Parent: 1, Point: "/pool", Type: "xfs", Device: 5},
		{ID: 6, Parent: 5, Point: "/pool/v", Type: "ext4", Device: 6},
		{ID: 7, Parent: 1, Point: "/host", Type: "ext4", Device: 2},
		{ID: 8, Parent: 1, Point: "/old", Type: "ext2", Device: 8},
	}
	s := surroundings{
		mounts:    mounts,
		protected: protect(mounts, nil, nil),
		storedOn: func(f Filesystem, _ mount) []Device {
			if f.Device == 6 {
				return []Device{5}
			}
			return nil
		},
	}
	pool, upper := Filesystem{"/pool", 5, "xfs"}, Filesystem{"/pool/v", 6, "ext4"}
	for _, row := range []struct {
		name string
		fs   []Filesystem
		want error
	}{
		{"upper before lower", []Filesystem{upper, pool}, nil},
		{"lower before upper", []Filesystem{pool, upper}, Invalid},
		{"twice", []Filesystem{pool, pool}, Invalid},
		{"behind a network", []Filesystem{{"/net/v", 4, "ext4"}}, Refused},
		{"a network", []Filesystem{{"/net", 3, "nfs4"}}, Refused},
		{"the host's root, seen through /etc/hosts", []Filesystem{{"/host", 2, "ext4"}}, Refused},
		{"an overlay", []Filesystem{{"/", 1, "overlay"}}, Refused},
		{"without a journal", []Filesystem{{"/old", 8, "ext2"}}, Refused},
		{"unclean", []Filesystem{{"/pool/", 5, "xfs"}}, Invalid},
		{"changed", []Filesystem{{"/pool", 7, "xfs"}}, Invalid},
	} {
		_, err := accept(Request{Filesystems: row.fs}, s)
		if row.want == nil && err != nil {
			t.Errorf("%s: %v", row.name, err)
		} else if row.want != nil {
			wantReason(t, err, row.want.(Reason))
		}
	}
}

// On a diskless machine everything stands on a network, and nothing would run without it: what comes after is judged.
func TestAcceptOnADisklessMachine(t *testing.T) {
	s := surroundings{storedOn: func(Filesystem, mount) []Device { return nil }, mounts: []mount{
		{ID: 1, Point: "/", Type: "nfs4", Device: 1},
		{ID: 2, Parent: 1, Point: "/v", Type: "ext4", Device: 2},
		{ID: 3, Parent: 1, Point: "/net", Type: "nfs4", Device: 3},
		{ID: 4, Parent: 3, Point: "/net/v", Type: "ext4", Device: 4},
	}}
	if _, err := accept(Request{Filesystems: []Filesystem{{"/v", 2, "ext4"}}}, s); err != nil {
		t.Error(err)
	}
	for _, f := range []Filesystem{{"/", 1, "nfs4"}, {"/net/v", 4, "ext4"}} {
		_, err := accept(Request{Filesystems: []Filesystem{f}}, s)
		wantReason(t, err, Refused)
	}
}
