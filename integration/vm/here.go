package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/peer"
)

// place is this machine, prepared as a guest would be: disks on loop devices, and an LVM that sees nothing else.
type place struct {
	env   []string // to add
	loops []*os.File
	guard *peer.Guard
}

func prepare(ctx context.Context, c Config) (p *place, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("device-mapper needs root")
	}
	if out, err := exec.CommandContext(ctx, "modprobe", append([]string{"-q", "-a"}, append(modules, c.Modules...)...)...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("loading modules: %w: %s", err, out)
	}
	dir := filepath.Join(os.TempDir(), "stillpoint-vm-"+strings.ToLower(rand.Text()[:10]))
	p = &place{}
	if p.guard, err = newGuard(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o700); err != nil {
		return nil, err
	}
	if err := c.build(ctx, bin); err != nil {
		return nil, err
	}
	var disks []string
	for i, size := range c.Disks {
		path := filepath.Join(dir, fmt.Sprintf("disk%d", i))
		if err := lab.Sparse(path, size); err != nil {
			return nil, err
		}
		device, f, err := lab.Loop(path)
		if err != nil {
			return nil, err
		}
		disks, p.loops = append(disks, device), append(p.loops, f)
	}
	p.env, err = configureLVM(filepath.Join(dir, "lvm"), disks)
	p.env = append(p.env, envInside+"=1", envDisks+"="+strings.Join(disks, " "), envBin+"="+bin)
	return p, err
}

// close lets the disks go, once nothing uses them, and removes the files.
func (p *place) close() error {
	for _, f := range p.loops {
		f.Close()
	}
	return p.guard.Close()
}

func runHere(ctx context.Context, c Config, cmd Command) (code int, err error) {
	p, err := prepare(ctx, c)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	run := exec.CommandContext(ctx, cmd.Path, cmd.Args...)
	run.Env, run.Dir, run.Stdout, run.Stderr = append(cmd.env(), p.env...), cmd.Dir, cmd.Stdout, cmd.Stderr
	err = run.Run()
	var ended *exec.ExitError
	if errors.As(err, &ended) && ctx.Err() == nil {
		if s := ended.Sys().(syscall.WaitStatus); s.Signaled() {
			return 128 + int(s.Signal()), nil
		}
		return ended.ExitCode(), nil
	}
	return 0, err
}
