//go:build ceph && cgo

// Package rbd holds the tests over filesystems on RBD images of a real cluster: cuts of them, what goes wrong during one,
// and backups of them in a bucket of the same cluster's gateway. The images are block devices by rbd-fuse and loop
// devices, since not every kernel has rbd; the cache of rbd-fuse holds back all that nobody flushes.
package rbd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"stillpoint.io/stillpoint/integration/ceph"
)

// What the tests share.
var (
	cluster *ceph.Cluster
	images  *ceph.Images
	freeze  string // the path of stillpoint-freezer
)

const pool = "rbd"

func TestMain(m *testing.M) {
	if os.Getenv(envVictim) != "" {
		if err := victim(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	flag.Parse()
	code, err := 0, error(nil)
	if testing.Short() { // newSite skips
		code = m.Run()
	} else {
		code, err = prepared(m)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "what the tests need:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// prepared runs the tests with a cluster.
func prepared(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "rbd-test-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	freeze = filepath.Join(dir, "stillpoint-freezer")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", freeze, "stillpoint.io/stillpoint/cmd/stillpoint-freezer").CombinedOutput(); err != nil {
		return 1, fmt.Errorf("building the freezer: %w\n%s", err, out)
	}
	if cluster, err = ceph.Start(ctx, ceph.Options{S3: true, Lease: ceph.NeverKilled, Watch: 5}); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, cluster.Close()) }()
	if images, err = cluster.Images(ctx, pool); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, images.Close()) }()
	return m.Run(), nil
}
