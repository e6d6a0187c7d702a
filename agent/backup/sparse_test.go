package backup

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
)

// memoryMax is the promise: no backup or restore takes more, whatever the volume's size.
const memoryMax = 300 << 20

type sparseReport struct {
	Full, Incremental Report
	Restore           RestoreReport
	Peak              int64 // resident memory, bytes
}

// peakMemory is what this process had resident at most. (A child's rusage counts its parent's memory before the exec.)
func peakMemory() (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	var kib int64
	_, err = fmt.Sscan(rest, &kib)
	return kib << 10, err
}

// sparseChild backs a volume of 16 TiB up twice, with little in it, and restores it.
func sparseChild() error {
	ctx := context.Background()
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	store := new(mem.Store)
	v, err := store.Create("vol", mem.SizeMax)
	if err != nil {
		return err
	}
	a := store.Adapter("mem")
	cut := func(name string) (adapters.SnapshotID, error) {
		s, err := a.CreateSnapshot(ctx, adapters.VolumeID{Backend: "mem", ID: "local/vol"}, name)
		if err != nil {
			return s.ID, err
		}
		return s.ID, a.Publish(ctx, s.ID, adapters.Notes{})
	}
	backup := func(name string, step int64) (Report, error) {
		for off := int64(0); off < mem.SizeMax; off += step {
			if _, err := v.WriteAt(fmt.Appendf(nil, "%s at %d", name, off), off); err != nil {
				return Report{}, err
			}
		}
		s, err := cut(name)
		if err != nil {
			return Report{}, err
		}
		return Run(ctx, Request{Adapter: a, Snapshot: s, Repository: r, ID: name})
	}
	var out sparseReport
	if out.Full, err = backup("one", mem.SizeMax/64); err != nil {
		return err
	}
	if out.Incremental, err = backup("two", mem.SizeMax/16); err != nil {
		return err
	}
	if out.Restore, err = Restore(ctx, RestoreRequest{Source: FromBackup(r, "two"), Target: a, Volume: adapters.VolumeID{Backend: "mem", ID: "new"}}); err != nil {
		return err
	}
	if out.Peak, err = peakMemory(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

// 16 TiB with next to nothing in it: cost follows what is there.
func TestSparse(t *testing.T) {
	t.Parallel()
	at := repository.Location{Path: t.TempDir()}
	if err := repository.Init(t.Context(), at, passphrase, repository.Options{}.Quick()); err != nil {
		t.Fatal(err)
	}
	var got sparseReport
	childReport(t, &got, "sparse", "REPOSITORY="+at.Path)
	t.Logf("peak %d MiB; full %.2f s, incremental %.2f s, restore %.2f s", got.Peak>>20, got.Full.Seconds, got.Incremental.Seconds, got.Restore.Seconds)
	if got.Peak > memoryMax {
		t.Errorf("peak of %d MiB", got.Peak>>20)
	}
	if f := got.Full; f.Kind != repository.Full || f.BytesRead != 64<<20 || f.BytesNew != 64<<20 {
		t.Errorf("%+v", f)
	}
	if i := got.Incremental; i.Kind != repository.Incremental || i.BytesRead != 16<<20 || i.BytesReused != 48<<20 {
		t.Errorf("%+v", i)
	}
	if r := got.Restore; r.BytesWritten != 64<<20 || r.BytesZeroed != 0 {
		t.Errorf("%+v", r)
	}
}
