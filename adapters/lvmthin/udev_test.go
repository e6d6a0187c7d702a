package lvmthin

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
)

// startUdev runs udevd, if none is running, with an LVM that expects one, and ends it with the test.
func startUdev(t *testing.T) {
	t.Helper()
	conf, err := os.ReadFile(filepath.Join(os.Getenv("LVM_SYSTEM_DIR"), "lvm.conf"))
	must(t, err)
	dir := t.TempDir()
	conf = []byte(strings.NewReplacer("udev_sync = 0", "udev_sync = 1", "udev_rules = 0", "udev_rules = 1").Replace(string(conf)))
	must(t, os.WriteFile(filepath.Join(dir, "lvm.conf"), conf, 0o644))
	t.Setenv("LVM_SYSTEM_DIR", dir)
	t.Setenv("DM_DISABLE_UDEV", "") // so that it is put back at the end
	must(t, os.Unsetenv("DM_DISABLE_UDEV"))
	if udevRuns() {
		return
	}
	c := exec.Command("/lib/systemd/systemd-udevd")
	c.Stdout, c.Stderr = os.Stderr, os.Stderr
	must(t, c.Start())
	t.Cleanup(func() {
		must(t, c.Process.Signal(os.Interrupt))
		c.Wait()
		os.RemoveAll("/run/udev")
	})
	waitUntil(t, "udevd listens", udevRuns)
}

// settle waits until udev has dealt with every event.
func settle(t testing.TB) {
	t.Helper()
	run(t, "udevadm", "settle", "--timeout=60")
}

// udevKnows is what udev knows of a device.
func udevKnows(t testing.TB, node string) map[string]string {
	t.Helper()
	settle(t)
	out, err := exec.Command("udevadm", "info", "--query=property", "--name="+node).Output()
	must(t, err)
	all := map[string]string{}
	for line := range strings.Lines(string(out)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		all[k] = v
	}
	return all
}

// linksTo are the links in /dev/disk that lead to a device.
func linksTo(t testing.TB, node string) (all []string) {
	t.Helper()
	settle(t)
	must(t, filepath.WalkDir("/dev/disk", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type() == fs.ModeSymlink {
			if to, err := filepath.EvalSymlinks(path); err == nil && to == node {
				all = append(all, path)
			}
		}
		return err
	}))
	return all
}

// nodeOf is the node of a logical volume's device, empty if it is not active.
func nodeOf(t testing.TB, a *Adapter, group, name string) string {
	t.Helper()
	g := fullReport(t, a, group)
	if g.logical[name] == nil {
		t.Fatalf("there is no %s/%s", group, name)
	}
	d, err := a.mapper.find(mapperUUID(g.id, g.logical[name].id, ""))
	must(t, err)
	if d == nil {
		return ""
	}
	n, err := node(d.device)
	must(t, err)
	return n
}

// What a snapshot holds is not looked into by udev or LVM while we read it, or while it is cloned: no UUID, no label and
// no physical volume in it becomes known on the node, neither at once nor when all devices are looked at again.
func TestGuestUdevDoesNotLookIntoSnapshots(t *testing.T) {
	guest(t)
	startUdev(t)
	a := newAdapter(t)
	for what, fill := range map[string][]string{
		"filesystem":      {"mkfs.ext4", "-q", "-F", "-L", "ours"},
		"physical volume": {"pvcreate", "-q", "-y", "--config", `devices{scan_lvs=1 filter=["a|.*|"]}`},
	} {
		t.Run(what, func(t *testing.T) {
			v := newLive(t, vgOne, fresh("looked-into-"), 16<<20)
			run(t, append(fill, v.device())...)
			s := snap(t, a, v, "moment")
			name := snapshotVolume(v.name, "moment")

			// LVM's own activation is looked into, or this test shows nothing.
			run(t, "lvchange", "-q", "-ay", "-K", vgOne+"/"+name)
			at := nodeOf(t, a, vgOne, name)
			if knows, links := udevKnows(t, at), linksTo(t, at); knows["ID_FS_TYPE"] == "" || len(links) == 0 {
				t.Fatalf("udev did not look into what LVM activated: %v, %v", knows, links)
			} else {
				t.Logf("activated by LVM: %v", links)
			}
			run(t, "lvchange", "-q", "-an", vgOne+"/"+name)

			unseen := func(when, name string) {
				t.Helper()
				at := nodeOf(t, a, vgOne, name)
				for k, v := range udevKnows(t, at) {
					if strings.HasPrefix(k, "ID_") {
						t.Errorf("%s: udev knows %s=%s", when, k, v)
					}
				}
				if links := linksTo(t, at); len(links) > 0 {
					t.Errorf("%s: %v lead to it", when, links)
				}
			}
			i, err := a.Open(t.Context(), s.ID)
			must(t, err)
			unseen("while it is read", name)
			for _, action := range []string{"change", "add"} {
				run(t, "udevadm", "trigger", "--action="+action, nodeOf(t, a, vgOne, name))
				unseen("after the event "+action, name)
			}
			must(t, i.Close())
			if at := nodeOf(t, a, vgOne, name); at != "" {
				t.Errorf("it is active still: %s", at)
			}

			clone := fresh("clone-")
			target, err := a.BeginClone(t.Context(), s.ID, adapters.VolumeSpec{ID: typed(vgOne + "/" + clone), Size: 16 << 20, Token: "t"})
			must(t, err)
			t.Cleanup(func() { removeIfThere(t, vgOne, clone) })
			unseen("while it is cloned", restoreVolume(clone, "t"))
			vol, err := target.Commit(t.Context())
			must(t, err)
			at = nodeOf(t, a, vgOne, clone)
			if knows := udevKnows(t, at); knows["ID_FS_TYPE"] == "" {
				t.Errorf("the new volume is not known to udev: %v", knows)
			}
			if _, err := os.Stat(vol.Path); err != nil {
				t.Errorf("the new volume has no path: %v", err)
			}
		})
	}
}
