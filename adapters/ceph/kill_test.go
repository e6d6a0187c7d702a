//go:build ceph && cgo

package ceph

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// victimTask is what this program, started anew with victimVariable in its environment, reads from its standard input and
// does until it is killed: it begins a restore and writes the first half of it.
type victimTask struct {
	Config adapters.Config
	Of     adapters.SnapshotID // a clone of it, if it is one
	Spec   adapters.VolumeSpec
	Bytes  []byte
}

const victimVariable = "STILLPOINT_TEST_CEPH_VICTIM"

// victim does the task, says so, and waits for its end.
func victim() error {
	var task victimTask
	if err := json.NewDecoder(os.Stdin).Decode(&task); err != nil {
		return err
	}
	ctx := context.Background()
	a, err := RBD().Open(ctx, task.Config)
	if err != nil {
		return err
	}
	target, err := task.begin(ctx, a.(*Adapter))
	if err != nil {
		return err
	}
	if err := target.WriteAt(ctx, task.Bytes, 0); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin) // it does not outlive the test
	return err
}

func (v victimTask) begin(ctx context.Context, a *Adapter) (adapters.Target, error) {
	if v.Of.Name != "" {
		return a.BeginClone(ctx, v.Of, v.Spec)
	}
	return a.Begin(ctx, v.Spec)
}

// TestKilledRestore: a restore whose process was killed is taken up at once, though Ceph does not know yet that it is dead.
func TestKilledRestore(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	old := makeImage(t, freeName("rbd", ""), 1<<20, nil)
	_, err := old.WriteAt(randomBytes(1<<20), 0)
	must(t, err)
	old.close()
	s, err := a.CreateSnapshot(t.Context(), old.ID(), "origin")
	must(t, err)
	without := makeImage(t, freeName("rbd", ""), 1<<20, withoutLock)
	without.close()
	fresh, clone := freeName("rbd", ""), freeName("rbd", "twin")
	for name, task := range map[string]victimTask{
		"new":                    {Spec: adapters.VolumeSpec{ID: fresh.id("r")}},
		"clone":                  {Spec: adapters.VolumeSpec{ID: clone.id("r")}, Of: s.ID},
		"overwrite":              {Spec: adapters.VolumeSpec{ID: old.ID(), Overwrite: true}},
		"overwrite without lock": {Spec: adapters.VolumeSpec{ID: without.ID(), Overwrite: true}},
	} {
		t.Run(name, func(t *testing.T) {
			n := imageOf(t, task.Spec.ID)
			cleanUp(t, ioctx(t, n), n)
			want := randomBytes(1 << 20)
			task.Spec.Size, task.Spec.Token = 1<<20, "killed"
			task.Bytes, task.Config = want[:1<<19], running.config(nil)
			child := startVictim(t, task)
			if _, err := task.begin(t.Context(), a); !errors.Is(err, fault.Busy) {
				t.Errorf("a restore that is under way: %v", err)
			}
			client := holderOf(t, n, task.Spec)
			must(t, child.Process.Kill())
			child.Wait()

			target, err := task.begin(t.Context(), a)
			must(t, err)
			defer target.Close()
			if !strings.Contains(shutOut(t), client) {
				t.Errorf("the dead client %s was not shut out: it was waited for", client)
			}
			if target.Fresh() {
				t.Error("a restore that was taken up says that it is fresh")
			}
			p := make([]byte, 1<<19)
			must(t, target.ReadAt(t.Context(), p, 0))
			if !bytes.Equal(p, want[:1<<19]) {
				t.Error("what the killed process wrote is not there")
			}
			must(t, target.WriteAt(t.Context(), want[1<<19:], 1<<19))
			_, err = target.Commit(t.Context())
			must(t, err)
			again, err := a.CreateSnapshot(t.Context(), task.Spec.ID, "restored")
			must(t, err)
			if !bytes.Equal(readAll(t, a, again.ID), want) {
				t.Error("the restored volume has other bytes")
			}
			w := openVolume(t, ioctx(t, n), n)
			for _, key := range []string{restoreKey, holderKey} {
				if text, err := w.rbd.GetMetadata(key); !isAbsent(err) {
					t.Errorf("the restored volume has the entry %s: %q, %v", key, text, err)
				}
			}
		})
	}
}

// holderOf is the address of the client that fills an image.
func holderOf(t *testing.T, n imageName, spec adapters.VolumeSpec) string {
	t.Helper()
	if !spec.Overwrite {
		n = n.target(spec.Token)
	}
	img, err := rbd.OpenImageReadOnly(ioctx(t, n), n.image, rbd.NoSnapshot)
	must(t, err)
	defer img.Close()
	text, err := img.GetMetadata(holderKey)
	must(t, err)
	h, ok := decodeHolder(text)
	if !ok || h.Process.isDead() {
		t.Fatalf("a live holder says %q", text)
	}
	return h.Client
}

// startVictim starts a process that does the task, and waits until it has.
func startVictim(t *testing.T, task victimTask) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	child := exec.CommandContext(t.Context(), self)
	child.Env = append(os.Environ(), victimVariable+"=1")
	child.Stderr = os.Stderr
	in, err := child.StdinPipe()
	must(t, err)
	out, err := child.StdoutPipe()
	must(t, err)
	must(t, child.Start())
	t.Cleanup(func() { child.Process.Kill() })
	must(t, json.NewEncoder(in).Encode(task))
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the process to be killed says %q, %v", line, err)
	}
	return child
}

// shutOut lists the clients that the cluster has shut out.
func shutOut(t *testing.T) string {
	t.Helper()
	answer, _, err := running.admin.MonCommand([]byte(`{"prefix":"osd blocklist ls"}`))
	must(t, err)
	return string(answer)
}
