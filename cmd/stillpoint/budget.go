package main

import (
	"os"
	"strconv"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// sizeFlag is a flag that takes a size in bytes: 64MiB.
type sizeFlag int64

func (f *sizeFlag) String() string {
	if *f == 0 {
		return ""
	}
	return bytesize(*f).String()
}
func (f *sizeFlag) Type() string { return "size" }
func (f *sizeFlag) Set(s string) error {
	n, err := adapters.ParseBytes(s)
	*f = sizeFlag(n)
	return err
}

// budgetFlags bound what a command uses.
type budgetFlags struct {
	memory, read, upload, download sizeFlag
	workers, parallel, nice        int
}

func (f *budgetFlags) register(c *cobra.Command) {
	f.memory = backup.DefaultMemory
	c.Flags().Var(&f.memory, "memory", "memory for buffers and packs, shared by all volumes that are worked on")
	c.Flags().IntVar(&f.workers, "workers", 0, "chunks worked on at once (default: by memory and processors)")
	c.Flags().IntVar(&f.nice, "nice", 0, "run with this niceness, 0 to 19, and idle disk priority from 10 on")
}

// registerBackup adds what only backups have.
func (f *budgetFlags) registerBackup(c *cobra.Command) {
	f.register(c)
	c.Flags().Var(&f.read, "read-limit", "bytes a second read from snapshots (default: no limit)")
	c.Flags().Var(&f.upload, "upload-limit", "bytes a second sent to the remote (default: no limit)")
	c.Flags().IntVar(&f.parallel, "parallel", 2, "volumes backed up at once; they share the budget in equal parts")
}

// registerReading adds what commands have that read a remote.
func (f *budgetFlags) registerReading(c *cobra.Command) {
	f.register(c)
	c.Flags().Var(&f.download, "download-limit", "bytes a second read from the remote (default: no limit)")
}

// budget checks the flags and lowers the process's priority. volumes is how many there are to work on.
func (f *budgetFlags) budget(volumes int) (backup.Budget, error) {
	b := backup.Budget{Memory: int64(f.memory), Workers: f.workers, Volumes: max(1, min(f.parallel, volumes)), ReadBytes: int64(f.read)}
	switch {
	case f.workers < 0:
		return b, fault.Errorf(fault.Invalid, "--workers %d: must be 0 or more", f.workers)
	case f.parallel < 0:
		return b, fault.Errorf(fault.Invalid, "--parallel %d: must be 1 or more", f.parallel)
	case f.nice < 0 || f.nice > 19:
		return b, fault.Errorf(fault.Invalid, "--nice %d: must be from 0 to 19", f.nice)
	case f.memory < 64<<20:
		return b, fault.Errorf(fault.Invalid, "--memory %v: must be 64MiB or more", &f.memory)
	}
	return b, f.yield()
}

func (f *budgetFlags) open() repository.OpenOptions {
	return repository.OpenOptions{UploadBytes: int64(f.upload), DownloadBytes: int64(f.download)}
}

// yield sets the niceness of every thread there is; new ones inherit it. (Linux keeps it for each thread.)
func (f *budgetFlags) yield() error {
	if f.nice == 0 {
		return nil
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	const (
		ofProcess = 1       // IOPRIO_WHO_PROCESS, which means a thread
		idle      = 3 << 13 // IOPRIO_CLASS_IDLE; linux/ioprio.h
	)
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, id, f.nice); err != nil && err != unix.ESRCH {
			return fault.Errorf(fault.Invalid, "--nice %d: %w", f.nice, err)
		}
		if f.nice < 10 {
			continue
		}
		if _, _, e := unix.Syscall(unix.SYS_IOPRIO_SET, ofProcess, uintptr(id), idle); e != 0 && e != unix.ESRCH {
			return fault.Errorf(fault.Invalid, "--nice %d: disk priority: %w", f.nice, e)
		}
	}
	return nil
}
