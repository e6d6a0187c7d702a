package backup

import (
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

func TestMakePlan(t *testing.T) {
	v := adapters.VolumeID{Backend: "mem", ID: "local/vol"}
	day := func(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
	snapshot := func(name string, n int) adapters.Snapshot {
		return adapters.Snapshot{ID: adapters.SnapshotID{Volume: v, Name: name}, Size: 100, Created: day(n), State: adapters.Ready, Mark: adapters.Verified}
	}
	backup := func(id, name string, n int) repository.Backup {
		return repository.Backup{
			Handle: repository.Handle{Remote: "r", ID: id}, ID: id, Volume: v, Snapshot: adapters.SnapshotID{Volume: v, Name: name},
			Size: 100, ChunkSize: 64 << 10, Created: day(n),
		}
	}
	good := func() Facts {
		return Facts{
			ID: "new", Snapshot: snapshot("c", 3), Differs: true, ChunkSize: 64 << 10,
			Backups:   []repository.Backup{backup("b2", "b", 2), backup("b1", "a", 1)},
			Snapshots: []adapters.Snapshot{snapshot("a", 1), snapshot("b", 2), snapshot("c", 3)},
		}
	}
	for _, c := range []struct {
		name   string
		change func(*Facts)
		base   string // id, "" for a full backup
		reason string
		fault  fault.Kind
	}{
		{name: "the newest base", change: func(*Facts) {}, base: "b2", reason: "since backup:r/b2"},
		{name: "in any order", change: func(f *Facts) { f.Backups[0], f.Backups[1] = f.Backups[1], f.Backups[0] }, base: "b2"},
		{name: "full is asked for", change: func(f *Facts) { f.Full = true }, reason: "asked for"},
		{name: "cannot compare", change: func(f *Facts) { f.Differs = false }, reason: "cannot compare"},
		{name: "the first", change: func(f *Facts) { f.Backups = nil }, reason: "the first"},
		{name: "snapshot gone", change: func(f *Facts) { f.Snapshots = f.Snapshots[:1] }, base: "b1"},
		{name: "all snapshots gone", change: func(f *Facts) { f.Snapshots = nil }, reason: "no backup of this volume"},
		{name: "snapshot made anew under the name", change: func(f *Facts) { f.Snapshots[1].Created = day(4) }, base: "b1"},
		{name: "snapshot of another size", change: func(f *Facts) { f.Snapshots[1].Size++ }, base: "b1"},
		{name: "snapshot not ready", change: func(f *Facts) { f.Snapshots[1].State = adapters.Failed }, base: "b1"},
		{name: "snapshot not verified", change: func(f *Facts) { f.Snapshots[1].Mark = adapters.Cutting }, base: "b1"},
		{name: "other chunks", change: func(f *Facts) { f.Backups[0].ChunkSize *= 2 }, base: "b1"},
		{name: "suspect", change: func(f *Facts) { f.Backups[0].Suspect = "wrong" }, base: "b1"},
		{name: "all suspect", change: func(f *Facts) { f.Backups[0].Suspect, f.Backups[1].Suspect = "wrong", "too" }, reason: "no backup of this volume"},
		{name: "a canary failed", change: func(f *Facts) { f.Distrust = "the canary did not sing" }, reason: "the canary did not sing"},
		{name: "everything is asked for", change: func(f *Facts) { f.Whole = true }, reason: "asked for"},
		{name: "a known fault", change: func(f *Facts) { f.Source = audit.Source{Name: audit.RBDFastDiff, Version: "17.2.0"} }, reason: "issues/61616"},
		{name: "a known fault, frozen", change: func(f *Facts) {
			f.Source = audit.Source{Name: audit.RBDFastDiff, Version: "17.2.0"}
			f.Backups[0].Consistency, f.Snapshot.Notes.Consistency = adapters.FilesystemConsistent, adapters.FilesystemConsistent
		}, base: "b2"},
		{name: "shrunk in between", change: func(f *Facts) {
			f.Source = audit.Source{Name: audit.RBDFastDiff, Version: "19.2.0"}
			f.Backups = append(f.Backups, backup("b3", "gone", 3))
			f.Backups[2].Size = 200
		}, reason: "shrink"},
		{name: "of another size long before", change: func(f *Facts) {
			f.Source = audit.Source{Name: audit.RBDFastDiff, Version: "19.2.0"}
			f.Backups[1].Size = 200
		}, base: "b2"},
		{name: "the base is younger", change: func(f *Facts) { f.Snapshot = snapshot("a", 1) }, base: "b2"},
		{name: "target not verified", change: func(f *Facts) { f.Snapshot.Mark = adapters.Cutting }, fault: fault.Invalid},
		{name: "target pending", change: func(f *Facts) { f.Snapshot.State = adapters.Pending }, fault: fault.Busy},
		{name: "target failed", change: func(f *Facts) { f.Snapshot.State = adapters.Failed }, fault: fault.Invalid},
		{name: "id of another snapshot", change: func(f *Facts) { f.Existing = &f.Backups[0] }, fault: fault.Invalid},
		{name: "id of a snapshot that had its name", change: func(f *Facts) { b := backup("new", "c", 2); f.Existing = &b }, fault: fault.Invalid},
	} {
		f := good()
		c.change(&f)
		p, err := MakePlan(f)
		if c.fault != fault.Internal {
			if fault.KindOf(err) != c.fault {
				t.Errorf("%s: %v, want %s", c.name, err, c.fault)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		base, kind := "", repository.Full
		if p.Base != nil {
			base = p.Base.ID
		}
		if c.base != "" {
			kind = repository.Incremental
		}
		if base != c.base || p.Kind != kind || !strings.Contains(p.String(), c.reason) || p.ID != "new" || p.Existing != nil {
			t.Errorf("%s: %s (%+v)", c.name, p, p)
		}
	}

	// What is done beside: a fault that reaches the allocated blocks too, and warnings.
	f := good()
	f.Source = audit.Source{Name: audit.VMwareCBT, Version: "6.0.0.1"}
	if p, err := MakePlan(f); err != nil || !p.Whole || p.Base != nil {
		t.Errorf("%+v, %v", p, err)
	}
	f.Backups = nil
	if p, err := MakePlan(f); err != nil || !p.Whole || len(p.Warnings) != 1 || p.Reason != "the first of this volume" {
		t.Errorf("%+v, %v", p, err)
	}
	f = good()
	f.Source = audit.Source{Name: "bitmap", Tracked: true}
	if p, err := MakePlan(f); err != nil || p.Base == nil || len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0], "not known") {
		t.Errorf("%+v, %v", p, err)
	}
	// An interrupted incremental is not continued when what it was told is not to be believed any more.
	f = good()
	unfinished := repository.Checkpoint{Backup: backup("new", "c", 3), Done: 50}
	unfinished.Kind, unfinished.Base, unfinished.Snapshot = repository.Incremental, "b2", f.Snapshot.ID
	f.Unfinished = &unfinished
	if p, err := MakePlan(f); err != nil || p.Resume == nil || p.Base == nil {
		t.Errorf("%+v, %v", p, err)
	}
	for what, change := range map[string]func(*Facts){
		"the canary":         func(f *Facts) { f.Distrust = "the canary did not sing" },
		"the quirk table":    func(f *Facts) { f.Source = audit.Source{Name: audit.RBDFastDiff, Version: "17.2.0"} },
		"whoever reads all":  func(f *Facts) { f.Whole = true },
		"the allocated ones": func(f *Facts) { f.Source = audit.Source{Name: audit.VMwareCBT, Version: "6.0.0.1"} },
	} {
		g := f
		change(&g)
		if p, err := MakePlan(g); err != nil || p.Resume != nil || p.Base != nil || p.Kind != repository.Full {
			t.Errorf("continued against %s: %+v, %v", what, p, err)
		}
	}
	b := backup("new", "c", 3)
	b.Suspect = "wrong"
	f = good()
	f.Existing = &b
	if p, err := MakePlan(f); fault.KindOf(err) != fault.Corrupt {
		t.Errorf("there already and suspect: %+v, %v", p, err)
	}

	f = good()
	b = backup("new", "c", 3)
	f.Existing = &b
	if p, err := MakePlan(f); err != nil || p.Existing == nil || !strings.Contains(p.String(), "nothing to do") {
		t.Errorf("there already: %s, %v", p, err)
	}
	f = good()
	f.ID = ""
	p, err := MakePlan(f)
	if err != nil || repository.CheckID(p.ID) != nil {
		t.Errorf("derived id %q: %v", p.ID, err)
	}
	f.Snapshot.Created = day(9)
	if again, err := MakePlan(f); err != nil || again.ID == p.ID {
		t.Errorf("another snapshot of the same name has the id %q too: %v", again.ID, err)
	}
}
