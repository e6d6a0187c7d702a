package backup

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
)

// The volume of the kill test is the same in every process: after n rounds of writes it holds a content that only
// depends on n and the run.
const (
	killChunk = 64 << 10
	killSize  = 12 << 20
	killFirst = 4 << 20 // bytes of the first, full backup: several chunks for each that stores them
	killRound = 1 << 20 // bytes of each increment
)

type killVolume struct {
	adapter adapters.Adapter
	volume  *mem.Volume
	model   *model
	rng     *rand.Rand
	round   int
}

func newKillVolume(run uint64) (*killVolume, error) {
	store := new(mem.Store)
	v, err := store.Create("vol", killSize)
	if err != nil {
		return nil, err
	}
	return &killVolume{adapter: store.Adapter("mem"), volume: v, model: newModel(killSize), rng: rand.New(rand.NewPCG(run, 99))}, nil
}

// next writes a round and cuts it.
func (k *killVolume) next(ctx context.Context) (adapters.SnapshotID, error) {
	p, off := random(k.rng, killFirst), int64(0)
	if k.round > 0 {
		p, off = random(k.rng, killRound), k.rng.Int64N(killSize-killRound)
	}
	k.round++
	if _, err := k.volume.WriteAt(p, off); err != nil {
		return adapters.SnapshotID{}, err
	}
	k.model.write(p, off)
	s, err := k.adapter.CreateSnapshot(ctx, adapters.VolumeID{Backend: "mem", ID: "local/vol"}, fmt.Sprintf("round-%d", k.round))
	if err != nil {
		return adapters.SnapshotID{}, err
	}
	return s.ID, k.adapter.Publish(ctx, s.ID, adapters.Notes{})
}

func (k *killVolume) from() adapters.Adapter { return k.adapter }

func (k *killVolume) holds(w *world, handle string) {
	mustEqual(w.t, handle, w.content(handle), k.model)
}

func killID(run uint64, round int) string { return fmt.Sprintf("run-%d-%d", run, round) }

// killSource is a volume that is backed up until somebody is killed: the same in every process, by its run and round.
type killSource interface {
	from() adapters.Adapter
	next(context.Context) (adapters.SnapshotID, error) // begins a round and cuts it
	holds(w *world, handle string)                     // fails the test unless the backup is of this round
}

// killedForm is a form of volumes to be killed with.
type killedForm struct {
	make func(run uint64) (killSource, error)
	pace Pace // of the child's checkpoints
	runs int
	most int // backups that a child makes
}

var killedForms = map[string]killedForm{
	"kill":      {func(run uint64) (killSource, error) { return newKillVolume(run) }, Pace{}, 24, 3},
	"kill-tree": {func(run uint64) (killSource, error) { return newKillTree(run) }, Pace{Bytes: 1, Time: 1}, 8, 4},
}

// killedChild makes backups until it is killed.
func killedChild(f killedForm) error {
	ctx := context.Background()
	var run uint64
	if _, err := fmt.Sscan(os.Getenv("RUN"), &run); err != nil {
		return err
	}
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	k, err := f.make(run)
	if err != nil {
		return err
	}
	fmt.Println("open")
	for round := 1; ; round++ {
		s, err := k.next(ctx)
		if err != nil {
			return err
		}
		report, err := Run(ctx, Request{Adapter: k.from(), Snapshot: s, Repository: r, ID: killID(run, round), Pace: f.pace})
		if err != nil {
			return err
		}
		fmt.Println("made", report.Kind, report.Seconds)
	}
}

// killsEach is how many runs one repository is for: each of them is followed by a verification of all that is in it.
const killsEach = 10

// Killed at any moment, a backup leaves a repository in which what is listed is right, what was reported is listed,
// and the next backup is right.
func TestKilled(t *testing.T) {
	t.Parallel()
	killBackups(t, newWorld(t, killChunk, killSize), "kill")
}

func killBackups(t *testing.T, w *world, what string) {
	f := killedForms[what]
	runs := kills(f.runs)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	full, incremental := 0, 0
	// The first run is killed after its last backup, and says how long that takes here; the others any time until then.
	pace := time.Hour
	for run := range uint64(runs) {
		after := pace
		if run > 0 {
			after = time.Duration(rng.Int64N(int64(pace)))
		}
		if run > 0 && run%killsEach == 0 {
			w.anew()
		}
		c := runChild(t, what, after, f.most, "REPOSITORY="+w.at.Path, fmt.Sprint("RUN=", run))
		if !c.killed {
			t.Fatal("the child ended by itself")
		}
		if run == 0 {
			pace = c.lived
		}
		w.sound()

		k, err := f.make(run)
		if err != nil {
			t.Fatal(err)
		}
		for round := 1; ; round++ {
			s, err := k.next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			b, err := w.repo.Backup(t.Context(), killID(run, round))
			if err == nil {
				if b.Kind == repository.Full {
					full++
				} else {
					incremental++
				}
				k.holds(w, b.Handle.String())
				continue
			}
			// The first round that the child did not finish.
			if round <= len(c.said) {
				t.Fatalf("%d backups were reported, the %d. is not there: %v", len(c.said), round, err)
			}
			r, err := Run(t.Context(), Request{Adapter: k.from(), Snapshot: s, Repository: w.repo, ID: killID(run, round)})
			if err != nil {
				t.Fatal(err)
			}
			k.holds(w, r.Backup)
			break
		}
		if left := blobs(t, w.at, ".partial"); len(left) > 0 {
			t.Fatalf("left: %v", left)
		}
	}
	t.Logf("%d kills left %d full and %d incremental backups", runs, full, incremental)
	if full == 0 || incremental == 0 {
		t.Error("no child came far enough")
	}
}
