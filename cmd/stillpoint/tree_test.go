package main

import (
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/integration/lab"
)

// A subvolume of btrfs from cut to restore, by the commands: the same as for a disk image, and ls, one file of it, and
// the repair of one.
func TestTreeStory(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	remote, _ := environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "btrfs", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(pool.Mount, "tree")
	if out, err := exec.CommandContext(t.Context(), "btrfs", "subvolume", "create", tree).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(tree, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, path), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	write("etc/passwd", "root")
	write("var/log/now", "then")
	if err := os.Symlink("passwd", filepath.Join(tree, "etc", "li\x1bnk")); err != nil {
		t.Fatal(err)
	}
	must(t, "remote", "init")
	type report struct {
		Backup string `json:"backup"`
		Kind   string `json:"kind"`
		Tree   struct {
			Entries    int64 `json:"entries"`
			DirsReused int64 `json:"dirs_reused"`
			FilesRead  int64 `json:"files_read"`
		} `json:"tree"`
	}
	backup := func(name string) report {
		t.Helper()
		cut := decode[cutJSON](t, must(t, "cut", "--json", "--name", name, "reflink:"+tree))[0]
		return decode[report](t, must(t, "backup", "--json", cut.Snapshots[0]))[0]
	}
	if r := backup("one"); r.Kind != "full" || r.Tree.Entries != 7 || r.Tree.FilesRead != 2 {
		t.Errorf("%+v", r)
	}
	write("var/log/now", "now")
	r := backup("two")
	if r.Kind != "incremental" || r.Tree.DirsReused != 1 || r.Tree.FilesRead != 1 {
		t.Errorf("%+v", r)
	}
	if out := must(t, "ls", r.Backup, "/etc/"); !strings.Contains(out, "-rw-r-----") || !strings.Contains(out, "passwd") || strings.Contains(out, "\x1b") || !strings.Contains(out, `"li\x1bnk" -> passwd`) {
		t.Errorf("%s", out)
	}
	type line struct{ Name, Type string }
	if lines := decode[line](t, must(t, "ls", "--json", r.Backup)); len(lines) != 2 || lines[0] != (line{"etc", "directory"}) {
		t.Errorf("%+v", lines)
	}
	refuses(t, 3, []string{`"no/such"`}, "ls", r.Backup, "no/such")
	must(t, "verify", r.Backup)
	if out := must(t, "backups", "reflink:"+tree); strings.Count(out, "backup:default/") != 2 {
		t.Errorf("%s", out)
	}

	read := func(path, want string) {
		t.Helper()
		if text, err := os.ReadFile(path); err != nil || string(text) != want {
			t.Errorf("%s: %q, %v", path, text, err)
		}
	}
	volume := filepath.Join(pool.Mount, "restored")
	must(t, "restore", r.Backup, "reflink:"+volume)
	read(filepath.Join(volume, "var/log/now"), "now")
	out := filepath.Join(l.Dir, "out")
	must(t, "restore", r.Backup, out, "--path", "/etc/passwd")
	read(filepath.Join(out, "passwd"), "root")
	refuses(t, 4, []string{"exists"}, "restore", r.Backup, out)
	refuses(t, 4, []string{"exists"}, "restore", r.Backup, "reflink:"+volume)
	must(t, "restore", r.Backup, filepath.Join(l.Dir, "all"))
	read(filepath.Join(l.Dir, "all", "var/log/now"), "now")

	// Rot in a file of the tree is planned by a dry run and repaired from the snapshot, which has it at the same path.
	noise := make([]byte, 4<<20)
	rand.Read(noise)
	write("srv/noise", string(noise))
	three := decode[cutJSON](t, must(t, "cut", "--json", "--name", "three", "reflink:"+tree))[0].Snapshots[0]
	third := decode[report](t, must(t, "backup", "--json", three))[0].Backup
	if text := must(t, "verify", "--against", three, third); !strings.Contains(text, "the same as "+three) {
		t.Errorf("verify --against: %s", text)
	}
	rot(t, remote, third)
	if code, text, errs := call("verify", third); code != 6 || !strings.Contains(text, "bad: "+third) || !strings.Contains(text, `the file "srv/noise"`) {
		t.Errorf("rot: %d, %s%s", code, text, errs)
	}
	if text := must(t, "repair", "--dry-run", third); strings.Count(text, "can be made whole") != 1 || !strings.Contains(text, "1 contents could be stored again") {
		t.Errorf("repair --dry-run: %s", text)
	}
	if code, _, _ := call("verify", third); code != 6 {
		t.Error("a dry run has repaired it")
	}
	if text := must(t, "repair", third); strings.Count(text, "is whole again") != 1 || !strings.Contains(text, "1 contents stored again") {
		t.Errorf("repair: %s", text)
	}
	must(t, "verify", "--all")
	must(t, "forget", "--force", r.Backup)
}

// Two folders are two instants: refused with a reason and a remedy, or allowed and recorded.
func TestCutOfTwoInstants(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "btrfs", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	var volumes []string
	for _, name := range []string{"one", "two"} {
		tree := filepath.Join(pool.Mount, name)
		if out, err := exec.CommandContext(t.Context(), "btrfs", "subvolume", "create", tree).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		volumes = append(volumes, "reflink:"+tree)
	}
	cut := func(more ...string) []string {
		return append(append([]string{"cut", "--name", "both"}, more...), volumes...)
	}
	refuses(t, 5, []string{"one", "two", "an instant of its own", "one at a time", "--allow-separate-instants"}, cut()...)
	refuses(t, 5, []string{"--allow-separate-instants"}, cut("--allow-crash-consistent")...)
	text := must(t, cut("--allow-separate-instants")...)
	if lines := strings.Split(text, "\n"); !strings.HasSuffix(lines[0], "/one@both") || !strings.HasSuffix(lines[1], "/two@both  (at an instant of its own)") {
		t.Errorf("cut prints:\n%s", text)
	}
	again := decode[cutJSON](t, must(t, cut("--allow-separate-instants", "--json")...))[0]
	if !again.Adopted || len(again.Separate) != 1 || again.Separate[0] != again.Snapshots[1] {
		t.Errorf("%+v", again)
	}
}
