package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A VolumeSnapshot of a foreign driver's volume, which a pod has mounted and writes to: it is cut with its filesystem frozen,
// restored into a volume of our own class, mounted by the kubelet for another pod, and deleted without a trace.
func TestSnapshotOfAForeignVolume(t *testing.T) {
	p := in(t, "shop")
	handle := p.foreignClaim("data")
	mount := p.pod("data")
	p.write(mount+"/kept", "before")
	// Somebody writes all the time, and knows the last number that was on disk before the snapshot was asked for.
	counter := p.startWriter(mount + "/counter")
	before := counter.synced()
	p.snapshot("first", "data", "plain")
	s, content := p.ready("first")
	after := counter.stop(p)
	if content.Spec.Source.VolumeHandle == nil || *content.Spec.Source.VolumeHandle != handle || content.Status.SnapshotHandle == nil ||
		!strings.HasPrefix(*content.Status.SnapshotHandle, "files:") {
		t.Errorf("the content: %+v", content)
	}
	if size := s.Status.RestoreSize; size == nil || size.Value() != 64<<20 {
		t.Errorf("its size to restore: %v", size)
	}
	if m := p.told("first", "SnapshotCut"); !strings.Contains(m, "filesystem was frozen for") {
		t.Errorf("the event says %q", m)
	}
	p.write(mount+"/kept", "after")

	p.ownClaim("restored", "first")
	restored := p.pod("restored")
	if got := p.read(restored + "/kept"); got != "before" {
		t.Errorf("the restored volume has %q", got)
	}
	var n int
	if _, err := fmt.Sscanf(p.read(restored+"/counter"), "%d", &n); err != nil || n < before || n > after {
		t.Errorf("the restored volume has the number %d, written were %d to %d meanwhile: %v", n, before, after, err)
	}
	p.removePod("restored", restored)
	p.must(p.Admin.Core.CoreV1().PersistentVolumeClaims(p.namespace).Delete(p.ctx, "restored", metav1.DeleteOptions{}))

	p.must(p.Admin.Snapshots.SnapshotV1().VolumeSnapshots(p.namespace).Delete(p.ctx, "first", metav1.DeleteOptions{}))
	p.gone("the content", func() error {
		_, err := p.Admin.Snapshots.SnapshotV1().VolumeSnapshotContents().Get(p.ctx, content.Name, metav1.GetOptions{})
		return err
	})
	p.until("nothing of them is left in the pool", func() error {
		return p.node.Inside(func() error {
			name := strings.Split(*content.Status.SnapshotHandle, "@")[1]
			for _, pattern := range []string{p.pool + "/.stillpoint/*" + name, p.pool + "/made/*"} {
				if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
					return errors.Join(fmt.Errorf("there is %v", left), err)
				}
			}
			return nil
		})
	})
	p.removePod("data", mount)
}

// writer writes growing numbers into a file, each durable before the next.
type writer struct {
	end, ended chan struct{}
	last       int
	failure    error
	first      chan int
}

func (p place) startWriter(path string) *writer {
	w := &writer{end: make(chan struct{}), ended: make(chan struct{}), first: make(chan int, 1)}
	go func() {
		defer close(w.ended)
		w.failure = p.node.Inside(func() error {
			f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			defer f.Close()
			for {
				select {
				case <-w.end:
					return nil
				default:
				}
				w.last++
				if _, err := f.WriteAt(fmt.Appendf(nil, "%020d\n", w.last), 0); err != nil {
					return err
				}
				if err := f.Sync(); err != nil {
					return err
				}
				if w.last == 10 {
					w.first <- w.last
				}
			}
		})
	}()
	return w
}

// synced waits until a number is on disk, and returns it.
func (w *writer) synced() int {
	select {
	case n := <-w.first:
		return n
	case <-w.ended:
		return 0
	}
}

// stop ends the writer and returns the last number.
func (w *writer) stop(p place) int {
	close(w.end)
	<-w.ended
	p.must(w.failure)
	return w.last
}
