package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// tool is a backup program with the commands that users give it.
type tool struct {
	name, version string
	env           []string
	init          []string
	backup        []string // run for the full and for the incremental backup
	restore       []string
	restored      string // where the restored image is
}

// backup compares full backup, incremental backup and restore of one image on the same pool.
func (b *bench) backup(ctx context.Context) error {
	image := filepath.Join(b.pool.Mount, "disk.img")
	if err := makeImage(image); err != nil {
		return err
	}
	tools, err := b.tools(ctx, image)
	if err != nil {
		return err
	}
	b.say("\n## Backup and restore\n")
	b.say("An image of 8 GiB (2 GiB random, 2 GiB compressible, 4 GiB hole) on a reflink pool; then 640 random writes of 64 KiB; page cache dropped before each command; every program with its default settings, on the same file and disk: %s.\n", versions(tools))
	b.say("| | full, s | incremental, s | restore, s | CPU of the full, s | peak memory, MiB | stored, MiB |")
	b.say("|---|---|---|---|---|---|---|")

	ours, err := b.ourBackups(ctx, image)
	if err != nil {
		return err
	}
	row := func(name string, m measured) {
		restore := "–"
		if m.restore.wall > 0 {
			restore = fmt.Sprintf("%.2f", m.restore.wall.Seconds())
		}
		b.say("| %s | %.2f | %.2f | %s | %.1f | %d | %d |", name, m.full.wall.Seconds(), m.incremental.wall.Seconds(), restore, m.full.cpu.Seconds(),
			max(m.full.peak, m.incremental.peak, m.restore.peak)/mib, m.stored/mib)
	}
	row("Stillpoint", ours)
	var full, incremental, restic time.Duration
	for _, t := range tools {
		m, err := b.measure(ctx, t, image)
		if err != nil {
			return err
		}
		row(t.name, m)
		if full == 0 || m.full.wall < full {
			full = m.full.wall
		}
		if incremental == 0 || m.incremental.wall < incremental {
			incremental = m.incremental.wall
		}
		if t.name == "restic" {
			restic = m.restore.wall
		}
	}
	ratio := func(a, b time.Duration) float64 { return a.Seconds() / b.Seconds() }
	b.say("\nThe fastest peer ÷ Stillpoint: full %.1f, incremental %.1f; restic's restore ÷ Stillpoint's %.1f.", ratio(full, ours.full.wall), ratio(incremental, ours.incremental.wall), ratio(restic, ours.restore.wall))
	b.say("The incremental read %.3f x the changed chunks, and audited %d MiB besides.", ours.readRatio, ours.audited/mib)
	return nil
}

type measured struct {
	full, incremental, restore usage
	stored                     int64
	readRatio                  float64
	audited                    int64
}

// ourBackups cuts, backs up, changes, cuts, backs up, and restores. The first state of the image is kept for the peers
// in its first snapshot; the second remains in the image.
func (b *bench) ourBackups(ctx context.Context, image string) (m measured, err error) {
	if _, err := b.stillpoint(ctx, false, "remote", "init"); err != nil {
		return m, err
	}
	step := func(name string) (usage, report, error) {
		u, err := b.stillpoint(ctx, false, "cut", "--json", "--name", name, "reflink:"+image)
		if err != nil {
			return u, report{}, err
		}
		var cut struct{ Snapshots []string }
		if err := json.Unmarshal(u.text, &cut); err != nil {
			return u, report{}, err
		}
		u, err = b.stillpoint(ctx, true, "backup", "--json", cut.Snapshots[0])
		if err != nil {
			return u, report{}, err
		}
		var r report
		return u, r, json.Unmarshal(u.text, &r)
	}
	if err := exec.CommandContext(ctx, "cp", "--reflink=always", image, image+".first").Run(); err != nil {
		return m, err
	}
	if m.full, _, err = step("first"); err != nil {
		return m, err
	}
	changed, err := change(image)
	if err != nil {
		return m, err
	}
	var r report
	if m.incremental, r, err = step("second"); err != nil {
		return m, err
	}
	m.readRatio, m.audited = float64(r.BytesRead)/float64(changed), r.BytesAudited
	target := filepath.Join(b.pool.Mount, "restored.img")
	if m.restore, err = b.stillpoint(ctx, true, "restore", r.Backup, "reflink:"+target); err != nil {
		return m, err
	}
	if err := exec.CommandContext(ctx, "cmp", image, target).Run(); err != nil {
		return m, fmt.Errorf("the restored image differs: %w", err)
	}
	m.stored, err = folderSize(filepath.Join(b.lab.Dir, "remote"))
	return m, err
}

type report struct {
	Backup       string `json:"backup"`
	BytesRead    int64  `json:"bytes_read"`
	BytesAudited int64  `json:"bytes_audited"`
}

// measure runs a peer over the same two states of the image.
func (b *bench) measure(ctx context.Context, t tool, image string) (m measured, err error) {
	second := image + ".second"
	defer os.Remove(second)
	defer os.RemoveAll(filepath.Join(b.lab.Dir, t.name))
	// The peers know a file by its path: the first state is put there, then the second.
	if err := os.Rename(image, second); err != nil {
		return m, err
	}
	if err := exec.CommandContext(ctx, "cp", "--reflink=always", image+".first", image).Run(); err != nil {
		return m, err
	}
	if len(t.init) > 0 {
		if _, err := b.time(ctx, false, t.env, t.init[0], t.init[1:]...); err != nil {
			return m, err
		}
	}
	if m.full, err = b.time(ctx, true, t.env, t.backup[0], number(t.backup[1:], 1)...); err != nil {
		return m, err
	}
	if err := exec.CommandContext(ctx, "cp", "--reflink=always", second, image).Run(); err != nil {
		return m, err
	}
	if m.incremental, err = b.time(ctx, true, t.env, t.backup[0], number(t.backup[1:], 2)...); err != nil {
		return m, err
	}
	if len(t.restore) > 0 {
		if m.restore, err = b.time(ctx, true, t.env, t.restore[0], t.restore[1:]...); err != nil {
			return m, err
		}
		if err := exec.CommandContext(ctx, "cmp", image, t.restored).Run(); err != nil {
			return m, fmt.Errorf("%s restored something else: %w", t.name, err)
		}
		os.Remove(t.restored)
	}
	m.stored, err = folderSize(filepath.Join(b.lab.Dir, t.name))
	return m, err
}

// tools lists the peers. kopia's command is built from the very module that we use.
func (b *bench) tools(ctx context.Context, image string) ([]tool, error) {
	kopia := filepath.Join(b.lab.Dir, "kopia-command")
	if out, err := exec.CommandContext(ctx, "go", "build", "-C", filepath.Join("integration", "kopia"), "-o", kopia, "github.com/kopia/kopia").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building kopia: %w: %s", err, out)
	}
	at := func(name string) string { return filepath.Join(b.lab.Dir, name) }
	restored := filepath.Join(b.pool.Mount, "peer")
	return []tool{
		{
			name: "restic", version: version(ctx, "restic", "version"),
			env:     []string{"RESTIC_PASSWORD=bench", "RESTIC_REPOSITORY=" + at("restic") + "/repo", "RESTIC_CACHE_DIR=" + at("restic") + "/cache"},
			init:    []string{"restic", "init"},
			backup:  []string{"restic", "backup", image},
			restore: []string{"restic", "restore", "latest", "--target", restored}, restored: filepath.Join(restored, image),
		},
		{
			name: "borg", version: version(ctx, "borg", "--version"),
			env:    []string{"BORG_PASSPHRASE=bench", "BORG_REPO=" + at("borg") + "/repo", "BORG_BASE_DIR=" + at("borg") + "/base"},
			init:   []string{"borg", "init", "--make-parent-dirs", "-e", "repokey-blake2"},
			backup: []string{"borg", "create", "::%d", image},
		},
		{
			name: "kopia", version: "kopia (command) " + moduleVersion(ctx, "github.com/kopia/kopia"),
			env:     []string{"KOPIA_PASSWORD=bench", "KOPIA_CHECK_FOR_UPDATES=false", "KOPIA_CONFIG_PATH=" + at("kopia") + "/config", "KOPIA_CACHE_DIRECTORY=" + at("kopia") + "/cache", "KOPIA_LOG_DIR=" + at("kopia") + "/log"},
			init:    []string{kopia, "repository", "create", "filesystem", "--path", at("kopia") + "/repo"},
			backup:  []string{kopia, "snapshot", "create", image},
			restore: []string{kopia, "snapshot", "restore", image, filepath.Join(restored, "kopia.img"), "--snapshot-time=latest"}, restored: filepath.Join(restored, "kopia.img"),
		},
	}, nil
}

// sparse shows that memory and time do not follow the volume's size.
func (b *bench) sparse(ctx context.Context) error {
	image := filepath.Join(b.pool.Mount, "huge.img")
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := f.Truncate(16 << 40); err != nil {
		return err
	}
	block := random(64 * kib)
	for range 640 {
		if _, err := f.WriteAt(block, rand.Int64N(16<<40/int64(len(block)))*int64(len(block))); err != nil {
			return err
		}
	}
	if err := f.Close(); err != nil {
		return err
	}
	b.say("\n## A sparse volume of 16 TiB\n")
	b.say("With 640 blocks of 64 KiB at random places; then 64 more.\n")
	b.say("| | s | peak memory, MiB |")
	b.say("|---|---|---|")
	if _, err := b.stillpoint(ctx, false, "remote", "init"); err != nil {
		return err
	}
	for i, kind := range []string{"full", "incremental"} {
		if i == 1 {
			f, err := os.OpenFile(image, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			for range 64 {
				if _, err := f.WriteAt(block, rand.Int64N(16<<40/int64(len(block)))*int64(len(block))); err != nil {
					return err
				}
			}
			if err := f.Close(); err != nil {
				return err
			}
		}
		u, err := b.stillpoint(ctx, false, "cut", "--json", "--name", kind, "reflink:"+image)
		if err != nil {
			return err
		}
		var cut struct{ Snapshots []string }
		if err := json.Unmarshal(u.text, &cut); err != nil {
			return err
		}
		if u, err = b.stillpoint(ctx, true, "backup", "--json", cut.Snapshots[0]); err != nil {
			return err
		}
		b.say("| %s | %.2f | %d |", kind, u.wall.Seconds(), u.peak/mib)
		if i == 1 {
			var r report
			if err := json.Unmarshal(u.text, &r); err != nil {
				return err
			}
			u, err := b.stillpoint(ctx, true, "restore", r.Backup, "reflink:"+filepath.Join(b.pool.Mount, "huge-restored.img"))
			if err != nil {
				return err
			}
			b.say("| restore | %.2f | %d |", u.wall.Seconds(), u.peak/mib)
		}
	}
	return nil
}

// delta runs the benchmarks of changed blocks, which stand beside their code.
func (b *bench) delta(ctx context.Context) error {
	b.say("\n## Changed blocks\n")
	out, err := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", ".", "-benchmem", "./cbt/...").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	b.say("```")
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "Benchmark") {
			b.say("%s", strings.TrimSpace(line))
		}
	}
	b.say("```")
	return nil
}

// makeImage writes 2 GiB of random bytes, 2 GiB that compress about 3 : 1, and a hole of 4 GiB.
func makeImage(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(8 * gib); err != nil {
		return err
	}
	for off := int64(0); off < 2*gib; off += 4 * mib {
		if _, err := f.WriteAt(random(4*mib), off); err != nil {
			return err
		}
		if _, err := f.WriteAt(compressible(4*mib), 2*gib+off); err != nil {
			return err
		}
	}
	return f.Sync()
}

func random(n int) []byte {
	p := make([]byte, n)
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rand.Uint32())
	}
	rand.NewChaCha8(seed).Read(p)
	return p
}

// compressible looks like text: words of a small vocabulary, no two blocks alike.
func compressible(n int) []byte {
	words := strings.Fields("the volume snapshot block extent freeze thaw verify publish node backend journal inode superblock allocation group kernel device queue request")
	p := make([]byte, 0, n+16)
	for len(p) < n {
		p = append(p, words[rand.IntN(len(words))]...)
		p = append(p, ' ', byte('0'+rand.IntN(10)), ' ')
	}
	return p[:n]
}

// change makes 640 random writes of 64 KiB and returns how many bytes the 1 MiB chunks that they touch have.
func change(path string) (int64, error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	chunks := map[int64]bool{}
	for range 640 {
		off := rand.Int64N(8*gib/(64*kib)) * 64 * kib
		chunks[off/mib] = true
		if _, err := f.WriteAt(random(64*kib), off); err != nil {
			return 0, err
		}
	}
	return int64(len(chunks)) * mib, f.Sync()
}

func number(args []string, n int) []string {
	out := make([]string, len(args))
	for i, a := range args {
		out[i] = strings.ReplaceAll(a, "%d", fmt.Sprint(n))
	}
	return out
}

func versions(tools []tool) string {
	var v []string
	for _, t := range tools {
		v = append(v, t.version)
	}
	return strings.Join(v, "; ")
}

func moduleVersion(ctx context.Context, module string) string {
	return version(ctx, "go", "list", "-m", "-f", "{{.Version}}", module)
}

func folderSize(dir string) (total int64, err error) {
	err = filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			total += info.Size()
		}
		return err
	})
	return total, err
}
