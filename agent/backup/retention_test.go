package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

func retained(volume, id string, at time.Time, suspect string) repository.Backup {
	v := adapters.VolumeID{Backend: "mem", ID: volume}
	return repository.Backup{
		ID: id, Volume: v, Snapshot: adapters.SnapshotID{Volume: v, Name: id}, Created: at, Finished: at.Add(time.Minute),
		Standing: repository.Standing{Suspect: suspect},
	}
}

func instant(s string) time.Time {
	t, err := time.Parse("2006-01-02 15:04 -0700", s)
	if err != nil {
		panic(err)
	}
	return t
}

func TestRetentionRules(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		policy Policy
		times  []string // newest first; ! marks a suspect
		want   []string // the reasons of each, joined; empty: forgotten
	}{
		{"last", Policy{Last: 2},
			[]string{"2026-03-03 12:00 +0000", "2026-03-03 11:59 +0000", "2026-03-03 11:58 +0000"},
			[]string{"last, 1 of 2", "last, 2 of 2", ""}},
		{"the newest of each hour, and the oldest while there is one left", Policy{Hourly: 3},
			[]string{"2026-03-03 12:50 +0000", "2026-03-03 12:10 +0000", "2026-03-03 10:59 +0000", "2026-03-03 10:00 +0000"},
			[]string{"hourly: 2026-03-03 12h +0000, 1 of 3", "", "hourly: 2026-03-03 10h +0000, 2 of 3", "hourly: the oldest of all, 3 of 3"}},
		{"an hour that comes twice is two", Policy{Hourly: 9, Zone: berlin},
			[]string{"2026-10-25 01:30 +0000", "2026-10-25 00:30 +0000", "2026-10-24 22:00 +0000"},
			[]string{"hourly: 2026-10-25 02h +0100, 1 of 9", "hourly: 2026-10-25 02h +0200, 2 of 9", "hourly: 2026-10-25 00h +0200, 3 of 9"}},
		{"a day begins where the zone says", Policy{Daily: 2, Zone: berlin},
			[]string{"2026-03-03 23:30 +0000", "2026-03-03 22:30 +0000", "2026-03-03 22:00 +0000", "2026-03-02 12:00 +0000"},
			[]string{"daily: 2026-03-04, 1 of 2", "daily: 2026-03-03, 2 of 2", "", ""}},
		{"ISO weeks: the last days of a year are the next one's", Policy{Weekly: -1},
			[]string{"2027-01-03 12:00 +0000", "2026-12-31 12:00 +0000", "2026-12-27 12:00 +0000", "2025-12-29 12:00 +0000", "2025-12-28 12:00 +0000"},
			[]string{"weekly: 2026-W53", "", "weekly: 2026-W52", "weekly: 2026-W01", "weekly: 2025-W52"}},
		{"months and years, and every reason", Policy{Monthly: 2, Yearly: 2},
			[]string{"2026-02-20 12:00 +0000", "2026-01-20 12:00 +0000", "2025-12-20 12:00 +0000", "2025-11-20 12:00 +0000"},
			[]string{"monthly: 2026-02, 1 of 2; yearly: 2026, 1 of 2", "monthly: 2026-01, 2 of 2", "yearly: 2025, 2 of 2", ""}},
		{"within counts from the newest", Policy{Within: 48 * time.Hour},
			[]string{"2026-02-20 12:00 +0000", "2026-02-18 12:00 +0000", "2026-02-18 11:59 +0000"},
			[]string{"within 48h0m0s of the newest", "within 48h0m0s of the newest", ""}},
		{"a suspect does not take a place", Policy{Daily: 1},
			[]string{"! 2026-02-20 12:00 +0000", "2026-02-20 11:00 +0000", "2026-02-19 12:00 +0000"},
			[]string{"", "daily: 2026-02-20, 1 of 1", ""}},
		{"a suspect is not all that is kept", Policy{Within: time.Hour},
			[]string{"! 2026-02-20 12:00 +0000", "! 2026-02-20 11:45 +0000", "2026-02-19 12:00 +0000", "2026-02-18 12:00 +0000"},
			[]string{"within 1h0m0s of the newest", "within 1h0m0s of the newest", "within 1h0m0s of the newest", ""}},
		{"nothing else is there", Policy{Last: 1},
			[]string{"! 2026-02-20 12:00 +0000", "! 2026-02-19 12:00 +0000"},
			[]string{"suspect, as everything that there is of the volume", "suspect, as everything that there is of the volume"}},
	} {
		var backups []repository.Backup
		for i, s := range c.times {
			s, bad := strings.CutPrefix(s, "! ")
			suspect := ""
			if bad {
				suspect = "it lied"
			}
			backups = append(backups, retained("v", fmt.Sprint("b", i), instant(s), suspect))
		}
		rand.Shuffle(len(backups), func(i, k int) { backups[i], backups[k] = backups[k], backups[i] })
		got, err := c.policy.Apply(backups, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range got {
			if reasons := strings.Join(v.Reasons, "; "); v.Keep != (c.want[i] != "") || v.Keep && reasons != c.want[i] {
				t.Errorf("%s: %s: keep %v: %s; want %q", c.name, c.times[i], v.Keep, reasons, c.want[i])
			} else if reasons == "" {
				t.Errorf("%s: %s: no reason", c.name, c.times[i])
			}
		}
	}
}

func TestRetentionRefusesToKeepNothing(t *testing.T) {
	for _, p := range []Policy{{}, {Zone: time.UTC}, {Within: -time.Hour}, {Within: -time.Hour, Last: 1}} {
		if _, err := p.Apply(nil, nil); fault.KindOf(err) != fault.Invalid || err == nil {
			t.Errorf("%+v: %v", p, err)
		}
	}
}

// kept is what a policy keeps by its rules alone, said in another way: all buckets first, then the newest of them.
func keptByRules(p Policy, sound []repository.Backup) map[string]bool {
	keep := map[string]bool{}
	slices.SortFunc(sound, func(a, b repository.Backup) int { return b.Created.Compare(a.Created) })
	zone := p.Zone
	if zone == nil {
		zone = time.UTC
	}
	by := func(count int, start func(time.Time) time.Time) {
		newest := map[time.Time]repository.Backup{}
		var starts []time.Time
		for _, b := range sound {
			s := start(b.Created.In(zone)).UTC()
			if _, ok := newest[s]; !ok {
				newest[s] = b
				starts = append(starts, s)
			}
		}
		slices.SortFunc(starts, func(a, b time.Time) int { return b.Compare(a) })
		if count < 0 || count > len(starts) {
			count = len(starts)
			if len(sound) > 0 && p != (Policy{}) {
				keep[sound[len(sound)-1].ID] = true
			}
		}
		for _, s := range starts[:count] {
			keep[newest[s].ID] = true
		}
	}
	day := func(t time.Time) time.Time { return time.Date(t.Year(), t.Month(), t.Day(), 0, 0, 0, 0, zone) }
	for i := range sound {
		if p.Last < 0 || i < p.Last {
			keep[sound[i].ID] = true
		}
	}
	if p.Hourly != 0 {
		by(p.Hourly, func(t time.Time) time.Time {
			return t.Add(-time.Duration(t.Minute())*time.Minute - time.Duration(t.Second())*time.Second)
		})
	}
	if p.Daily != 0 {
		by(p.Daily, day)
	}
	if p.Weekly != 0 {
		by(p.Weekly, func(t time.Time) time.Time { d := day(t); return d.AddDate(0, 0, -(int(d.Weekday())+6)%7) })
	}
	if p.Monthly != 0 {
		by(p.Monthly, func(t time.Time) time.Time { return time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, zone) })
	}
	if p.Yearly != 0 {
		by(p.Yearly, func(t time.Time) time.Time { return time.Date(t.Year(), 1, 1, 0, 0, 0, 0, zone) })
	}
	for _, b := range sound {
		if p.Within > 0 && b.Created.Compare(sound[0].Created.Add(-p.Within)) >= 0 {
			keep[b.ID] = true
		}
	}
	return keep
}

// Whatever the backups and the policy: what the rules keep is what a plain reading of them keeps; a needed base stays;
// of what is sound something stays; more of a rule keeps no less; one volume does not touch another; nor does it matter
// in which order they come, or how often the policy is applied.
func TestRetentionProperties(t *testing.T) {
	zones := []*time.Location{nil, time.UTC, time.FixedZone("", 5*3600+1800), time.FixedZone("", -11*3600)}
	if berlin, err := time.LoadLocation("Europe/Berlin"); err != nil {
		t.Fatal(err)
	} else {
		zones = append(zones, berlin)
	}
	count := func(rng *rand.Rand) int { return []int{0, 0, 0, 1, 2, 5, -1}[rng.IntN(7)] }
	for seed := range uint64(3000) {
		rng := rand.New(rand.NewPCG(seed, 5))
		var backups []repository.Backup
		present := Present{}
		spread := []time.Duration{time.Hour, 40 * time.Hour, 90 * 24 * time.Hour, 1500 * 24 * time.Hour}[rng.IntN(4)]
		for n := range rng.IntN(30) + 1 {
			suspect := ""
			if rng.IntN(4) == 0 {
				suspect = "it lied"
			}
			at := instant("2024-02-29 23:00 +0000").Add(time.Duration(rng.Int64N(int64(spread))).Truncate(time.Second))
			b := retained(fmt.Sprint("v", rng.IntN(3)), fmt.Sprint("b", n), at, suspect)
			backups = append(backups, b)
			if rng.IntN(3) > 0 {
				present[b.Volume] = append(present[b.Volume], adapters.Snapshot{ID: b.Snapshot, Created: b.Created})
			}
		}
		p := Policy{count(rng), count(rng), count(rng), count(rng), count(rng), count(rng), 0, zones[rng.IntN(len(zones))]}
		if rng.IntN(4) == 0 || p.Check() != nil {
			p.Within = 1 + time.Duration(rng.Int64N(int64(spread)))
		}
		bases := Bases(backups, present)
		verdicts, err := p.Apply(backups, bases)
		if err != nil || len(verdicts) != len(backups) {
			t.Fatalf("seed %d: %d verdicts of %d: %v", seed, len(verdicts), len(backups), err)
		}
		keep := map[string]bool{}
		for _, v := range verdicts {
			keep[v.Backup.ID] = v.Keep
			if len(v.Reasons) == 0 {
				t.Errorf("seed %d: %s without a reason", seed, v.Backup.ID)
			}
		}
		for _, volume := range byVolume(backups) {
			sound := slices.DeleteFunc(slices.Clone(volume), func(b repository.Backup) bool { return b.Suspect != "" })
			want := keptByRules(p, sound)
			kept, base := 0, ""
			for _, b := range volume {
				if _, ok := bases[b.ID]; ok {
					if base != "" {
						t.Errorf("seed %d: two bases of %s", seed, b.Volume)
					}
					base = b.ID
				}
				if keep[b.ID] && b.Suspect == "" {
					kept++
				}
			}
			if base == "" || !keep[base] {
				t.Errorf("seed %d: the base %q of %s is forgotten", seed, base, volume[0].Volume)
			}
			if len(sound) > 0 && kept == 0 {
				t.Errorf("seed %d: nothing sound of %s is kept", seed, volume[0].Volume)
			}
			for _, b := range sound {
				if keep[b.ID] != (want[b.ID] || b.ID == base) {
					t.Errorf("seed %d: %+v: %s of %s: keep %v, the rules say %v, base %s", seed, p, b.ID, b.Created, keep[b.ID], want[b.ID], base)
				}
			}
			alone, err := p.Apply(volume, bases)
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range alone {
				if v.Keep != keep[v.Backup.ID] {
					t.Errorf("seed %d: %s is judged differently without the other volumes", seed, v.Backup.ID)
				}
			}
		}
		rng.Shuffle(len(backups), func(i, k int) { backups[i], backups[k] = backups[k], backups[i] })
		again, err := p.Apply(slices.DeleteFunc(backups, func(b repository.Backup) bool { return !keep[b.ID] }), bases)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range again {
			if !v.Keep {
				t.Errorf("seed %d: %s was kept, and is forgotten the second time", seed, v.Backup.ID)
			}
		}
		more := p
		more.Last, more.Daily, more.Yearly = more.Last+1, max(more.Daily, more.Daily*2), -1
		if more.Last == 0 {
			more.Last = -1
		}
		wider, err := more.Apply(backups, bases)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range wider {
			if keep[v.Backup.ID] && !v.Keep {
				t.Errorf("seed %d: more rules keep less: %s", seed, v.Backup.ID)
			}
		}
	}
}

// The base is the one that the next plan takes, for every backend that can be asked.
func TestBasesAreThePlans(t *testing.T) {
	for seed := range uint64(500) {
		rng := rand.New(rand.NewPCG(seed, 6))
		var backups []repository.Backup
		var snapshots []adapters.Snapshot
		for n := range rng.IntN(8) + 1 {
			b := retained("v", fmt.Sprint("b", n), instant("2026-01-01 00:00 +0000").Add(time.Duration(rng.IntN(1000))*time.Hour), "")
			backups = append(backups, b)
			s := adapters.Snapshot{ID: b.Snapshot, Created: b.Created, Mark: adapters.Verified, State: adapters.Ready}
			switch rng.IntN(3) {
			case 0:
				snapshots = append(snapshots, s)
			case 1:
				s.Created = s.Created.Add(time.Second) // another of the same name
				snapshots = append(snapshots, s)
			}
		}
		v := backups[0].Volume
		target := adapters.Snapshot{ID: adapters.SnapshotID{Volume: v, Name: "now"}, Mark: adapters.Verified, State: adapters.Ready, Created: time.Now()}
		plan, err := MakePlan(Facts{Snapshot: target, Differs: true, Backups: backups, Snapshots: snapshots})
		if err != nil {
			t.Fatal(err)
		}
		bases := Bases(backups, Present{v: snapshots})
		if len(bases) != 1 {
			t.Fatalf("seed %d: bases %v", seed, bases)
		}
		if plan.Base != nil {
			if _, ok := bases[plan.Base.ID]; !ok {
				t.Errorf("seed %d: the plan takes %s, the bases are %v", seed, plan.Base.ID, bases)
			}
		} else if _, ok := bases[byVolume(backups)[0][0].ID]; !ok {
			t.Errorf("seed %d: no snapshot is there, and the newest is not the base: %v", seed, bases)
		}
	}
}

func TestAskPresent(t *testing.T) {
	var store mem.Store
	if _, err := store.Create("v", 1<<20); err != nil {
		t.Fatal(err)
	}
	a := store.Adapter("mem")
	v, err := a.Volume(t.Context(), adapters.VolumeID{Backend: "mem", ID: "v"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := a.CreateSnapshot(t.Context(), v.ID, "one")
	if err == nil {
		err = a.Publish(t.Context(), s.ID, adapters.Notes{})
	}
	if err != nil {
		t.Fatal(err)
	}
	there, elsewhere := retained("x", "b0", s.Created, ""), retained("y", "b1", s.Created, "")
	there.Volume, there.Snapshot = v.ID, s.ID
	elsewhere.Volume.Backend = "gone"
	open := func(_ context.Context, backend string) (adapters.Adapter, error) {
		if backend != "mem" {
			return nil, errors.New("not configured")
		}
		return a, nil
	}
	present, err := AskPresent(t.Context(), []repository.Backup{there, elsewhere}, open)
	if err != nil || len(present[v.ID]) != 1 || present[v.ID][0].ID != s.ID || len(present) != 1 {
		t.Errorf("%v: %v", present, err)
	}
	bases := Bases([]repository.Backup{there, elsewhere}, present)
	if !strings.Contains(bases["b0"], "base of the next") || !strings.Contains(bases["b1"], "cannot be asked") {
		t.Errorf("%v", bases)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := AskPresent(ctx, []repository.Backup{elsewhere}, open); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
