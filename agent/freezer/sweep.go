package freezer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Swept is what a sweep did about one filesystem.
type Swept struct {
	Filesystem
	Thawed  bool   // our FITHAW ended a freeze
	Pending bool   // it cannot be done yet: sweep again
	What    string // in words
}

func (s Swept) String() string {
	return fmt.Sprintf("%s (%s %v): %s", s.Mount, s.Type, s.Device, s.What)
}

// Sweep thaws what freezers left frozen of which both processes are gone, by their ledgers in a folder (empty:
// DefaultRecords), and removes those ledgers. It leaves alone what belongs to a living process, stopped or not, and
// waits for nothing: a freeze whose killed thread is still in the kernel is Pending, and so is a thaw that hangs.
//
// A freezer counts as gone when its ledger's lock is free (it is released with the last thread of both processes) or,
// in our own PID namespace, when both processes are zombies with threads inside the kernel. A freeze that is recorded
// as landed gets exactly one FITHAW, and so does one that was under way, once its thread is gone. What cannot be told:
// if somebody else thawed what we left, and froze it again, our FITHAW ends his freeze; and if the killed thread's
// FIFREEZE failed because a stranger had frozen the filesystem just then, so does it. Both need a stranger who freezes
// the same filesystem in the moment of a double kill.
func Sweep(ctx context.Context, folder string) ([]Swept, error) {
	if folder == "" {
		folder = DefaultRecords
	}
	names, err := os.ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // no freezer ever ran here
	}
	if err != nil {
		return nil, err
	}
	var out []Swept
	var failed error
	for _, n := range names {
		if isLedger(n.Name()) && ctx.Err() == nil {
			swept, err := sweepLedger(folder, n.Name())
			out = append(out, swept...)
			failed = errors.Join(failed, err)
		}
	}
	return out, errors.Join(failed, dropRests(folder, boottime()), ctx.Err())
}

func sweepLedger(folder, name string) ([]Swept, error) {
	path := filepath.Join(folder, name)
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // its owner, or another sweep, was faster
	}
	if err != nil {
		return nil, err
	}
	l, err := mapLedger(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	defer l.close()
	h := l.header()
	if text(h.Magic[:]) != ledgerMagic {
		return nil, fmt.Errorf("%s: of another version of the freezer: use that one to sweep it", path)
	}
	free := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	if text(h.BootID[:]) == bootID() && !free && !killed(h) {
		return nil, nil
	}
	if text(h.BootID[:]) != bootID() { // a folder that outlives a boot; what was frozen does not
		return nil, os.Remove(path)
	}
	var out []Swept
	over := true
	for i := MaxFilesystems - 1; i >= 0; i-- {
		e := l.entry(i)
		switch s := e.state(); {
		case s == idle || s == unfrozen:
			continue
		case !s.settled():
			r := sweepEntry(l, i, free)
			out = append(out, r)
			over = over && !r.Pending
		}
		if e.state().settled() && e.FrozenAt.Load() != 0 {
			keepRest(folder, Device(e.Device), time.Duration(e.ThawedAt.Load()-e.FrozenAt.Load()), e.ThawedAt.Load())
		}
	}
	if over && free {
		return out, os.Remove(path)
	}
	return out, nil
}

// killed tells whether both processes of a ledger whose lock is held are beyond running.
func killed(h *header) bool {
	ns := pidNamespace()
	return h.Holder.Namespace.Load() == ns && h.Guard.Namespace.Load() == ns && h.Holder.finished() && h.Guard.finished()
}

// sweepEntry thaws one entry. The FITHAW is on a thread of its own, with its own mapping of the ledger: it may hang.
func sweepEntry(l *ledger, i int, free bool) Swept {
	e := l.entry(i)
	out := Swept{Filesystem: e.filesystem()}
	s := e.state()
	if (s == freezing || s == doomed) && !free && !l.header().Holder.threadGone(e.Thread.Load()) {
		out.Pending, out.What = true, "a killed freezer is still inside its freeze"
		return out
	}
	if s == thawingSweeper && !free {
		out.Pending, out.What = true, "another sweep is thawing it"
		return out
	}
	fd, err := reach(out.Filesystem, text(e.Source[:]), e.BlockDev)
	if err != nil {
		out.Pending, out.What = true, fmt.Sprintf("a killed freezer left it frozen, and it cannot be reached: %v", err)
		return out
	}
	if fd < 0 {
		e.ThawedAt.Store(boottime())
		e.State.Store(uint32(gone))
		out.What = "is mounted nowhere, and its device is free: nothing is frozen"
		return out
	}
	if !e.claim(s, thawingSweeper, boottime()) {
		unix.Close(fd)
		out.Pending, out.What = true, "somebody else is thawing it"
		return out
	}
	done := make(chan state, 1)
	again, err := l.again()
	if err != nil {
		unix.Close(fd)
		out.Pending, out.What = true, err.Error()
		return out
	}
	go func() { // not waited for for ever: it ends with the FITHAW
		defer again.close()
		e := again.entry(i)
		thaw(e, fd)
		unix.Close(fd)
		done <- e.state()
	}()
	select {
	case s = <-done:
	case <-time.After(patience):
		out.Pending, out.What = true, "its thaw hangs"
		return out
	}
	if out.Thawed = s == thawed; out.Thawed {
		out.What = "thawed; a killed freezer had left it frozen"
	} else {
		out.What = "was not frozen any more"
	}
	return out
}

// reach opens a filesystem by its superblock: through any mount of it, or, when it was unmounted while frozen,
// through a mount that has no place in the tree and goes with the descriptor. It returns -1 when there is no such
// superblock any more.
func reach(f Filesystem, source string, blockDev uint64) (int, error) {
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return -1, err
	}
	for _, m := range mounts {
		if m.Device != f.Device || m.Type != f.Type || m.Point == "" {
			continue
		}
		if _, hangs := mayHang(route(mounts, m.Point)); hangs {
			continue
		}
		if fd, err := openVerified(Filesystem{Mount: m.Point, Device: f.Device, Type: f.Type}); err == nil {
			return fd, nil
		}
	}
	return remount(f, source, blockDev)
}

// remount mounts the superblock that lives on a device, detached. It never makes a new one: only a device that is
// held (opening it exclusively gives EBUSY) has a living superblock, and while it has, mounting it gives that one.
func remount(f Filesystem, source string, blockDev uint64) (int, error) {
	if !strings.HasPrefix(source, "/dev/") || blockDev == 0 {
		return -1, fmt.Errorf("%s is no device that could be mounted again", source)
	}
	if _, err := os.Stat("/sys/dev/block/" + Device(blockDev).String()); errors.Is(err, os.ErrNotExist) {
		return -1, nil // the device itself is gone
	}
	probe, err := unix.Open(source, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		unix.Close(probe)
		return -1, nil
	}
	if err == unix.ENXIO || err == unix.ENODEV {
		return -1, nil // a loop device without a file
	}
	if err != unix.EBUSY {
		return -1, fmt.Errorf("opening %s: %w", source, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(source, &st); err != nil || st.Rdev != blockDev {
		return -1, fmt.Errorf("%s is another device now", source)
	}
	for _, readOnly := range []bool{false, true} { // a living superblock is given out only as it was mounted
		var fd int
		if fd, err = detached(f.Type, source, readOnly); err != nil {
			continue
		}
		if err := unix.Fstat(fd, &st); err != nil || st.Dev != uint64(f.Device) && f.Type != "btrfs" { // its st_dev is no s_dev
			unix.Close(fd)
			return -1, fmt.Errorf("%s holds another filesystem now", source)
		}
		return fd, nil
	}
	return -1, fmt.Errorf("mounting %s: %w", source, err)
}

func detached(fstype, source string, readOnly bool) (int, error) {
	ctx, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigSetString(ctx, "source", source); err != nil {
		return -1, err
	}
	if readOnly {
		if err := unix.FsconfigSetFlag(ctx, "ro"); err != nil {
			return -1, err
		}
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, err
	}
	mnt, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(mnt) // the mount lives as long as what is open in it
	return unix.Openat(mnt, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
