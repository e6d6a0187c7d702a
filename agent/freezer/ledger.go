package freezer

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The ledger is one file on a tmpfs, mapped by holder and guard: at once the memory in which they agree who thaws
// what, and the record by which a sweep finds what both left behind when they were killed. It is made whole before
// anything is frozen, so that writing the intent is a store to locked memory and can neither fail nor touch a disk.
//
// Its format, version 1, in the machine's byte order: a header of 1024 bytes and MaxFilesystems entries of 1024 bytes,
// laid out as the two structs below; strings end at the first zero byte.
// The file is locked (flock) as long as one of its two processes exists.
const (
	ledgerMagic = "stillpoint freezer ledger 1\n"
	ledgerSize  = 1024 * (1 + MaxFilesystems)
	ledgerExt   = ".ledger"
)

type header struct {
	Magic  [32]byte
	BootID [40]byte
	Holder process
	Guard  process
	// Each process counts up while something is frozen, every tick, so that the other sees it stop.
	HolderBeat, GuardBeat atomic.Uint64
	_                     [1024 - 32 - 40 - 2*24 - 16]byte
}

// process identifies one for ever on one boot.
type process struct {
	PID       atomic.Int64
	Start     atomic.Uint64 // clock ticks since boot, /proc/PID/stat field 22
	Namespace atomic.Uint64 // the inode of its PID namespace
}

type entry struct {
	State     atomic.Uint32 // a state; whoever thaws has changed it by compare-and-swap
	Thread    atomic.Int32  // of the holder, the one inside FIFREEZE
	Device    uint64        // the superblock
	BlockDev  uint64        // the device that it was mounted from
	Until     atomic.Int64  // CLOCK_BOOTTIME, ns: frozen no longer than this
	FrozenAt  atomic.Int64  // CLOCK_BOOTTIME, ns
	ClaimedAt atomic.Int64  // when somebody took the thaw on himself
	ThawedAt  atomic.Int64
	Type      [32]byte
	Source    [384]byte
	Mount     [552]byte
}

// Both structs must fill their places.
var (
	_ [1024]byte = [unsafe.Sizeof(header{})]byte{}
	_ [1024]byte = [unsafe.Sizeof(entry{})]byte{}
)

// state of a ledger entry. doc.go has the diagram.
type state uint32

const (
	idle           state = iota // nothing of ours
	freezing                    // a holder's thread is in FIFREEZE, or about to be
	frozen                      // FIFREEZE returned 0: it is ours
	doomed                      // as freezing, but to be thawed the moment that it lands
	thawingHolder               // the holder has taken the thaw on itself
	thawingGuard                // the guard has
	thawingSweeper              // a sweep has
	thawed                      // our FITHAW ended it
	gone                        // our FITHAW found it not frozen: somebody else had ended it
	unfrozen                    // FIFREEZE failed: there is nothing to thaw
)

func (s state) String() string {
	return [...]string{"idle", "freezing", "frozen", "doomed", "thawing", "thawing by the guard", "thawing by a sweep", "thawed", "gone", "not frozen"}[s]
}

// settled: nothing is frozen by us any more, and nothing will be.
func (s state) settled() bool { return s == thawed || s == gone || s == unfrozen || s == idle }

func (e *entry) state() state             { return state(e.State.Load()) }
func (e *entry) swap(from, to state) bool { return e.State.CompareAndSwap(uint32(from), uint32(to)) }

// claim takes the thaw from a state that was just seen. Only the winner may call FITHAW.
func (e *entry) claim(from, to state, now int64) bool {
	if !e.swap(from, to) {
		return false
	}
	e.ClaimedAt.Store(now)
	return true
}

func (e *entry) filesystem() Filesystem {
	return Filesystem{Mount: text(e.Mount[:]), Device: Device(e.Device), Type: text(e.Type[:])}
}

type ledger struct {
	file *os.File
	data []byte
	path string
}

func (l *ledger) header() *header { return (*header)(unsafe.Pointer(&l.data[0])) }

func (l *ledger) entry(i int) *entry { return (*entry)(unsafe.Pointer(&l.data[1024*(1+i)])) }

// createLedger makes and locks one. It gets its name only when it is locked, so that a sweep never sees it free.
func createLedger(folder string) (*ledger, error) {
	fd, err := unix.Open(folder, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a record in %s: %w", folder, err)
	}
	f := os.NewFile(uintptr(fd), "ledger")
	if err := unix.Fallocate(fd, 0, 0, ledgerSize); err != nil {
		f.Close()
		return nil, fmt.Errorf("making a record in %s: %w", folder, err)
	}
	l, err := mapLedger(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	copy(l.header().Magic[:], ledgerMagic)
	copy(l.header().BootID[:], bootID())
	l.header().Holder.set()
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		l.close()
		return nil, err
	}
	l.path = filepath.Join(folder, fmt.Sprintf("%d-%d%s", os.Getpid(), boottime(), ledgerExt))
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, l.path, unix.AT_SYMLINK_FOLLOW); err != nil {
		l.close()
		return nil, fmt.Errorf("making the record %s: %w", l.path, err)
	}
	return l, nil
}

// mapLedger maps an open one, which it owns from then on.
func mapLedger(f *os.File) (*ledger, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Size != ledgerSize {
		return nil, fmt.Errorf("%s: %d bytes are no ledger", f.Name(), st.Size)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, ledgerSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mapping %s: %w", f.Name(), err)
	}
	return &ledger{file: f, data: data, path: f.Name()}, nil
}

// again is a second mapping, for a thread that may outlive the first.
func (l *ledger) again() (*ledger, error) {
	fd, err := unix.FcntlInt(l.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), l.path)
	out, err := mapLedger(f)
	if err != nil {
		f.Close()
	}
	return out, err
}

func (l *ledger) close() {
	unix.Munmap(l.data)
	l.file.Close()
}

// boottime is the clock of all deadlines: unlike CLOCK_MONOTONIC it goes on while the machine is suspended.
func boottime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("CLOCK_BOOTTIME: " + err.Error()) // in every kernel since 2.6.39
	}
	return ts.Nano()
}

// text reads a string out of a ledger's field.
func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// put writes a string into a ledger's field, cut to fit.
func put(field []byte, s string) {
	clear(field)
	copy(field[:len(field)-1], s)
}
