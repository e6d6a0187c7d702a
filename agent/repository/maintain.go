package repository

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/fault"
)

// MaintainOptions says how to maintain a repository.
type MaintainOptions struct {
	Full     bool // the full cycle now, due or not
	TakeOver bool // make this host the owner first
	DryRun   bool // change nothing, only say what is due
}

// Maintenance is what maintaining did, or would do.
type Maintenance struct {
	Remote      string            `json:"remote"`
	Owner       string            `json:"owner"`
	Mode        string            `json:"mode"`        // none, quick or full: what was due or wanted
	Checkpoints int               `json:"checkpoints"` // of unfinished backups, dropped because they were stale
	Tasks       []MaintenanceTask `json:"tasks"`
	Before      int64             `json:"before_bytes"` // on the medium
	After       int64             `json:"after_bytes"`
	NextQuick   time.Time         `json:"next_quick,omitzero"`
	NextFull    time.Time         `json:"next_full,omitzero"`
}

// MaintenanceTask is one of kopia's, by kopia's name for it.
type MaintenanceTask struct {
	Name    string         `json:"name"`
	Seconds float64        `json:"seconds"`
	Stats   map[string]any `json:"stats,omitempty"` // kopia's, by its names
}

// StaleCheckpoint is the age from which on nobody will continue from a checkpoint.
const StaleCheckpoint = 7 * 24 * time.Hour

// Maintain runs kopia's maintenance with its full safety times, as the package comment describes: what is due by kopia's
// schedule (often nothing), or the full cycle. It may run beside backups, restores and everything else, and may be killed
// at any point. Those of one host lock each other out by OpenOptions.Locks, which must be given. Invalid: it belongs to
// another host, which the error names. Busy: somebody on this host is at it.
// Unavailable: a clock is wrong, and nothing can be judged by its age. Corrupt: a backup refers to what is not there;
// nothing was freed.
func (r *Repository) Maintain(ctx context.Context, o MaintainOptions) (Maintenance, error) {
	m := Maintenance{Remote: r.remote, Mode: string(maintenance.ModeNone), Tasks: []MaintenanceTask{}}
	if err := r.kopia.Refresh(ctx); err != nil {
		return m, r.corrupt(err)
	}
	params, err := maintenance.GetParams(ctx, r.kopia)
	if err != nil {
		return m, r.corrupt(err)
	}
	m.Owner = params.Owner
	if r.kopia.ClientOptions().ReadOnly && !o.DryRun {
		return m, fault.Errorf(fault.Invalid, "repository %s: it is open for reading only", r.at)
	}
	me := r.kopia.ClientOptions().UsernameAtHost()
	if params.Owner != me && !o.TakeOver {
		return m, fault.Errorf(fault.Invalid, "repository %s: its maintenance belongs to %q and this is %q; run it there, or with --take-over here if that one never will again",
			r.at, params.Owner, me)
	}
	if o.DryRun {
		return r.due(ctx, m, params, o.Full)
	}
	lock, err := r.lockMaintenance()
	if err != nil {
		return m, err
	}
	defer lock.Close()
	err = repo.DirectWriteSession(ctx, r.kopia, repo.WriteSessionOptions{Purpose: "stillpoint maintenance"}, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		return r.maintain(ctx, &m, params, o, maintainer{w, lock.Name()})
	})
	if fault.KindOf(err) == fault.Internal && err != nil {
		err = r.at.fault("maintaining", err)
	}
	return m, err
}

func (r *Repository) maintain(ctx context.Context, m *Maintenance, params *maintenance.Params, o MaintainOptions, w maintainer) error {
	before, err := r.checkClocks(ctx, w)
	if err != nil {
		return err
	}
	if me := w.ClientOptions().UsernameAtHost(); params.Owner != me {
		params.Owner, m.Owner = me, me
		if err := maintenance.SetParams(ctx, w, params); err != nil {
			return err
		}
		if err := w.Flush(ctx); err != nil {
			return err
		}
	}
	if m.Before, err = r.mediumBytes(ctx); err != nil {
		return err
	}
	mode := maintenance.ModeAuto
	if o.Full {
		mode = maintenance.ModeFull
	}
	err = maintenance.RunExclusive(ctx, w, mode, false, func(ctx context.Context, p maintenance.RunParameters) error {
		m.Mode = string(p.Mode)
		if err := r.keepForgotten(ctx, w); err != nil {
			return err
		}
		if err := r.dropHealed(ctx, w); err != nil {
			return err
		}
		var err error
		if m.Checkpoints, err = r.dropStaleCheckpoints(ctx, w); err != nil {
			return err
		}
		if p.Mode == maintenance.ModeFull {
			if err := r.collect(ctx, w.DirectRepositoryWriter, p.MaintenanceStartTime); err != nil {
				return err
			}
		}
		return maintenance.Run(ctx, p, maintenance.SafetyFull)
	})
	if err != nil {
		return err
	}
	if m.After, err = r.mediumBytes(ctx); err != nil {
		return err
	}
	after, err := maintenance.GetSchedule(ctx, w)
	if err != nil {
		return err
	}
	m.NextQuick, m.NextFull = after.NextQuickMaintenanceTime, after.NextFullMaintenanceTime
	m.Tasks = tasksSince(before, after)
	return nil
}

// maintainer is the repository as kopia's maintenance sees it.
type maintainer struct {
	repo.DirectRepositoryWriter
	config string
}

// ConfigFilename names a file for kopia's own lock on this host. Kopia makes it beside its configuration, which is in
// memory here.
func (m maintainer) ConfigFilename() string { return m.config }

// ContentReader leaves manifests out of what is packed anew. A maintenance works by an index as it was when it began.
// Somebody else may compact manifests meanwhile, and what the maintenance then packs anew of the old ones counts as newer
// than that they were deleted: a backup that was forgotten is back, with or without its data.
func (m maintainer) ContentReader() content.Reader {
	return manifestsAside{m.DirectRepositoryWriter.ContentReader()}
}

type manifestsAside struct{ content.Reader }

func (m manifestsAside) IteratePacks(ctx context.Context, o content.IteratePackOptions, f content.IteratePacksCallback) error {
	return m.Reader.IteratePacks(ctx, o, func(p content.PackInfo) error {
		p.ContentInfos = slices.DeleteFunc(p.ContentInfos, func(c content.Info) bool { return c.ContentID.Prefix() == manifest.ContentPrefix })
		if len(p.ContentInfos) == 0 && o.IncludeContentInfos {
			return nil
		}
		return f(p)
	})
}

// lockMaintenance keeps others on this host out: kopia's own lock, which is a file beside this one, would make them
// believe that they were done.
func (r *Repository) lockMaintenance() (*os.File, error) {
	if r.locks == "" {
		return nil, fault.Errorf(fault.Invalid, "repository %s: maintenance needs a folder for locks", r.at)
	}
	file, err := r.lockName("maintenance", "the maintenance of "+r.at.String())
	if errors.Is(err, fault.Busy) {
		return nil, fault.Errorf(fault.Busy, "repository %s: somebody on this host is maintaining it", r.at)
	}
	return file, err
}

// checkClocks refuses when ages cannot be trusted: when kopia's clock and the medium's differ, which kopia checks as well
// but only after it has put off the next maintenance by the wrong clock, and when a maintenance was later than now.
func (r *Repository) checkClocks(ctx context.Context, w repo.DirectRepositoryWriter) (*maintenance.Schedule, error) {
	s, err := maintenance.GetSchedule(ctx, w)
	if err != nil {
		return nil, err
	}
	now := w.Time()
	for task, runs := range s.Runs {
		for _, run := range runs {
			if run.End.After(now.Add(maxSkew)) {
				return nil, fault.Errorf(fault.Unavailable, "repository %s: the clock says %s, and the maintenance of %s (%s) was later than that: either clock was wrong, and until that time has come nothing can be judged by its age",
					r.at, now.UTC().Format(time.RFC3339), run.End.UTC().Format(time.RFC3339), task)
			}
		}
	}
	if err := maintenance.SetSchedule(ctx, w, s); err != nil { // as it was: to see the medium's clock
		return nil, err
	}
	const scheduleBlob = "kopia.maintenance"
	at, err := w.BlobReader().GetMetadata(ctx, scheduleBlob)
	if err != nil {
		return nil, err
	}
	if skew := at.Timestamp.Sub(now).Abs(); skew > maxSkew {
		return nil, fault.Errorf(fault.Unavailable, "repository %s: its clock says %s and this machine's %s; set the one that is wrong",
			r.at, at.Timestamp.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return s, nil
}

// dropStaleCheckpoints deletes the checkpoints that nobody will continue from: those of backups that exist, and old ones.
func (r *Repository) dropStaleCheckpoints(ctx context.Context, w repo.DirectRepositoryWriter) (int, error) {
	found, err := w.FindManifests(ctx, map[string]string{manifest.TypeLabelKey: snapshot.ManifestType})
	if err != nil {
		return 0, err
	}
	done := map[string]bool{}
	for _, m := range found {
		if m.Labels[descriptionLabel] != "" {
			done[m.Labels[idLabel]] = true
		}
	}
	dropped := 0
	for _, m := range found {
		id := m.Labels[checkpointLabel]
		if id == "" || !done[id] && w.Time().Sub(m.ModTime) < StaleCheckpoint {
			continue
		}
		if err := w.DeleteManifest(ctx, m.ID); err != nil {
			return 0, err
		}
		dropped++
	}
	return dropped, w.Flush(ctx)
}

// due says what maintaining would do.
func (r *Repository) due(ctx context.Context, m Maintenance, params *maintenance.Params, full bool) (Maintenance, error) {
	s, err := maintenance.GetSchedule(ctx, r.kopia)
	if err != nil {
		return m, r.corrupt(err)
	}
	if m.Before, err = r.mediumBytes(ctx); err != nil {
		return m, err
	}
	m.After, m.NextQuick, m.NextFull = m.Before, s.NextQuickMaintenanceTime, s.NextFullMaintenanceTime
	now := r.kopia.Time()
	switch {
	case full, params.FullCycle.Enabled && !now.Before(s.NextFullMaintenanceTime):
		m.Mode = string(maintenance.ModeFull)
	case params.QuickCycle.Enabled && !now.Before(s.NextQuickMaintenanceTime):
		m.Mode = string(maintenance.ModeQuick)
	}
	return m, nil
}

func (r *Repository) mediumBytes(ctx context.Context) (total int64, err error) {
	err = r.kopia.BlobReader().ListBlobs(ctx, "", func(m blob.Metadata) error {
		total += m.Length
		return nil
	})
	return total, r.at.fault("listing", err)
}

// tasksSince lists the runs that are in kopia's books after and were not before, in their order.
func tasksSince(before, after *maintenance.Schedule) []MaintenanceTask {
	type run struct {
		at   time.Time
		task MaintenanceTask
	}
	var runs []run
	for name, all := range after.Runs {
		for _, i := range all {
			known := slices.ContainsFunc(before.Runs[name], func(b maintenance.RunInfo) bool { return b.Start.Equal(i.Start) })
			if !known {
				runs = append(runs, run{i.Start, MaintenanceTask{Name: string(name), Seconds: i.End.Sub(i.Start).Seconds(), Stats: stats(i)}})
			}
		}
	}
	slices.SortFunc(runs, func(a, b run) int { return a.at.Compare(b.at) })
	tasks := []MaintenanceTask{}
	for _, r := range runs {
		tasks = append(tasks, r.task)
	}
	return tasks
}

// stats are kopia's numbers of a run that are not zero.
func stats(run maintenance.RunInfo) map[string]any {
	all := map[string]any{}
	for _, extra := range run.Extra {
		var one map[string]any
		if json.Unmarshal(extra.Data, &one) != nil {
			continue // numbers for people, of which a newer kopia may have others
		}
		for name, v := range one {
			if n, ok := v.(float64); !ok || n != 0 {
				all[name] = v
			}
		}
	}
	return all
}
