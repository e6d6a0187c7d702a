package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// repairRounds is how many backups the test of killed repairs has.
const repairRounds = 3

// repairChild mends and repairs the repository until it is killed or done.
func repairChild() error {
	ctx := context.Background()
	at := repository.Location{Path: os.Getenv("REPOSITORY")}
	k, err := newKillVolume(0)
	if err != nil {
		return err
	}
	for range repairRounds {
		if _, err := k.next(ctx); err != nil {
			return err
		}
	}
	fmt.Println("open")
	if _, err := repository.Mend(ctx, at, passphrase, repository.OpenOptions{Host: "test"}, false); err != nil {
		return err
	}
	r, err := repository.Open(ctx, at, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	if _, err := Repair(ctx, RepairRequest{Repository: r, All: true, Adapter: func(context.Context, string) (adapters.Adapter, error) { return k.adapter, nil }}); err != nil {
		return err
	}
	return r.Close(ctx)
}

// Killed at any moment, a repair leaves nothing worse than it was: no backup has more that is bad, and another repair
// makes all of them whole.
func TestRepairKilled(t *testing.T) {
	t.Parallel()
	w := &sick{world: newWorld(t, killChunk, killSize), t: t}
	k, err := newKillVolume(0)
	if err != nil {
		t.Fatal(err)
	}
	for round := range repairRounds {
		s, err := k.next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, err := Run(t.Context(), Request{Adapter: k.adapter, Snapshot: s, Repository: w.repo, ID: killID(0, round)})
		if err != nil {
			t.Fatal(err)
		}
		w.handles, w.wants = append(w.handles, r.Backup), append(w.wants, k.model.clone())
	}
	w.spoil(append(append(w.all("top"), w.all("segment")...), w.all("chunk")...)...)
	for i, path := range blobs(t, w.at, "x") { // and some of the indexes
		if i%2 == 0 {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	bad := map[string]int64{}
	for _, h := range w.handles {
		bad[h] = killSize + 1
	}
	// A repair of a copy says how long it takes here.
	other := repository.Location{Path: t.TempDir()}
	if err := os.CopyFS(other.Path, os.DirFS(w.at.Path)); err != nil {
		t.Fatal(err)
	}
	done, pace := repairUntil(t, other, time.Hour)
	if !done {
		t.Fatal("a repair does not end")
	}
	killed := 0
	for run := range 6 {
		if done, _ := repairUntil(t, w.at, time.Duration(rng.Int64N(int64(pace)))); done {
			break // there was less to do than before
		}
		killed++
		for h, now := range w.badness() {
			if now > bad[h] {
				t.Fatalf("run %d: %s has %d bad bytes, had %d", run, h, now, bad[h])
			}
			bad[h] = now
		}
	}
	t.Logf("killed %d times, then %v of bad bytes", killed, bad)
	if done, _ := repairUntil(t, w.at, time.Hour); !done {
		t.Error("the last repair did not end by itself")
	}
	w.whole()
}

// badness is how many bytes of each backup cannot be restored. Before the indexes are mended nobody knows: all.
func (w *sick) badness() map[string]int64 {
	w.t.Helper()
	bad := map[string]int64{}
	for _, h := range w.handles {
		bad[h] = killSize + 1
	}
	r, err := repository.Open(w.t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test"})
	if fault.KindOf(err) == fault.Corrupt {
		return bad
	} else if err != nil {
		w.t.Fatal(err)
	}
	defer r.Close(context.Background())
	for _, h := range w.handles {
		report, err := Verify(w.t.Context(), VerifyRequest{Repository: r, ID: backupID(w.t, h)})
		switch {
		case errors.Is(err, fault.NotFound):
		case err == nil || fault.KindOf(err) == fault.Corrupt:
			bad[h] = report.BytesBad
		default:
			w.t.Fatal(err)
		}
	}
	return bad
}

// repairUntil runs a repair and kills it after a while. It says whether the repair ended before, and how long it took.
func repairUntil(t *testing.T, at repository.Location, after time.Duration) (done bool, took time.Duration) {
	t.Helper()
	c := runChild(t, "repair", after, 0, "REPOSITORY="+at.Path)
	return !c.killed, c.lived
}
