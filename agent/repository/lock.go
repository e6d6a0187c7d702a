package repository

import (
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Lock makes sure that one backup of a volume at a time is made into the repository: by this Repository, and by all
// processes of the host that name the same OpenOptions.Locks. Busy if one is under way; nobody waits. A process that
// dies lets go. Machines that share a volume are kept apart by whoever sends them to work.
func (r *Repository) Lock(v adapters.VolumeID) (release func() error, err error) {
	if !r.locked.add(v) {
		return nil, underWay(v)
	}
	if r.locks == "" {
		return func() error { r.locked.remove(v); return nil }, nil
	}
	file, err := r.lockFile(v)
	if err != nil {
		r.locked.remove(v)
		return nil, err
	}
	return func() error {
		r.locked.remove(v)
		return file.Close()
	}, nil
}

// lockFile opens and locks a file that stands for the volume and the repository. It stays when the lock goes.
func (r *Repository) lockFile(v adapters.VolumeID) (*os.File, error) {
	file, err := r.lockName(v.String(), v.String())
	if errors.Is(err, fault.Busy) {
		return nil, underWay(v)
	}
	return file, err
}

// lockName locks a name of the repository's, which messages call what. Busy if it is locked.
func (r *Repository) lockName(name, what string) (*os.File, error) {
	if err := os.MkdirAll(r.locks, 0o700); err != nil {
		return nil, fault.Errorf(fault.Invalid, "the folder for locks: %w", err)
	}
	name = adapters.ShortName(hex.EncodeToString(r.kopia.UniqueID()) + " " + name)
	file, err := os.OpenFile(filepath.Join(r.locks, name), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fault.Errorf(fault.Invalid, "the lock of %s: %w", what, err)
	}
	switch err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case err == nil:
		return file, nil
	case errors.Is(err, unix.EWOULDBLOCK):
		file.Close()
		return nil, fault.Errorf(fault.Busy, "%s: somebody else is at it", what)
	default:
		file.Close()
		return nil, fault.Errorf(fault.Unavailable, "the lock of %s: %w", what, err)
	}
}

func underWay(v adapters.VolumeID) error {
	return fault.Errorf(fault.Busy, "volume %s: another backup of it is under way; wait until it is done", v)
}

// volumes is a set, safe in parallel.
type volumes struct {
	mu  sync.Mutex
	set map[adapters.VolumeID]bool
}

// add says whether v was not in it.
func (s *volumes) add(v adapters.VolumeID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.set[v] {
		return false
	}
	if s.set == nil {
		s.set = map[adapters.VolumeID]bool{}
	}
	s.set[v] = true
	return true
}

func (s *volumes) remove(v adapters.VolumeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.set, v)
}
