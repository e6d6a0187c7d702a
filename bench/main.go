// Command bench measures Stillpoint against what users run today, on this machine, in one run: the freeze window
// against fsfreeze and cp, backup and restore against restic, borg and kopia's own command. It prints a table and
// writes it to bench/RESULTS.md, which the README quotes. It needs root, the peers, about 30 GB of disk below
// /var/tmp, and a machine that does nothing else.
//
//	go run ./bench                 everything
//	go run ./bench -only freeze    one part: freeze, backup, stages, s3, sparse, delta, thin, rbd, cephfs or tree
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/lab"
)

func main() {
	only := flag.String("only", "", "one part: freeze, backup, stages, s3, sparse, delta, thin, rbd, cephfs or tree")
	image := flag.String("thin-image", "", "only make the metadata of the part thin, into a `file`")
	changes := flag.String("rbd-read", "", "only read what changed in an RBD image: `conf,image`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *image != "" {
		if err := makeThinImage(*image); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if *changes != "" {
		if err := rbdRead(ctx, *changes); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	var table bytes.Buffer
	err := run(ctx, *only, io.MultiWriter(os.Stdout, &table))
	if err == nil && *only == "" {
		err = os.WriteFile(filepath.Join("bench", "RESULTS.md"), table.Bytes(), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// bench is one run.
type bench struct {
	out  io.Writer
	lab  *lab.Lab
	pool *lab.Filesystem
	bin  string // the folder with our programs
	env  []string
}

func run(ctx context.Context, only string, out io.Writer) (err error) {
	parts := []struct {
		name string
		run  func(*bench, context.Context) error
	}{{"freeze", (*bench).freeze}, {"backup", (*bench).backup}, {"stages", (*bench).stages}, {"s3", (*bench).s3}, {"sparse", (*bench).sparse}, {"delta", (*bench).delta}, {"thin", (*bench).thin}, {"rbd", (*bench).rbd}, {"cephfs", (*bench).cephfs}, {"tree", (*bench).tree}}
	known := only == ""
	for _, p := range parts {
		known = known || p.name == only
	}
	if !known {
		return fmt.Errorf("there is no part %q", only)
	}
	bin, err := filepath.Abs("bin")
	if err != nil {
		return err
	}
	b := &bench{out: out, bin: bin}
	fmt.Fprintf(out, "# Stillpoint's numbers\n\nMeasured by `make bench` on %s: %s.\n", time.Now().UTC().Format(time.DateOnly), machine())
	for _, p := range parts {
		if only != "" && p.name != only {
			continue
		}
		if err := b.inLab(ctx, p.run); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// inLab gives a part a pool of its own.
func (b *bench) inLab(ctx context.Context, part func(*bench, context.Context) error) (err error) {
	if b.lab, err = lab.Open("bench"); err != nil {
		return err
	}
	defer func() {
		if e := b.lab.Close(); err == nil {
			err = e
		}
	}()
	if b.pool, err = b.lab.Pool(ctx, "pool", "xfs", 64*gib); err != nil {
		return err
	}
	passphrase := filepath.Join(b.lab.Dir, "passphrase")
	if err := os.WriteFile(passphrase, []byte("bench\n"), 0o600); err != nil {
		return err
	}
	b.env = append(os.Environ(), "STILLPOINT_RUN="+filepath.Join(b.lab.Dir, "run"), "STILLPOINT_REMOTE="+filepath.Join(b.lab.Dir, "remote"), "STILLPOINT_PASSPHRASE_FILE="+passphrase)
	return part(b, ctx)
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(b.out, format+"\n", args...) }

// usage is what a program took.
type usage struct {
	wall time.Duration
	cpu  time.Duration // user and system
	busy time.Duration // of all processors, by everybody, while it ran
	peak int64         // resident memory, bytes
	text []byte        // standard output
}

// time runs a program and measures it. cold drops the page cache before.
func (b *bench) time(ctx context.Context, cold bool, env []string, name string, args ...string) (usage, error) {
	var stdout bytes.Buffer
	u, err := b.timeInto(ctx, &stdout, cold, env, name, args...)
	if err != nil {
		return u, fmt.Errorf("%w%s", err, stdout.Bytes())
	}
	u.text = stdout.Bytes()
	return u, nil
}

// timeInto is time with the program's output going elsewhere than into the usage. The peak of memory that the kernel
// tells of a process is at least that of the one that started it: large outputs are better not kept in this one.
func (b *bench) timeInto(ctx context.Context, stdout io.Writer, cold bool, env []string, name string, args ...string) (usage, error) {
	if cold {
		unix.Sync()
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return usage{}, err
		}
	}
	var stderr bytes.Buffer
	c := exec.CommandContext(ctx, name, args...)
	c.Env, c.Stdout, c.Stderr = append(b.env, env...), stdout, &stderr
	begin, busy := time.Now(), busyTime()
	if err := c.Run(); err != nil {
		return usage{}, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, stderr.Bytes())
	}
	u := usage{wall: time.Since(begin), cpu: c.ProcessState.UserTime() + c.ProcessState.SystemTime(), busy: busyTime() - busy}
	u.peak = c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss * kib
	return u, nil
}

// busyTime is how long the processors have not been idle since the machine started, all together; proc(5), /proc/stat.
func busyTime() time.Duration {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	var user, nice, system, idle, iowait, irq, softirq int64
	fmt.Sscanf(string(text), "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq)
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux that Go runs on
	return time.Duration(user+nice+system+irq+softirq) * tick
}

func (b *bench) stillpoint(ctx context.Context, cold bool, args ...string) (usage, error) {
	return b.time(ctx, cold, nil, filepath.Join(b.bin, "stillpoint"), args...)
}

// machine says what the numbers were measured on.
func machine() string {
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(text), "model name\t: "); ok {
			model, _, _ = strings.Cut(rest, "\n")
		}
	}
	var u unix.Utsname
	var s unix.Sysinfo_t
	unix.Uname(&u)
	unix.Sysinfo(&s)
	return fmt.Sprintf("%d cores of %s, %d GiB of memory, Linux %s, %s", runtime.NumCPU(), model, s.Totalram*uint64(s.Unit)>>30, unix.ByteSliceToString(u.Release[:]), runtime.Version())
}

// version is the first line of what a program says of itself.
func version(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return name
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line)
}
