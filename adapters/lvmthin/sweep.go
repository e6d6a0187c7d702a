package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// sweep looks at the records that dead processes left, and resumes what programs of LVM's left suspended when they were
// killed. What it could not do stands in the way of the next Gate. It starts no programs.
func (a *Adapter) sweep(ctx context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.swept = sweepRecords(ctx, a.state, a.mapper)
}

// sweepFailure tries again what the last sweep could not do.
func (a *Adapter) sweepFailure() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.swept != nil {
		ctx, cancel := context.WithTimeout(context.Background(), recoverPatience)
		defer cancel()
		a.swept = sweepRecords(ctx, a.state, a.mapper)
	}
	return a.swept
}

func sweepRecords(ctx context.Context, s *state, m mapper) error {
	names, err := filepath.Glob(filepath.Join(s.folder, recordPrefix+"*"))
	if err != nil || len(names) == 0 {
		return err
	}
	if err := s.make(); err != nil { // a folder that others can write to proves nothing
		return err
	}
	var failures []error
	for _, name := range names {
		if ctx.Err() != nil {
			return errors.Join(append(failures, ctx.Err())...)
		}
		if err := sweepRecord(name, m); err != nil {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// recordMax is the most that a record is, in bytes, with its script.
const recordMax = 1 << 20

// sweepRecord deals with one record: nothing if its program still runs.
func sweepRecord(name string, m mapper) error {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if free, err := tryFlock(f, unix.LOCK_EX); err != nil || !free {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(f, recordMax))
	if err != nil {
		return err
	}
	if in, ok := readIntent(b); ok && in.Owner.Boot == bootID() {
		if err := m.recover(in); err != nil {
			return err
		}
	}
	return os.Remove(name)
}

// quiet waits until every program is over that may be making a snapshot in a group and was started before, by whomever:
// this process for a call that has ended, another one, or one that is dead. What such a program makes would be taken for
// the snapshot of a later call by the same name, and may be of an earlier instant than that call. After quiet there can
// be none, as long as nobody else calls CreateSnapshot. It is Busy if it takes too long.
func (a *Adapter) quiet(ctx context.Context, g *group) error {
	limited, cancel := context.WithTimeout(ctx, a.lvm.wait)
	defer cancel()
	words := "other programs of ours"
	err := a.batches.settled(limited, g.id)
	if err == nil {
		var release func()
		if release, err = a.state.exclusive(limited, groupLock(g.id)); err == nil {
			// Alone among those that are alive: a program that still runs was started by a process that is dead.
			err = poll(limited, pollStep, func() (bool, error) {
				in, err := a.state.atWork(g.name)
				if in != nil {
					words = fmt.Sprintf("a program that process %d, which is dead, started (%s)", in.Owner.PID, in.Line)
				}
				return in == nil, err
			})
			release()
		}
	}
	if err != nil && ctx.Err() == nil && limited.Err() != nil {
		return fault.Errorf(fault.Busy, "%s may be making snapshots in the volume group %s, for more than %v; they are waited for, because LVM must not be killed", words, g.name, a.lvm.wait)
	}
	return err
}

// atWork is the record of a program that is running in a group; nil if there is none. The lock on a record is the
// program's, and ends with it.
func (s *state) atWork(group string) (*intent, error) {
	names, err := s.list(recordPrefix)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		f, err := os.OpenFile(filepath.Join(s.folder, name), os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, s.unusable(err)
		}
		in, err := holder(f)
		f.Close()
		if err != nil || in != nil && in.Group == group {
			return in, err
		}
	}
	return nil, nil
}

// holder is what a record says, if its program is running.
func holder(f *os.File) (*intent, error) {
	if free, err := tryFlock(f, unix.LOCK_SH); err != nil || free {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, recordMax))
	if err != nil {
		return nil, err
	}
	if in, ok := readIntent(b); ok && in.Owner.Boot == bootID() {
		return &in, nil
	}
	return nil, nil
}

// intent is the record of a command that changes volumes of a group: it may suspend them and their pools, and of those
// the record names what exists and is not suspended now.
func (a *Adapter) intent(g *group, volumes ...*logical) *intent {
	var uuids []string
	for _, l := range volumes {
		uuids = append(uuids, mapperUUID(g.id, l.id, ""))
		pool := g.logical[l.pool]
		if pool == nil {
			continue
		}
		uuids = append(uuids, mapperUUID(g.id, pool.id, "tpool"), mapperUUID(g.id, pool.id, "pool"))
		for _, part := range []string{"tdata", "tmeta"} {
			if l := g.logical[pool.name+"_"+part]; l != nil {
				uuids = append(uuids, mapperUUID(g.id, l.id, part))
			}
		}
	}
	slices.Sort(uuids)
	in := &intent{Group: g.name}
	for _, u := range slices.Compact(uuids) {
		if d, err := a.mapper.find(u); err == nil && d != nil && !d.suspended {
			in.Devices = append(in.Devices, u)
		}
	}
	return in
}

// recoverPatience is how long to wait for a group's lock before giving a suspended device up for now.
const recoverPatience = 5 * time.Second

// recover resumes what a program that is over left suspended. It resumes only devices that its record names, which were
// not suspended before it started, and only while it holds the group's lock itself, as LVM's programs do for as long as
// they have anything suspended: so what is suspended under the lock was left so, and is not another program's doing.
func (m mapper) recover(in intent) error {
	suspended, err := m.suspended(in.Devices)
	if err != nil || len(suspended) == 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), recoverPatience)
	defer cancel()
	lock, err := lockGroup(ctx, in)
	if err != nil {
		return fault.Errorf(fault.Busy, "%s (%q) was killed and left %s suspended, and another program has locked the volume group %s: %w",
			"a program of LVM's", in.Line, strings.Join(suspended, ", "), in.Group, err)
	}
	defer lock.Close()
	if suspended, err = m.suspended(in.Devices); err != nil {
		return err
	}
	var failures []error
	for _, uuid := range suspended {
		if err := m.resume(uuid); err != nil {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// suspended are those devices that are.
func (m mapper) suspended(uuids []string) ([]string, error) {
	var are []string
	for _, u := range uuids {
		d, err := m.find(u)
		if err != nil {
			return nil, err
		}
		if d != nil && d.suspended {
			are = append(are, u)
		}
	}
	return are, nil
}

// lockGroup takes the lock that LVM takes when it changes a group: an exclusive flock on V_<group> in its folder of
// locks (file_lock_resource in lvm2's lib/locking/file_locking.c, lock_file in lib/misc/lvm-flock.c). LVM removes the
// file when it unlocks, so a lock on a file that is not there any more is none.
func lockGroup(ctx context.Context, in intent) (*os.File, error) {
	path := filepath.Join(in.Locks, "V_"+in.Group)
	var lock *os.File
	err := poll(ctx, pollStep, func() (bool, error) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR|unix.O_CLOEXEC, 0o777)
		if err != nil {
			return false, err
		}
		free, err := tryFlock(f, unix.LOCK_EX)
		if err != nil || !free {
			f.Close()
			return false, err
		}
		if !there(f) {
			f.Close()
			return false, nil
		}
		lock = f
		return true, nil
	})
	return lock, err
}
