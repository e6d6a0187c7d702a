package lvmthin

import (
	"os"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
)

func TestGuestConformance(t *testing.T) {
	guest(t)
	uuid := groupUUID(t, vgOne)
	adaptertest.Run(t, adaptertest.Harness{
		Backend: "l",
		Open: func(t testing.TB) adapters.Adapter {
			a, err := Kind().Open(t.Context(), adapters.Config{Name: "l", Parameters: map[string]string{"state": stateOf(t), "groups": vgOne + ", " + vgTwo}})
			must(t, err)
			return a
		},
		Provision: func(t testing.TB) adapters.Adapter {
			a, err := Kind().Open(t.Context(), adapters.Config{Name: "l", Parameters: map[string]string{"state": stateOf(t), "groups": vgOne}})
			must(t, err)
			return a
		},
		Create: func(t testing.TB, size int64) adaptertest.Volume { return borrowLive(t, vgOne, size) },
		Absent: func(t testing.TB) adapters.VolumeID {
			name := fresh("absent_")
			t.Cleanup(func() { removeIfThere(t, vgOne, name) })
			return typed(uuid + "/" + name)
		},
		Twin: func(t testing.TB, v adaptertest.Volume, size int64) adaptertest.Volume {
			return newLive(t, vgTwo, v.(live).name, size)
		},
		Unreachable: func(t testing.TB) adapters.VolumeID { return typed("AbCdEf-0123-4567-89aB-cDeF-0123-456789/vol") },
		Foreign: func(t testing.TB, v adaptertest.Volume, name string) {
			l := v.(live)
			lv := snapshotVolume(l.name, name)
			run(t, "lvcreate", "-q", "-y", "-s", "-n", lv, l.path())
			t.Cleanup(func() { run(t, "lvremove", "-q", "-f", "-y", l.group+"/"+lv) })
		},
		Use: func(t testing.TB, v adaptertest.Volume) func() {
			f, err := os.Open(v.(live).device())
			must(t, err)
			return func() { f.Close() }
		},
		Wrong: []string{"", "vol", "/", vgOne, vgOne + "/", "/vol", vgOne + "/a/b", vgOne + "/-a", vgOne + "/a b", vgOne + "/..", vgOne + "/ä", "../vol", "-x/vol",
			vgOne + "/snapshot1", vgOne + "/pvmove0", vgOne + "/x_tdata", vgOne + "/pool_tmeta", "/dev/mapper/vol", vgOne + "/a\n"},
		Step: chunk,
		Size: 1 << 20,
	})
}

// groupUUID is a volume group's UUID.
func groupUUID(t testing.TB, name string) string {
	t.Helper()
	p, err := newAdapter(t).locate(t.Context(), typed(name+"/any"))
	must(t, err)
	return string(p.group.id)
}

func removeIfThere(t testing.TB, group, name string) {
	t.Helper()
	if _, err := os.Stat("/dev/" + group + "/" + name); err == nil {
		run(t, "lvremove", "-q", "-f", "-y", group+"/"+name)
	}
}
