package freezer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// set makes p the calling process.
func (p *process) set() {
	p.Namespace.Store(pidNamespace())
	_, start, _ := processState(os.Getpid())
	p.Start.Store(start)
	p.PID.Store(int64(os.Getpid()))
}

// finished tells whether no code of p's own will run any more: it is gone, or killed with its leader a zombie and
// the rest, if any, inside the kernel. Only for processes of our own PID namespace.
func (p *process) finished() bool {
	pid := int(p.PID.Load())
	if pid == 0 {
		return true
	}
	s, start, err := processState(pid)
	return err != nil || s != unreadable && (start != p.Start.Load() || s == 'Z' || s == 'X')
}

// threadGone tells whether a thread of p has left the kernel for good, so that its last system call has returned.
// Only for a finished process.
func (p *process) threadGone(tid int32) bool {
	pid := p.PID.Load()
	if s, start, err := processState(int(pid)); err != nil || s != unreadable && start != p.Start.Load() {
		return true
	}
	s, _, err := readStat(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
	return err != nil || s == 'Z' || s == 'X'
}

// unreadable is the state of a process that is there and cannot be looked at. It is not gone.
const unreadable = '?'

// processState gives a process's state letter and start time; an error means that there is no such process.
func processState(pid int) (byte, uint64, error) { return readStat(fmt.Sprintf("/proc/%d/stat", pid)) }

func readStat(path string) (byte, uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return 0, 0, err
		}
		return unreadable, 0, nil
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // the name may hold anything
	if len(fields) < 20 {
		return unreadable, 0, nil
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return fields[0][0], start, err
}

func pidNamespace() uint64 {
	var st unix.Stat_t
	if unix.Stat("/proc/self/ns/pid", &st) != nil {
		return 0
	}
	return st.Ino
}

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}
