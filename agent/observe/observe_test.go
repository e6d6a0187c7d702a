package observe

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// What runs shows while it runs, what failed is counted by its kind, and what was made is there by volume.
func TestMetrics(t *testing.T) {
	m := New()
	var p backup.Progress
	p.Done.Store(3)
	p.Total.Store(7)
	end := m.Begin("backup", "mem:local/v@s", &p)
	text := func() string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "metrics.prom")
		if err := prometheus.WriteToTextfile(path, m.Registry()); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	const running = `stillpoint_progress_bytes{operation="backup",state="done",subject="mem:local/v@s"} 3`
	if got := text(); !strings.Contains(got, running) {
		t.Errorf("while it runs: %s", got)
	}
	end(fault.Errorf(fault.Exhausted, "full"))
	m.Backup("mem:local/v", "offsite", backup.Report{Kind: repository.Full, BytesNew: 5, Distrusted: true})
	got := text()
	for _, want := range []string{
		`stillpoint_failures_total{kind="exhausted",operation="backup"} 1`,
		`stillpoint_backup_bytes{remote="offsite",volume="mem:local/v",what="new"} 5`,
		`stillpoint_backups_total{kind="full",remote="offsite",volume="mem:local/v"} 1`,
		`stillpoint_distrusted_total{volume="mem:local/v"} 1`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in %s", want, got)
		}
	}
	if strings.Contains(got, "stillpoint_progress_bytes{") {
		t.Errorf("after its end: %s", got)
	}
}

// Every operation has a beginning and an end, the end with its error.
func TestEvents(t *testing.T) {
	var out bytes.Buffer
	e := NewEvents(&out)
	e.Begin("restore", "x", new(backup.Progress))(nil)
	e.Begin("verify", "y", new(backup.Progress))(fault.Errorf(fault.Corrupt, "rotten"))
	var got []string
	for d := json.NewDecoder(&out); d.More(); {
		var v Event
		if err := d.Decode(&v); err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.Join([]string{v.Event, v.Operation, v.Subject, v.Error, v.Kind}, " "))
	}
	want := []string{"begin restore x  ", "end restore x  ", "begin verify y  ", "end verify y rotten corrupt"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%q", got)
	}
}
