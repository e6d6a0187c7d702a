//go:build ceph && cgo

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/ceph"
	cluster "stillpoint.io/stillpoint/integration/ceph"
)

// rbdChange is the size of one change: a write of that many bytes at a random multiple of it.
const rbdChange = 64 * kib

var rbdCases = []struct {
	name          string
	size, written int64
	changes       int
	places        []rbdPlace
}{
	{"1 TiB, 2 GiB written", 1024 * gib, 2 * gib, 200, []rbdPlace{{0, [2]float64{50, 30}}}},
	{"100 GiB, 2 GiB written", 100 * gib, 2 * gib, 500, []rbdPlace{{0, [2]float64{8, 5}}}},
	{"10 GiB, all written", 10 * gib, 10 * gib, 2000, []rbdPlace{{0, [2]float64{1, 1}}, {time.Millisecond, [2]float64{1.2, 1.2}}}},
}

// rbdPlace is how far away the cluster is.
type rbdPlace struct {
	delay time.Duration // added in each direction
	goals [2]float64    // export-diff's time ÷ ours: with 10 requests in flight, and with 64
}

// rbdFlights are the numbers of requests in flight that export-diff is run with; the first is its default.
var rbdFlights = []int{10, 64}

// rbd compares changed blocks and their content from RBD images with rbd export-diff.
func (b *bench) rbd(ctx context.Context) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c, err := cluster.Start(ctx, cluster.Options{Size: "64G"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	b.env = append(b.env, "CEPH_CONF="+c.Conf)
	b.say("\n## Changed blocks of RBD images\n")
	b.say("A cluster of one OSD on this machine, %s. The image has objects of 4 MiB; between two snapshots, random runs of %d KiB of what is written are overwritten. Stillpoint is the adapter ceph-rbd in a process of its own: it connects, finds the changes, reads them with %d readers, and writes them to /dev/null. Medians of %d runs, interleaved. The last row has the cluster farther away: a relay delivers all that goes in either direction 1 ms later.\n",
		version(ctx, "ceph", "--version"), rbdChange/kib, rbdReaders, rbdTurns)
	b.say("| image | changes | changed, MiB | read, MiB | read ÷ changed | Stillpoint, s | export-diff, s | with 64 in flight, s | export-diff ÷ Stillpoint | 64 in flight ÷ Stillpoint | goals | processor time, s: Stillpoint, export-diff |")
	b.say("|---|---|---|---|---|---|---|---|---|---|---|---|")
	for i, x := range rbdCases {
		image := fmt.Sprintf("bench-%d", i)
		changed, err := b.rbdPrepare(ctx, c.Conf, image, x.size, x.written, x.changes)
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		for _, p := range x.places {
			name := x.name
			if p.delay > 0 {
				name += fmt.Sprintf(", %v away", 2*p.delay)
			}
			m, err := b.rbdCompare(ctx, c, self, image, p.delay)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			w, cpu := m.walls, m.cpus
			b.say("| %s | %d | %.1f | %.1f | %.3f | %.2f | %.2f | %.2f | %.1f | %.1f | %.1f, %.1f | %.2f, %.2f |", name, x.changes, float64(changed)/mib, float64(m.read)/mib, float64(m.read)/float64(changed),
				w[0], w[1], w[2], w[1]/w[0], w[2]/w[0], p.goals[0], p.goals[1], cpu[0], cpu[1])
		}
	}
	return nil
}

// rbdMeasured are the medians of Stillpoint's process and of export-diff's with each number of requests in flight.
type rbdMeasured struct {
	walls, cpus [3]float64 // seconds
	read        int64      // bytes, by Stillpoint
}

// rbdCompare runs the three in turn. The first turn does not count: it warms up.
func (b *bench) rbdCompare(ctx context.Context, c *cluster.Cluster, self, image string, delay time.Duration) (m rbdMeasured, err error) {
	run := func(cmd *exec.Cmd) error { return cmd.Run() }
	if delay > 0 {
		f, err := newFar(c.Ports[0], c.Ports[1], delay)
		if err != nil {
			return m, err
		}
		defer f.Close()
		run = f.run
	}
	var walls, cpus [3][]float64
	for turn := range 1 + rbdTurns {
		for way := range walls {
			name, args := self, []string{"-rbd-read", c.Conf + "," + image}
			if way > 0 {
				name = "rbd"
				args = []string{"export-diff", "--no-progress", "--rbd-concurrent-management-ops", fmt.Sprint(rbdFlights[way-1]), "--from-snap", "a", "rbd/" + image + "@b", "-"}
			}
			u, err := b.rbdRun(ctx, run, name, args...)
			if err != nil {
				return m, err
			}
			if way == 0 {
				if _, err := fmt.Sscan(string(u.text), &m.read); err != nil {
					return m, err
				}
			}
			if turn > 0 {
				walls[way] = append(walls[way], u.wall.Seconds())
				cpus[way] = append(cpus[way], u.cpu.Seconds())
			}
		}
	}
	m.walls, m.cpus = medians(walls), medians(cpus)
	return m, nil
}

// rbdTurns is how many runs of each are measured.
const rbdTurns = 7

func medians(all [3][]float64) (m [3]float64) {
	for i := range all {
		slices.Sort(all[i])
		m[i] = all[i][len(all[i])/2]
	}
	return m
}

// rbdRun measures a program whose data goes to /dev/null: ours opens that itself, and tells how much it read.
func (b *bench) rbdRun(ctx context.Context, run func(*exec.Cmd) error, name string, args ...string) (usage, error) {
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, name, args...)
	c.Env, c.Stdout, c.Stderr = b.env, &stdout, &stderr
	if name == "rbd" {
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			return usage{}, err
		}
		defer null.Close()
		c.Stdout = null
	}
	begin := time.Now()
	if err := run(c); err != nil {
		return usage{}, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, stderr.Bytes())
	}
	return usage{wall: time.Since(begin), cpu: c.ProcessState.UserTime() + c.ProcessState.SystemTime(), text: stdout.Bytes()}, nil
}

// rbdPrepare makes an image, snapshot a of it, changes, and snapshot b. It returns how many bytes are changed.
func (b *bench) rbdPrepare(ctx context.Context, conf, image string, size, written int64, changes int) (int64, error) {
	conn, err := rados.NewConnWithUser("admin")
	if err != nil {
		return 0, err
	}
	if err := errors.Join(conn.ReadConfigFile(conf), conn.SetConfigOption("rbd_cache", "false")); err != nil {
		return 0, err
	}
	if err := conn.Connect(); err != nil {
		return 0, err
	}
	defer conn.Shutdown()
	pool, err := conn.OpenIOContext("rbd")
	if err != nil {
		return 0, err
	}
	defer pool.Destroy()
	options := rbd.NewRbdImageOptions()
	defer options.Destroy()
	if err := rbd.CreateImage(pool, image, uint64(size), options); err != nil {
		return 0, err
	}
	img, err := rbd.OpenImage(pool, image, rbd.NoSnapshot)
	if err != nil {
		return 0, err
	}
	defer img.Close()
	const piece = 4 * mib
	noise := make([]byte, piece+mib)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	// Spread over the image, whole objects at a time.
	stride := size / (written / piece) / piece * piece
	if err := inTurns(8, written/piece, func(i int64) error {
		_, err := img.WriteAt(noise[:piece], i*stride)
		return err
	}); err != nil {
		return 0, err
	}
	a, err := ceph.RBD().Open(ctx, adapters.Config{Name: "ceph-rbd", Parameters: map[string]string{"conf": conf}})
	if err != nil {
		return 0, err
	}
	defer a.Close()
	volume := adapters.VolumeID{Backend: "ceph-rbd", ID: "rbd/" + image}
	take := func(name string) error {
		s, err := a.CreateSnapshot(ctx, volume, name)
		if err == nil {
			err = a.Publish(ctx, s.ID, adapters.Notes{Cut: name})
		}
		return err
	}
	if err := take("a"); err != nil {
		return 0, err
	}
	places := map[int64]bool{}
	for len(places) < changes {
		places[rand.Int64N(written/piece)*stride+rand.Int64N(piece/rbdChange)*rbdChange] = true
	}
	list := make([]int64, 0, len(places))
	for at := range places {
		list = append(list, at)
	}
	if err := inTurns(8, int64(len(list)), func(i int64) error {
		_, err := img.WriteAt(noise[i%mib:i%mib+rbdChange], list[i])
		return err
	}); err != nil {
		return 0, err
	}
	return int64(len(list)) * rbdChange, take("b")
}

// inTurns does n things, some at once.
func inTurns(workers int, n int64, do func(i int64) error) error {
	var next atomic.Int64
	var group sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		group.Go(func() {
			for i := next.Add(1) - 1; i < n && errs[w] == nil; i = next.Add(1) - 1 {
				errs[w] = do(i)
			}
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

// rbdReaders is how many reads are under way at once.
const rbdReaders = 64

// rbdRead is the process that is measured: it reads what changed between an image's snapshots a and b, and prints how
// many bytes those were.
func rbdRead(ctx context.Context, what string) error {
	conf, image, _ := strings.Cut(what, ",")
	a, err := ceph.RBD().Open(ctx, adapters.Config{Name: "ceph-rbd", Parameters: map[string]string{"conf": conf}})
	if err != nil {
		return err
	}
	defer a.Close()
	volume := adapters.VolumeID{Backend: "ceph-rbd", ID: "rbd/" + image}
	base, target := adapters.SnapshotID{Volume: volume, Name: "a"}, adapters.SnapshotID{Volume: volume, Name: "b"}
	differ, _ := adapters.As[adapters.Differ](a)
	opener, _ := adapters.As[adapters.Opener](a)
	delta, err := differ.Changed(ctx, base, target, 0)
	if err != nil {
		return err
	}
	img, err := opener.Open(ctx, target)
	if err != nil {
		return err
	}
	defer img.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	const piece = mib
	type read struct{ offset, length int64 }
	reads := make(chan read, rbdReaders)
	var group sync.WaitGroup
	var total atomic.Int64
	errs := make([]error, rbdReaders)
	for i := range rbdReaders {
		group.Go(func() {
			p := make([]byte, piece)
			for r := range reads {
				n, err := img.ReadAt(ctx, p[:r.length], r.offset)
				if err == nil || err == io.EOF {
					_, err = null.Write(p[:n])
				}
				total.Add(int64(n))
				errs[i] = errors.Join(errs[i], err)
			}
		})
	}
	for e, e2 := range delta.Extents {
		if err = e2; err != nil {
			break
		}
		for at := e.Offset; at < e.End() && !e.Zero; at += piece {
			reads <- read{at, min(piece, e.End()-at)}
		}
	}
	close(reads)
	group.Wait()
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	fmt.Println(total.Load())
	return nil
}
