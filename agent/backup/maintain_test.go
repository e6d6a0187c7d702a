package backup

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// A week of backups, a policy and maintenance at the same moment each day: every backup that the policy keeps is right on
// every day, increments go on from their bases, and kopia's own command agrees at the end.
func TestAWeekOfMaintenance(t *testing.T) {
	t.Parallel()
	w := newKopiaWorld(t, 64<<10, 70<<20)
	rng := rand.New(rand.NewPCG(21, 22))
	w.write(random(rng, 6<<20), 60<<20)
	locks := t.TempDir()
	open := func(later time.Duration) *repository.Repository {
		t.Helper()
		r, err := repository.Open(t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test", Locks: locks}.Skewed(later, later))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := r.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
		return r
	}
	wants := map[string]*model{}
	for day := range 7 {
		later := time.Duration(day) * 25 * time.Hour
		w.repo = open(later)
		w.write(random(rng, 700<<10), 60<<20+rng.Int64N(8<<20))
		w.zero(61<<20, int64(day)<<18)
		s, want := w.cut()

		keeper := open(later)
		maintained := make(chan error, 1)
		go func() { // beside the backup, forgetting what the policy does not keep
			verdicts, err := Judge(t.Context(), keeper, repository.Filter{}, Policy{Last: 2}, func(context.Context, string) (adapters.Adapter, error) { return w.adapter, nil })
			var ids []string
			for _, v := range verdicts {
				if !v.Keep {
					ids = append(ids, v.Backup.ID)
				}
			}
			if err == nil {
				err = Forget(t.Context(), keeper, ids, func([]string) error { return nil })
			}
			if err == nil {
				_, err = keeper.Maintain(t.Context(), repository.MaintainOptions{Full: true})
			}
			maintained <- err
		}()
		r := w.backup(s)
		if day > 0 && (r.Kind != repository.Incremental || len(r.Warnings) > 0) {
			t.Errorf("day %d: %+v", day, r)
		}
		wants[r.Backup] = want
		if err := <-maintained; err != nil {
			t.Fatalf("day %d: %v", day, err)
		}
		w.repo = open(later)
		listed, err := w.repo.Backups(t.Context(), repository.Filter{})
		if err != nil || len(listed) < min(day+1, 2) || len(listed) > 3 {
			t.Fatalf("day %d: %d backups: %v", day, len(listed), err)
		}
		for _, b := range listed {
			mustEqual(t, fmt.Sprintf("day %d: %s", day, b.ID), w.content(b.Handle.String()), wants[b.Handle.String()])
		}
		if summary, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true}); err != nil || summary.Backups != len(listed) {
			t.Errorf("day %d: %+v: %v", day, summary, err)
		}
	}
	k := newKopia(t, w.at)
	k.run("snapshot", "verify", "--verify-files-percent=100")
	var listed []struct {
		ID   string            `json:"id"`
		Tags map[string]string `json:"tags"`
	}
	if err := json.Unmarshal([]byte(k.run("snapshot", "list", "--all", "--json")), &listed); err != nil || len(listed) < 2 {
		t.Fatalf("%v: %v", listed, err)
	}
	for _, m := range listed {
		got, _ := k.restore(m.ID)
		handle := repository.Handle{Remote: "default", ID: m.Tags["tag:backup"]}.String()
		mustEqual(t, "kopia's disk.img of "+handle, got, wants[handle])
	}
}
