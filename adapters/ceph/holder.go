package ceph

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// holderKey is the key of an image's metadata under which the process that fills it says who it is.
const holderKey = ".stillpoint.holder"

// holder is the process that fills an image, and the client of Ceph that it is. When it is known to have died, the next
// one need not wait until Ceph notices.
type holder struct {
	Version int     `json:"version"`
	Client  string  `json:"client"` // the address that Ceph shows of it as a watcher, which no other client ever has
	Process process `json:"process"`
}

func (h holder) encode() string {
	h.Version = recordVersion
	b, err := json.Marshal(h)
	if err != nil {
		panic(err) // strings and numbers only
	}
	return string(b)
}

func decodeHolder(text string) (h holder, ok bool) {
	err := json.Unmarshal([]byte(text), &h)
	return h, err == nil && h.Version == recordVersion && h.Client != ""
}

// process is a process as no other ever is, on any machine: its number means something only under one boot of one kernel
// and in one namespace of numbers, and another process may get it again, which then started later.
type process struct {
	Boot      string `json:"boot"`      // /proc/sys/kernel/random/boot_id
	Namespace uint64 `json:"namespace"` // the inode of /proc/self/ns/pid
	PID       int    `json:"pid"`
	Started   uint64 `json:"started"` // in clock ticks after the boot, see proc(5), /proc/pid/stat
}

// thisProcess is the one that runs this.
func thisProcess() (process, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return process{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return process{}, &fs.PathError{Op: "stat", Path: "/proc/self/ns/pid", Err: err}
	}
	p := process{Boot: strings.TrimSpace(string(boot)), Namespace: st.Ino, PID: os.Getpid()}
	_, p.Started, err = processState(p.PID)
	return p, err
}

// isDead reports whether a process is known to have ended. It is not known of processes of other machines and of other
// containers.
func (p process) isDead() bool {
	here, err := thisProcess()
	if err != nil || p.Boot == "" || p.Boot != here.Boot || p.Namespace != here.Namespace || p.PID <= 0 {
		return false
	}
	if unix.Kill(p.PID, 0) == unix.ESRCH {
		return true
	}
	state, started, err := processState(p.PID)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		return unix.Kill(p.PID, 0) == unix.ESRCH // /proc may hide what it is not to show
	case err != nil:
		return false
	}
	return started != p.Started || state == 'Z' || state == 'X'
}

// processState reads a process's state and when it started.
func processState(pid int) (state byte, started uint64, err error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // the name before it may hold anything
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("%s is not what proc(5) says", path)
	}
	started, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0][0], started, err
}
