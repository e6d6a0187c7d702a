package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"stillpoint.io/stillpoint/integration/lab"
)

// freeze measures how long filesystems stand still: through Stillpoint, and with fsfreeze and cp --reflink on the same
// volumes, which is what people do today.
func (b *bench) freeze(ctx context.Context) error {
	b.say("\n## Freeze window\n")
	b.say("Time from the return of FIFREEZE to the return of FITHAW, of the filesystem that stood longest. Today: `fsfreeze -f` on each, `cp --reflink` of each, `fsfreeze -u` on each, from the first command to the last.\n")
	b.say("| volumes (ext4 and XFS) | load | cuts | Stillpoint p50 / p99 / max, ms | today p50 / p99 / max, ms | p99, today ÷ Stillpoint |")
	b.say("|---|---|---|---|---|---|")
	volumes, err := b.volumes(ctx, "steady", 2*gib)
	if err != nil {
		return err
	}
	const working = 24 * mib // rewritten by the writer: at most 384 extents a volume
	writer, err := lab.StartWriter(mountsOf(volumes), working, 20*mib)
	if err != nil {
		return err
	}
	err = b.compareFreezes(ctx, volumes, "writer of 20 MB/s", 200, func() error { return nil })
	if err == nil {
		err = b.compareFreezes(ctx, volumes, "writer of 20 MB/s, 512 MiB dirty at the start", 20, func() error { return dirty(volumes, 512*mib) })
	}
	if err := errors.Join(err, writer.Stop()); err != nil {
		return err
	}
	for _, extents := range []int{10_000, 100_000} {
		volumes, err := b.volumes(ctx, fmt.Sprintf("x%d", extents), 2*gib)
		if err != nil {
			return err
		}
		if err := b.fragment(ctx, volumes, extents); err != nil {
			return err
		}
		writer, err := lab.StartWriter(mountsOf(volumes), working, 20*mib)
		if err != nil {
			return err
		}
		err = b.compareFreezes(ctx, volumes, fmt.Sprintf("writer of 20 MB/s, %d extents each", extents), 20, func() error { return nil })
		if err := errors.Join(err, writer.Stop()); err != nil {
			return err
		}
		for _, v := range volumes {
			if err := v.Down(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) volumes(ctx context.Context, name string, size int64) (volumes []*lab.Filesystem, err error) {
	for _, fstype := range []string{"ext4", "xfs"} {
		v, err := b.lab.Volume(ctx, b.pool.Mount, name+"-"+fstype, fstype, size)
		if err != nil {
			return nil, err
		}
		volumes = append(volumes, v)
	}
	return volumes, nil
}

// compareFreezes cuts by both ways in turn and prints a row.
func (b *bench) compareFreezes(ctx context.Context, volumes []*lab.Filesystem, load string, cuts int, before func() error) error {
	var ours, theirs []float64
	for i := range cuts {
		if err := before(); err != nil {
			return err
		}
		ms, err := b.ourCut(ctx, volumes, fmt.Sprintf("cut-%d", i))
		if err != nil {
			return err
		}
		ours = append(ours, ms)
		if err := before(); err != nil {
			return err
		}
		if ms, err = theirCut(ctx, volumes); err != nil {
			return err
		}
		theirs = append(theirs, ms)
	}
	o, t := quantiles(ours), quantiles(theirs)
	b.say("| 2 | %s | %d | %.1f / %.1f / %.1f | %.1f / %.1f / %.1f | %.1f |", load, cuts, o[0], o[1], o[2], t[0], t[1], t[2], t[1]/o[1])
	return nil
}

// ourCut makes a cut with the program, deletes its snapshots, and returns the longest freeze in milliseconds.
func (b *bench) ourCut(ctx context.Context, volumes []*lab.Filesystem, name string) (float64, error) {
	args := []string{"cut", "--json", "--name", name}
	for _, v := range volumes {
		args = append(args, "reflink:"+v.File)
	}
	u, err := b.stillpoint(ctx, false, args...)
	if err != nil {
		return 0, err
	}
	var res struct {
		Snapshots []string
		Frozen    []struct{ Milliseconds float64 }
	}
	if err := json.Unmarshal(u.text, &res); err != nil {
		return 0, err
	}
	longest := 0.0
	for _, f := range res.Frozen {
		longest = max(longest, f.Milliseconds)
	}
	_, err = b.stillpoint(ctx, false, append([]string{"delete"}, res.Snapshots...)...)
	return longest, err
}

// theirCut does what a careful script does today.
func theirCut(ctx context.Context, volumes []*lab.Filesystem) (ms float64, err error) {
	begin := time.Now()
	for _, v := range volumes {
		if err := exec.CommandContext(ctx, "fsfreeze", "-f", v.Mount).Run(); err != nil {
			return 0, err
		}
		defer func() {
			if e := exec.Command("fsfreeze", "-u", v.Mount).Run(); e != nil {
				err = errors.Join(err, e)
			}
			ms = float64(time.Since(begin).Microseconds()) / 1000 // the last one to run counts
		}()
	}
	for _, v := range volumes {
		copied := v.File + ".today"
		if err := exec.CommandContext(ctx, "cp", "--reflink=always", v.File, copied).Run(); err != nil {
			return 0, err
		}
		defer os.Remove(copied)
	}
	return 0, nil
}

// dirty writes bytes in all to the volumes' page caches.
func dirty(volumes []*lab.Filesystem, total int64) error {
	block := make([]byte, mib)
	for i := range block {
		block[i] = byte(rand.Uint32())
	}
	for _, v := range volumes {
		f, err := os.OpenFile(filepath.Join(v.Mount, "dirty"), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		for off := int64(0); off < total/int64(len(volumes)); off += mib {
			if _, err := f.WriteAt(block, off); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// fragment writes to the volumes' files, unmounted, until they have about so many extents: every other block of a
// region that a clone shares.
func (b *bench) fragment(ctx context.Context, volumes []*lab.Filesystem, extents int) error {
	for _, v := range volumes {
		filler, err := os.Create(filepath.Join(v.Mount, "filler"))
		if err != nil {
			return err
		}
		block := make([]byte, 4*kib)
		for i := range int64(extents) {
			block[i%4096]++
			if _, err := filler.WriteAt(block, i*8*kib); err != nil { // holes between: the blocks lie together in the volume
				return errors.Join(err, filler.Close())
			}
		}
		if err := errors.Join(filler.Sync(), filler.Close()); err != nil {
			return err
		}
		// With a clone alive, rewriting every other block moves it: two extents where there was one.
		clone := v.File + ".clone"
		if err := exec.CommandContext(ctx, "cp", "--reflink=always", v.File, clone).Run(); err != nil {
			return err
		}
		if filler, err = os.OpenFile(filepath.Join(v.Mount, "filler"), os.O_WRONLY, 0); err != nil {
			return err
		}
		for i := range int64(extents / 2) {
			if _, err := filler.WriteAt(block, i*16*kib); err != nil {
				return errors.Join(err, filler.Close())
			}
		}
		if err := errors.Join(filler.Sync(), filler.Close(), os.Remove(clone)); err != nil {
			return err
		}
	}
	return nil
}

// quantiles gives p50, p99 and the maximum.
func quantiles(v []float64) [3]float64 {
	v = slices.Sorted(slices.Values(v))
	at := func(q float64) float64 { return v[min(len(v)-1, int(q*float64(len(v))))] }
	return [3]float64{at(0.5), at(0.99), v[len(v)-1]}
}

func mountsOf(volumes []*lab.Filesystem) (paths []string) {
	for _, v := range volumes {
		paths = append(paths, v.Mount)
	}
	return paths
}
