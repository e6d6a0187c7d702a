package repository

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/fault"
)

// kills is how often a test kills: as often as it is made for, or as STILLPOINT_KILLS says, which `make soak` sets.
func kills(otherwise int) int {
	n := otherwise
	if _, err := fmt.Sscan(os.Getenv("STILLPOINT_KILLS"), &n); err != nil {
		return otherwise
	}
	return n
}

func childRepository(later time.Duration) (*Repository, error) {
	var skew time.Duration
	if _, err := fmt.Sscan(os.Getenv("SKEW"), (*int64)(&skew)); err != nil {
		return nil, err
	}
	return Open(context.Background(), Location{Path: os.Getenv("REPOSITORY")}, secret,
		OpenOptions{Host: "test", Locks: os.Getenv("LOCKS")}.Skewed(skew+later, skew+later))
}

// forgettingChild forgets backups, two at once, until it is killed.
func forgettingChild() error {
	r, err := childRepository(0)
	if err != nil {
		return err
	}
	fmt.Println("open")
	for pair := range slices.Chunk(strings.Fields(os.Getenv("IDS")), 2) {
		if err := r.Forget(context.Background(), pair...); err != nil {
			return err
		}
		fmt.Println(pair[0])
	}
	select {}
}

// killCycles is how many days a child maintains at most.
const killCycles = 3

// maintainingChild maintains, a full cycle a day, until it is killed.
func maintainingChild() error {
	fmt.Println("open")
	for n := range killCycles {
		r, err := childRepository(time.Duration(n) * 25 * time.Hour)
		if err != nil {
			return err
		}
		if _, err := r.Maintain(context.Background(), MaintainOptions{Full: true}); err != nil {
			return err
		}
		fmt.Println(n)
		if err := r.Close(context.Background()); err != nil {
			return err
		}
	}
	select {}
}

// killChild runs a child and kills it after a while, or when it has said as much as it will. It returns what it said, and
// how long it lived after it had opened the repository.
func (a *aged) killChild(child string, after time.Duration, most int, env ...string) (said []string, lived time.Duration) {
	a.t.Helper()
	program, err := childProgram()
	if err != nil {
		a.t.Fatal(err)
	}
	c := exec.Command(program)
	c.Env = append(append(os.Environ(), childVariable+"="+child, "REPOSITORY="+a.at.Path, "LOCKS="+a.run, fmt.Sprint("SKEW=", int64(a.now))), env...)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		a.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "open" {
		c.Process.Kill()
		a.t.Fatalf("the child says %q: %v", lines.Text(), c.Wait())
	}
	opened := time.Now()
	timer := time.AfterFunc(after, func() { c.Process.Kill() })
	defer timer.Stop()
	for lines.Scan() {
		if said = append(said, lines.Text()); len(said) == most {
			c.Process.Kill()
		}
	}
	lived = time.Since(opened)
	if err := c.Wait(); err == nil || c.ProcessState.Exited() {
		a.t.Fatalf("the child ended by itself: %v", err)
	}
	return said, lived
}

// Killed at any moment, forgetting and maintaining leave a repository in which every backup that is listed is right, what
// was said to be forgotten is gone and nothing else, and which goes on as if nothing had happened.
func TestKilledForgetAndMaintenance(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	d := &disk{name: "v", chunks: make([]uint64, 1300), random: true}
	next := uint64(0)
	paces := [2]time.Duration{time.Hour, time.Hour} // the first run says how long all of it takes here
	within := func(run, which int) time.Duration {
		if run == 0 {
			return paces[which]
		}
		return time.Duration(rng.Int64N(int64(paces[which])))
	}
	half, cycles := 0, 0
	for run := range kills(9) {
		var ids []string
		for n := range 7 {
			for range 8 {
				next++
				d.chunks[rng.IntN(60)*21] = next
			}
			id := fmt.Sprintf("run-%d-%d", run, n)
			a.backup(d, id)
			ids = append(ids, id)
		}
		doomed := ids[:6]
		a.leap(time.Second) // a clock that stands still would be one that is behind

		said, lived := a.killChild("forget", within(run, 0), len(doomed)/2, "IDS="+strings.Join(doomed, " "))
		if run == 0 {
			paces[0] = lived
		}
		for i := 0; i < len(doomed); i += 2 {
			gone := 0
			for _, id := range doomed[i : i+2] {
				if _, err := a.repo.Backup(t.Context(), id); fault.KindOf(err) == fault.NotFound {
					delete(a.has, id)
					gone++
				} else if err != nil {
					t.Fatal(err)
				}
			}
			if gone == 1 || gone == 0 && i/2 < len(said) {
				t.Fatalf("run %d: %d of %v are gone, and %d pairs were said to be", run, gone, doomed[i:i+2], len(said))
			}
		}
		if len(said) < len(doomed)/2 {
			half++
		}
		a.check()

		a.leap(25 * time.Hour)
		said, lived = a.killChild("maintain", within(run, 1), killCycles)
		if run == 0 {
			paces[1] = lived
		}
		cycles += len(said)
		a.leap(0)
		a.check()
		a.leap(killCycles * 25 * time.Hour)
		a.check()
		a.maintain(MaintainOptions{})
		a.check()
		if left := a.has[ids[6]]; left == nil {
			t.Fatal("the last backup is not there")
		}
		if run%2 == 1 { // old ones go, or a thousand runs would take forever
			for id := range a.has {
				if !strings.HasPrefix(id, fmt.Sprintf("run-%d-", run)) {
					a.forget(id)
				}
			}
		}
	}
	for range 6 {
		a.leap(25 * time.Hour)
		a.maintain(MaintainOptions{})
	}
	a.check()
	s := a.space()
	t.Logf("%d times forgetting was cut short, %d cycles were whole; at the end %d KiB on the medium, %d KiB in use, %d KiB reclaimable",
		half, cycles, s.Medium>>10, s.Backups>>10, s.Reclaimable>>10)
	// Kopia keeps a pack of which 60 % are alive, and the last one in any case.
	if s.Medium > 2*s.Backups+24<<20 || s.Reclaimable > 12<<20 {
		t.Errorf("the space did not come back: %d bytes on the medium, %d in use, %d reclaimable", s.Medium, s.Backups, s.Reclaimable)
	}
	if cycles < killCycles {
		t.Error("not even the first child came to its end")
	}
}
