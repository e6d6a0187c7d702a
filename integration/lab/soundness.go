package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// Sound checks that the filesystem in a file or on a device is what a clean cut leaves: for ext4 no journal to replay
// and no error found by e2fsck; for XFS, which keeps a log to replay even when frozen, no error found by xfs_repair once
// mount has replayed it. The file itself is not written: XFS is checked on a copy.
func (l *Lab) Sound(ctx context.Context, fstype, file string) error {
	switch fstype {
	case "ext4":
		out, err := exec.CommandContext(ctx, "dumpe2fs", "-h", file).CombinedOutput()
		if err != nil {
			return fmt.Errorf("dumpe2fs %s: %w: %s", file, err, out)
		}
		if strings.Contains(string(out), "needs_recovery") {
			return fmt.Errorf("%s has a journal to replay: it was not frozen", file)
		}
		return run(ctx, "e2fsck", "-fn", file)
	case "xfs":
		fs, err := l.MountCopy(ctx, fstype, file)
		if err != nil {
			return err
		}
		defer os.Remove(fs.File)
		if err := fs.Down(); err != nil {
			return err
		}
		return run(ctx, "xfs_repair", "-n", fs.File)
	default:
		return fmt.Errorf("no check for a %s filesystem", fstype)
	}
}

// MountCopy mounts a copy of a file or device with a filesystem: of a file a reflink copy beside it, of a device one in
// the lab, with holes for zeros. The caller takes it down.
func (l *Lab) MountCopy(ctx context.Context, fstype, file string) (*Filesystem, error) {
	mnt, err := os.MkdirTemp(l.Dir, "copy-")
	if err != nil {
		return nil, err
	}
	fs := &Filesystem{File: file + ".copy", Mount: mnt, Type: fstype}
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	copying := []string{"cp", "--reflink=always", "--no-preserve=mode", file, fs.File}
	if !info.Mode().IsRegular() {
		fs.File = mnt + ".img"
		copying = []string{"dd", "if=" + file, "of=" + fs.File, "bs=1M", "conv=sparse", "status=none"}
	}
	if err := run(ctx, copying[0], copying[1:]...); err != nil {
		return nil, err
	}
	device, f, err := Loop(fs.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	options := ""
	if fstype == "xfs" {
		options = "nouuid" // the original is mounted, too
	}
	if err := unix.Mount(device, mnt, fstype, 0, options); err != nil {
		return nil, fmt.Errorf("mounting a copy of %s (%s): %w", file, fstype, err)
	}
	fs.Device = device
	return fs, nil
}

func run(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
