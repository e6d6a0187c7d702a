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
		return replayed(ctx, fs)
	default:
		return fmt.Errorf("no check for a %s filesystem", fstype)
	}
}

// Replayed checks that no error is found in the filesystem in a file once mount has replayed its log there. The file must
// be one to be written to: a clone of a snapshot.
func (l *Lab) Replayed(ctx context.Context, fstype, file string) error {
	fs, err := l.MountAgain(ctx, fstype, file)
	if err != nil {
		return err
	}
	return replayed(ctx, fs)
}

func replayed(ctx context.Context, fs *Filesystem) error {
	if err := fs.Down(); err != nil {
		return err
	}
	if fs.Type == "xfs" {
		return run(ctx, "xfs_repair", "-n", fs.File)
	}
	return run(ctx, "e2fsck", "-fn", fs.File)
}

// MountCopy mounts a copy of a file or device with a filesystem: of a file a reflink copy beside it, of a device one in
// the lab, with holes for zeros. The caller takes it down.
func (l *Lab) MountCopy(ctx context.Context, fstype, file string) (*Filesystem, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	made := file + ".copy"
	copying := []string{"cp", "--reflink=always", "--no-preserve=mode", file, made}
	if !info.Mode().IsRegular() {
		to, err := os.CreateTemp(l.Dir, "copy-*.img")
		if err != nil {
			return nil, err
		}
		made = to.Name()
		to.Close()
		copying = []string{"dd", "if=" + file, "of=" + made, "bs=1M", "conv=sparse", "status=none"}
	}
	if err := run(ctx, copying[0], copying[1:]...); err != nil {
		return nil, err
	}
	return l.MountAgain(ctx, fstype, made)
}

// MountAgain mounts the filesystem in a file, though another one of the same UUID may be mounted. The caller takes it
// down.
func (l *Lab) MountAgain(ctx context.Context, fstype, file string) (*Filesystem, error) {
	mnt, err := os.MkdirTemp(l.Dir, "copy-")
	if err != nil {
		return nil, err
	}
	device, f, err := Loop(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	options := ""
	if fstype == "xfs" {
		options = "nouuid" // the original is mounted, too
	}
	if err := unix.Mount(device, mnt, fstype, 0, options); err != nil {
		return nil, fmt.Errorf("mounting %s again (%s): %w", file, fstype, err)
	}
	return &Filesystem{File: file, Device: device, Mount: mnt, Type: fstype}, nil
}

func run(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
