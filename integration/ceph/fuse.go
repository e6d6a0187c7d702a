package ceph

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/moby/sys/mountinfo"

	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/peer"
)

// Images are the images of a pool as files in a folder, by rbd-fuse. With a loop device on one of them an image is a block
// device also where the kernel has no rbd.
//
// The cache of rbd-fuse's librbd is as dangerous as it can be configured: it holds back what was written until somebody
// flushes. Close it after whatever is mounted on it, and before the cluster.
type Images struct {
	Pool, Folder string

	cluster *Cluster
	guard   *peer.Guard
}

// fuseConf is the end of rbd-fuse's configuration. A client says at each tick that it still watches an image: by default
// that is every 5 s, after which these clusters take it for dead.
const fuseConf = `
[client]
objecter tick interval = 1
rbd cache = true
rbd cache policy = writeback
rbd cache writethrough until flush = false
rbd cache max dirty age = 600
`

// Images mounts the images of a pool. What dies with the test program errors from then on: it hangs nobody.
func (c *Cluster) Images(ctx context.Context, pool string) (*Images, error) {
	if _, err := exec.LookPath("rbd-fuse"); err != nil {
		return nil, fmt.Errorf("%w; `make test` installs it", err)
	}
	i := &Images{Pool: pool, Folder: filepath.Join(filepath.Dir(c.dir), "images-"+pool), cluster: c}
	conf, err := os.ReadFile(c.Conf)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Mkdir(i.Folder, 0o700), os.WriteFile(c.Conf+".fuse", append(conf, fuseConf...), 0o600)); err != nil {
		return nil, err
	}
	// umount may ask rbd-fuse, which waits for a cluster that may be away.
	i.guard, err = peer.NewGuard(`
rbd-fuse -f -c "$1" -p "$2" "$3" >"$3.log" 2>&1 & server=$!
read -r _
timeout -s KILL 5 umount "$3" 2>/dev/null
for _ in $(seq 50); do kill -0 "$server" 2>/dev/null || break; sleep 0.1; done
kill -9 "$server" 2>/dev/null
wait "$server"
! grep -qF " $3 " /proc/self/mountinfo || umount -l "$3"`, c.Conf+".fuse", pool, i.Folder)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		mounted, err := mountinfo.Mounted(i.Folder)
		if err != nil || mounted {
			return i, err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			said, _ := os.ReadFile(i.Folder + ".log")
			return nil, errors.Join(fmt.Errorf("rbd-fuse has not mounted %s: %w: %s", i.Folder, ctx.Err(), said), i.Close())
		}
	}
}

// Close unmounts the images.
func (i *Images) Close() error { return i.guard.Close() }

// Create makes an image, with the features named or else those that images have by default, and returns its file. The
// image stays until the cluster goes.
func (i *Images) Create(ctx context.Context, name string, size int64, features ...string) (file string, err error) {
	args := []string{"create", i.Pool + "/" + name, "--size", strconv.FormatInt(size, 10) + "B"}
	for _, f := range features {
		args = append(args, "--image-feature", f)
	}
	return i.File(name), i.rbd(ctx, args...)
}

// Clone makes an image of a snapshot, to be written to, and returns its file.
func (i *Images) Clone(ctx context.Context, image, snapshot, name string) (file string, err error) {
	return i.File(name), i.rbd(ctx, "clone", "--rbd-default-clone-format", "2", i.Pool+"/"+image+"@"+snapshot, i.Pool+"/"+name)
}

// File is an image's file.
func (i *Images) File(name string) string { return filepath.Join(i.Folder, name) }

// In makes mounted filesystems of a lab, as Lab.Pool does, each on an image of its own.
func (i *Images) In(l *lab.Lab, features ...string) func(ctx context.Context, name, fstype string, size int64) (*lab.Filesystem, error) {
	return func(ctx context.Context, name, fstype string, size int64) (*lab.Filesystem, error) {
		file, err := i.Create(ctx, name, size, features...)
		if err != nil {
			return nil, err
		}
		return l.In(ctx, file, name, fstype)
	}
}

func (i *Images) rbd(ctx context.Context, args ...string) error {
	if out, err := i.cluster.Command(ctx, "rbd", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("rbd %s: %w: %s", args[0], err, out)
	}
	return nil
}
