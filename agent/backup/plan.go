package backup

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// Plan says what a backup will do and why.
type Plan struct {
	ID       string
	Snapshot adapters.Snapshot
	Kind     repository.Kind
	Base     *repository.Backup // of an incremental
	Reason   string
	Existing *repository.Backup // the backup is there already: nothing to do
	Whole    bool               // of a full backup: every byte is read, whatever the backend says is empty
	Warnings []string

	Unfinished *repository.Checkpoint // what an interrupted run of this backup left
	Resume     *repository.Checkpoint // the same, if it is worth continuing

	Walk  bool        // of a tree: look at everything that the backend calls unchanged, too
	facts audit.Facts // what the backend was judged by
}

// String is the plan in a sentence.
func (p Plan) String() string {
	if p.Existing != nil {
		return fmt.Sprintf("%s: nothing to do, %s", p.Snapshot.ID, p.Reason)
	}
	return fmt.Sprintf("%s: %s backup %s, %s", p.Snapshot.ID, p.Kind, p.ID, p.Reason)
}

// Facts is what a plan is made from.
type Facts struct {
	ID         string // of the backup, empty to derive it
	Snapshot   adapters.Snapshot
	Full       bool                   // a full backup is wanted
	Whole      bool                   // one that reads every byte
	Distrust   string                 // why the backend's changed blocks are not to be used
	Source     audit.Source           // who lists changed blocks
	Differs    bool                   // the backend can compare snapshots
	ChunkSize  int64                  // of the repository, bytes
	Existing   *repository.Backup     // what bears ID already
	Unfinished *repository.Checkpoint // of ID
	Spoilt     bool                   // that is damaged, and only to be replaced
	Backups    []repository.Backup    // of the volume
	Snapshots  []adapters.Snapshot    // of the volume, verified, in the backend
}

// MakePlan decides. The base is the newest backup of the volume, in chunks of the same size and not suspect, whose
// snapshot is still in the backend: the same one, not another that was given its name later. What is known of the faults
// of whoever lists changed blocks may make it a full backup all the same.
func MakePlan(f Facts) (Plan, error) {
	s := f.Snapshot
	switch {
	case s.Mark != adapters.Verified:
		return Plan{}, fault.Errorf(fault.Invalid, "snapshot %s: its cut is not verified; cut again", s.ID)
	case s.State == adapters.Pending:
		return Plan{}, fault.Errorf(fault.Busy, "snapshot %s: the backend has not finished it yet; try again later", s.ID)
	case s.State != adapters.Ready:
		return Plan{}, fault.Errorf(fault.Invalid, "snapshot %s: the backend could not make it; delete it and cut again", s.ID)
	}
	p := Plan{ID: cmp.Or(f.ID, DefaultID(s)), Snapshot: s, Kind: repository.Full}
	if e := f.Existing; e != nil {
		if !isOf(*e, s) {
			return Plan{}, fault.Errorf(fault.Invalid, "backup id %s: already that of %s from %s; choose another", e.ID, e.Snapshot, e.Created.Format(time.RFC3339))
		}
		if e.Suspect != "" {
			return Plan{}, fault.Errorf(fault.Corrupt, "backup %s: it is there and suspect, %s; back the snapshot up under another id", e.Handle, e.Suspect)
		}
		p.Kind, p.Existing, p.Reason = e.Kind, e, "it is backed up as "+e.Handle.String()
		return p, nil
	}
	p.facts = audit.Facts{Source: f.Source, TargetSize: s.Size, Smallest: s.Size, Largest: s.Size}
	p.judge()
	p.Whole = p.Whole || f.Whole
	p.Unfinished = f.Unfinished
	if f.resume(&p) {
		return p, nil
	}
	switch {
	case f.Full || f.Whole:
		p.Reason = "asked for"
		return p, nil
	case !f.Differs:
		p.Reason = "the backend cannot compare snapshots"
		return p, nil
	case len(f.Backups) == 0:
		p.Reason = "the first of this volume"
		return p, nil
	case f.Distrust != "":
		p.Reason = f.Distrust
		return p, nil
	}
	for i, b := range f.Backups {
		if !f.canBeBase(b) {
			continue
		}
		if p.Base == nil || b.Created.After(p.Base.Created) {
			p.Base = &f.Backups[i]
		}
	}
	if p.Base == nil {
		p.Reason = "no backup of this volume has its snapshot still in the backend"
		return p, nil
	}
	p.Kind, p.Reason = repository.Incremental, "since "+p.Base.Handle.String()
	if p.Walk = p.Base.Form == adapters.TreeForm && p.Base.Believed+1 >= walkEvery; p.Walk {
		p.Reason += ", looking at every file"
	}
	f.judgeBase(&p)
	return p, nil
}

// judge lets the quirk table have its say.
func (p *Plan) judge() {
	if p.Snapshot.Form == adapters.TreeForm {
		return // it is about blocks
	}
	for _, f := range audit.Judge(p.facts) {
		switch f.Verdict {
		case audit.Whole, audit.Full:
			if p.Base == nil {
				p.Warnings = append(p.Warnings, f.String()+"; every byte is read")
			}
			p.Kind, p.Base, p.Whole, p.Reason = repository.Full, nil, p.Whole || f.Verdict == audit.Whole, f.String()
			return
		case audit.Warn:
			p.Warnings = append(p.Warnings, f.String())
		}
	}
}

// canBeBase says that the backup's snapshot is still in the backend, as it was.
func (f Facts) canBeBase(b repository.Backup) bool {
	i := slices.IndexFunc(f.Snapshots, func(s adapters.Snapshot) bool { return s.ID == b.Snapshot })
	if i < 0 {
		return false
	}
	at := f.Snapshots[i]
	sized := at.Size == b.Size || b.Form == adapters.TreeForm // a backend does not know a tree's
	return isOf(b, at) && sized && at.Form == b.Form && at.State == adapters.Ready && at.Mark == adapters.Verified && b.ChunkSize == f.ChunkSize && b.Suspect == ""
}

// judgeBase lets it speak about the comparison with the base.
func (f Facts) judgeBase(p *Plan) {
	p.facts.BaseSize = p.Base.Size
	p.facts.Quiet = p.Base.Consistency.Quiet() && f.Snapshot.Notes.Consistency.Quiet()
	for _, b := range f.Backups {
		p.facts.Smallest = min(p.facts.Smallest, b.Size)
		if !b.Created.Before(p.Base.Created) {
			p.facts.Largest = max(p.facts.Largest, b.Size)
		}
	}
	p.judge()
}

// resume plans to continue an interrupted run, if that was of the same snapshot and the same base is still one, and if
// what it was told by the backend may still be believed.
func (f Facts) resume(p *Plan) bool {
	c := f.Unfinished
	if c == nil || f.Spoilt || !isOf(c.Backup, f.Snapshot) || c.Size != f.Snapshot.Size || c.ChunkSize != f.ChunkSize || f.Full && c.Kind != repository.Full || p.Whole {
		return false
	}
	if c.Kind == repository.Incremental {
		i := slices.IndexFunc(f.Backups, func(b repository.Backup) bool { return b.ID == c.Base && b.Image == c.BaseImage })
		if !f.Differs || f.Distrust != "" || i < 0 || !f.canBeBase(f.Backups[i]) {
			return false
		}
		judged := *p
		judged.Base = &f.Backups[i]
		if f.judgeBase(&judged); judged.Base == nil {
			return false
		}
		*p = judged
	}
	p.Kind, p.Resume, p.Reason = c.Kind, c, fmt.Sprintf("continues an interrupted one at %d of %d bytes", c.Done, c.Size)
	if f.Snapshot.Form == adapters.TreeForm {
		p.Reason = fmt.Sprintf("continues an interrupted one that had read %d bytes", c.Done)
	}
	return true
}

// isOf says that b is of s, and not of another snapshot that had its name before.
func isOf(b repository.Backup, s adapters.Snapshot) bool {
	return b.Snapshot == s.ID && b.Created.Equal(s.Created)
}

// DefaultID is the id of a backup of s when nobody chose one. When a backup of that id is suspect, Prepare derives
// another from it.
func DefaultID(s adapters.Snapshot) string {
	return adapters.ShortName(s.ID.Full() + " " + s.Created.UTC().Format(time.RFC3339Nano))
}

// differs says that a backend can compare snapshots of that form.
func differs(a adapters.Adapter, form adapters.Form) bool {
	if form == adapters.TreeForm {
		_, ok := adapters.As[adapters.Trees](a)
		return ok
	}
	_, ok := adapters.As[adapters.Differ](a)
	return ok
}

// Prepare asks the backend and the repository what they have, and decides. It changes nothing.
func Prepare(ctx context.Context, q Request) (Plan, error) {
	s, err := q.Adapter.Snapshot(ctx, q.Snapshot)
	if err != nil {
		return Plan{}, err
	}
	f := Facts{
		ID: q.ID, Snapshot: s, Full: q.Full, Whole: q.Whole, Distrust: q.Distrust,
		Source: q.Adapter.Capabilities().Source, ChunkSize: q.Repository.ChunkSize(),
	}
	if f.ID != "" {
		if err := repository.CheckID(f.ID); err != nil {
			return Plan{}, err
		}
	}
	all, err := q.Repository.Backups(ctx, repository.Filter{})
	if err != nil {
		return Plan{}, err
	}
	byID := map[string]*repository.Backup{}
	for i, b := range all {
		byID[b.ID] = &all[i]
		if b.Volume == s.ID.Volume {
			f.Backups = append(f.Backups, b)
		}
	}
	if f.ID == "" {
		f.ID = DefaultID(s)
		for b := byID[f.ID]; b != nil && b.Suspect != ""; b = byID[f.ID] {
			f.ID = adapters.ShortName(f.ID + " again")
		}
	}
	f.Existing = byID[f.ID]
	unfinished, err := q.Repository.Checkpoints(ctx, repository.Filter{Volume: s.ID.Volume})
	if err != nil {
		return Plan{}, err
	}
	for i, c := range unfinished {
		if c.ID == f.ID {
			f.Unfinished = &unfinished[i]
		}
	}
	if f.Differs = differs(q.Adapter, s.Form); f.Differs && f.Existing == nil && len(f.Backups) > 0 {
		for s, err := range q.Adapter.Snapshots(ctx, adapters.Filter{Volume: s.ID.Volume}) {
			if err != nil {
				return Plan{}, err
			}
			f.Snapshots = append(f.Snapshots, s)
		}
	}
	return makeSoundPlan(ctx, q.Repository, f)
}

// makeSoundPlan plans without what would hand on damage that is known: a checkpoint that refers to such contents is not
// continued, and with a base that does the backup is a full one. It stores anew what is damaged, which makes the base
// whole as well where the volume still has the bytes.
func makeSoundPlan(ctx context.Context, r *repository.Repository, f Facts) (Plan, error) {
	p, err := MakePlan(f)
	if err == nil && p.Resume != nil {
		part := p.Resume.Backup
		part.Size = p.Resume.Done
		why, err := r.Hurt(ctx, part)
		if err != nil {
			return Plan{}, err
		}
		if why != "" {
			f.Spoilt = true
			p, err = MakePlan(f)
		}
		if err != nil {
			return Plan{}, err
		}
	}
	if err != nil || p.Base == nil {
		return p, err
	}
	why, err := r.Hurt(ctx, *p.Base)
	if err != nil || why == "" {
		return p, err
	}
	f.Distrust = fmt.Sprintf("its base %s is damaged: %s", p.Base.Handle, why)
	return MakePlan(f)
}
