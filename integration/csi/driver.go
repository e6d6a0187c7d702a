package csi

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"stillpoint.io/stillpoint/agent/csi"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/freezer"
)

// Serve serves a driver on a socket in a folder until the test ends. A driver that does not stop fails the test.
func Serve(t testing.TB, folder string, c csi.Config) (socket string) {
	t.Helper()
	if c.Node == "" {
		c.Node = "node-a"
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	d, err := csi.New(c)
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(folder, "csi.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- d.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		d.Stop(ctx)
		if err := <-served; err != nil {
			t.Errorf("serving: %v", err)
		}
		if ctx.Err() != nil {
			t.Error("the driver did not stop by itself")
		}
	})
	return socket
}

// Node is the machine for cuts, with the freezer's program. Its state is in a folder of its own on a tmpfs, where the
// freezer's records are kept without mounting one.
func Node(t testing.TB, program string) cut.Node {
	t.Helper()
	folder, err := os.MkdirTemp("/dev/shm", "stillpoint-csi-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return cut.Node{
		Freezer: func(ctx context.Context) (*freezer.Client, error) {
			return freezer.Spawn(ctx, freezer.SpawnOptions{Program: program, Records: filepath.Join(folder, "records")})
		},
		SyncCommand: []string{program, "sync"},
		Lock:        filepath.Join(folder, "cut.lock"),
	}
}
