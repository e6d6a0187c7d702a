package backup

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/integration/lab"
)

// intoFile restores a backup into a file of a pool.
func intoFile(ctx context.Context, at repository.Location, id, file string, opened func()) (RestoreReport, error) {
	r, err := repository.Open(ctx, at, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return RestoreReport{}, err
	}
	defer r.Close(ctx)
	a, err := reflink.Kind().Open(ctx, adapters.Config{Name: "reflink"})
	if err != nil {
		return RestoreReport{}, err
	}
	defer a.Close()
	opened()
	return Restore(ctx, RestoreRequest{Source: FromBackup(r, id), Target: a, Volume: adapters.VolumeID{Backend: "reflink", ID: file}})
}

func restoringChild() error {
	_, err := intoFile(context.Background(), repository.Location{Path: os.Getenv("REPOSITORY")}, os.Getenv("BACKUP"), os.Getenv("FILE"), func() { fmt.Println("open") })
	return err
}

// Killed at any moment, a restore leaves no volume, or the whole one; the same restore again finishes it, and nothing
// half-done is left beside it.
func TestKilledRestore(t *testing.T) {
	t.Parallel()
	l := lab.Test(t)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 4<<30)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, 64<<10, 96<<20)
	w.write(random(rand.New(rand.NewPCG(4, 4)), 80<<20), 8<<20)
	s, want := w.cut()
	id := backupID(t, w.backup(s).Backup)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	pace := time.Hour // the first is not killed, and says how long a restore takes here
	killed, whole, found := 0, 0, int64(0)
	for run := 0; killed < kills(12); run++ {
		file := filepath.Join(pool.Mount, fmt.Sprintf("volume-%d.img", run))
		after := pace
		if run > 0 {
			after = time.Duration(rng.Int64N(int64(pace)))
		}
		c := runChild(t, "restore", after, 0, "REPOSITORY="+w.at.Path, "BACKUP="+id, "FILE="+file)
		if c.killed {
			killed++
			w.sound()
		}
		if run == 0 {
			pace = c.lived
		}
		if _, err := os.Stat(file); err == nil {
			whole++
		} else {
			report, err := intoFile(t.Context(), w.at, id, file, func() {})
			if err != nil {
				t.Fatal(err)
			}
			found += report.BytesFound
		}
		mustEqual(t, fmt.Sprintf("run %d", run), openFile(t, file), want)
		entries, err := os.ReadDir(pool.Mount)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".stillpoint-restore") {
				t.Fatalf("run %d: left %s", run, e.Name())
			}
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills; %d volumes were whole; the others continued with %d MiB", killed, whole, found>>20)
}
