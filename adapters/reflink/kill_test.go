package reflink

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// helperEnv makes the test binary one of the programs below instead, working on the volume that it names.
const helperEnv = "STILLPOINT_REFLINK_HELPER"

func TestMain(m *testing.M) {
	if program, ok := os.LookupEnv(helperEnv); ok {
		fmt.Fprintln(os.Stderr, helpers[program](os.Args[1]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

var background = context.Background()

// helpers work until they are killed; they return only with an error.
var helpers = map[string]func(at string) error{
	"snapshot": func(at string) error {
		return helper(func(a *Adapter) error {
			if err := a.Stage(background, typed(at), "staged"); err != nil {
				return err
			}
			for _, name := range []string{"staged", "plain"} {
				s, err := a.CreateSnapshot(background, typed(at), name)
				if err != nil {
					return err
				}
				for _, cut := range []string{"one", "two"} {
					if err := a.Publish(background, s.ID, adapters.Notes{Cut: cut}); err != nil {
						return err
					}
				}
				if err := a.DeleteSnapshot(background, s.ID); err != nil {
					return err
				}
			}
			return nil
		})
	},
	"restore": func(at string) error {
		return helper(func(a *Adapter) error {
			if err := os.RemoveAll(at + "-new"); err != nil {
				return err
			}
			t, err := a.Begin(background, newSpec(at))
			if err != nil {
				return err
			}
			for off := int64(0); off < newSize; off += 64 << 10 {
				if err := t.WriteAt(background, bytes.Repeat([]byte{9}, 64<<10), off); err != nil {
					return err
				}
			}
			_, err = t.Commit(background)
			return err
		})
	},
}

func helper(work func(*Adapter) error) error {
	a, err := Kind().Open(background, adapters.Config{Name: "r"})
	for err == nil {
		fmt.Print(".") // alive
		err = work(a.(*Adapter))
	}
	return err
}

const newSize = 1 << 20

func newSpec(at string) adapters.VolumeSpec {
	return adapters.VolumeSpec{ID: typed(at + "-new"), Size: newSize, Token: "t"}
}

// killed runs a helper for a while after its first sign of life, and kills it.
func killed(t testing.TB, program, at string, after time.Duration) {
	t.Helper()
	c := exec.Command(os.Args[0], at)
	c.Env = append(os.Environ(), helperEnv+"="+program)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	if _, err := out.Read(make([]byte, 1)); err != nil {
		c.Wait()
		t.Fatalf("the helper died: %v: %s", err, &stderr)
	}
	time.Sleep(after)
	must(t, c.Process.Kill())
	err = c.Wait()
	if e, ok := errors.AsType[*exec.ExitError](err); !ok || !e.Sys().(interface{ Signaled() bool }).Signaled() {
		t.Fatalf("the helper failed by itself: %v: %s", err, &stderr)
	}
}

// TestKilled: a process that is killed at any moment leaves whole snapshots or nothing, and the next one goes on.
func TestKilled(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at := filepath.Join(x.fs.Mount, "v")
		scatter(t, at, 500)
		content, err := os.ReadFile(at)
		must(t, err)
		r := random(7)
		for range 15 {
			killed(t, "snapshot", at, time.Duration(r.IntN(30_000))*time.Microsecond)
			left, err := os.ReadDir(filepath.Join(x.fs.Mount, folderName))
			must(t, err)
			if len(left) > 1 {
				t.Errorf("left: %v", left)
			}
			for _, name := range []string{"staged", "plain"} {
				s, err := x.CreateSnapshot(ctx, typed(at), name)
				must(t, err)
				if s.Mark == adapters.Verified && s.Notes.Cut == "" {
					t.Errorf("a verified snapshot without its notes: %+v", s)
				}
				must(t, x.Publish(ctx, s.ID, adapters.Notes{}))
				if got := x.read(t, s.ID); !bytes.Equal(got, content) {
					t.Error("the snapshot is not the volume")
				}
				must(t, x.DeleteSnapshot(ctx, s.ID))
			}
		}
		for range 10 {
			killed(t, "restore", at, time.Duration(r.IntN(20_000))*time.Microsecond)
			if got, err := os.ReadFile(at + "-new"); err == nil {
				if !bytes.Equal(got, bytes.Repeat([]byte{9}, newSize)) {
					t.Error("a volume is visible that is not whole")
				}
				must(t, os.Remove(at+"-new"))
			}
			target, err := x.Begin(ctx, newSpec(at))
			must(t, err)
			must(t, target.Abort(ctx))
			left, err := os.ReadDir(x.fs.Mount)
			must(t, err)
			if len(left) != 2 { // the volume and the snapshot folder
				t.Errorf("left: %v", left)
			}
		}
		_, err = x.Volume(ctx, typed(at+"-new"))
		want(t, "given up", err, fault.NotFound)
	})
}
