package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// How a snapshot gets along with a filesystem that is frozen already depends on the kernel: lvcreate has device-mapper
// suspend the volume, which freezes ext4 and xfs on it, and on kernels before "fs: handle freezing from multiple
// devices" (Debian 12's 6.1 among them) that fails with EBUSY where FIFREEZE was there first. Distributions carry that
// patch to other versions: so it is tried, once a boot, with a small volume in the pool and a filesystem on it that
// nobody sees.

// freezeProbe finds the mode out, once for all who ask meanwhile.
type freezeProbe struct {
	mu      sync.Mutex
	found   bool
	mode    adapters.FreezeMode
	doubt   error         // why the mode is only the careful one
	until   time.Time     // that the doubt is kept
	running chan struct{} // closed when the probe that is under way is over
}

const (
	probePatience = time.Minute
	doubtKept     = time.Minute
	freezePrefix  = "freeze-" // a file with what was found in this boot
	probeLock     = "probe"
)

// quiesce is the sentence of Capabilities, with what is known by now.
func (a *Adapter) quiesce() string {
	const base = "lvcreate has device-mapper suspend the volume, which freezes ext4 and xfs on it by itself, and not btrfs; "
	f := &a.freeze
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.found && f.mode == adapters.FreezeNests:
		return base + "on this kernel that works while the cut has frozen the filesystem"
	case f.found:
		return base + "on this kernel that fails while the cut has frozen the filesystem"
	case f.doubt != nil:
		return base + "whether that works while the cut has frozen the filesystem could not be tried, so it is taken to fail: " + f.doubt.Error()
	}
	return base + "whether that works while the cut has frozen the filesystem is tried when a volume is first looked at"
}

// freezeMode is how snapshots of a volume get along with a freeze: what was found in this boot, or what a trial finds
// now. Where nothing can be tried, the careful answer is FreezeSelf: it is right for one volume on every kernel.
func (a *Adapter) freezeMode(ctx context.Context, g *group, l *logical) (adapters.FreezeMode, error) {
	f := &a.freeze
	for {
		f.mu.Lock()
		if !f.found {
			f.mode, f.found = a.state.readFreeze()
		}
		if f.found || f.doubt != nil && time.Now().Before(f.until) {
			defer f.mu.Unlock()
			if !f.found {
				return adapters.FreezeSelf, nil
			}
			return f.mode, nil
		}
		if f.running == nil {
			f.running = make(chan struct{})
			go a.probe(g, l)
		}
		running := f.running
		f.mu.Unlock()
		select {
		case <-running:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// probe makes the trial, and keeps the answer.
func (a *Adapter) probe(g *group, l *logical) {
	ctx, cancel := context.WithTimeout(context.Background(), probePatience)
	defer cancel()
	mode, err := a.tryFreeze(ctx, g, l)
	if err == nil {
		err = a.state.writeFreeze(mode)
	}
	f := &a.freeze
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mode, f.found, f.doubt, f.until = mode, err == nil, err, time.Now().Add(doubtKept)
	close(f.running)
	f.running = nil
}

// settled waits for a trial under way.
func (f *freezeProbe) settled() {
	f.mu.Lock()
	running := f.running
	f.mu.Unlock()
	if running != nil {
		<-running
	}
}

// readFreeze reads what was found in this boot.
func (s *state) readFreeze() (adapters.FreezeMode, bool) {
	if s.make() != nil {
		return 0, false
	}
	b, err := os.ReadFile(s.folder + "/" + freezePrefix + bootID())
	if err != nil {
		return 0, false
	}
	for _, m := range []adapters.FreezeMode{adapters.FreezeNests, adapters.FreezeSelf} {
		if strings.TrimSpace(string(b)) == m.String() {
			return m, true
		}
	}
	return 0, false
}

// writeFreeze keeps it, whole or not at all.
func (s *state) writeFreeze(m adapters.FreezeMode) error {
	temporary := s.folder + "/new-" + strings.ToLower(randomText())
	if err := os.WriteFile(temporary, []byte(m.String()+"\n"), 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, s.folder+"/"+freezePrefix+bootID())
}

// tryFreeze makes a scratch volume with a filesystem, freezes it, and takes a snapshot. Whatever comes of it, the
// filesystem is thawed and everything is removed; what a SIGKILL leaves, the next who opens the backend removes.
func (a *Adapter) tryFreeze(ctx context.Context, g *group, l *logical) (mode adapters.FreezeMode, err error) {
	lock, err := a.state.lock(ctx, probeLock)
	if err != nil {
		return 0, err
	}
	defer unlock(lock)
	if m, found := a.state.readFreeze(); found { // by who had the lock
		return m, nil
	}
	kind, program, size, err := scratchKind()
	if err != nil {
		return 0, err
	}
	pool, _, err := g.poolOf(l)
	if err != nil {
		return 0, err
	}
	status, err := a.mapper.poolStatus(pool)
	if err == nil {
		err = status.room(pool, a.limits)
	}
	if err != nil {
		return 0, err
	}
	name := scratchPrefix + strings.ToLower(randomText())
	defer func() {
		clean, cancel := context.WithTimeout(context.Background(), probePatience)
		defer cancel()
		if e := a.removeScratch(clean, g); e != nil && err == nil {
			err = e
		}
	}()
	tag := tagScratch + bootID()
	_, err = a.change(ctx, g, task{
		args:   []string{"lvcreate", "-q", "-y", "-V", fmt.Sprintf("%db", (size+g.extent-1)/g.extent*g.extent), "--thinpool", l.pool, "-kn", "-Wn", "-n", name, "--addtag", tag, g.name},
		intent: a.intent(g, &logical{pool: l.pool}),
	})
	if err != nil {
		return 0, err
	}
	now, err := a.report(ctx, g)
	if err != nil || now == nil || now.logical[name] == nil {
		return 0, errors.Join(err, fault.Errorf(fault.Unavailable, "the scratch volume %s was made, and is not there", name))
	}
	scratch := now.logical[name]
	device, err := a.mapper.find(mapperUUID(g.id, scratch.id, ""))
	if err != nil || device == nil {
		return 0, errors.Join(err, fault.Errorf(fault.Unavailable, "the scratch volume %s is not active", name))
	}
	at, err := node(device.device)
	if err != nil {
		return 0, err
	}
	if out, err := exec.CommandContext(ctx, program[0], append(program[1:], at)...).CombinedOutput(); err != nil {
		return 0, fault.Errorf(fault.Unavailable, "%s on the scratch volume: %w: %s", program[0], err, gist(string(out)))
	}
	fs, err := mountDetached(kind, at)
	if err != nil {
		return 0, err
	}
	defer fs.Close()
	if err := freeze(fs, fiFreeze); err != nil {
		return 0, fmt.Errorf("freezing the scratch volume: %w", err)
	}
	_, failure := a.change(ctx, g, task{args: snapshotArgs(g.name+"/"+name, name+".snapshot", []string{tag}), frozen: true, intent: a.intent(now, scratch)})
	if err := freeze(fs, fiThaw); err != nil {
		return 0, fmt.Errorf("thawing the scratch volume: %w", err)
	}
	return judgeFreeze(failure)
}

// judgeFreeze decides what a snapshot of a frozen volume shows: it worked, or the kernel refused to suspend the volume.
func judgeFreeze(failure error) (adapters.FreezeMode, error) {
	switch {
	case failure == nil:
		return adapters.FreezeNests, nil
	case strings.Contains(failure.Error(), "suspend ioctl on") && strings.Contains(failure.Error(), "Device or resource busy"):
		return adapters.FreezeSelf, nil
	}
	return 0, failure
}

// scratchKind is the filesystem to try with, the command that makes it, and how large the volume must be, in bytes: the
// pool gives only what is written, a megabyte or two.
func scratchKind() (kind string, program []string, size int64, err error) {
	for _, k := range []struct {
		kind string
		args []string
		size int64
	}{
		{"ext4", []string{"-q", "-F", "-E", "nodiscard"}, 16 << 20},
		{"xfs", []string{"-q", "-f", "-K"}, 512 << 20},
	} {
		for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
			if p, err := exec.LookPath(dir + "/mkfs." + k.kind); err == nil {
				return k.kind, append([]string{p}, k.args...), k.size, nil
			}
		}
	}
	return "", nil, 0, fault.Errorf(fault.Unsupported, "neither mkfs.ext4 nor mkfs.xfs is installed: Debian's packages are e2fsprogs and xfsprogs")
}

// mountDetached mounts a filesystem where nobody finds it: in no folder of any namespace. It goes with its descriptor,
// also by the death of the process.
func mountDetached(kind, device string) (*os.File, error) {
	config, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fault.Errorf(fault.Unsupported, "fsopen of %s: %w", kind, err)
	}
	defer unix.Close(config)
	if err := unix.FsconfigSetString(config, "source", device); err != nil {
		return nil, fmt.Errorf("mounting the scratch volume: %w", err)
	}
	if err := unix.FsconfigCreate(config); err != nil {
		return nil, fmt.Errorf("mounting the scratch volume: %w", err)
	}
	mount, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mounting the scratch volume: %w", err)
	}
	defer unix.Close(mount)
	root, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the scratch volume: %w", err)
	}
	return os.NewFile(uintptr(root), "scratch"), nil
}

// The ioctls of linux/fs.h.
const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

func freeze(f *os.File, request uint) error {
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}

// removeScratch removes the scratch volumes of a group. Its caller has the probe's lock, so nobody is using them; one
// that a dead process left frozen is thawed first, for what is frozen stays so when its mount is gone, and keeps the
// volume in use.
func (a *Adapter) removeScratch(ctx context.Context, g *group) error {
	now, err := a.report(ctx, g)
	if err != nil || now == nil {
		return err
	}
	var failures []error
	for _, l := range now.logical {
		if !isScratch(l) {
			continue
		}
		d, err := a.mapper.find(mapperUUID(now.id, l.id, ""))
		if err == nil && d != nil && d.users > 0 {
			err = thawLeft(d)
		}
		if err == nil {
			err = a.remove(ctx, now, l)
		}
		failures = append(failures, err)
	}
	return errors.Join(failures...)
}

func isScratch(l *logical) bool {
	_, tagged := single(l.tags, tagScratch)
	return tagged && strings.HasPrefix(l.name, scratchPrefix)
}

// thawLeft mounts a filesystem that was left frozen without a mount, thaws it, and lets it go.
func thawLeft(d *mapped) error {
	at, err := node(d.device)
	if err != nil {
		return err
	}
	var failures []error
	for _, kind := range []string{"ext4", "xfs"} {
		fs, err := mountDetached(kind, at)
		if err != nil {
			failures = append(failures, err)
			continue
		}
		defer fs.Close()
		if err := freeze(fs, fiThaw); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is not frozen
			return fmt.Errorf("thawing a scratch volume that was left frozen: %w", err)
		}
		return nil
	}
	return errors.Join(failures...)
}

// tidy removes what dead processes left in a group: scratch volumes, and snapshots that nobody reads any more and are
// still active. Neither does harm, so what cannot be removed now is left to the next who opens the backend.
func (a *Adapter) tidy(ctx context.Context, g *group) {
	a.mu.Lock()
	done := a.tidied[g.id]
	a.tidied[g.id] = true
	a.mu.Unlock()
	if done {
		return
	}
	scratch := slices.ContainsFunc(slices.Collect(volumesOf(g)), isScratch)
	if scratch {
		if lock, err := a.state.tryLock(probeLock, unix.LOCK_EX); err == nil && lock != nil {
			_ = a.removeScratch(ctx, g)
			unlock(lock)
		}
	}
	_ = a.images.sweep(ctx, g)
}
