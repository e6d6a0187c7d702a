package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"image/png"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/integration/lab"
)

// call runs the program in this process.
func call(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(args, &out, &errs)
	return code, out.String(), errs.String()
}

// must runs the program and fails the test unless it succeeds.
func must(t *testing.T, args ...string) string {
	t.Helper()
	code, stdout, stderr := call(args...)
	if code != 0 {
		t.Fatalf("stillpoint %s: exit code %d: %s", strings.Join(args, " "), code, stderr)
	}
	return stdout
}

// refuses runs the program and fails the test unless it exits with the code and says all of the words on stderr.
func refuses(t *testing.T, want int, words []string, args ...string) {
	t.Helper()
	code, stdout, stderr := call(args...)
	if code != want {
		t.Errorf("stillpoint %s: exit code %d, want %d: %s", strings.Join(args, " "), code, want, stderr)
	}
	for _, w := range words {
		if !strings.Contains(stderr, w) {
			t.Errorf("stillpoint %s: the error does not say %q: %s", strings.Join(args, " "), w, stderr)
		}
	}
	if code != 0 && strings.TrimSpace(stdout) != "" {
		t.Errorf("stillpoint %s: failed, yet printed %q", strings.Join(args, " "), stdout)
	}
}

// decode reads JSON lines.
func decode[T any](t *testing.T, text string) (all []T) {
	t.Helper()
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		var v T
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			t.Fatalf("%v in %q", err, lines.Text())
		}
		all = append(all, v)
	}
	return all
}

// environment gives the program a remote of its own and a folder for its run-time state.
func environment(t *testing.T, dir string) (remote, passphrase string) {
	t.Helper()
	remote, passphrase = filepath.Join(dir, "remote"), filepath.Join(dir, "passphrase")
	if err := os.WriteFile(passphrase, []byte("a passphrase nobody may see\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(envRemote, remote)
	t.Setenv(envPassphraseFile, passphrase)
	t.Setenv(envRun, filepath.Join(dir, "run"))
	return remote, passphrase
}

func TestUsageErrors(t *testing.T) {
	environment(t, t.TempDir())
	for _, c := range []struct {
		code  int
		words []string
		args  string
	}{
		{2, []string{"unknown command", "frobnicate"}, "frobnicate"},
		{2, []string{"unknown flag", "--help"}, "cut --name x --frozen"},
		{2, []string{"no name", "--name"}, "cut reflink:/x"},
		{2, []string{"name some", "--all"}, "cut --name x"},
		{2, []string{"not both"}, "cut --name x --all reflink:/x"},
		{2, []string{"at most 60s"}, "cut --name x --max-freeze 61s reflink:/x"},
		{2, []string{"invalid argument", "--max-freeze"}, "cut --name x --max-freeze soon reflink:/x"},
		{2, []string{`"/pool/disk.img"`, "BACKEND:ID"}, "cut --name x /pool/disk.img"},
		{3, []string{`"lvm"`, "not configured", "reflink"}, "cut --name x lvm:vg/lv"},
		{2, []string{"is a snapshot, a volume is wanted"}, "cut --name x reflink:/x@y"},
		{3, []string{"/no/such/file"}, "cut --name x reflink:/no/such/file"},
		{2, []string{"wants one snapshot"}, "diff"},
		{2, []string{"is a volume, a snapshot is wanted"}, "diff reflink:/x"},
		{2, []string{"wants snapshots"}, "delete"},
		{2, []string{"an @ inside an id is written %40"}, "diff reflink:/x@UPPER"},
		{2, []string{"wants backups"}, "verify"},
		{2, []string{"not both"}, "verify --all backup:default/x"},
		{2, []string{"--older-than", "--all"}, "verify --older-than 30d backup:default/x"},
		{2, []string{"no age"}, "verify --all --older-than soon"},
		{2, []string{"--against", "one backup"}, "verify --against reflink:/x@y --all"},
		{2, []string{"wants backups"}, "repair"},
		{2, []string{"backup:"}, "verify reflink:/x@y"},
		{3, []string{`"elsewhere"`, "default"}, "verify backup:elsewhere/x"},
		{2, []string{"wants a backup or snapshot, and the volume"}, "restore backup:default/x"},
		{2, []string{"not both"}, "backup reflink:/x reflink:/x@y"},
		{3, []string{"remote init"}, "backups"},
		{2, []string{"/no/such.yaml"}, "--config /no/such.yaml backups"},
		{2, []string{"one remote at most"}, "remote init a b"},
		{2, []string{"power of two"}, "remote init --chunk-size 100"},
		{2, []string{"--socket"}, "freezer"},
	} {
		refuses(t, c.code, c.words, strings.Fields(c.args)...)
	}
}

func TestConfiguration(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(envRemote, "")
	file := func(text string) string {
		path := filepath.Join(dir, "config.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		code  int
		words []string
		text  string
	}{
		{2, []string{"backend"}, "backend:\n  x: {adapter: reflink}\n"},
		{2, []string{"adaptor"}, "backends:\n  x: {adaptor: reflink}\n"},
		{2, []string{"Upper", "[a-z0-9-]"}, "backends:\n  Upper: {adapter: reflink}\n"},
		{2, []string{"backup", "cannot be named"}, "backends:\n  backup: {adapter: reflink}\n"},
		{2, []string{"has no adapter"}, "backends:\n  x: {}\n"},
		{2, []string{"config.yaml"}, "\tnot yaml"},
		{2, []string{`"lvm-thick"`, "reflink"}, "backends:\n  x: {adapter: lvm-thick}\n"},
		{2, []string{"colour"}, "backends:\n  x: {adapter: reflink, parameters: {colour: red}}\n"},
	} {
		refuses(t, c.code, c.words, "--config", file(c.text), "snapshots", "x:")
	}
	for _, c := range []struct {
		code  int
		words []string
		text  string
	}{
		{3, []string{"no remote is configured", envRemote}, "backends: {}\n"},
		{2, []string{"has no path"}, "remotes: {default: {passphrase-file: /x}}\n"},
		{2, []string{"has no passphrase", "passphrase-file"}, "remotes: {default: {path: /x}}\n"},
		{3, []string{"/no/such/file"}, "remotes: {default: {path: /x, passphrase-file: /no/such/file}}\n"},
		{3, []string{`"default"`, "offsite"}, "remotes: {offsite: {path: /x, passphrase-file: /x}}\n"},
	} {
		refuses(t, c.code, c.words, "--config", file(c.text), "backups")
	}
}

func TestAdaptersAndVersion(t *testing.T) {
	if text := must(t, "adapters"); !strings.Contains(text, "reflink") {
		t.Errorf("adapters: %s", text)
	}
	found := decode[struct{ Name, Summary string }](t, must(t, "adapters", "--json"))
	if len(found) == 0 || found[0].Summary == "" {
		t.Errorf("adapters --json: %+v", found)
	}
	if v := decode[map[string]string](t, must(t, "version", "--json")); v[0]["version"] == "" || v[0]["kopia"] == "" {
		t.Errorf("version --json: %v", v)
	}
	if text := must(t, "completion", "bash"); !strings.Contains(text, "stillpoint") {
		t.Error("no shell completion")
	}
}

// programs builds both programs into one folder and puts it first in PATH, where cut finds the freezer.
func programs(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", bin+"/", "../...").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	return bin
}

type cutJSON struct {
	Name      string
	Adopted   bool
	Snapshots []string
	Separate  []string `json:"separate_instants"`
	Frozen    []struct {
		Filesystem   string
		Milliseconds float64
	}
}

type backupJSON struct {
	Backup, Snapshot, Kind, Base                             string
	Size, Bytes_read, Bytes_audited, Bytes_new, Bytes_reused int64
	Seconds                                                  float64
}

// The whole story through the command line, with --json as scripts use it.
func TestTheWholeStory(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 4<<30)
	if err != nil {
		t.Fatal(err)
	}
	v, err := l.Volume(t.Context(), pool.Mount, "v", "ext4", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	volume := "reflink:" + v.File
	write := func(name string, size int) {
		if err := os.WriteFile(filepath.Join(v.Mount, name), bytes.Repeat([]byte(name), size/len(name)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first", 4<<20)
	must(t, "remote", "init", "--json")
	refuses(t, 4, []string{"already"}, "remote", "init")

	if text := must(t, "cut", "--name", "one", "--dry-run", volume); !strings.Contains(text, "freeze    "+v.Mount) {
		t.Errorf("the plan: %s", text)
	}
	one := decode[cutJSON](t, must(t, "cut", "--name", "one", "--json", volume))[0]
	if one.Name != "one" || len(one.Snapshots) != 1 || len(one.Frozen) != 1 || one.Frozen[0].Filesystem != v.Mount || one.Frozen[0].Milliseconds <= 0 {
		t.Fatalf("cut --json: %+v", one)
	}
	full := decode[backupJSON](t, must(t, "backup", "--json", one.Snapshots[0]))[0]
	if full.Kind != "full" || full.Snapshot != one.Snapshots[0] || full.Size != 64<<20 || full.Bytes_new == 0 {
		t.Errorf("backup --json: %+v", full)
	}
	write("second", 2<<20)
	two := decode[cutJSON](t, must(t, "cut", "--name", "two", "--json", volume))[0]

	type extent struct {
		Offset, Length int64
		Zero           bool
	}
	picture := filepath.Join(l.Dir, "changed.png")
	changed := decode[extent](t, must(t, "diff", "--json", "--png", picture, "--base", one.Snapshots[0], two.Snapshots[0]))
	var sum int64
	for i, e := range changed {
		sum += e.Length
		if i > 0 && e.Offset < changed[i-1].Offset+changed[i-1].Length {
			t.Errorf("extents out of order: %+v", changed)
		}
	}
	if sum < 2<<20 || sum > 16<<20 {
		t.Errorf("changed %d bytes after writing 2 MiB", sum)
	}
	if f, err := os.Open(picture); err != nil {
		t.Error(err)
	} else if _, err := png.Decode(f); err != nil {
		t.Errorf("the picture: %v", err)
	}
	if text := must(t, "diff", "--base", one.Snapshots[0], two.Snapshots[0]); !strings.Contains(text, "OFFSET") || !strings.Contains(text, "changed: ") {
		t.Errorf("diff: %s", text)
	}

	inc := decode[backupJSON](t, must(t, "backup", "--json", two.Snapshots[0]))[0]
	if inc.Kind != "incremental" || inc.Base != full.Backup || inc.Bytes_reused == 0 {
		t.Errorf("backup --json: %+v", inc)
	}
	if n := len(decode[map[string]any](t, must(t, "snapshots", "--json", volume))); n != 2 {
		t.Errorf("%d snapshots, want 2", n)
	}
	if n := len(decode[map[string]any](t, must(t, "backups", "--json", volume))); n != 2 {
		t.Errorf("%d backups, want 2", n)
	}
	must(t, "verify", full.Backup, inc.Backup)

	target := filepath.Join(pool.Mount, "restored.img")
	must(t, "restore", inc.Backup, "reflink:"+target)
	refuses(t, 4, []string{target}, "restore", inc.Backup, "reflink:"+target) // exists
	fromSnapshot := filepath.Join(pool.Mount, "from-snapshot.img")
	must(t, "restore", two.Snapshots[0], "reflink:"+fromSnapshot)
	if out, err := exec.Command("cmp", target, fromSnapshot).CombinedOutput(); err != nil {
		t.Errorf("restored from the backup and from the snapshot: %s", out)
	}
	if err := l.Sound(t.Context(), "ext4", target); err != nil {
		t.Error(err)
	}
	refuses(t, 4, []string{v.File}, "restore", "--overwrite", inc.Backup, volume) // mounted

	must(t, "delete", one.Snapshots[0])
	refuses(t, 3, []string{one.Snapshots[0]}, "delete", one.Snapshots[0])
	must(t, "forget", full.Backup)
	refuses(t, 3, []string{"remote"}, "verify", "backup:default/nothing")
	refuses(t, 3, nil, "forget", full.Backup)
	must(t, "verify", inc.Backup)
	must(t, "remote", "status")

	// Backups that make their own cut retire the snapshot that they no longer need.
	must(t, "backup", volume)
	time.Sleep(time.Second) // the name of such a cut has seconds
	write("third", 1<<20)
	must(t, "backup", volume)
	own := 0
	for _, s := range decode[struct{ Name string }](t, must(t, "snapshots", "--json", volume)) {
		if isOwnCut(s.Name, defaultRemote) {
			own++
		}
	}
	if own != 1 {
		t.Errorf("%d snapshots of own cuts are left, want the last one", own)
	}
}

// --all is every volume of the configured backends that is mounted: not one that is only attached, nor a stranger's.
func TestAllMountedVolumes(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "btrfs", 2<<30)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(l.Dir, "config.yaml")
	text := fmt.Sprintf("backends:\n  mine: {adapter: reflink, parameters: {pools: %s}}\n", pool.Mount)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, 3, []string{"mounted on this node"}, "--config", config, "cut", "--name", "x", "--all")
	for _, name := range []string{"a", "b"} {
		if _, err := l.Volume(t.Context(), pool.Mount, name, "ext4", 64<<20); err != nil {
			t.Fatal(err)
		}
	}
	raw := filepath.Join(pool.Mount, "raw.img")
	if err := lab.Sparse(raw, 16<<20); err != nil {
		t.Fatal(err)
	}
	_, f, err := lab.Loop(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	must(t, "remote", "init")
	all := decode[backupJSON](t, must(t, "--config", config, "backup", "--json", "--all"))
	if len(all) != 2 {
		t.Errorf("backup --all made %+v", all)
	}
	refuses(t, 5, []string{"raw.img", "not mounted", "--allow-crash-consistent"}, "--config", config, "cut", "--name", "raw", "mine:"+raw)
	if text := must(t, "--config", config, "cut", "--name", "raw", "--allow-crash-consistent", "mine:"+raw); !strings.Contains(text, "(crash-consistent)") {
		t.Errorf("cut --allow-crash-consistent: %s", text)
	}
	if text := must(t, "--config", config, "snapshots", "mine:"); !strings.Contains(text, "crash") || !strings.Contains(text, "filesystem") {
		t.Errorf("snapshots: %s", text)
	}
}

// The passphrase appears in no output, no error and no process title.
func TestSecretsStaySecret(t *testing.T) {
	dir := t.TempDir()
	remote, passphrase := environment(t, dir)
	var all strings.Builder
	for _, args := range [][]string{{"remote", "init"}, {"remote", "init"}, {"remote", "status"}, {"backups", "--json"}, {"verify", "backup:default/x"}} {
		_, stdout, stderr := call(args...)
		all.WriteString(stdout + stderr)
	}
	if err := os.WriteFile(passphrase, []byte("another passphrase nobody may see"), 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, 2, []string{"passphrase"}, "backups")
	_, stdout, stderr := call("backups")
	all.WriteString(stdout + stderr)
	if strings.Contains(all.String(), "nobody may see") {
		t.Errorf("the passphrase shows: %s", all.String())
	}
	err := filepath.Walk(remote, func(path string, info os.FileInfo, err error) error {
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte("nobody may see")) {
			t.Errorf("%s holds the passphrase", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Only the names that backup itself gives are its own: a user's snapshots stay.
func TestOwnCuts(t *testing.T) {
	for name, want := range map[string]bool{
		ownCut(time.Now(), defaultRemote):  true,
		"backup-20261123t101112-000":       true,
		"backup-20261123t101112-000-other": false,
		"backup-monday":                    false,
		"backup-":                          false,
		"backup-20261123t101112-before":    false,
		"monday":                           false,
	} {
		if isOwnCut(name, defaultRemote) != want {
			t.Errorf("isOwnCut(%q) = %v", name, !want)
		}
	}
}

// The freezer as a service, and what is swept after it.
func TestFreezerAsAService(t *testing.T) {
	l := lab.Test(t)
	bin := programs(t)
	environment(t, l.Dir)
	socket := filepath.Join(l.Dir, "freezer", "socket")
	if err := os.Mkdir(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(filepath.Join(bin, "stillpoint"), "freezer", "--socket", socket)
	var words bytes.Buffer
	c.Stderr = &words
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	var client *freezer.Client
	for begin := time.Now(); client == nil && time.Since(begin) < 20*time.Second; time.Sleep(10 * time.Millisecond) {
		client, _ = freezer.Connect(t.Context(), socket)
	}
	if client == nil {
		t.Errorf("nobody serves %s: %s", socket, words.String())
	} else if _, err := client.Status(t.Context()); err != nil {
		t.Error(err)
	}
	c.Process.Signal(syscall.SIGTERM)
	if err := c.Wait(); err != nil {
		t.Errorf("told to stop, it ended with %v: %s", err, words.String())
	}
	if out, err := exec.Command(filepath.Join(bin, "stillpoint"), "freezer", "sweep").CombinedOutput(); err != nil || len(out) != 0 {
		t.Errorf("a sweep with nothing to do: %v: %s", err, out)
	}
}

// Without the rights that it needs, a command says so and changes nothing.
func TestWithoutRights(t *testing.T) {
	l := lab.Test(t)
	bin := programs(t)
	environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 2<<30)
	if err != nil {
		t.Fatal(err)
	}
	v, err := l.Volume(t.Context(), pool.Mount, "v", "ext4", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	for dir := bin; dir != "/"; dir = filepath.Dir(dir) { // others may enter, so that the program itself starts
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&1 == 0 {
			if err := os.Chmod(dir, info.Mode().Perm()|0o11); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, args := range [][]string{
		{"cut", "--name", "x", "reflink:" + v.File},
		{"remote", "init"},
		{"--config", filepath.Join(l.Dir, "passphrase"), "snapshots"},
	} {
		c := exec.Command(filepath.Join(bin, "stillpoint"), args...)
		c.Dir = "/"
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := c.CombinedOutput()
		if err == nil || !regexp.MustCompile(`permission denied|not permitted|needs root`).Match(out) {
			t.Errorf("stillpoint %v as nobody: %v: %s", args, err, out)
		}
	}
}

// A process killed in the middle of a cut leaves nothing frozen, and the next command works.
func TestKilledWhileFrozen(t *testing.T) {
	l := lab.Test(t)
	bin := programs(t)
	environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 2<<30)
	if err != nil {
		t.Fatal(err)
	}
	v, err := l.Volume(t.Context(), pool.Mount, "v", "xfs", 320<<20)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 6 {
		c := exec.Command(filepath.Join(bin, "stillpoint"), "cut", "--name", fmt.Sprintf("k%d", i), "reflink:"+v.File)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * 15 * time.Millisecond) // wherever that is: each place must be survived
		c.Process.Signal(syscall.SIGKILL)
		c.Wait()
		done := make(chan error, 1)
		go func() { done <- os.WriteFile(filepath.Join(v.Mount, "alive"), []byte("x"), 0o600) }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("kill %d: still frozen", i)
		}
	}
	must(t, "cut", "--name", "after", "reflink:"+v.File)
}

// A full disk, a read-only repository: a clear error, and nothing that breaks the next run.
func TestDisksThatRefuse(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 2<<30)
	if err != nil {
		t.Fatal(err)
	}
	v, err := l.Volume(t.Context(), pool.Mount, "v", "ext4", 128<<20)
	if err != nil {
		t.Fatal(err)
	}
	small, err := l.Volume(t.Context(), l.Dir, "small", "ext4", 24<<20)
	if err != nil {
		t.Fatal(err)
	}
	random, err := os.Open("/dev/urandom")
	if err != nil {
		t.Fatal(err)
	}
	defer random.Close()
	f, err := os.Create(filepath.Join(v.Mount, "noise"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(f, random, 64<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	t.Setenv(envRemote, filepath.Join(small.Mount, "remote"))
	must(t, "remote", "init")
	cut := decode[cutJSON](t, must(t, "cut", "--name", "c", "--json", "reflink:"+v.File))[0]
	refuses(t, 7, []string{"space"}, "backup", cut.Snapshots[0])
	if n := len(decode[map[string]any](t, must(t, "backups", "--json"))); n != 0 {
		t.Errorf("%d backups are listed after one that failed", n)
	}
	if err := unix.Mount("", small.Mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	must(t, "backups")
	code, _, stderr := call("backup", cut.Snapshots[0])
	if code == 0 || !regexp.MustCompile(`read-only`).MatchString(stderr) {
		t.Errorf("a read-only repository: exit code %d: %s", code, stderr)
	}
}
