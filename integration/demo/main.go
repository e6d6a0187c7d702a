// Command demo shows Stillpoint's main job on real filesystems of this machine, start to end, with the real programs:
// a pool with two mounted volumes and a writer on both; two cuts, the changed blocks between them, a full and an
// incremental backup, a restore over old bytes; and the proof of each claim. It needs root and leaves nothing behind.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/integration/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	program := filepath.Join("bin", "stillpoint")
	if len(os.Args) > 1 {
		program = os.Args[1]
	}
	if err := run(ctx, os.Stdout, program); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
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
	pool    *lab.Filesystem
	volumes []*lab.Filesystem
	env     []string
	begin   time.Time
}

func run(ctx context.Context, out io.Writer, program string) (err error) {
	program, err = filepath.Abs(program)
	if err != nil {
		return err
	}
	l, err := lab.Open("demo")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	d := &demo{out: out, program: program, lab: l, begin: time.Now()}

	d.title("a pool (XFS with reflink, in a sparse file) with two volumes (ext4 and XFS, on loop devices), all mounted")
	if err := d.build(ctx); err != nil {
		return err
	}
	d.title("a writer on both volumes, which will not stop: it appends 1, 2, 3, … to the first and then to the second, and rewrites random blocks")
	writer, err := lab.StartWriter([]string{d.volumes[0].Mount, d.volumes[1].Mount}, dataSize, 20*mib)
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

	d.title("a restore of both, over files full of 0xA5, so that every hole has to be written")
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
	if d.pool, err = d.lab.Pool(ctx, "pool", "xfs", poolSize); err != nil {
		return err
	}
	for _, fstype := range []string{"ext4", "xfs"} {
		v, err := d.lab.Volume(ctx, d.pool.Mount, "volume-"+fstype, fstype, volumeSize)
		if err != nil {
			return err
		}
		d.volumes = append(d.volumes, v)
		d.say("  %s on %s at %s", v.File, v.Device, v.Mount)
	}
	passphrase := filepath.Join(d.lab.Dir, "passphrase")
	d.env = append(os.Environ(), "STILLPOINT_RUN="+filepath.Join(d.lab.Dir, "run"), "STILLPOINT_REMOTE="+filepath.Join(d.lab.Dir, "remote"), "STILLPOINT_PASSPHRASE_FILE="+passphrase)
	return os.WriteFile(passphrase, []byte("only for this demo\n"), 0o600)
}

var (
	snapshotHandle = regexp.MustCompile(`(?m)^reflink:\S+@\S+`)
	backupHandle   = regexp.MustCompile(`(?m)^backup:\S+`)
)

func (d *demo) cut(ctx context.Context, name string) ([]string, error) {
	args := []string{"cut", "--name", name}
	for _, v := range d.volumes {
		args = append(args, "reflink:"+v.File)
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

// restore restores into files that are full of old bytes.
func (d *demo) restore(ctx context.Context, backups []string) (files []string, err error) {
	old := bytes.Repeat([]byte{0xA5}, mib)
	for i, b := range backups {
		file := filepath.Join(d.pool.Mount, fmt.Sprintf("restored-%d.img", i))
		f, err := os.Create(file)
		if err != nil {
			return nil, err
		}
		for range volumeSize / mib {
			if _, err := f.Write(old); err != nil {
				return nil, errors.Join(err, f.Close())
			}
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
		if _, err := d.stillpoint(ctx, "restore", b, "reflink:"+file, "--overwrite"); err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}

// prove shows that the restored files are the snapshots bit for bit, that the filesystems in them are sound, and that
// both are of one instant.
func (d *demo) prove(ctx context.Context, snapshots, files []string) error {
	adapter, err := reflink.Kind().Open(ctx, adapters.Config{Name: "reflink"})
	if err != nil {
		return err
	}
	defer adapter.Close()
	var folders []string
	for i, file := range files {
		n, err := sameBytes(ctx, adapter, snapshots[i], file)
		if err != nil {
			return err
		}
		d.say("  %s: bit-identical to its snapshot, all %d bytes", filepath.Base(file), n)
		if err := d.lab.Sound(ctx, d.volumes[i].Type, file); err != nil {
			return err
		}
		d.say("  %s: the %s filesystem in it is sound", filepath.Base(file), d.volumes[i].Type)
		fs, err := d.lab.MountCopy(ctx, d.volumes[i].Type, file)
		if err != nil {
			return err
		}
		defer fs.Down()
		folders = append(folders, fs.Mount)
	}
	last, err := lab.Instant(folders)
	if err != nil {
		return err
	}
	d.say("  the writer had come to %d on the first volume and %d on the second: one instant", last[0], last[1])
	return nil
}

// sameBytes compares a snapshot, read through its adapter, with a file.
func sameBytes(ctx context.Context, a adapters.Adapter, handle, file string) (int64, error) {
	h, err := adapters.ParseHandle(handle)
	if err != nil {
		return 0, err
	}
	id, err := adapters.Resolve(ctx, a, h)
	if err != nil {
		return 0, err
	}
	opener, _ := adapters.As[adapters.Opener](a)
	image, err := opener.Open(ctx, id)
	if err != nil {
		return 0, err
	}
	defer image.Close()
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Size() != image.Size() {
		return 0, fmt.Errorf("%s does not have the snapshot's size of %d: %v", file, image.Size(), err)
	}
	want, got := make([]byte, mib), make([]byte, mib)
	for off := int64(0); off < image.Size(); off += mib {
		n := min(mib, image.Size()-off)
		if _, err := image.ReadAt(ctx, want[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if _, err := f.ReadAt(got[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if !bytes.Equal(want[:n], got[:n]) {
			return 0, fmt.Errorf("%s differs from %s within the MiB at %d", file, handle, off)
		}
	}
	return image.Size(), nil
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
	c := exec.CommandContext(ctx, d.program, args...)
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
	for _, a := range args {
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
