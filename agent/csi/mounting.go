package csi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"stillpoint.io/stillpoint/fault"
)

// mounter mounts, by the code that the kubelet uses. The programs that it starts (blkid, fsck, mkfs, mount, resize) are not
// cut short: a filesystem is made whole or not at all, as far as it is up to us.
type mounter struct {
	*mount.SafeFormatAndMount
}

func newMounter() mounter {
	return mounter{mount.NewSafeFormatAndMount(mount.NewWithoutSystemd(""), utilexec.New())}
}

// staging is a filesystem that is to be mounted.
type staging struct {
	device   string
	at       string
	fstype   string // empty: the default
	flags    []string
	readOnly bool
	grown    bool // the volume may be larger than the filesystem on it
}

// stage mounts a filesystem, made before if there is none. It is not mounted twice.
func (m mounter) stage(ctx context.Context, s staging) error {
	if s.fstype == "" {
		s.fstype = filesystems[0]
	}
	device, err := deviceNumber(s.device)
	if err != nil {
		return err
	}
	there, err := mountAt(s.at)
	switch {
	case err != nil:
		return err
	case there == nil:
		if err := m.mountNew(ctx, s); err != nil {
			return err
		}
	case !there.of(device):
		return fault.Errorf(fault.Busy, "something else is mounted at %s: %s; unmount it", s.at, there.info.Source)
	case there.info.FSType != s.fstype:
		return status.Errorf(codes.AlreadyExists, "the volume is staged at %s as %s, not as %s", s.at, there.info.FSType, s.fstype)
	case there.readOnly() != s.readOnly:
		return status.Errorf(codes.AlreadyExists, "the volume is staged at %s for another access mode", s.at)
	}
	if s.grown && !s.readOnly {
		return m.growFilesystem(s.device, s.at)
	}
	return nil
}

func (m mounter) mountNew(ctx context.Context, s staging) error {
	if err := os.MkdirAll(s.at, 0o750); err != nil {
		return err
	}
	options := slices.Clone(s.flags)
	if s.readOnly {
		options = append(options, "ro")
	}
	switch s.fstype {
	case "xfs": // the volume that it is a clone of, or a clone of it, may be mounted too
		options = append(options, "nouuid")
	case "btrfs":
		if err := m.ownIdentity(ctx, s.device); err != nil {
			return err
		}
	}
	if err := m.FormatAndMount(s.device, s.at, s.fstype, options); err != nil {
		var e mount.MountError
		if errors.As(err, &e) && e.Type == mount.FilesystemMismatch {
			return fault.Errorf(fault.Unsupported, "the volume holds another filesystem than %s: %w", s.fstype, err)
		}
		return err
	}
	return nil
}

// ownIdentity gives a btrfs another UUID when one with the same is mounted from another device: btrfs mixes up devices
// that say they are of one filesystem, and a clone says so.
func (m mounter) ownIdentity(ctx context.Context, device string) error {
	out, err := exec.CommandContext(ctx, "blkid", "-p", "-s", "UUID", "-s", "TYPE", "-o", "export", device).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 2 {
		return nil // nothing is on it
	}
	if err != nil {
		return fmt.Errorf("what is on %s: %w", device, err)
	}
	found := map[string]string{}
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		found[key] = value
	}
	if found["TYPE"] != "btrfs" || found["UUID"] == "" {
		return nil
	}
	real, err := filepath.EvalSymlinks(device)
	if err != nil {
		return err
	}
	members := filepath.Join("/sys/fs/btrfs", found["UUID"], "devices")
	if _, err := os.Stat(members); err != nil {
		return nil // it is not mounted
	}
	if _, err := os.Stat(filepath.Join(members, filepath.Base(real))); err == nil {
		return nil // from this very device
	}
	if out, err := exec.Command("btrfstune", "-f", "-m", device).CombinedOutput(); err != nil {
		return fmt.Errorf("a filesystem with the UUID of the one on %s is mounted, and it could not be given another: btrfstune: %w: %s", device, err, out)
	}
	return nil
}

// growFilesystem grows what is on a device to the device's size, while it is mounted.
func (m mounter) growFilesystem(device, at string) error {
	there, err := mountAt(at)
	if err != nil {
		return err
	}
	if there != nil && there.superReadOnly() {
		return nil // it can only be grown by who writes to it
	}
	resizer := mount.NewResizeFs(m.Exec)
	need, err := resizer.NeedResize(device, at)
	if err == nil && need {
		_, err = resizer.Resize(device, at)
	}
	if err != nil && strings.Contains(err.Error(), "Permission denied to resize") {
		err = fault.Errorf(fault.Unsupported, "%w; an ext4 is grown while it is mounted by who has CAP_SYS_RESOURCE only", err)
	}
	return err
}

// publish shows a staged filesystem at another place.
func (m mounter) publish(device, staged, at string, readOnly bool) error {
	number, err := deviceNumber(device)
	if err != nil {
		return err
	}
	from, err := mountAt(staged)
	if err != nil {
		return err
	}
	if from == nil || !from.of(number) {
		return status.Errorf(codes.FailedPrecondition, "the volume is not staged at %s", staged)
	}
	there, err := mountAt(at)
	switch {
	case err != nil:
		return err
	case there == nil:
		if err := os.MkdirAll(at, 0o750); err != nil {
			return err
		}
	case !there.of(number):
		return fault.Errorf(fault.Busy, "something else is mounted at %s: %s; unmount it", at, there.info.Source)
	case there.readOnly() == readOnly || from.readOnly():
		return nil
	case there.readOnly():
		return status.Errorf(codes.AlreadyExists, "the volume is published at %s, read-only", at)
	default: // whoever mounted it died before it was made read-only
		return m.Mount(staged, at, "", []string{"bind", "remount", "ro"})
	}
	options := []string{"bind"}
	if readOnly {
		options = append(options, "ro")
	}
	return m.Mount(staged, at, "", options)
}

// publishDevice shows a device's node as a file.
func (m mounter) publishDevice(device, at string) error {
	number, err := deviceNumber(device)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	switch err := unix.Stat(at, &st); {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == number:
		return nil
	case err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fault.Errorf(fault.Busy, "something else is at %s; remove it", at)
	case err != nil && !errors.Is(err, unix.ENOENT):
		return err
	}
	if err := os.MkdirAll(filepath.Dir(at), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(at, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	return m.Mount(device, at, "", []string{"bind"})
}

// unpublish takes away what was published, and the file or directory under it.
func (m mounter) unpublish(at string) error {
	if err := m.unmount(at); err != nil {
		return err
	}
	if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// unmount unmounts everything at a place.
func (m mounter) unmount(at string) error {
	for {
		there, err := mountAt(at)
		if err != nil || there == nil {
			return err
		}
		switch err := unix.Unmount(there.info.Mountpoint, unix.UMOUNT_NOFOLLOW); err {
		case nil, unix.EINVAL: // somebody else was quicker
		case unix.EBUSY:
			return fault.Errorf(fault.Busy, "%s is in use; stop who uses it (fuser -m %s)", at, at)
		default:
			return fmt.Errorf("unmounting %s: %w", at, err)
		}
	}
}

// mounted is a mount.
type mounted struct{ info *mountinfo.Info }

// mountAt is what is mounted at a path, on top; nil if nothing is.
func mountAt(path string) (*mounted, error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if real, err = filepath.Abs(real); err != nil {
		return nil, err
	}
	all, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != real, false })
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return &mounted{all[len(all)-1]}, nil
}

// of says whether the filesystem is on a device. The number in mountinfo is not that of the device for btrfs, which has one
// of its own: what it was mounted from is.
func (m mounted) of(device uint64) bool {
	if unix.Mkdev(uint32(m.info.Major), uint32(m.info.Minor)) == device {
		return true
	}
	source, err := deviceNumber(m.info.Source)
	return err == nil && source == device
}

func (m mounted) readOnly() bool {
	return slices.Contains(strings.Split(m.info.Options, ","), "ro")
}

func (m mounted) superReadOnly() bool {
	return slices.Contains(strings.Split(m.info.VFSOptions, ","), "ro")
}

// deviceNumber is the number of a block device.
func deviceNumber(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("the device %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("%s is not a block device", path)
	}
	return st.Rdev, nil
}
