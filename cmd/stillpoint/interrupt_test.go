package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"stillpoint.io/stillpoint/agent/observe"
	"stillpoint.io/stillpoint/integration/lab"
)

// A backup that gets SIGINT or SIGTERM ends with a checkpoint; with the volume named again it is finished, and a new cut
// is backed up on top of it. Progress comes as events, one a line; the metrics are in their file.
func TestInterrupted(t *testing.T) {
	l := lab.Test(t)
	bin := programs(t)
	environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 4<<30)
	if err != nil {
		t.Fatal(err)
	}
	v, err := l.Volume(t.Context(), pool.Mount, "v", "ext4", 640<<20)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1<<20)
	f, err := os.Create(filepath.Join(v.Mount, "file"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 512 { // every chunk another one, and all of them small when compressed
		for k := 0; k < len(p); k += 4096 {
			p[k], p[k+1] = byte(i), byte(i>>8)|1<<7
		}
		if _, err := f.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	must(t, "remote", "init")
	volume, metrics := "reflink:"+v.File, filepath.Join(l.Dir, "metrics.prom")
	for i, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		c := exec.Command(filepath.Join(bin, "stillpoint"), "backup", "--json", "--progress", "json", "--metrics-file", metrics, "--read-limit", "100MiB", volume)
		if i > 0 { // the limit is for the remainder
			c.Args[len(c.Args)-2] = "50MiB"
		}
		stderr, err := c.StderrPipe()
		if err == nil {
			err = c.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		ended := ""
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			var e observe.Event
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				if strings.HasPrefix(lines.Text(), "stillpoint: ") {
					continue // its last word
				}
				t.Fatalf("%q is no event: %v", lines.Text(), err)
			}
			if e.Event == "progress" && e.Done > 150<<20 && ended == "" {
				ended = e.Subject
				c.Process.Signal(signal)
			}
			if e.Event == "end" && (e.Error == "" || e.Subject != ended) {
				t.Errorf("%+v", e)
			}
		}
		if err := c.Wait(); c.ProcessState.ExitCode() != 130 {
			t.Fatalf("%v: %v, exit code %d", signal, err, c.ProcessState.ExitCode())
		}
		text, err := os.ReadFile(metrics)
		if err != nil || !regexp.MustCompile(`stillpoint_failures_total\{kind="[a-z]+",operation="backup"\} 1`).Match(text) {
			t.Errorf("%v: %s", err, text)
		}
	}
	if err := os.WriteFile(filepath.Join(v.Mount, "later"), []byte("later"), 0o600); err != nil {
		t.Fatal(err)
	}
	made := decode[struct {
		Backup       string
		Kind         string
		BytesResumed int64 `json:"bytes_resumed"`
		BytesRead    int64 `json:"bytes_read"`
	}](t, must(t, "backup", "--json", "--metrics-file", metrics, volume))
	if len(made) != 2 || made[0].Kind != "full" || made[0].BytesResumed < 128<<20 || made[1].Kind != "incremental" || made[1].BytesRead > 64<<20 {
		t.Errorf("%+v", made)
	}
	text, err := os.ReadFile(metrics)
	if err != nil || !strings.Contains(string(text), "stillpoint_backup_last_success_timestamp_seconds{remote=\"default\"") {
		t.Errorf("%v: %s", err, text)
	}
	for _, name := range []string{"unverified", "unaudited"} {
		if !strings.Contains(string(text), "stillpoint_backup_"+name+"_since_timestamp_seconds{") {
			t.Errorf("no metric of what is %s: %s", name, text)
		}
	}
	if n := len(decode[snapshotLine](t, must(t, "snapshots", "--json", volume))); n != 1 {
		t.Errorf("%d snapshots are left, want the newest", n)
	}
}

func TestBudgetFlags(t *testing.T) {
	environment(t, t.TempDir())
	for words, args := range map[string]string{
		"--memory":   "backup --memory 1MiB reflink:/x",
		"--workers":  "backup --workers -1 reflink:/x",
		"--nice":     "backup --nice 20 reflink:/x",
		"--parallel": "backup --parallel -1 reflink:/x",
		"a size":     "backup --upload-limit fast reflink:/x",
	} {
		refuses(t, 2, []string{words}, strings.Fields(args)...)
	}
	must(t, "remote", "init")
	refuses(t, 2, []string{"--progress", "json"}, "verify", "--progress", "loud", "backup:default/x")
}

// The passphrase can be changed; the old one opens nothing any more.
func TestChangePassphrase(t *testing.T) {
	dir := t.TempDir()
	_, passphrase := environment(t, dir)
	must(t, "remote", "init")
	next := filepath.Join(dir, "next")
	if err := os.WriteFile(next, []byte("another that nobody may see\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, 2, []string{"--new-passphrase-file"}, "remote", "passphrase")
	if text := must(t, "remote", "passphrase", "--new-passphrase-file", next); strings.Contains(text, "nobody may see") {
		t.Errorf("it shows: %s", text)
	}
	refuses(t, 2, []string{"wrong passphrase"}, "backups")
	if err := os.Rename(next, passphrase); err != nil {
		t.Fatal(err)
	}
	must(t, "backups")
}
