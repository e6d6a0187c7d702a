package backup

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
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
	killSize  = 24 << 20
	killFirst = 8 << 20 // bytes of the first, full backup
)

type killVolume struct {
	adapter adapters.Adapter
	volume  *mem.Volume
	model   []byte
	rng     *rand.Rand
	round   int
}

func newKillVolume(run uint64) (*killVolume, error) {
	store := new(mem.Store)
	v, err := store.Create("vol", killSize)
	if err != nil {
		return nil, err
	}
	return &killVolume{adapter: store.Adapter("mem"), volume: v, model: make([]byte, killSize), rng: rand.New(rand.NewPCG(run, 99))}, nil
}

// next writes a round and cuts it.
func (k *killVolume) next(ctx context.Context) (adapters.SnapshotID, error) {
	p, off := random(k.rng, killFirst), int64(0)
	if k.round > 0 {
		p, off = random(k.rng, 2<<20), k.rng.Int64N(killSize-2<<20)
	}
	k.round++
	if _, err := k.volume.WriteAt(p, off); err != nil {
		return adapters.SnapshotID{}, err
	}
	copy(k.model[off:], p)
	s, err := k.adapter.CreateSnapshot(ctx, adapters.VolumeID{Backend: "mem", ID: "local/vol"}, fmt.Sprintf("round-%d", k.round))
	if err != nil {
		return adapters.SnapshotID{}, err
	}
	return s.ID, k.adapter.Publish(ctx, s.ID, adapters.Notes{})
}

func killID(run uint64, round int) string { return fmt.Sprintf("run-%d-%d", run, round) }

// killedChild makes backups of the volume until it is killed.
func killedChild() error {
	ctx := context.Background()
	var run uint64
	if _, err := fmt.Sscan(os.Getenv("RUN"), &run); err != nil {
		return err
	}
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	k, err := newKillVolume(run)
	if err != nil {
		return err
	}
	fmt.Println("open")
	for {
		s, err := k.next(ctx)
		if err != nil {
			return err
		}
		report, err := Run(ctx, Request{Adapter: k.adapter, Snapshot: s, Repository: r, ID: killID(run, k.round)})
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
	w := newWorld(t, killChunk, killSize)
	runs := kills(24)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	full, incremental := 0, 0
	// The first run is killed after its third backup, and says how long that takes here; the others any time until then.
	const most = 3
	pace := time.Hour
	for run := range uint64(runs) {
		after := pace
		if run > 0 {
			after = time.Duration(rng.Int64N(int64(pace)))
		}
		started := time.Now()
		if run > 0 && run%killsEach == 0 {
			w.anew(killChunk)
		}
		reported := killSomewhere(t, "kill", w.at, run, after, most)
		if run == 0 {
			pace = time.Since(started)
		}
		w.sound()

		k, err := newKillVolume(run)
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
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
				seen++
				mustEqual(t, b.ID, w.content(b.Handle.String()), k.model)
				continue
			}
			// The first round that the child did not finish.
			if seen < reported {
				t.Fatalf("%d backups were reported, %d are there: %v", reported, seen, err)
			}
			r, err := Run(t.Context(), Request{Adapter: k.adapter, Snapshot: s, Repository: w.repo, ID: killID(run, round)})
			if err != nil {
				t.Fatal(err)
			}
			mustEqual(t, "the next", w.content(r.Backup), k.model)
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

// killSomewhere starts a child and kills it after a while or when it has made the most it should. It returns how many
// backups the child reported.
func killSomewhere(t *testing.T, what string, at repository.Location, run uint64, after time.Duration, most int) int {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childVariable+"="+what, "REPOSITORY="+at.Path, fmt.Sprint("RUN=", run))
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err == nil {
		err = child.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "open" {
		child.Process.Kill()
		t.Fatalf("the child says %q: %v", lines.Text(), child.Wait())
	}
	timer := time.AfterFunc(after, func() { child.Process.Kill() })
	defer timer.Stop()
	reported := 0
	for lines.Scan() {
		if reported++; reported == most {
			child.Process.Kill()
		}
	}
	if err := child.Wait(); err == nil || child.ProcessState.Exited() {
		t.Fatalf("the child ended by itself: %v", err)
	}
	return reported
}
