package lvmthin

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// lvm runs LVM's commands: all of them, from here.
type lvm struct {
	commands
	devices []string // that LVM may look at for volume groups
	wait    time.Duration

	mu    sync.Mutex
	found *installation
}

func newLVM(s *state, devices []string, wait time.Duration) *lvm {
	return &lvm{commands: commands{state: s}, devices: devices, wait: wait}
}

// installation is LVM as it is installed on this node.
type installation struct {
	program string
	locks   string // its folder of locks
}

// task is a command of LVM.
type task struct {
	args    []string
	devices []string // that it may look at: the physical volumes of its group
	group   groupID  // that it changes; empty if it only reads
	frozen  bool     // filesystems may be frozen now: it must not write to any
	intent  *intent  // it suspends devices
	// script, if there is one, makes the standard input of the program lvm without arguments: commands, one a line,
	// each with the options.
	script func(options []string) string
}

// run runs a command to its end or the context's. A group that somebody else has locked is waited for, and Busy in the
// end. An exit code other than 0 is an error of the kind that LVM's words suggest; the output is returned in any case.
// A script may have failed in part, and its exit code does not tell.
func (l *lvm) run(ctx context.Context, t task) (*command, error) {
	limited, cancel := context.WithTimeout(ctx, l.wait)
	defer cancel()
	for {
		release, err := l.queue(limited, t)
		if err != nil {
			if ctx.Err() == nil && limited.Err() != nil {
				err = fault.Errorf(fault.Busy, "other programs of ours have kept the volume group busy for more than %v", l.wait)
			}
			return nil, err
		}
		c, err := l.once(ctx, t, release)
		if err != nil {
			return nil, err
		}
		if !c.locked() || c.made(t) {
			return c, c.err()
		}
		file := lockFile(c.stderr)
		if err := untilFree(limited, file); err != nil {
			if ctx.Err() != nil {
				return c, context.Cause(ctx)
			}
			return c, fault.Errorf(fault.Busy, "%s: another program has locked the volume group for more than %v (lsof %s shows which)", c.name(), l.wait, file)
		}
	}
}

// locked reports whether it could not have a lock: a group's, whatever it then made of that, or LVM's lock of everything.
func (c *command) locked() bool {
	return strings.Contains(c.stderr, lockFailed) || c.code != 0 && lockFile(c.stderr) != ""
}

// made reports whether a script has made something: then it is not run again.
func (c *command) made(t task) bool {
	return t.script != nil && len(strings.TrimSpace(string(c.stdout))) > 0
}

// queue lets the programs of ours that change one group go one after the other: LVM's own lock would let only one go,
// too, but the others would have to start, look at the disks, fail and try again.
func (l *lvm) queue(ctx context.Context, t task) (release func(), err error) {
	if t.group == "" || os.Geteuid() != 0 {
		return func() {}, nil
	}
	return l.state.exclusive(ctx, groupLock(t.group))
}

// groupLock names the lock of programs that change a group.
func groupLock(id groupID) string { return "group-" + string(id) }

// once runs a command once. release is called at its end, whoever is still waiting for it.
func (l *lvm) once(ctx context.Context, t task, release func()) (*command, error) {
	c, err := l.begin(ctx, t, release)
	if err != nil {
		release()
		return nil, err
	}
	return c, c.wait(ctx)
}

func (l *lvm) begin(ctx context.Context, t task, release func()) (*command, error) {
	in, err := l.installed(ctx)
	if err != nil {
		return nil, err
	}
	if t.intent != nil {
		t.intent.Owner, t.intent.Locks = thisProcess(), in.locks
		if t.intent.Line == "" {
			t.intent.Line = strings.Join(t.args, " ")
		}
	}
	args, script := t.args, ""
	if options := l.options(t.devices, t.frozen); t.script != nil {
		script = t.script(options)
	} else {
		args = append(slices.Clone(args), options...)
	}
	return l.start(in.program, args, environment(), t.intent, script, release)
}

// options are those of every command: no waiting for locks (we wait, and say for what), no look at devices outside the
// group's, so that what a guest keeps on its volumes is never scanned, and no expectation of a udevd that is not there.
func (l *lvm) options(devices []string, frozen bool) []string {
	config := "global{wait_for_locks=0}"
	if frozen {
		config += "backup{backup=0,archive=0}log{syslog=0}" // those write to /etc and /var, which may be on a frozen volume
	}
	if !udevRuns() {
		config += `activation{udev_sync=0,udev_rules=0}devices{obtain_device_list_from_udev=0,external_device_info_source="none"}`
	}
	config = strings.NewReplacer(",", " ").Replace(config)
	options := []string{"--config", config}
	if devices != nil {
		options = append(options, "--devices", strings.Join(devices, ","))
	}
	return options
}

// udevRuns reports whether a udevd manages this /dev. libudev asks the same question in the same way (access of
// /run/udev/control, udev_queue_get_udev_is_active). Without one, or behind a container's own /run, LVM would wait for
// cookies that nobody hands in, or never make a node.
func udevRuns() bool {
	_, err := os.Stat("/run/udev/control")
	return err == nil
}

// environment is all that LVM's programs get of ours.
func environment() []string {
	env := []string{"LC_ALL=C", "LVM_SUPPRESS_FD_WARNINGS=1", "HOME=/nonexistent", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, name := range []string{"LVM_SYSTEM_DIR", "MODPROBE_OPTIONS", "DM_DISABLE_UDEV"} {
		if v, ok := os.LookupEnv(name); ok && !(name == "DM_DISABLE_UDEV" && !udevRuns()) {
			env = append(env, name+"="+v)
		}
	}
	if !udevRuns() {
		env = append(env, "DM_DISABLE_UDEV=1")
	}
	return env
}

// installed finds LVM, once. What was not found is looked for again.
func (l *lvm) installed(ctx context.Context) (*installation, error) {
	if os.Geteuid() != 0 {
		return nil, errNoPermission
	}
	if err := l.mapper.present(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	in := l.found
	l.mu.Unlock()
	if in != nil {
		return in, nil
	}
	in = &installation{}
	for _, dir := range strings.Split("/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin:"+os.Getenv("PATH"), ":") {
		if p, err := exec.LookPath(dir + "/lvm"); err == nil {
			in.program = p
			break
		}
	}
	if in.program == "" {
		return nil, fault.Errorf(fault.Unsupported, "LVM's program lvm is not installed: Debian's package is lvm2")
	}
	c, err := l.start(in.program, []string{"lvmconfig", "--typeconfig", "full", "global/locking_dir"}, environment(), nil, "", func() {})
	if err != nil {
		return nil, err
	}
	if err := c.wait(ctx); err != nil {
		return nil, err
	}
	if c.code != 0 {
		return nil, c.err()
	}
	_, dir, ok := strings.Cut(strings.TrimSpace(string(c.stdout)), "=") // locking_dir="/run/lock/lvm"
	if in.locks = strings.Trim(dir, `"`); !ok || !strings.HasPrefix(in.locks, "/") {
		return nil, fault.Errorf(fault.Unsupported, "lvmconfig does not say where LVM keeps its locks (global/locking_dir): %q", c.stdout)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.found = in
	return in, nil
}

// err is the error of a command that failed, nil if it did not.
func (c *command) err() error {
	if c.failure != nil {
		return fmt.Errorf("%s: %w", c.line, c.failure)
	}
	switch {
	case c.code == 0:
		return nil
	case c.code < 0:
		return fault.Errorf(fault.Unavailable, "%s was killed by somebody else; %s", c.line, gist(c.stderr))
	}
	return fault.Errorf(complaint(c.stderr), "%s: %s", c.name(), gist(c.stderr))
}

// name is the command without its options.
func (c *command) name() string {
	words := strings.Fields(c.line)
	return strings.Join(words[:min(2, len(words))], " ")
}

// lockFile is the file that LVM could not lock: "/run/lock/lvm/V_vg0: flock failed: …", or P_global, or their neighbours for
// who is next.
func lockFile(words string) string {
	for line := range strings.Lines(words) {
		if path, ok := strings.CutSuffix(strings.TrimSpace(line), flockFailed); ok {
			return path
		}
	}
	return ""
}

// untilFree waits for the end of somebody else's lock.
func untilFree(ctx context.Context, path string) error {
	return poll(ctx, pollStep, func() (bool, error) {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, os.ErrNotExist) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		defer f.Close() // the lock with it
		return tryFlock(f, unix.LOCK_SH)
	})
}

func randomText() string { return rand.Text() }
