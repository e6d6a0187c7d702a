package backup

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// RepairRequest asks to make backups whole again from snapshots that still exist in their backends.
type RepairRequest struct {
	Repository *repository.Repository // that can be opened: repository.Mend comes first
	IDs        []string               // the backups to look at
	All        bool                   // or all there are, and what no backup refers to
	DryRun     bool                   // change nothing, say what would be done
	// Adapter gives the backend of that name.
	Adapter  func(ctx context.Context, backend string) (adapters.Adapter, error)
	Budget   Budget
	Progress *Progress // may be nil
}

// RepairReport is what a repair found and did.
type RepairReport struct {
	Looked  int        `json:"looked"`            // backups that were read
	Hurt    []Repaired `json:"hurt,omitempty"`    // every backup in the repository that refers to something bad
	Stored  int64      `json:"stored"`            // contents stored again; of a dry run, those that could be, but for what shows only when they are
	Dropped []string   `json:"dropped,omitempty"` // bad contents that no backup refers to, and that none to come will
	Loose   []string   `json:"loose,omitempty"`   // bad contents of which nobody knows, before what is hurt is whole, who refers to them
	DryRun  bool       `json:"dry_run,omitempty"`
	Seconds float64    `json:"seconds"`
}

// Repaired is a backup that was hurt.
type Repaired struct {
	Backup   string   `json:"backup"`
	Bad      []string `json:"bad"`       // what was wrong, by offset; the first hundred
	BytesBad int64    `json:"bytes_bad"` // of the volume, that could not be restored
	Healed   bool     `json:"healed"`    // it was verified again and is whole; of a dry run: everything bad that shows was found in a snapshot
	Left     []string `json:"left,omitempty"`
	Why      []string `json:"why,omitempty"` // what stood in the way
}

// suspectPrefix begins the suspicion that a repair leaves, and that a later one may take back.
const suspectPrefix = "damaged: "

// Repair verifies backups, finds every backup in the repository that refers to what is bad, and stores again what a
// snapshot still has: bytes of the volume whose name is the lost one, of a tree at the same path. Indexes, directories and
// descriptions are made again the same way. Everything gets the name that it had, so that all backups which share it are
// whole again. Nothing is deleted that is not stored again, but bad contents that no backup refers to. Those that were hurt
// are verified again; the ones that still are get marked as suspect. It is Corrupt if something is left.
//
// It may be killed at any time and begun anew.
func Repair(ctx context.Context, q RepairRequest) (report RepairReport, err error) {
	started := time.Now()
	chosen, err := VerifyRequest{Repository: q.Repository, IDs: q.IDs, All: q.All}.choose(ctx)
	if err != nil {
		return report, err
	}
	everybody, err := q.Repository.Backups(ctx, repository.Filter{})
	if err != nil {
		return report, err
	}
	p := &repairer{q: q, sources: newSources(q.Adapter), hurt: map[string]*patient{}}
	defer func() { err = errors.Join(err, p.sources.close()) }()
	report.Looked, report.DryRun = len(chosen), q.DryRun
	if err := p.examine(ctx, chosen, everybody, &report); err != nil {
		return report, err
	}
	for round := 0; len(p.order) > 0 && round < maxRounds; round++ {
		stored, err := p.heal(ctx)
		if err != nil {
			return report, err
		}
		report.Stored += stored
		if stored == 0 || q.DryRun {
			break
		}
		if err := p.again(ctx); err != nil {
			return report, err
		}
		if p.whole() {
			break
		}
	}
	left := 0
	for _, s := range p.order {
		r := s.repaired(q.DryRun)
		report.Hurt = append(report.Hurt, r)
		if !r.Healed {
			left++
		}
		if !q.DryRun {
			if err := s.mark(ctx, q.Repository, r); err != nil {
				return report, err
			}
		}
	}
	report.Seconds = time.Since(started).Seconds()
	if left > 0 {
		return report, fault.Errorf(fault.Corrupt, "%d of %d hurt backups cannot be made whole: no snapshot has what they lack", left, len(p.order))
	}
	return report, nil
}

// maxRounds is how often what was stored again is read again: the folder of a backup shows its tree, directories their files,
// a top level its segments, a segment its chunks.
const maxRounds = 5

// repairer is a repair under way.
type repairer struct {
	q       RepairRequest
	sources *sources
	hurt    map[string]*patient // by the backup's id
	order   []*patient
}

// patient is a backup that is hurt.
type patient struct {
	backup repository.Backup
	first  []Hurt // as it was found
	hurts  []Hurt // as it is now
	found  int    // of a dry run: how many of hurts a snapshot has
	why    map[string]bool
}

// examine verifies what was chosen, and finds who else is hurt by what is bad.
func (p *repairer) examine(ctx context.Context, chosen, everybody []repository.Backup, report *RepairReport) (err error) {
	m, err := p.q.Repository.OpenMedium(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	c := newChecker(m, false, p.q.Budget, p.q.Progress)
	looked := map[string]bool{}
	for _, b := range chosen {
		c.progress.Total.Add(b.Data)
	}
	for _, b := range chosen {
		f, err := c.backup(ctx, b)
		if err != nil {
			return fmt.Errorf("verifying %s: %w", b.Handle, err)
		}
		looked[b.ID] = true
		p.admit(b, f.hurts)
	}
	if len(c.bad)+len(c.broken) > 0 {
		for _, b := range everybody {
			if looked[b.ID] {
				continue
			}
			f, err := c.known(ctx, b)
			if err != nil {
				return fmt.Errorf("looking at %s: %w", b.Handle, err)
			}
			p.admit(b, f)
		}
	}
	if !p.q.All {
		return p.note(ctx, c, nil)
	}
	loose, err := c.rest(ctx)
	if err != nil {
		return err
	}
	if err := p.note(ctx, c, loose); err != nil {
		return err
	}
	to := &report.Dropped
	if p.hidden() {
		to = &report.Loose
	}
	for _, l := range loose {
		*to = append(*to, l.why)
	}
	if p.q.DryRun || len(report.Dropped) == 0 {
		return nil
	}
	return drop(ctx, m, loose)
}

// note records what is bad: what cannot be stored again now is so by the next backup that has it.
func (p *repairer) note(ctx context.Context, c *checker, others []loose) error {
	if p.q.DryRun {
		return nil
	}
	return c.note(ctx, others)
}

// hidden says that some index is broken, or may be, of a large file: what is in it is not known to be referred to.
func (p *repairer) hidden() bool {
	for _, s := range p.order {
		for _, h := range s.hurts {
			if h.Part == TopPart || h.Part == SegmentPart || h.Part == DirectoryPart || h.Part == FilePart && h.Length > p.q.Repository.ChunkSize() {
				return true
			}
		}
	}
	return false
}

func (p *repairer) admit(b repository.Backup, hurts []Hurt) {
	if len(hurts) == 0 {
		return
	}
	s := &patient{backup: b, first: hurts, hurts: hurts, why: map[string]bool{}}
	p.hurt[b.ID] = s
	p.order = append(p.order, s)
}

// drop gets bad contents out of the way that no backup refers to.
func drop(ctx context.Context, m *repository.Medium, all []loose) (err error) {
	h, err := m.NewHealer(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close(context.WithoutCancel(ctx))) }()
	for _, l := range all {
		if err := h.Drop(ctx, l.chunk); err != nil {
			return err
		}
	}
	return h.Flush(ctx)
}

// heal stores again what snapshots have. It returns how many contents those are.
func (p *repairer) heal(ctx context.Context) (stored int64, err error) {
	m, err := p.q.Repository.OpenMedium(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	h := &healing{m: m, r: p.q.Repository, sources: p.sources, done: map[repository.Chunk]bool{}, whole: map[string]bool{}}
	if h.chunk, err = newBuffer(max(p.q.Repository.ChunkSize(), adapters.ImageAlign)); err != nil {
		return 0, err
	}
	defer h.chunk.free()
	if !p.q.DryRun {
		if h.to, err = m.NewHealer(ctx); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, h.to.Close(context.WithoutCancel(ctx))) }()
	}
	for _, s := range p.order {
		s.found = 0
		clear(s.why)
		for _, hurt := range s.hurts {
			ok, why, err := h.one(ctx, s.backup, hurt)
			if err != nil {
				return 0, fmt.Errorf("repairing %s: %w", s.backup.Handle, err)
			}
			if ok {
				s.found++
			} else {
				s.why[why] = true
			}
		}
	}
	if h.to == nil {
		return h.count, nil
	}
	return h.count, h.to.Flush(ctx)
}

// again verifies those that are hurt, from the medium.
func (p *repairer) again(ctx context.Context) (err error) {
	m, err := p.q.Repository.OpenMedium(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	c := newChecker(m, false, p.q.Budget, p.q.Progress)
	for _, s := range p.order {
		c.progress.Total.Add(s.backup.Data)
		f, err := c.backup(ctx, s.backup)
		if err != nil {
			return fmt.Errorf("verifying %s again: %w", s.backup.Handle, err)
		}
		s.hurts = f.hurts
	}
	return p.note(ctx, c, nil) // what a lost directory had hidden
}

func (p *repairer) whole() bool {
	for _, s := range p.order {
		if len(s.hurts) > 0 {
			return false
		}
	}
	return true
}

// repaired puts a patient into words.
func (s *patient) repaired(dry bool) Repaired {
	r := Repaired{Backup: s.backup.Handle.String(), Healed: len(s.hurts) == 0 || dry && s.found == len(s.hurts)}
	for _, h := range s.first {
		r.BytesBad += h.Length
		if len(r.Bad) < badMax {
			r.Bad = append(r.Bad, h.String())
		}
	}
	if r.Healed {
		return r
	}
	for _, h := range s.hurts[:min(len(s.hurts), badMax)] {
		r.Left = append(r.Left, h.String())
	}
	for why := range s.why {
		r.Why = append(r.Why, why)
	}
	return r
}

// mark records what the repair came to.
func (s *patient) mark(ctx context.Context, r *repository.Repository, is Repaired) error {
	if !is.Healed {
		var bytes int64
		for _, h := range s.hurts {
			bytes += h.Length
		}
		return r.MarkSuspect(ctx, s.backup.ID, fmt.Sprintf("%s%d bytes cannot be restored and no snapshot has them: %s", suspectPrefix, bytes, s.hurts[0]))
	}
	if err := r.MarkVerified(ctx, s.backup.ID, time.Now()); err != nil {
		return err
	}
	if strings.HasPrefix(s.backup.Suspect, suspectPrefix) {
		return r.ClearSuspect(ctx, s.backup.ID)
	}
	return nil
}
