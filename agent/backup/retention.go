package backup

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// Policy says which backups of each volume to keep, by rules that are those of restic (`restic forget`): each of Hourly
// to Yearly keeps the newest backup of each of that many hours, days, ISO weeks, months or years in which there is one,
// going back from the newest backup; while a rule has some left, it keeps the oldest backup of all as well. A backup is
// kept if any rule keeps it. Counts of 0 are no rule, negative ones keep all.
type Policy struct {
	Last    int // this many, the newest ones
	Hourly  int
	Daily   int
	Weekly  int
	Monthly int
	Yearly  int
	Within  time.Duration // everything not older than this before the newest sound one; 0: no rule

	Zone *time.Location // where an hour, day, week, month or year begins; nil: UTC
}

// Verdict is what a policy says about a backup.
type Verdict struct {
	Backup  repository.Backup
	Keep    bool
	Reasons []string // in words: of a kept backup everything that keeps it, of another why nothing does
}

// rule keeps the newest of each bucket; at names the bucket that a time is in.
type rule struct {
	name  string
	count int
	at    func(t time.Time, n int) string
}

func (p Policy) rules() []rule {
	all := []rule{
		{"last", p.Last, func(_ time.Time, n int) string { return fmt.Sprint(n) }},
		{"hourly", p.Hourly, func(t time.Time, _ int) string { return t.Format("2006-01-02 15h -0700") }}, // an hour may come twice
		{"daily", p.Daily, func(t time.Time, _ int) string { return t.Format(time.DateOnly) }},
		{"weekly", p.Weekly, func(t time.Time, _ int) string {
			year, week := t.ISOWeek()
			return fmt.Sprintf("%d-W%02d", year, week)
		}},
		{"monthly", p.Monthly, func(t time.Time, _ int) string { return t.Format("2006-01") }},
		{"yearly", p.Yearly, func(t time.Time, _ int) string { return t.Format("2006") }},
	}
	return slices.DeleteFunc(all, func(r rule) bool { return r.count == 0 })
}

// Check refuses a policy that keeps nothing. Errors are Invalid.
func (p Policy) Check() error {
	if p.Within < 0 {
		return fault.Errorf(fault.Invalid, "keep-within %v: a time before the newest backup cannot be negative", p.Within)
	}
	if len(p.rules()) == 0 && p.Within == 0 {
		return fault.Errorf(fault.Invalid, "the policy keeps nothing: give it at least one rule, such as --keep-daily 7")
	}
	return nil
}

// Apply judges backups, of any volumes; each volume by itself. Beside what the rules keep:
//
//   - The backups in bases, with their reasons, are always kept: see Bases.
//   - A suspect backup counts for no rule, and nothing but Within keeps it. It is never all that is left, because every rule
//     keeps the newest sound backup; where none is sound all are kept.
//
// The verdicts are in the order of volumes, each newest first. Invalid if the policy has no rule.
func (p Policy) Apply(backups []repository.Backup, bases map[string]string) ([]Verdict, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	var all []Verdict
	for _, volume := range byVolume(backups) {
		all = append(all, p.volume(volume, bases)...)
	}
	return all, nil
}

// volume judges the backups of one volume, newest first.
func (p Policy) volume(backups []repository.Backup, bases map[string]string) []Verdict {
	all := make([]Verdict, len(backups))
	var sound []*Verdict
	for i, b := range backups {
		all[i].Backup = b
		if b.Suspect == "" {
			sound = append(sound, &all[i])
		}
	}
	for _, r := range p.rules() {
		r.apply(sound, cmp.Or(p.Zone, time.UTC))
	}
	newest := backups[0].Created
	if len(sound) > 0 {
		newest = sound[0].Backup.Created
	}
	for i := range all {
		if p.Within > 0 && !all[i].Backup.Created.Before(newest.Add(-p.Within)) {
			all[i].keep("within %v of the newest", p.Within)
		}
		if why, ok := bases[all[i].Backup.ID]; ok {
			all[i].keep("%s", why)
		}
	}
	for i := range all {
		v := &all[i]
		switch {
		case len(sound) == 0:
			v.keep("suspect, as everything that there is of the volume")
		case !v.Keep && v.Backup.Suspect != "":
			v.Reasons = []string{"suspect, which counts for no rule: " + v.Backup.Suspect}
		case !v.Keep:
			v.Reasons = []string{"no rule keeps it"}
		}
	}
	return all
}

func (v *Verdict) keep(format string, args ...any) {
	v.Keep = true
	v.Reasons = append(v.Reasons, fmt.Sprintf(format, args...))
}

// apply keeps what the rule keeps of the sound backups, newest first.
func (r rule) apply(sound []*Verdict, zone *time.Location) {
	kept, last := 0, ""
	for n, v := range sound {
		if kept == r.count {
			return
		}
		bucket := r.at(v.Backup.Created.In(zone), n+1)
		oldest := n == len(sound)-1
		if bucket == last && !oldest {
			continue
		}
		kept++
		of := ""
		if r.count > 0 {
			of = fmt.Sprintf(", %d of %d", kept, r.count)
		}
		switch {
		case bucket == last:
			v.keep("%s: the oldest of all%s", r.name, of)
		case r.name == "last":
			v.keep("last%s", of)
		default:
			v.keep("%s: %s%s", r.name, bucket, of)
		}
		last = bucket
	}
}

// byVolume groups backups, each group newest first.
func byVolume(backups []repository.Backup) [][]repository.Backup {
	sorted := slices.SortedFunc(slices.Values(backups), func(a, b repository.Backup) int {
		return cmp.Or(cmp.Compare(a.Volume.String(), b.Volume.String()), b.Created.Compare(a.Created), b.Finished.Compare(a.Finished), cmp.Compare(a.ID, b.ID))
	})
	var groups [][]repository.Backup
	for from, to := 0, 0; from < len(sorted); from = to {
		for to = from; to < len(sorted) && sorted[to].Volume == sorted[from].Volume; to++ {
		}
		groups = append(groups, sorted[from:to])
	}
	return groups
}

// Present is which verified snapshots volumes have in their backends. A volume that is not in it could not be asked about.
type Present map[adapters.VolumeID][]adapters.Snapshot

// Bases finds the backups that the next incrementals need, by id, and says why: of each volume the newest one whose
// snapshot still exists, as MakePlan chooses it; where there is none, or nobody could be asked, the newest one. Suspect
// backups are no base, unless there is nothing else.
func Bases(backups []repository.Backup, present Present) map[string]string {
	bases := map[string]string{}
	for _, volume := range byVolume(backups) {
		sound := slices.DeleteFunc(slices.Clone(volume), func(b repository.Backup) bool { return b.Suspect != "" })
		if len(sound) == 0 {
			bases[volume[0].ID] = "the newest of its volume, and none is sound"
			continue
		}
		snapshots, asked := present[volume[0].Volume]
		i := slices.IndexFunc(sound, func(b repository.Backup) bool {
			return slices.ContainsFunc(snapshots, func(s adapters.Snapshot) bool { return isOf(b, s) })
		})
		switch {
		case i >= 0:
			bases[sound[i].ID] = "the base of the next incremental backup"
		case asked:
			bases[sound[0].ID] = "the newest of its volume"
		default:
			bases[sound[0].ID] = "the newest of its volume, whose backend cannot be asked which one the next incremental backup needs"
		}
	}
	return bases
}

// AskPresent asks the backends of backups which snapshots they still have. open gives a backend by its name.
func AskPresent(ctx context.Context, backups []repository.Backup, open OpenBackend) (Present, error) {
	present := Present{}
	for _, volume := range byVolume(backups) {
		id := volume[0].Volume
		snapshots, err := presentOf(ctx, id, open)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err == nil {
			present[id] = snapshots
		}
	}
	return present, nil
}

func presentOf(ctx context.Context, id adapters.VolumeID, open OpenBackend) (all []adapters.Snapshot, err error) {
	a, err := open(ctx, id.Backend)
	if err != nil {
		return nil, err
	}
	for s, err := range a.Snapshots(ctx, adapters.Filter{Volume: id}) {
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}
