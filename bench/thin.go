package main

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/cbt/thinmeta/thinmetatest"
)

// The pool's metadata: a device of 1 TiB in blocks of 64 KiB, all of it mapped, as device 1, and snapshots of it.
const (
	thinBlock  = 64 * kib
	thinBlocks = 16 << 20
	thinFill   = 210 // mappings in a leaf, as the kernel leaves them after writing from start to end
)

var thinCases = []struct {
	device thinmeta.DeviceID
	name   string
	goal   float64 // thin_delta's time ÷ ours
}{
	{2, "nothing", 50},
	{3, "1 % in one place", 20},
	{4, "1 % at random", 2},
}

// makeThinImage makes the metadata. It runs in a process of its own, because the peak of a process is at least that of
// the one that started it.
func makeThinImage(path string) error {
	p := thinmetatest.New(thinmetatest.Options{BlockSize: thinBlock, DataBlocks: thinBlocks + thinBlocks/32})
	p.Create(1)
	p.Fill(1, 0, thinBlocks, thinFill)
	for _, c := range thinCases {
		p.Snapshot(uint64(c.device), 1)
	}
	for b := range uint64(thinBlocks / 100) {
		p.Write(3, thinBlocks/3+b)
		p.Write(4, rand.Uint64N(thinBlocks))
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.WriteImage(f); err != nil {
		return err
	}
	return f.Sync()
}

// thin compares deltas from a thin pool's metadata with thin_delta's.
func (b *bench) thin(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	image, out := filepath.Join(b.lab.Dir, "thin-metadata"), filepath.Join(b.lab.Dir, "thin-output")
	if _, err := b.time(ctx, false, nil, self, "-thin-image", image); err != nil {
		return err
	}
	if _, err := b.time(ctx, false, nil, "thin_check", image); err != nil {
		return err
	}
	info, err := os.Stat(image)
	if err != nil {
		return err
	}
	b.say("\n## Changed blocks of thin volumes\n")
	b.say("Metadata of %d MiB of a thin pool: a device of 1 TiB, %d blocks mapped, and snapshots of it of which so much was changed. thin_delta is that of thin-provisioning-tools %s; its output goes to a file, as ours does. Medians of 5 runs; page cache dropped before those that are cold; thin_delta reads past the page cache in any case.\n",
		info.Size()/mib, thinBlocks, version(ctx, "thin_delta", "-V"))
	b.say("| changed | extents | in process, ms | Stillpoint, ms | cold, ms | thin_delta, ms | cold, ms | thin_delta ÷ Stillpoint | cold | goal | peak memory, MiB: Stillpoint, thin_delta |")
	b.say("|---|---|---|---|---|---|---|---|---|---|---|")
	for _, c := range thinCases {
		inProcess, total, err := b.thinInProcess(ctx, image, c.device)
		if err != nil {
			return err
		}
		var walls [4][]float64 // ours, ours cold, theirs, theirs cold
		var peaks [2]int64
		for range 5 {
			for i := range walls {
				name, args := "thin_delta", []string{"--snap1", "1", "--snap2", fmt.Sprint(c.device), image}
				if i < 2 {
					name, args = filepath.Join(b.bin, "stillpoint"), []string{"inspect", "thin-metadata", image, "--delta", fmt.Sprintf("1,%d", c.device), "--json"}
				}
				u, err := b.thinRun(ctx, out, i%2 == 1, name, args...)
				if err != nil {
					return err
				}
				if i == 2 {
					if blocks, err := thinDeltaBlocks(out); err != nil || blocks*thinBlock != total.Data+total.Zero {
						return fmt.Errorf("%s: thin_delta finds %d blocks changed (%v), we find %+v", c.name, blocks, err, total)
					}
				}
				walls[i] = append(walls[i], u.wall.Seconds()*1e3)
				peaks[i/2] = max(peaks[i/2], u.peak)
			}
		}
		var m [4]float64
		for i := range walls {
			slices.Sort(walls[i])
			m[i] = walls[i][len(walls[i])/2]
		}
		b.say("| %s | %d | %.2f | %.1f | %.1f | %.0f | %.0f | %.1f | %.1f | %.0f | %d, %d |", c.name, total.Extents, inProcess.Seconds()*1e3, m[0], m[1], m[2], m[3], m[2]/m[0], m[3]/m[1], c.goal, peaks[0]/mib, peaks[1]/mib)
	}
	return nil
}

// thinInProcess is how long a delta takes without a process around it, in the median of 5, and what it adds up to.
func (b *bench) thinInProcess(ctx context.Context, image string, device thinmeta.DeviceID) (time.Duration, cbt.Total, error) {
	var walls []time.Duration
	var total cbt.Total
	for range 5 {
		begin := time.Now()
		f, err := thinmeta.OpenFile(image)
		if err != nil {
			return 0, total, err
		}
		total, err = thinTotal(ctx, f, device)
		if err := f.Close(); err != nil {
			return 0, total, err
		}
		if err != nil {
			return 0, total, err
		}
		walls = append(walls, time.Since(begin))
	}
	slices.Sort(walls)
	return walls[len(walls)/2], total, nil
}

func thinTotal(ctx context.Context, f *thinmeta.File, device thinmeta.DeviceID) (cbt.Total, error) {
	m, err := thinmeta.Open(ctx, f)
	if err != nil {
		return cbt.Total{}, err
	}
	const size = thinBlocks * thinBlock
	d, err := m.Changed(ctx, thinmeta.Volume{ID: 1, Size: size}, thinmeta.Volume{ID: device, Size: size}, 0)
	if err != nil {
		return cbt.Total{}, err
	}
	return cbt.Sum(d.Extents)
}

// thinRun measures a program that prints into a file.
func (b *bench) thinRun(ctx context.Context, out string, cold bool, name string, args ...string) (usage, error) {
	f, err := os.Create(out)
	if err != nil {
		return usage{}, err
	}
	defer f.Close()
	return b.timeInto(ctx, f, cold, nil, name, args...)
}

// thinDeltaBlocks adds up what thin_delta says is different.
func thinDeltaBlocks(path string) (blocks int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		var begin, length int64
		for _, kind := range []string{"different", "left_only", "right_only"} {
			if n, _ := fmt.Sscanf(line, "<"+kind+` begin="%d" length="%d"/>`, &begin, &length); n == 2 {
				blocks += length
			}
		}
	}
	return blocks, lines.Err()
}
