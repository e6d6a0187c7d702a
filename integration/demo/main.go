// Command demo shows Stillpoint's main job on real filesystems of this machine, start to end, with the real programs:
// two mounted volumes and a writer on both; two cuts, the changed blocks between them, a full and an incremental backup,
// a restore over old bytes; and the proof of each claim. It needs root and leaves nothing behind.
//
//	demo [-backend reflink|lvm-thin] [PROGRAM]
//
// With reflink both volumes are files of a pool. With lvm-thin one is a thin volume, in the same cut with a file: that
// is one instant on every kernel, also where two thin volumes cannot be. It runs where there is device-mapper (package
// vm).
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

func main() {
	vm.Init()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	backend := flag.String("backend", "reflink", "what the volumes are on: reflink or lvm-thin")
	flag.Parse()
	program := filepath.Join("bin", "stillpoint")
	if flag.NArg() > 0 {
		program = flag.Arg(0)
	}
	code, err := start(ctx, os.Stdout, *backend, program)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// start runs the demo here, or where there is device-mapper if the backend needs that: then this program runs itself
// there, and the code is that one's.
func start(ctx context.Context, out io.Writer, backend, program string) (int, error) {
	program, err := filepath.Abs(program)
	if err != nil {
		return 0, err
	}
	if backend != "lvm-thin" || vm.Inside() {
		return 0, run(ctx, out, backend, program)
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	return vm.Run(ctx, vm.Config{Memory: 2 << 30, Disks: []int64{poolSize}}, vm.Command{
		Path: self, Args: []string{"-backend", backend, program}, Stdout: out, Stderr: os.Stderr})
}

const (
	mib        = 1 << 20
	poolSize   = 8 << 30
	volumeSize = 512 * mib
	dataSize   = 128 * mib // what the writer rewrites, on each volume
)

// demo is one run.
type demo struct {
	out     io.Writer
	program string
	lab     *lab.Lab
	grounds grounds
	volumes []volume
	args    []string // before those of every command
	env     []string
	begin   time.Time
}

func run(ctx context.Context, out io.Writer, backend, program string) (err error) {
	g, err := newGrounds(ctx, backend)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	l, err := lab.Open("demo")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	d := &demo{out: out, program: program, lab: l, grounds: g, begin: time.Now()}

	d.title(g.title())
	if err := d.build(ctx); err != nil {
		return err
	}
	d.title("a writer on both volumes, which will not stop: it appends 1, 2, 3, … to the first and then to the second, and rewrites random blocks")
	writer, err := lab.StartWriter([]string{d.volumes[0].fs.Mount, d.volumes[1].fs.Mount}, dataSize, g.rate())
	if err != nil {
		return err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, writer.Stop())
		}
	}()
	pause(ctx, 3*time.Second)

	d.title("one consistent cut over both, and a full backup of it")
	if _, err := d.stillpoint(ctx, "remote", "init"); err != nil {
		return err
	}
	first, err := d.cut(ctx, "first")
	if err != nil {
		return err
	}
	if _, err := d.stillpoint(ctx, append([]string{"backup"}, first...)...); err != nil {
		return err
	}
	pause(ctx, 2*time.Second)

	d.title("the writer went on; a second cut, and what changed since the first: as a table, and as a picture")
	second, err := d.cut(ctx, "second")
	if err != nil {
		return err
	}
	picture := filepath.Join(l.Dir, "changed.png")
	if err := d.showDiff(ctx, first[1], second[1], picture); err != nil {
		return err
	}

	d.title("an incremental backup of the second cut")
	text, err := d.stillpoint(ctx, append([]string{"backup"}, second...)...)
	if err != nil {
		return err
	}
	backups := backupHandle.FindAllString(text, -1)
	if len(backups) != 2 {
		return fmt.Errorf("expected two backup handles, got %q", backups)
	}

	d.title("a restore of both, over volumes full of 0xA5, so that every hole has to be written")
	restored, err := d.restore(ctx, backups)
	if err != nil {
		return err
	}

	d.title("the proof")
	stopped = true
	if err := writer.Stop(); err != nil {
		return fmt.Errorf("the writer: %w", err)
	}
	if err := d.prove(ctx, second, restored); err != nil {
		return err
	}
	d.say("\ndone in %.0f s; nothing is left behind", time.Since(d.begin).Seconds())
	return nil
}

func (d *demo) build(ctx context.Context) (err error) {
	if d.volumes, err = d.grounds.volumes(ctx, d.lab); err != nil {
		return err
	}
	for _, v := range d.volumes {
		d.say("  %s (%s) on %s at %s", v.id, v.fs.Type, v.fs.Device, v.fs.Mount)
	}
	passphrase := filepath.Join(d.lab.Dir, "passphrase")
	d.env = append(os.Environ(), "STILLPOINT_RUN="+filepath.Join(d.lab.Dir, "run"), "STILLPOINT_REMOTE="+filepath.Join(d.lab.Dir, "remote"), "STILLPOINT_PASSPHRASE_FILE="+passphrase)
	if err := os.WriteFile(passphrase, []byte("only for this demo\n"), 0o600); err != nil || d.grounds.thin == "" {
		return err // what is configured by itself is enough
	}
	config := filepath.Join(d.lab.Dir, "config.yaml")
	d.args = []string{"--config", config}
	return os.WriteFile(config, []byte("backends:\n  reflink: {adapter: reflink}\n  lvm-thin: {adapter: lvm-thin}\n"), 0o600)
}

var (
	snapshotHandle = regexp.MustCompile(`(?m)^(?:reflink|lvm-thin):\S+@\S+`)
	backupHandle   = regexp.MustCompile(`(?m)^backup:\S+`)
)

func (d *demo) cut(ctx context.Context, name string) ([]string, error) {
	args := []string{"cut", "--name", name}
	for _, v := range d.volumes {
		args = append(args, v.id.String())
	}
	text, err := d.stillpoint(ctx, args...)
	if err != nil {
		return nil, err
	}
	handles := snapshotHandle.FindAllString(text, -1)
	if len(handles) != len(d.volumes) {
		return nil, fmt.Errorf("expected %d snapshot handles, got %q", len(d.volumes), handles)
	}
	return handles, nil
}

// showDiff runs diff and shows the first rows, the picture and the sum.
func (d *demo) showDiff(ctx context.Context, base, target, picture string) error {
	args := []string{"diff", "--base", base, target, "--png", picture}
	d.command(args)
	text, err := d.capture(ctx, args...)
	if err != nil {
		return err
	}
	rows, rest, _ := bytes.Cut(text, []byte("\n\n"))
	lines := bytes.SplitAfter(rows, []byte("\n"))
	const shown = 8
	for i, line := range lines {
		if i == shown && len(lines) > shown+1 {
			d.say("    … and %d more rows", len(lines)-shown)
			break
		}
		fmt.Fprintf(d.out, "    %s", line)
	}
	fmt.Fprintf(d.out, "\n%s", rest)
	info, err := os.Stat(picture)
	if err != nil {
		return err
	}
	d.say("  (--png drew the same picture in colours, %d bytes)", info.Size())
	return nil
}

// stillpoint runs the program, shows the command and what it prints, and returns its standard output.
func (d *demo) stillpoint(ctx context.Context, args ...string) (string, error) {
	d.command(args)
	text, err := d.capture(ctx, args...)
	for line := range bytes.Lines(text) {
		fmt.Fprintf(d.out, "    %s", line)
	}
	return string(text), err
}

func (d *demo) capture(ctx context.Context, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, d.program, append(slices.Clone(d.args), args...)...)
	c.Cancel = func() error { return c.Process.Signal(os.Interrupt) }
	c.Env = d.env
	var text, words bytes.Buffer
	c.Stdout, c.Stderr = &text, &words
	if err := c.Run(); err != nil {
		return nil, fmt.Errorf("stillpoint %s: %w: %s", args[0], err, words.Bytes())
	}
	return text.Bytes(), nil
}

func (d *demo) command(args []string) {
	fmt.Fprint(d.out, "  $ stillpoint")
	for _, a := range append(slices.Clone(d.args), args...) {
		fmt.Fprint(d.out, " ", a)
	}
	fmt.Fprintln(d.out)
}

func (d *demo) title(s string) { d.say("\n%4.1f s  %s", time.Since(d.begin).Seconds(), s) }

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

func pause(ctx context.Context, t time.Duration) {
	select {
	case <-time.After(t):
	case <-ctx.Done():
	}
}
