package freezer

import (
	"path/filepath"
	"sync"
	"testing"
	"time"

	"stillpoint.io/stillpoint/integration/lab"
)

// Freezers that start together share one tmpfs: two, one over the other, would hide the first one's records.
func TestRecordFolderIsMountedOnce(t *testing.T) {
	folder := filepath.Join(lab.Test(t).Dir, "records")
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if err := prepareRecords(folder); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range mounts {
		if m.Point == folder {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d mounts on the record folder", n)
	}
}

// A rest is seen by everybody, and forgotten when it is over.
func TestRests(t *testing.T) {
	folder := t.TempDir()
	keepRest(folder, 7, time.Second, 10*second)
	if got := restOf(folder, 7, 11*second); got != 4*time.Second {
		t.Error(got)
	}
	if got := restOf(folder, 8, 11*second); got != 0 {
		t.Error(got)
	}
	if err := dropRests(folder, 15*second); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(folder + "/*"); len(left) != 0 {
		t.Error(left)
	}
}

// A living ledger is not swept, an empty one of the dead is removed, and what is no ledger is left and named.
func TestSweepOfLedgers(t *testing.T) {
	folder := filepath.Join(lab.Test(t).Dir, "records")
	if err := prepareRecords(folder); err != nil {
		t.Fatal(err)
	}
	l, err := createLedger(folder)
	if err != nil {
		t.Fatal(err)
	}
	count := func() int {
		names, _ := filepath.Glob(folder + "/*" + ledgerExt)
		return len(names)
	}
	if swept, err := Sweep(t.Context(), folder); err != nil || len(swept) != 0 || count() != 1 {
		t.Errorf("a living ledger: %v, %v", swept, err)
	}
	clear(l.data[:8])
	l.close() // releases the lock, as death does
	if _, err := Sweep(t.Context(), folder); err == nil || count() != 1 {
		t.Error("a ledger of another version was swept")
	}
	if swept, err := Sweep(t.Context(), filepath.Join(folder, "none")); err != nil || len(swept) != 0 {
		t.Errorf("no folder: %v, %v", swept, err)
	}
}
