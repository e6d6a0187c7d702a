package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// VerifyRequest asks whether backups can be restored. What several of them share is looked at once.
type VerifyRequest struct {
	Repository *repository.Repository
	ID         string        // a backup
	IDs        []string      // and more
	All        bool          // or all there are, and also what is in the repository and no backup reads
	OlderThan  time.Duration // with All: only those whose last full verification is longer ago than that; 0: all
	Quick      bool          // read no data: everything must be in the index, and within a blob that exists
	Budget     Budget
	Progress   *Progress          // may be nil
	Each       func(VerifyReport) // is told of each backup when it is done; may be nil
}

// VerifyReport is what a verification found out about a backup. Counts are bytes.
type VerifyReport struct {
	Backup        string   `json:"backup"`
	Quick         bool     `json:"quick,omitempty"` // no data was read
	Size          int64    `json:"size"`
	BytesVerified int64    `json:"bytes_verified"`     // of the volume, in chunks that are right; all-zero ones are not counted
	BytesRead     int64    `json:"bytes_read"`         // of those, how many no backup before it in this run had
	BytesBad      int64    `json:"bytes_bad"`          // of the volume, that cannot be restored
	Bad           []string `json:"bad,omitempty"`      // what is wrong, by offset; the first hundred
	Warnings      []string `json:"warnings,omitempty"` // why nothing was recorded
	Seconds       float64  `json:"seconds"`
	Faults        int      `json:"faults"` // how many things are wrong
}

// VerifySummary is a whole run.
type VerifySummary struct {
	Backups int      `json:"backups"`           // that were looked at
	Damaged []string `json:"damaged,omitempty"` // handles of those that cannot be restored bit for bit
	// Rot is what else is wrong in the repository, of a run over all backups: a sentence for each blob.
	Rot     []string `json:"rot,omitempty"`
	Seconds float64  `json:"seconds"`
}

const badMax = 100 // so many of what is wrong are reported in words

// Verify reads every chunk of a backup from the medium and checks it, and that its index and its description fit
// together. A backup that cannot be restored bit for bit is a report together with an error of kind Corrupt. That
// everything is right is recorded in the repository, and so is what is damaged, unless it cannot be written: the next
// backup stores that anew and relies on none of it.
func Verify(ctx context.Context, q VerifyRequest) (VerifyReport, error) {
	var report VerifyReport
	q.Each = func(r VerifyReport) { report = r }
	_, err := VerifyAll(ctx, q)
	return report, err
}

// VerifyAll verifies several backups. It is Corrupt if anything is, after it has looked at everything.
func VerifyAll(ctx context.Context, q VerifyRequest) (summary VerifySummary, err error) {
	started := time.Now()
	ctx, end := repository.Operation(ctx)
	defer end()
	chosen, err := q.choose(ctx)
	if err != nil {
		return summary, err
	}
	m, err := q.Repository.OpenMedium(ctx)
	if err != nil {
		return summary, err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	c := newChecker(m, q.Quick, q.Budget, q.Progress)
	for _, b := range chosen {
		c.progress.Total.Add(b.Data)
	}
	book := ledger{r: q.Repository}
	var loose []loose
	defer func() {
		ctx := context.WithoutCancel(ctx)
		err = errors.Join(err, book.write(ctx), c.note(ctx, loose))
	}()
	var first error
	for _, b := range chosen {
		begun := time.Now()
		found, err := c.backup(ctx, b)
		if err != nil {
			return summary, fmt.Errorf("verifying %s: %w", b.Handle, err)
		}
		report := found.report(b)
		report.Quick, report.Seconds = q.Quick, time.Since(begun).Seconds()
		summary.Backups++
		if err := report.fault(); err != nil {
			summary.Damaged = append(summary.Damaged, report.Backup)
			first = errors.Join(first, err)
		} else if !q.Quick {
			if err := book.sound(ctx, b.ID); err != nil {
				report.Warnings = append(report.Warnings, err.Error())
			}
		}
		if q.Each != nil {
			q.Each(report)
		}
	}
	if q.All && q.OlderThan == 0 {
		if summary.Rot, loose, err = survey(ctx, c); err != nil {
			return summary, err
		}
		if len(summary.Rot) > 0 {
			first = errors.Join(first, fault.Errorf(fault.Corrupt, "the repository is damaged: %s (%d faults); see `stillpoint repair --all --dry-run`", summary.Rot[0], len(summary.Rot)))
		}
	}
	summary.Seconds = time.Since(started).Seconds()
	return summary, first
}

// choose finds the backups that are meant.
func (q VerifyRequest) choose(ctx context.Context) ([]repository.Backup, error) {
	if q.All {
		all, err := q.Repository.Backups(ctx, repository.Filter{})
		if err != nil {
			return nil, err
		}
		var chosen []repository.Backup
		for _, b := range all {
			if q.OlderThan == 0 || time.Since(b.Verified) >= q.OlderThan {
				chosen = append(chosen, b)
			}
		}
		return chosen, nil
	}
	ids := q.IDs
	if q.ID != "" {
		ids = append([]string{q.ID}, ids...)
	}
	var chosen []repository.Backup
	seen := map[string]bool{}
	for _, id := range ids {
		b, err := q.Repository.Backup(ctx, id)
		if err != nil {
			return nil, err
		}
		if !seen[id] {
			seen[id] = true
			chosen = append(chosen, b)
		}
	}
	return chosen, nil
}

// report puts what was found into words.
func (f finding) report(b repository.Backup) VerifyReport {
	r := VerifyReport{Backup: b.Handle.String(), Size: b.Size, BytesVerified: f.data, BytesRead: f.read, Faults: len(f.hurts)}
	for _, h := range f.hurts {
		r.BytesBad += h.Length
		r.BytesVerified -= h.data
		if len(r.Bad) < badMax {
			r.Bad = append(r.Bad, h.String())
		}
	}
	return r
}

func (r VerifyReport) fault() error {
	if r.Faults == 0 {
		return nil
	}
	return fault.Errorf(fault.Corrupt, "backup %s is damaged: %s (%d faults, %d bytes cannot be restored); `stillpoint repair %s` stores again what a snapshot still has",
		r.Backup, r.Bad[0], r.Faults, r.BytesBad, r.Backup)
}

// survey checks what no backup reads.
func survey(ctx context.Context, c *checker) ([]string, []loose, error) {
	rot, err := c.m.Survey(ctx)
	if err != nil {
		return nil, nil, err
	}
	var words []string
	for _, r := range rot {
		words = append(words, r.String())
	}
	if c.quick {
		return words, nil, nil
	}
	loose, err := c.rest(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, l := range loose {
		words = append(words, l.why)
	}
	return words, loose, nil
}

// ledger collects which backups are sound and records it now and then: each time costs a few blobs.
type ledger struct {
	r      *repository.Repository
	sounds []string
	at     time.Time // of the last record
	failed bool
}

// ledgerEvery is how much of the knowledge a killed verification may lose.
const ledgerEvery = time.Minute

func (l *ledger) sound(ctx context.Context, id string) error {
	l.sounds = append(l.sounds, id)
	if l.at.IsZero() {
		l.at = time.Now()
	}
	if time.Since(l.at) < ledgerEvery {
		return nil
	}
	return l.write(ctx)
}

// write records. A repository that cannot be written from here can be verified all the same.
func (l *ledger) write(ctx context.Context) error {
	if l.failed || len(l.sounds) == 0 {
		return nil
	}
	err := l.r.MarkAllVerified(ctx, l.sounds, time.Now())
	l.sounds, l.at = nil, time.Now()
	if fault.KindOf(err) == fault.Invalid {
		l.failed = true
		return nil
	}
	return err
}
