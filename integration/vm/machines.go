package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// kind is a way to have device-mapper.
type kind string

const (
	here     kind = "here"
	uml      kind = "uml"
	umlNewer kind = "uml-newer"
	qemu     kind = "qemu"
)

func chosen() (kind, error) {
	k := kind(os.Getenv(envChoice))
	switch k {
	case here, uml, umlNewer, qemu:
		return k, nil
	case "":
		if hasDeviceMapper() {
			return here, nil
		}
		return uml, nil
	}
	return "", fmt.Errorf("%s=%s: it is one of %s, %s, %s, %s", envChoice, k, here, uml, umlNewer, qemu)
}

// hasDeviceMapper opens the control device, which loads the module: that it is there proves nothing, LVM's programs make it on
// any kernel.
func hasDeviceMapper() bool {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// kernel is one that can be booted.
type kernel struct {
	image   string // User-Mode Linux's is a program
	modules string // has a folder a kernel's version
}

func findKernel(ctx context.Context, kind kind) (kernel, error) {
	if kind == uml {
		program, err := exec.LookPath("linux.uml")
		if err != nil {
			return kernel{}, fmt.Errorf("this kernel has no device-mapper, and User-Mode Linux is missing: %w; `make test` installs it", err)
		}
		return kernel{program, "/usr/lib/uml/modules"}, nil
	}
	dir, err := Fetch(ctx, string(kind), os.Stderr)
	if err != nil {
		return kernel{}, err
	}
	if kind == umlNewer {
		return kernel{dir + "/usr/bin/linux.uml", dir + "/usr/lib/uml/modules"}, nil
	}
	images, err := filepath.Glob(dir + "/boot/vmlinuz-*")
	if err != nil || len(images) != 1 {
		return kernel{}, fmt.Errorf("%s: one kernel expected, found %q", dir, images)
	}
	return kernel{images[0], dir + "/lib/modules"}, nil
}

// spec describes the guest to its init.
func (m *machine) spec(cmd Command) (spec, error) {
	s := spec{Program: cmd.Path, Args: cmd.Args, Env: cmd.env(), Dir: cmd.Dir, ModuleDir: m.kernel.modules, Limit: cmd.limit,
		Modules: slices.Concat(modules, m.config.Modules)}
	if s.Dir == "" {
		var err error
		if s.Dir, err = os.Getwd(); err != nil {
			return spec{}, err
		}
	}
	prefix, line := "/dev/ubd", 0
	if m.kind == qemu {
		prefix, line = "/dev/vd", 1 // ttyS0 is the console
		s.Modules = append(s.Modules, "virtio_blk")
	}
	for i := range m.config.Disks {
		s.Disks = append(s.Disks, prefix+string(rune('a'+i)))
	}
	s.Scratch = prefix + string(rune('a'+len(s.Disks)))
	s.Out, s.Err = fmt.Sprintf("/dev/ttyS%d", line), fmt.Sprintf("/dev/ttyS%d", line+1)
	if cmd.Stdout == cmd.Stderr {
		s.Err = s.Out
	}
	return s, nil
}

const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// env is the program's environment: without what says where things are on this machine only.
func (cmd Command) env() []string {
	from := cmd.Env
	if from == nil {
		from = os.Environ()
	}
	path := systemPath
	var env []string
	for _, kv := range from {
		name, value, _ := strings.Cut(kv, "=")
		switch {
		case name == "PATH":
			path = value + ":" + systemPath
		case name == "HOME", name == "TMPDIR", name == "GOTMPDIR", name == envChoice, strings.HasPrefix(name, "XDG_"):
		default:
			env = append(env, kv)
		}
	}
	return append(env, "PATH="+path)
}

// boot is the guest's process, ready to start, and what to stop after it ended. Its descriptors 3 and 4 will be where
// the program's output goes.
func (m *machine) boot(ctx context.Context) (boot *exec.Cmd, stop func() error, err error) {
	if m.kind == qemu {
		return m.bootQEMU(ctx)
	}
	args := []string{fmt.Sprintf("mem=%dM", m.config.Memory>>20), "rootfstype=hostfs", "rootflags=/", "ro", "quiet",
		"init=" + m.folder.share("init"), "uml_dir=" + string(m.folder), envShare + "=hostfs:" + m.folder.share(),
		"con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:3", "ssl1=null,fd:4"}
	for i, path := range m.disks {
		args = append(args, fmt.Sprintf("ubd%d=%s", i, path))
	}
	// The shell is the first process of the namespace. User-Mode Linux cannot be: it ends a panic with SIGABRT to itself,
	// again and again until it works, and the first process of a namespace does not hear that.
	boot = exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", `ulimit -c 0; "$0" "$@"; exit $?`, m.kernel.image}, args...)...)
	boot.Dir = string(m.folder)
	boot.Env = append(os.Environ(), "TMPDIR="+m.memory) // its memory is a file there, which it removes at once
	boot.SysProcAttr, boot.WaitDelay = isolated(), 5*time.Second
	return boot, func() error { return nil }, nil
}

// bootQEMU emulates a machine. Root and share are folders of this one through virtiofsd, the kernel's command line is
// as for User-Mode Linux.
func (m *machine) bootQEMU(ctx context.Context) (boot *exec.Cmd, stop func() error, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var servers []*exec.Cmd
	stop = func() error {
		cancel()
		for _, v := range servers {
			v.Wait() // killed: that is no error
		}
		return nil
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	memory := fmt.Sprintf("%dM", m.config.Memory>>20)
	args := []string{"-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "qemu64", "-smp", "2", "-m", memory,
		"-object", "memory-backend-memfd,id=mem,size=" + memory + ",share=on", "-numa", "node,memdev=mem",
		"-nodefaults", "-display", "none", "-no-reboot",
		"-serial", "stdio", "-serial", "file:/proc/self/fd/3", "-serial", "file:/proc/self/fd/4",
		"-kernel", m.kernel.image, "-append", strings.Join([]string{"console=ttyS0", "quiet", "panic=-1", "nokaslr", "mitigations=off",
			"root=root", "rootfstype=virtiofs", "ro", "init=" + m.folder.share("init"), envShare + "=virtiofs:share"}, " ")}
	for tag, from := range map[string]string{"root": "/", "share": m.folder.share()} {
		socket := filepath.Join(string(m.folder), tag+".sock")
		listener, err := listen(socket) // if it listened itself it would leave a file in /run
		if err != nil {
			return nil, nil, err
		}
		v := exec.CommandContext(ctx, "/usr/lib/qemu/virtiofsd", "--fd=3", "-o", "source="+from, "-o", "sandbox=chroot", "-o", "cache=auto")
		v.SysProcAttr, v.ExtraFiles = isolated(), []*os.File{listener}
		err = v.Start()
		listener.Close()
		if err != nil {
			return nil, nil, fmt.Errorf("%w; qemu-system-x86 of Debian 12 has it", err)
		}
		servers = append(servers, v)
		args = append(args, "-chardev", "socket,id="+tag+",path="+socket, "-device", "vhost-user-fs-pci,chardev="+tag+",tag="+tag)
	}
	for _, path := range m.disks {
		args = append(args, "-drive", "file="+path+",if=virtio,format=raw,cache=unsafe,discard=unmap")
	}
	boot = exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	boot.Dir, boot.SysProcAttr, boot.WaitDelay = string(m.folder), isolated(), 5*time.Second
	return boot, stop, nil
}

// listen is a Unix socket that listens, as a descriptor to hand down.
func listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}
