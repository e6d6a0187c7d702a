package freezer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// prepareRecords makes the record folder, and a tmpfs on it where it is not on one: a record must need no disk. Two
// freezers that start together agree by a lock on the folder below.
func prepareRecords(folder string) error {
	if !filepath.IsAbs(folder) {
		return fmt.Errorf("the record folder %s: give an absolute path", folder)
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("the record folder: %w", err)
	}
	if err := ensureMemory(folder); err != nil {
		return err
	}
	if err := os.Chmod(folder, 0o700); err != nil {
		return fmt.Errorf("the record folder: %w", err)
	}
	return nil
}

func ensureMemory(folder string) error {
	f, err := os.Open(folder)
	if err != nil {
		return fmt.Errorf("the record folder: %w", err)
	}
	defer f.Close()
	if ok, err := inMemory(int(f.Fd())); ok || err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	again, err := os.Open(folder) // somebody may have mounted while we waited
	if err != nil {
		return err
	}
	defer again.Close()
	if ok, err := inMemory(int(again.Fd())); ok || err != nil {
		return err
	}
	if err := unix.Mount("stillpoint", folder, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=16m,mode=0700"); err != nil {
		return fmt.Errorf("mounting a tmpfs on the record folder %s: %w", folder, err)
	}
	return nil
}

func inMemory(fd int) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false, fmt.Errorf("the record folder: %w", err)
	}
	return st.Type == unix.TMPFS_MAGIC || uint32(st.Type) == unix.RAMFS_MAGIC, nil
}

// privateFolder makes the socket's folder, or refuses one that others may enter.
func privateFolder(folder string) error {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("the socket's folder: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(folder, &st); err != nil {
		return fmt.Errorf("the socket's folder %s: %w", folder, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mode&0o077 != 0 || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("the socket's folder %s must be a folder of root's own that nobody else may enter: chmod 0700, or choose another", folder)
	}
	return nil
}

const restPrefix = "rest-"

// keepRest notes how long a superblock was frozen, for all freezers of the machine. A note that cannot be written
// costs a rest, and nothing else.
func keepRest(folder string, d Device, frozen time.Duration, thawedAt int64) {
	b := binary.NativeEndian.AppendUint64(nil, uint64(thawedAt))
	b = binary.NativeEndian.AppendUint64(b, uint64(frozen))
	_ = os.WriteFile(filepath.Join(folder, restPrefix+d.String()), b, 0o600)
}

// restOf is how long a superblock must still rest.
func restOf(folder string, d Device, now int64) time.Duration {
	return restIn(filepath.Join(folder, restPrefix+d.String()), now)
}

func restIn(path string, now int64) time.Duration {
	b, err := os.ReadFile(path)
	if err != nil || len(b) != 16 {
		return 0
	}
	return restLeft(time.Duration(binary.NativeEndian.Uint64(b[8:])), int64(binary.NativeEndian.Uint64(b)), now)
}

// dropRests removes notes that say nothing any more.
func dropRests(folder string, now int64) error {
	notes, err := filepath.Glob(filepath.Join(folder, restPrefix+"*"))
	for _, n := range notes {
		if restIn(n, now) == 0 {
			if e := os.Remove(n); e != nil && !errors.Is(e, os.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

// isLedger tells a ledger from other files by its name.
func isLedger(name string) bool { return strings.HasSuffix(name, ledgerExt) }
