//go:build ceph && cgo

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	gocephfs "github.com/ceph/go-ceph/cephfs"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/ceph"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	cluster "stillpoint.io/stillpoint/integration/ceph"
)

// The tree in CephFS: so many directories of so many files, so many of which change before each increment.
const (
	cephDirs    = 1000
	cephFiles   = 100
	cephChanged = 10
	cephRounds  = 3
	cephLag     = 5 * time.Second
	cephGoal    = 20 // the walk's time ÷ the increment's
	cephWalkers = 8
)

// cephfs compares an incremental backup of a tree in CephFS with a walk over all of it.
func (b *bench) cephfs(ctx context.Context) (err error) {
	c, err := cluster.Start(ctx, cluster.Options{Files: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	user, err := mountCephFS(c)
	if err != nil {
		return err
	}
	defer user.Release()
	defer user.Unmount()
	if err := plantCephFS(user); err != nil {
		return err
	}
	at := repository.Location{Path: filepath.Join(b.lab.Dir, "cephfs-repository")}
	secret := adapters.NewSecret("benchmark")
	if err := repository.Init(ctx, at, secret, repository.Options{}); err != nil {
		return err
	}
	repo, err := repository.Open(ctx, at, secret, repository.OpenOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()

	b.say("\n## Incremental backup of a tree in CephFS\n")
	b.say("%d files in %d directories in CephFS, a cluster of one metadata server and one OSD on this machine, %s; %d files changed, each in a directory of its own. Stillpoint's backup goes into a repository in a folder. The walk is what a backup cannot do without that does not know of recursive times: the same adapter lists all directories, %d at a time, and reads no file. Each starts with a new mount and cold caches, on the same snapshot, %v (the parameter lag) after it was taken. Medians of %d runs, interleaved.\n",
		cephDirs*cephFiles, cephDirs, version(ctx, "ceph", "--version"), cephChanged, cephWalkers, cephLag, cephRounds)
	var walks, increments []time.Duration
	var last backup.Report
	for round := range cephRounds + 1 { // the first is the full backup
		if round > 0 {
			for _, d := range rand.Perm(cephDirs)[:cephChanged] {
				if err := writeCephFS(user, cephPath(d, rand.IntN(cephFiles)), random(4*kib)); err != nil {
					return err
				}
			}
		}
		pause(ctx, cephLag)
		id, err := cutCephFS(ctx, c, fmt.Sprint("state-", round))
		if err != nil {
			return err
		}
		pause(ctx, cephLag)
		took, err := withCephFS(ctx, c, func(a adapters.Adapter) (err error) {
			last, err = backup.Run(ctx, backup.Request{Adapter: a, Snapshot: id, Repository: repo})
			return err
		})
		if err != nil {
			return err
		}
		if round == 0 {
			b.say("The full backup took %.1f s.", took.Seconds())
			continue
		}
		if g := last.Tree; g.DirsWalked > 1+cephChanged || g.FilesRead < cephChanged {
			return fmt.Errorf("the increment is none: %+v", g)
		}
		increments = append(increments, took)
		took, err = withCephFS(ctx, c, func(a adapters.Adapter) error { return walkCephFS(ctx, a, id) })
		if err != nil {
			return err
		}
		walks = append(walks, took)
	}
	slices.Sort(walks)
	slices.Sort(increments)
	walk, increment := walks[len(walks)/2], increments[len(increments)/2]
	b.say("| walk, s | incremental backup, s | walk ÷ backup | goal |")
	b.say("|---|---|---|---|")
	b.say("| %.2f (%.2f to %.2f) | %.2f (%.2f to %.2f) | %.0f | %d |", walk.Seconds(), walks[0].Seconds(), walks[len(walks)-1].Seconds(),
		increment.Seconds(), increments[0].Seconds(), increments[len(increments)-1].Seconds(), walk.Seconds()/increment.Seconds(), cephGoal)
	b.say("\nThe last increment walked %d directories and read %d files.", last.Tree.DirsWalked, last.Tree.FilesRead)
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

const cephTree = "/tree"

func cephPath(dir, file int) string { return fmt.Sprintf("%s/d%03d/f%03d", cephTree, dir, file) }

func mountCephFS(c *cluster.Cluster) (*gocephfs.MountInfo, error) {
	m, err := gocephfs.CreateMountWithId("admin")
	if err != nil {
		return nil, err
	}
	if err := m.ReadConfigFile(c.Conf); err != nil {
		return nil, err
	}
	return m, m.Mount()
}

// plantCephFS makes the tree, with many goroutines: each file costs some round trips.
func plantCephFS(m *gocephfs.MountInfo) error {
	if err := m.MakeDir(cephTree, 0o755); err != nil {
		return err
	}
	var next atomic.Int64
	var group sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		group.Go(func() {
			for d := int(next.Add(1)) - 1; d < cephDirs && errs[i] == nil; d = int(next.Add(1)) - 1 {
				errs[i] = m.MakeDir(filepath.Dir(cephPath(d, 0)), 0o755)
				for f := 0; f < cephFiles && errs[i] == nil; f++ {
					errs[i] = writeCephFS(m, cephPath(d, f), random(kib))
				}
			}
		})
	}
	group.Wait()
	return errors.Join(append(errs, m.SyncFs())...)
}

func writeCephFS(m *gocephfs.MountInfo, path string, p []byte) error {
	f, err := m.Open(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	n, err := f.WriteAt(p, 0)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return errors.Join(err, f.Close())
}

// withCephFS measures what is done with an adapter that was just opened.
func withCephFS(ctx context.Context, c *cluster.Cluster, do func(adapters.Adapter) error) (took time.Duration, err error) {
	began := time.Now()
	a, err := ceph.FS().Open(ctx, adapters.Config{Name: "f", Parameters: map[string]string{"conf": c.Conf, "lag": cephLag.String()}})
	if err != nil {
		return 0, err
	}
	err = do(a)
	took = time.Since(began)
	return took, errors.Join(err, a.Close())
}

func cutCephFS(ctx context.Context, c *cluster.Cluster, name string) (id adapters.SnapshotID, err error) {
	_, err = withCephFS(ctx, c, func(a adapters.Adapter) error {
		s, err := a.CreateSnapshot(ctx, adapters.VolumeID{Backend: "f", ID: "cephfs:" + cephTree}, name)
		if err != nil {
			return err
		}
		id = s.ID
		return a.Publish(ctx, id, adapters.Notes{Cut: name, Consistency: adapters.CrashConsistent})
	})
	return id, err
}

// walkCephFS lists every directory of a snapshot.
func walkCephFS(ctx context.Context, a adapters.Adapter, id adapters.SnapshotID) (err error) {
	trees, _ := adapters.As[adapters.Trees](a)
	tree, err := trees.OpenTree(ctx, id, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tree.Close()) }()
	var files atomic.Int64
	turns := make(chan struct{}, cephWalkers)
	var group sync.WaitGroup
	var mu sync.Mutex
	for e, listing := range tree.Entries(ctx, "") {
		if listing != nil {
			err = errors.Join(err, listing)
			break
		}
		turns <- struct{}{}
		group.Go(func() {
			defer func() { <-turns }()
			for _, e := range tree.Entries(ctx, e.Name) {
				if e != nil {
					mu.Lock()
					err = errors.Join(err, e)
					mu.Unlock()
					return
				}
				files.Add(1)
			}
		})
	}
	group.Wait()
	if err == nil && files.Load() != cephDirs*cephFiles {
		err = fmt.Errorf("the walk found %d files", files.Load())
	}
	return err
}
