package freezer

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// isolated marks a process that Isolate has made.
const isolated = "STILLPOINT_FREEZER_ISOLATED"

// kept are the capabilities that a freezer needs: to freeze and mount, to open other users' folders, to lock memory,
// to lower its oom_score_adj, and to have its thaws scheduled first.
var kept = []int{unix.CAP_SYS_ADMIN, unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE, unix.CAP_IPC_LOCK, unix.CAP_SYS_RESOURCE, unix.CAP_SYS_NICE}

// Isolate is the first act of the freezer's program: it leaves the network and the capabilities that it does not
// need, and executes itself anew, because both belong to single threads and a Go program has several from the start.
// In the new program it does nothing.
func Isolate() error {
	if os.Getenv(isolated) != "" {
		return os.Unsetenv(isolated)
	}
	if os.Geteuid() != 0 {
		return errors.New("the freezer must run as root: it needs CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH, CAP_IPC_LOCK and CAP_SYS_RESOURCE")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("leaving the network: %w: the freezer needs CAP_SYS_ADMIN", err)
	}
	for c := range unix.CAP_LAST_CAP + 1 {
		if !slices.Contains(kept, c) {
			// Fails without CAP_SETPCAP, and then somebody has cut the set down already.
			_ = unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("setting no_new_privs: %w", err)
	}
	err := unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), isolated+"=1"))
	return fmt.Errorf("executing the freezer anew: %w", err)
}

// harden makes the process one that a machine short of memory, or with its disks frozen, still runs: wholly in memory
// (its program included: a page fault on a file can wait for a disk), never killed for memory, ahead of others on the
// processors. Threads and long-lived memory should exist by now. Without CAP_SYS_RESOURCE it may be killed for memory:
// that is said (weakness) and not refused, because the other process and the sweep are there for it.
func harden() (weakness string, err error) {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		weakness = fmt.Sprintf("without CAP_SYS_RESOURCE the freezer may be killed when memory runs out (oom_score_adj: %v)", errors.Unwrap(err))
	}
	if err := lockMemory(); err != nil {
		return "", fmt.Errorf("locking the freezer's memory: %w: it needs CAP_IPC_LOCK", err)
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return "", err
	}
	for _, t := range tasks {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, tid, -20) // better with CAP_SYS_NICE; right without
		}
	}
	return weakness, nil
}

// lockMemory locks every page when it is first touched, and the pages of files, which are the program itself and the
// ledger, now: only a file's page needs a disk to come. Locking all of the rest now would more than double what is
// resident, with the Go runtime's reserves.
func lockMemory() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		var from, to, offset, inode uint64
		var rights, device string
		if _, err := fmt.Sscanf(line, "%x-%x %s %x %s %d", &from, &to, &rights, &offset, &device, &inode); err != nil || inode == 0 {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, uintptr(from), uintptr(to-from), 0); errno != 0 {
			return errno
		}
	}
	// The next allocations find memory that is there.
	reserve := make([]byte, 4<<20)
	for i := 0; i < len(reserve); i += os.Getpagesize() {
		reserve[i] = 1
	}
	return nil
}
