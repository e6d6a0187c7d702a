package ceph

import (
	"errors"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

func TestParseTreeName(t *testing.T) {
	for id, want := range map[string]treeName{
		"fs/csi/vol":       {fs: "fs", group: "csi", subvolume: "vol"},
		"fs/_nogroup/vol":  {fs: "fs", group: noGroup, subvolume: "vol"},
		"fs/vol":           {fs: "fs", group: noGroup, subvolume: "vol"},
		"fs:/":             {fs: "fs", dir: "/"},
		"fs:/a/b c/@x:y/é": {fs: "fs", dir: "/a/b c/@x:y/é"},
		"fs:/volumes2":     {fs: "fs", dir: "/volumes2"},
		"fs/g/a:b":         {fs: "fs", group: "g", subvolume: "a:b"},
	} {
		n, err := parseTreeName(id, "fs")
		if err != nil || n != want {
			t.Errorf("%s: %+v, %v", id, n, err)
		}
		if again, err := parseTreeName(n.String(), ""); err != nil || again != n {
			t.Errorf("%s became %s, which is %+v, %v", id, n, again, err)
		}
	}
	for _, id := range []string{"", "fs", "fs/", "/x", "fs//x", "fs/g/s/t", "fs/_g/s", "fs/g/_nogroup", "fs/g/.snap", "fs:", "fs:x", "fs:/a/", "fs:/a//b", "fs:/../b", "fs:/.snap/x",
		"fs:/volumes", "fs:/volumes/g/s/u", ":/x", "fs/g/" + growing, "fs:/" + growing + "-x", "fs/a\nb", "fs/\xff", "fs:/" + strings.Repeat("n", 256)} {
		if n, err := parseTreeName(id, ""); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q was read as %+v, %v", id, n, err)
		}
	}
	if _, err := parseTreeName("fs/g/s", "other"); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "limited") {
		t.Errorf("another filesystem's: %v", err)
	}
}

func FuzzParseTreeName(f *testing.F) {
	f.Add("fs/csi/vol", "name")
	f.Add("fs:/a@b#c", "n-1")
	f.Fuzz(func(t *testing.T, id, name string) {
		n, err := parseTreeName(id, "")
		if err != nil {
			return
		}
		if again, err := parseTreeName(n.String(), n.fs); err != nil || again != n {
			t.Errorf("%q became %q, which is %+v, %v", id, n, again, err)
		}
		if strings.Contains(n.top(), "/../") || !strings.HasPrefix(n.snapshot("x"), "/") {
			t.Errorf("%q leads to %q", id, n.top())
		}
		name = adapters.Name("x" + name)
		for _, key := range []string{n.key(name), n.markKey(name, 7)} {
			if m, s, ok := parseKey(key); !ok || m != n || s != name {
				t.Errorf("the key %q is of %+v, %q, %v", key, m, s, ok)
			}
		}
	})
}

func TestParseDescription(t *testing.T) {
	n := treeName{fs: "fs", group: "g", subvolume: "s"}
	d, err := parseDescription(n, "[GLOBAL]\nversion = 2\ntype = subvolume\npath = /volumes/g/s/0c1c\nstate = complete\n\n[other]\npath = /etc\n")
	if err != nil || d != (description{complete, "0c1c"}) {
		t.Errorf("%+v, %v", d, err)
	}
	for _, text := range []string{"", "[GLOBAL]\npath = /volumes/g/s\nstate = complete\n", "[GLOBAL]\npath = /volumes/g/t/u\nstate = complete\n", "[GLOBAL]\npath = /volumes/g/s/../t\nstate = complete\n", "[GLOBAL]\npath = /volumes/g/s/u\n"} {
		if d, err := parseDescription(n, text); !errors.Is(err, fault.Unsupported) {
			t.Errorf("%q was read as %+v, %v", text, d, err)
		}
	}
}

func TestResolveFS(t *testing.T) {
	const subvolume = "csi-vol-" + imageUUID
	pv := func(handle string, attributes ...string) adapters.PersistentVolume {
		p := adapters.PersistentVolume{Driver: "rook-ceph." + fsDriver, Handle: handle, Attributes: map[string]string{}}
		for i := 0; i < len(attributes); i += 2 {
			p.Attributes[attributes[i]] = attributes[i+1]
		}
		return p
	}
	path := "/volumes/csi/" + subvolume + "/0f3a"
	for want, p := range map[string]adapters.PersistentVolume{
		"myfs/csi/" + subvolume: pv(rookHandle, "fsName", "myfs", "subvolumePath", path, "subvolumeName", subvolume),
		"myfs:/data/team":       pv("any", "fsName", "myfs", "staticVolume", "true", "rootPath", "/data/team"),
		"myfs/group/sub":        pv("any", "fsName", "myfs", "staticVolume", "true", "rootPath", "/volumes/group/sub/0f3a"),
	} {
		if id, err := FS().VolumeOf(p); err != nil || id != want {
			t.Errorf("%+v: %q, %v", p, id, err)
		}
	}
	for what, p := range map[string]adapters.PersistentVolume{
		"fsName":        pv(rookHandle, "subvolumePath", path),
		"subvolumePath": pv(rookHandle, "fsName", "myfs"),
		"rootPath":      pv("any", "fsName", "myfs", "staticVolume", "true"),
		"handle":        pv("any", "fsName", "myfs", "subvolumePath", path),
		"name":          pv(rookHandle, "fsName", "myfs", "subvolumePath", path, "subvolumeName", "other"),
		"no path":       pv(rookHandle, "fsName", "myfs", "subvolumePath", "/data"),
		"cannot be":     pv("any", "fsName", "my/fs", "staticVolume", "true", "rootPath", "/data"),
		"dot":           pv("any", "fsName", "myfs", "staticVolume", "true", "rootPath", "/a/../b"),
	} {
		if id, err := FS().VolumeOf(p); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %q, %v", what, id, err)
		}
	}
}

func TestParseCephTime(t *testing.T) {
	for text, want := range map[string]time.Time{
		"1795537046.108971984":   time.Unix(1795537046, 108971984),
		"1795537046.0":           time.Unix(1795537046, 0),
		"1795537046.09108971984": time.Unix(1795537046, 999999999), // an old release's: later than it was, never earlier
	} {
		if at, err := parseCephTime(text); err != nil || !at.Equal(want) {
			t.Errorf("%s: %v, %v", text, at, err)
		}
	}
	for _, text := range []string{"", "1", "x.1", "1.x", "1.-2", "."} {
		if at, err := parseCephTime(text); !errors.Is(err, fault.Corrupt) {
			t.Errorf("%q: %v, %v", text, at, err)
		}
	}
}

// The rule under which something is unchanged, at its edges.
func TestUnchanged(t *testing.T) {
	base := time.Unix(1_800_000_000, 0).UTC()
	c := comparison{created: base, lag: time.Minute}
	old := node{number: 1, size: 5, version: 3, links: 1, mode: 0o100644, modified: base.Add(-time.Hour), changed: base.Add(-time.Hour)}
	if !c.file(old, old) {
		t.Error("what is the same, and old, is unchanged")
	}
	for what, now := range map[string]func(*node){
		"number": func(n *node) { n.number++ }, "size": func(n *node) { n.size++ }, "version": func(n *node) { n.version++ },
		"links": func(n *node) { n.links++ }, "uid": func(n *node) { n.uid++ }, "mode": func(n *node) { n.mode++ },
		"modified": func(n *node) { n.modified = base }, "changed": func(n *node) { n.changed = n.changed.Add(1) },
	} {
		n := old
		if now(&n); c.file(n, old) || c.directory(n, old, old.changed) {
			t.Errorf("another %s is a change", what)
		}
	}
	for ago, want := range map[time.Duration]bool{time.Minute + 1: true, time.Minute: false, time.Second: false, 0: false, -time.Hour: false} {
		young := old
		young.changed = base.Add(-ago)
		if c.file(young, young) != want || c.directory(old, old, base.Add(-ago)) != want {
			t.Errorf("changed %v before the base: not %v", ago, want)
		}
	}
	for _, x := range []struct {
		age     time.Duration
		entries int64
		wait    time.Duration
		ok      bool
	}{{2 * time.Minute, 1, 0, true}, {time.Minute, 1, 0, true}, {0, 1_000_000, time.Minute, true}, {0, 1000, time.Minute, false}, {59 * time.Second, 10_000, time.Second, true}} {
		if wait, ok := c.settling(base.Add(x.age), base, x.entries); wait != x.wait || ok != x.ok {
			t.Errorf("%+v: %v, %v", x, wait, ok)
		}
	}
}
