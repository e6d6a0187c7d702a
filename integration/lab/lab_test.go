package lab

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A lab whose owner died while a filesystem was frozen, mounted and unmounted-while-frozen is taken down by the next.
func TestSweepTakesDownADeadLab(t *testing.T) {
	l := Test(t)
	dead, err := Open("dead")
	if err != nil {
		t.Fatal(err)
	}
	pool, err := dead.Pool(t.Context(), "pool", "xfs", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"mounted", "unmounted"} {
		v, err := dead.Volume(t.Context(), pool.Mount, name, "ext4", 64<<20)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(v.Mount)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.IoctlSetInt(int(f.Fd()), 0xC0045877, 0); err != nil {
			t.Fatal("FIFREEZE:", err)
		}
		f.Close()
		if name == "unmounted" {
			if err := unix.Unmount(v.Mount, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	dead.lock.Close() // its owner is gone

	next, err := Open("next")
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dead.Dir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", dead.Dir, err)
	}
	if mounts, _ := mountinfo.GetMounts(mountinfo.PrefixFilter(dead.Dir)); len(mounts) > 0 {
		t.Errorf("still mounted: %v", mounts[0].Mountpoint)
	}
	if left, _ := filepath.Glob(l.Dir + "/*"); len(left) != 0 {
		t.Errorf("the living lab was touched: %v", left)
	}
}
