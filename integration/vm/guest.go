package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/lab"
)

// spec is what a guest shall be and do: written by the host into the share, since a kernel's command line has room for
// few words and none with a space.
type spec struct {
	Program   string
	Args, Env []string
	Dir       string
	Modules   []string
	ModuleDir string   // has a folder a kernel
	Disks     []string // devices
	Scratch   string   // device
	Out, Err  string   // the serial lines for the program's output
	Limit     time.Duration
}

// status is what the guest leaves in the share.
type status struct {
	Code  int
	Error string // there was no exit code, because of this
}

const (
	specFile, statusFile = "spec.json", "status.json"
	envShare             = "STILLPOINT_VM_SHARE" // on the kernel's command line: filesystem type, colon, source
	guestTemp            = "/run/tmp"
)

// Init does nothing, unless this process is the init of a guest: then it is that and never returns. Programs that use
// [Run], and TestMains of packages that use [Here], call it first of all.
func Init() {
	share := os.Getenv(envShare)
	if os.Getpid() != 1 || share == "" {
		return
	}
	s, err := guest(share)
	if err != nil {
		s.Error = err.Error()
	}
	if err := leave(s); err != nil {
		fmt.Println("vm: leaving the status:", err) // on the console
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// leave writes the status last: everything else in the share is on the host's side by then. No other filesystem is
// synced: it is about to be thrown away, and may be frozen.
func leave(s status) error {
	dir, err := os.Open(guestShare)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(guestShare, statusFile))
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func guest(share string) (status, error) {
	if err := mountBase(share); err != nil {
		return status{}, err
	}
	b, err := os.ReadFile(filepath.Join(guestShare, specFile))
	if err != nil {
		return status{}, err
	}
	var s spec
	if err := json.Unmarshal(b, &s); err != nil {
		return status{}, err
	}
	if err := os.Setenv("PATH", systemPath); err != nil { // an init has none
		return status{}, err
	}
	if err := s.settle(); err != nil {
		return status{}, err
	}
	return s.execute()
}

func mountBase(share string) error {
	kind, source, _ := strings.Cut(share, ":")
	data := ""
	if kind == "hostfs" {
		source, data = "none", source
	}
	for _, m := range []struct{ source, at, kind, data string }{
		{"dev", "/dev", "devtmpfs", ""},
		{"proc", "/proc", "proc", ""},
		{"sys", "/sys", "sysfs", ""},
		{"run", "/run", "tmpfs", ""},
		{"shm", "/dev/shm", "tmpfs", ""},
		{"pts", "/dev/pts", "devpts", ""},
		{source, guestShare, kind, data},
	} {
		if m.at != "/dev" && strings.HasPrefix(m.at, "/dev/") || m.at == guestShare {
			if err := os.MkdirAll(m.at, 0o755); err != nil {
				return err
			}
		}
		// EBUSY: the kernel mounted /dev itself.
		if err := unix.Mount(m.source, m.at, m.kind, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s: %w", m.at, err)
		}
	}
	return nil
}

// settle makes the rest of what the program may expect.
func (s *spec) settle() error {
	for _, dir := range []string{guestTemp, "/run/lvm", "/run/lock/lvm", "/run/modules/lib/modules"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	s.Env = append(s.Env, "MODPROBE_OPTIONS=-d /run/modules", "HOME="+guestTemp+"/home", "TMPDIR="+guestTemp, envInside+"=1",
		envDisks+"="+strings.Join(s.Disks, " "), envBin+"="+guestShare+"/bin")
	if err := s.modprobe(); err != nil {
		return err
	}
	lvm, err := configureLVM("/run/lvm-system", s.Disks)
	if err != nil {
		return err
	}
	s.Env = append(s.Env, lvm...)
	if err := unix.Mount(s.Scratch, guestTemp, "xfs", 0, ""); err != nil {
		return fmt.Errorf("mounting the scratch filesystem: %w", err)
	}
	labs := filepath.Join(guestTemp, "labs")
	for _, dir := range []string{labs, guestTemp + "/home"} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	if err := unix.Mount(labs, lab.Base, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", lab.Base, err)
	}
	return loopbackUp()
}

// modprobe loads the modules, and lets the kernel find others by itself. The machine's own /lib/modules is of another
// kernel.
func (s *spec) modprobe() error {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	version := strings.TrimSpace(string(release))
	if err := os.Symlink(filepath.Join(s.ModuleDir, version), "/run/modules/lib/modules/"+version); err != nil {
		return err
	}
	program, err := exec.LookPath("modprobe")
	if err != nil {
		return err
	}
	wrapper := "/run/modules/modprobe"
	if err := os.WriteFile(wrapper, []byte("#!/bin/sh\nexec "+program+" -d /run/modules \"$@\"\n"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/kernel/modprobe", []byte(wrapper), 0); err != nil {
		return err
	}
	if out, err := exec.Command(wrapper, append([]string{"-a"}, s.Modules...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("loading modules: %w: %s", err, out)
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// execute runs the program, and buries whatever dies: an init's first duty, without which a process that lost its
// parent never quite goes.
func (s *spec) execute() (status, error) {
	var out []*os.File
	null, err := os.Open(os.DevNull)
	if err != nil {
		return status{}, err
	}
	for _, line := range []string{s.Out, s.Err} {
		f, err := serial(line)
		if err != nil {
			return status{}, fmt.Errorf("%s: %w", line, err)
		}
		out = append(out, f)
	}
	p, err := os.StartProcess(s.Program, append([]string{s.Program}, s.Args...), &os.ProcAttr{
		Dir: s.Dir, Env: s.Env, Files: append([]*os.File{null}, out...)})
	if err != nil {
		return status{}, err
	}
	if s.Limit > 0 {
		go s.giveUp()
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return status{}, fmt.Errorf("waiting for the program: %w", err)
		}
		if pid != p.Pid || !ws.Exited() && !ws.Signaled() {
			continue
		}
		for _, f := range out {
			if err := unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1); err != nil { // tcdrain(3)
				return status{}, fmt.Errorf("draining the program's output: %w", err)
			}
		}
		if ws.Signaled() {
			return status{Code: 128 + int(ws.Signal())}, nil
		}
		return status{Code: ws.ExitStatus()}, nil
	}
}

// giveUp ends the guest, with the stacks of what blocks in the kernel on its console.
func (s *spec) giveUp() {
	time.Sleep(s.Limit)
	os.WriteFile("/proc/sys/kernel/printk", []byte("8"), 0)
	os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
	leave(status{Error: fmt.Sprintf("the program did not end in %v, and was to end by itself before that", s.Limit)})
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// serial opens a serial line as a plain pipe: no newline becomes two characters.
func serial(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, err
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	return f, unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}
