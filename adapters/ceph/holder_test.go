package ceph

import (
	"os/exec"
	"slices"
	"testing"

	"stillpoint.io/stillpoint/adapters"
)

func TestHolder(t *testing.T) {
	me, err := thisProcess()
	if err != nil {
		t.Fatal(err)
	}
	h := holder{Version: recordVersion, Client: "10.0.0.1:0/17", Process: me}
	if again, ok := decodeHolder(h.encode()); !ok || again != h {
		t.Errorf("%+v, %v", again, ok)
	}
	for _, text := range []string{"", "{}", `{"version":2,"client":"x"}`, `{"version":1}`} {
		if h, ok := decodeHolder(text); ok {
			t.Errorf("%q was read as %+v", text, h)
		}
	}
}

func TestProcessIsDead(t *testing.T) {
	me, err := thisProcess()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sleep", "600")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Process.Kill()
	other := me
	other.PID = child.Process.Pid
	if _, other.Started, err = processState(other.PID); err != nil {
		t.Fatal(err)
	}
	with := func(p process, change func(*process)) process { change(&p); return p }
	check := func(name string, p process, want bool) {
		t.Helper()
		if p.isDead() != want {
			t.Errorf("%s: dead is %v: %+v", name, !want, p)
		}
	}
	check("this one", me, false)
	check("a child", other, false)
	check("one that had this number before", with(me, func(p *process) { p.Started-- }), true)
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	child.Wait()
	check("a child that was killed", other, true)
	check("one on another machine, or before a restart", with(other, func(p *process) { p.Boot = "x" }), false)
	check("one in another container", with(other, func(p *process) { p.Namespace++ }), false)
	check("none", process{}, false)
}

func TestOrphans(t *testing.T) {
	text := func(image string) string {
		s, err := record{Image: image, Wanted: "w", Mark: adapters.Cutting}.encode()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	records := map[string]string{
		recordKey(4):         text("me"),
		recordKey(5):         text("me"),
		recordKey(6):         text("parent"),
		recordKey(7):         text("me"),
		recordKey(9):         text("me"), // perhaps made after the numbers were listed
		recordKey(10):        text("parent"),
		recordKey(3):         `{"version":2,"image":"parent"}`,
		recordKey(2):         "x",
		recordPrefix + "4":   text("me"),
		recordPrefix:         text("me"),
		".stillpoint.other":  text("parent"),
		recordKey(1) + "0":   text("parent"),
		"conf_rbd_cache":     "false",
		recordPrefix + "zzz": text("parent"),
	}
	got := orphans(records, "me", []snapshotNumber{5, 6, 8})
	if want := []string{recordKey(4), recordKey(6), recordKey(7), recordKey(10)}; !slices.Equal(got, want) {
		t.Errorf("%q instead of %q", got, want)
	}
	if got := orphans(map[string]string{recordKey(1): text("me")}, "me", nil); len(got) > 0 {
		t.Errorf("of an image without snapshots, %q may be newer than the list", got)
	}
}
