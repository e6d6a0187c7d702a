//go:build ceph && cgo

package rbd

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// logbook is a file to which a writer appends 1, 2, 3, …, each followed by an fsync, without pause.
type logbook struct {
	begun, durable atomic.Uint64 // the last number handed to write(2), and the last whose fsync has returned
	stop           chan struct{}
	done           sync.WaitGroup
	err            error
}

const logbookName = "journal" // as lab.Instant wants it

func keepLogbook(t *testing.T, folder string) *logbook {
	t.Helper()
	f, err := os.Create(filepath.Join(folder, logbookName))
	must(t, err)
	b := &logbook{stop: make(chan struct{})}
	b.done.Go(func() {
		defer f.Close()
		for n := uint64(1); b.err == nil; n++ {
			select {
			case <-b.stop:
				return
			default:
			}
			b.begun.Store(n)
			_, b.err = f.Write(binary.LittleEndian.AppendUint64(nil, n))
			if b.err == nil {
				b.err = f.Sync()
			}
			if b.err == nil {
				b.durable.Store(n)
			}
		}
	})
	return b
}

func (b *logbook) close() error {
	close(b.stop)
	b.done.Wait()
	return b.err
}

// A filesystem on an image is frozen and snapshotted under a writer: whatever it was told is durable is in the snapshot,
// and nothing that it began after the freeze, though rbd-fuse holds back what nobody flushes and has the image's
// exclusive lock, or the image has no such lock. The filesystem in the snapshot has no error once its log is replayed.
func TestEachType(t *testing.T) {
	for _, fstype := range []string{"xfs", "ext4"} {
		for name, features := range map[string][]string{"locked": nil, "without a lock": {"layering"}} {
			t.Run(fstype+" "+name, func(t *testing.T) {
				s := newSite(t)
				l := s.image(t, fstype, features...)
				v, err := s.rbd.Volume(t.Context(), l.id)
				must(t, err)
				if v.Path != l.Device || v.Device == 0 || v.Freeze != adapters.FreezeNests {
					t.Fatalf("%+v, want on %s", v, l.Device)
				}
				book := keepLogbook(t, l.Mount)
				if holders := run(t, "rbd", "lock", "list", l.id.ID); (holders == "") != (features != nil) {
					t.Errorf("the image's lock: %q", holders)
				}
				for i := range 2 {
					var least, most uint64
					l.adapter = meddler{s.rbd, func() error {
						// Frozen: at most one number is under way, written or not.
						least, most = book.durable.Load(), book.begun.Load()
						return nil
					}}
					res, err := cut.Make(t.Context(), request(fmt.Sprintf("cut-%d", i), l), s.node)
					must(t, err)
					if len(res.Unverified)+len(res.Crash)+len(res.Separate) > 0 || len(res.Frozen) != 1 {
						t.Errorf("%+v", res)
					}
					file := s.restored(t, l, res.Snapshots[0])
					if fstype == "ext4" {
						must(t, s.Sound(t.Context(), fstype, file)) // nothing to replay
					}
					must(t, s.Replayed(t.Context(), fstype, file))
					fs, err := s.MountAgain(t.Context(), fstype, file)
					must(t, err)
					last, err := lab.Instant([]string{fs.Mount})
					must(t, errors.Join(err, fs.Down()))
					if last[0] < least || last[0] > most || least == 0 {
						t.Errorf("the snapshot ends at %d; when all was frozen %d was durable and %d begun", last[0], least, most)
					}
					t.Logf("frozen for %.1f ms, at %d of %d to %d", res.Frozen[0].Milliseconds, last[0], least, most)
				}
				must(t, book.close())
			})
		}
	}
}

// What was written and not flushed is with rbd-fuse alone, where another client does not see it, until the freeze: then it
// is in the snapshot.
func TestWhatIsNotFlushed(t *testing.T) {
	for fstype, options := range map[string]string{"xfs": "norecovery,nouuid", "ext4": "noload"} {
		t.Run(fstype, func(t *testing.T) {
			s := newSite(t)
			l := s.image(t, fstype)
			must(t, exec.Command("sync", "-f", l.Mount).Run())
			words, err := unix.Mmap(-1, 0, adapters.ImageAlign, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
			must(t, err)
			defer unix.Munmap(words)
			copy(words, bytes.Repeat([]byte(rand.Text()[:16]), len(words)/16))
			f, err := os.OpenFile(filepath.Join(l.Mount, "before"), os.O_CREATE|os.O_WRONLY|unix.O_DIRECT, 0o600)
			must(t, err)
			defer f.Close()
			_, err = f.Write(words)
			must(t, err)
			if bytes.Contains([]byte(run(t, "rbd", "export-diff", "--no-progress", l.id.ID, "-")), words) {
				t.Error("another client sees what nobody flushed: the test proves nothing")
			}
			res, err := cut.Make(t.Context(), request("cut", l), s.node)
			must(t, err)
			file := s.restored(t, l, res.Snapshots[0])
			device, held, err := lab.Loop(file)
			must(t, err)
			defer held.Close()
			at := filepath.Join(s.Dir, "snapshot")
			must(t, os.Mkdir(at, 0o700))
			must(t, unix.Mount(device, at, fstype, unix.MS_RDONLY, options))
			if got, err := os.ReadFile(filepath.Join(at, "before")); err != nil || !bytes.Equal(got, words) {
				t.Errorf("in the snapshot: %d bytes, %v", len(got), err)
			}
			must(t, unix.Unmount(at, 0))
		})
	}
}

// A cut over an image and a file of a reflink pool is one instant, whichever is written to first.
func TestWithAFile(t *testing.T) {
	for name, imageFirst := range map[string]bool{"image first": true, "file first": false} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			legs := []leg{s.image(t, "xfs"), s.file(t, "ext4")}
			if !imageFirst {
				legs[0], legs[1] = legs[1], legs[0]
			}
			writer, err := lab.StartWriter([]string{legs[0].Mount, legs[1].Mount}, 16<<20, 20<<20)
			must(t, err)
			var cuts []cut.Result
			for i := range 3 {
				time.Sleep(100 * time.Millisecond) // something for the writer to do, not something to wait for
				res, err := cut.Make(t.Context(), request(fmt.Sprintf("cut-%d", i), legs...), s.node)
				if err != nil {
					t.Error(err)
					break
				}
				cuts = append(cuts, res)
			}
			must(t, writer.Stop())
			for _, res := range cuts {
				var folders []string
				for i, l := range legs {
					file := s.restored(t, l, res.Snapshots[i])
					must(t, s.Replayed(t.Context(), l.Type, file))
					fs, err := s.MountAgain(t.Context(), l.Type, file)
					must(t, err)
					folders = append(folders, fs.Mount)
				}
				last, err := lab.Instant(folders)
				if err != nil || last[0] == 0 {
					t.Errorf("%v, %v", last, err)
				}
				for _, folder := range folders {
					must(t, unix.Unmount(folder, 0))
				}
				if len(res.Frozen) != 2 || len(res.Unverified)+len(res.Crash)+len(res.Separate) > 0 {
					t.Errorf("%+v", res)
				}
				t.Logf("the writer was at %v; frozen: %+v", last, res.Frozen)
			}
		})
	}
}

// Where an image is a block device twice, who writes to it by the one is not seen through the other: it is not cut. Nor
// is one that is a device by nothing that is known.
func TestNotToBeFrozen(t *testing.T) {
	s := newSite(t)
	l := s.image(t, "ext4")
	for what, adapter := range map[string]adapters.Adapter{
		"attached twice":            s.rbd,
		"with nothing said of fuse": open(t, "ceph-rbd", map[string]string{"conf": cluster.Conf}),
		"said of another folder":    open(t, "ceph-rbd", rbdParameters(cluster.Conf, s.Dir, "")),
	} {
		if adapter == s.rbd {
			_, second, err := lab.Loop(l.File)
			must(t, err)
			defer second.Close()
		}
		again := l
		again.adapter = adapter
		_, err := cut.Make(t.Context(), request("refused", again), s.node)
		if !errors.Is(err, fault.Unsupported) || !strings.Contains(fmt.Sprint(err), "--allow-crash-consistent") {
			t.Errorf("%s: error %v, want Unsupported", what, err)
		}
	}
	if left := snapshots(t, l); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	l.thawed(t)
}
