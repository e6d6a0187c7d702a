package repository

import (
	"context"
	"testing"
	"time"
)

// aged is a repository in which days pass in seconds.
type aged struct {
	t    *testing.T
	at   Location
	run  string
	now  time.Duration // since now
	repo *Repository
	open []*Repository
	has  map[string]*disk // what backups must hold
}

func newAged(t *testing.T) *aged {
	t.Helper()
	a := &aged{t: t, at: mustInit(t, MinChunkSize), run: t.TempDir(), has: map[string]*disk{}}
	a.pass(0)
	t.Cleanup(func() {
		for _, r := range a.open {
			if err := r.Close(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return a
}

// pass opens the repository a while later. What was open stays so.
func (a *aged) pass(d time.Duration) {
	a.t.Helper()
	a.now += d
	var err error
	if a.repo, err = Open(a.t.Context(), a.at, secret, OpenOptions{Host: "test", Locks: a.run}.Skewed(a.now, a.now)); err != nil {
		a.t.Fatal(err)
	}
	a.open = append(a.open, a.repo)
}

// leap is pass for tests that do it often: it closes what was open.
func (a *aged) leap(d time.Duration) {
	a.t.Helper()
	for _, r := range a.open {
		if err := r.Close(a.t.Context()); err != nil {
			a.t.Fatal(err)
		}
	}
	a.open = nil
	a.pass(d)
}

func (a *aged) maintain(o MaintainOptions) Maintenance {
	a.t.Helper()
	m, err := a.repo.Maintain(a.t.Context(), o)
	if err != nil {
		a.t.Fatal(err)
	}
	return m
}

func (a *aged) backup(d *disk, id string) Backup {
	a.t.Helper()
	b, err := d.backup(a.t.Context(), a.repo, id, time.Now().Add(a.now))
	if err != nil {
		a.t.Fatal(err)
	}
	a.has[id] = d.clone()
	return b
}

func (a *aged) forget(ids ...string) {
	a.t.Helper()
	if err := a.repo.Forget(a.t.Context(), ids...); err != nil {
		a.t.Fatal(err)
	}
	for _, id := range ids {
		delete(a.has, id)
	}
}

// check reads all of every backup that there must be, and looks for damage in the rest of the repository.
func (a *aged) check() {
	a.t.Helper()
	found, err := a.repo.Backups(a.t.Context(), Filter{})
	if err != nil || len(found) != len(a.has) {
		a.t.Fatalf("%d backups, want %d: %v", len(found), len(a.has), err)
	}
	for _, b := range found {
		if a.has[b.ID] == nil {
			a.t.Fatalf("backup %s is listed", b.ID)
		}
		if err := a.has[b.ID].check(a.t.Context(), a.repo, b); err != nil {
			a.t.Error(err)
		}
	}
	m, err := a.repo.OpenMedium(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	rot, err := m.Survey(a.t.Context())
	if err != nil || len(rot) > 0 {
		a.t.Errorf("a survey says: %v, %v", rot, err)
	}
	if err := m.Close(a.t.Context()); err != nil {
		a.t.Fatal(err)
	}
}

func (a *aged) space() Space {
	a.t.Helper()
	s, err := a.repo.Space(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	return s
}

// tasks are the names of what a maintenance did.
func tasks(m Maintenance) (names []string) {
	for _, t := range m.Tasks {
		names = append(names, t.Name)
	}
	return names
}

const day = 24 * time.Hour
