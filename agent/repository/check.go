package repository

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/fault"
)

// Step is one thing that Check tried.
type Step struct {
	Name    string  `json:"step"`
	Result  Result  `json:"result"`
	Text    string  `json:"text"` // what was found; of a failure what is wrong and what to do
	Seconds float64 `json:"seconds"`
	Rate    float64 `json:"mib_per_second,omitempty"`
}

// Result is how a Step ended.
type Result string

const (
	Passed  Result = "ok"
	Warning Result = "warning" // backups will work; something about the place is worth knowing
	Failed  Result = "failed"  // no backup should go there before this is put right
)

// CheckOptions says what Check does besides.
type CheckOptions struct {
	ObjectLock bool  // the bucket must keep objects that are retained
	Bytes      int64 // how much is written and read to measure the throughput, DefaultCheckBytes if 0
}

const (
	DefaultCheckBytes = 64 << 20
	checkPiece        = 8 << 20 // an object of the throughput test, about as large as kopia's packs
	checkParallel     = 4

	// Kopia's maintenance decides by time stamps of the store what is old enough to be deleted, and refuses to run when
	// they are further than this from its own clock.
	maxSkew     = 5 * time.Minute
	suspectSkew = time.Minute
)

// Check proves that a place can hold a repository, before or after Init. It writes, reads, lists and deletes objects of
// its own in a folder below the place, which it removes again, also after a failure; what a check that was killed left
// there an hour ago or longer goes as well. Each step is reported as it ends.
// The error is that of the first step that failed, with its kind.
func Check(ctx context.Context, at Location, o CheckOptions, report func(Step)) error {
	if err := at.check(); err != nil {
		return err
	}
	name := checkFolder + hex.EncodeToString(noise(6))
	c := &checker{at: at, o: o, report: report}
	if at.S3 != nil {
		return c.bucket(ctx, name)
	}
	return c.folder(ctx, name)
}

// checkFolder begins the names of the folders that checks work in; 12 hexadecimal digits follow.
const checkFolder = "stillpoint-check-"

// leftoverAge is how long ago a check did something last that was killed and will not clean up, by the place's clock.
const leftoverAge = time.Hour

var checkFolders = regexp.MustCompile("^" + checkFolder + "[0-9a-f]{12}$")

// leftovers picks, from when something was last written into each folder beside a check's own, those of checks that were
// killed.
func leftovers(last map[string]time.Time, own string) (old []string) {
	for name, at := range last {
		if name != own && checkFolders.MatchString(name) && last[own].Sub(at) > leftoverAge {
			old = append(old, name)
		}
	}
	slices.Sort(old)
	return old
}

// swept says what became of leftovers.
func swept(old []string) finding {
	if len(old) == 0 {
		return found("nothing of an earlier check is left")
	}
	return found("removed what %d earlier checks left that were killed", len(old))
}

type checker struct {
	at     Location
	o      CheckOptions
	report func(Step)
	first  error // the first failure
}

// finding is what a step that did not fail has to say.
type finding struct {
	text string
	warn bool
	rate float64
}

func found(format string, args ...any) finding { return finding{text: fmt.Sprintf(format, args...)} }

func warned(format string, args ...any) finding {
	return finding{text: fmt.Sprintf(format, args...), warn: true}
}

// try does one step and says whether it did not fail. After a cancelled context nothing more is tried.
func (c *checker) try(ctx context.Context, name string, do func(context.Context) (finding, error)) bool {
	if err := ctx.Err(); err != nil {
		c.first = cmp.Or(c.first, context.Cause(ctx))
		return false
	}
	began := time.Now()
	f, err := do(ctx)
	if fault.KindOf(err) == fault.Internal {
		err = c.at.fault("checking", err)
	}
	s := Step{Name: name, Result: Passed, Text: f.text, Seconds: time.Since(began).Seconds(), Rate: f.rate}
	switch {
	case err != nil:
		s.Result, s.Text = Failed, err.Error()
		c.first = cmp.Or(c.first, fmt.Errorf("%s: %w", name, err))
	case f.warn:
		s.Result = Warning
	}
	c.report(s)
	return err == nil
}

// contract is what every place must do, tried in st, which is empty. It ends early when nothing can be written.
func (c *checker) contract(ctx context.Context, st blob.Storage) bool {
	data := noise(1<<20 + 7)
	if !c.try(ctx, "write", func(ctx context.Context) (finding, error) {
		return found("%d bytes", len(data)), st.PutBlob(ctx, "one", slice(data), blob.PutOptions{})
	}) {
		return false
	}
	c.try(ctx, "read", func(ctx context.Context) (finding, error) {
		return found("what was written"), same(ctx, st, "one", 0, -1, data)
	})
	c.try(ctx, "range", func(ctx context.Context) (finding, error) {
		for _, r := range [][2]int64{{0, 1}, {12345, 54321}, {int64(len(data)) - 1, 1}} {
			if err := same(ctx, st, "one", r[0], r[1], data[r[0]:r[0]+r[1]]); err != nil {
				return finding{}, err
			}
		}
		return found("parts at the start, in the middle and at the end"), nil
	})
	c.try(ctx, "metadata", func(ctx context.Context) (finding, error) {
		m, err := st.GetMetadata(ctx, "one")
		if err == nil && m.Length != int64(len(data)) {
			err = fault.Errorf(fault.Corrupt, "%d bytes were written, and there are said to be %d", len(data), m.Length)
		}
		return found("the length is right"), err
	})
	c.try(ctx, "list", func(ctx context.Context) (finding, error) {
		want := []blob.ID{"one"}
		for _, id := range []blob.ID{"o", "two"} {
			if err := st.PutBlob(ctx, id, slice(data[:10]), blob.PutOptions{}); err != nil {
				return finding{}, err
			}
			want = append(want, id)
		}
		return found("what was just written is in it"), c.listed(ctx, st, want)
	})
	c.try(ctx, "missing", func(ctx context.Context) (finding, error) {
		return found("what was never written is said to be missing"), missing(ctx, st, "never")
	})
	c.try(ctx, "replace", func(ctx context.Context) (finding, error) {
		if err := st.PutBlob(ctx, "two", slice(data[100:200]), blob.PutOptions{}); err != nil {
			return finding{}, err
		}
		return found("the new content is there at once"), same(ctx, st, "two", 0, -1, data[100:200])
	})
	c.try(ctx, "latency", func(ctx context.Context) (finding, error) {
		var times []time.Duration
		for range 10 {
			began := time.Now()
			if err := same(ctx, st, "two", 0, -1, data[100:200]); err != nil {
				return finding{}, err
			}
			times = append(times, time.Since(began))
		}
		slices.Sort(times)
		return found("a small read takes %v, at most %v of 10", times[5].Round(10*time.Microsecond), times[9].Round(10*time.Microsecond)), nil
	})
	c.try(ctx, "delete", func(ctx context.Context) (finding, error) {
		if err := st.DeleteBlob(ctx, "two"); err != nil {
			return finding{}, err
		}
		if err := missing(ctx, st, "two"); err != nil {
			return finding{}, err
		}
		return found("what is deleted is gone at once"), c.listed(ctx, st, []blob.ID{"o", "one"})
	})
	return ctx.Err() == nil
}

// throughput writes and reads a few objects in parallel.
func (c *checker) throughput(ctx context.Context, st blob.Storage) {
	piece := noise(checkPiece)
	n := int(max(cmp.Or(c.o.Bytes, DefaultCheckBytes)/checkPiece, 1))
	measure := func(do func(ctx context.Context, id blob.ID) error) func(context.Context) (finding, error) {
		return func(ctx context.Context) (finding, error) {
			began := time.Now()
			g, ctx := errgroup.WithContext(ctx)
			g.SetLimit(checkParallel)
			for i := range n {
				g.Go(func() error { return do(ctx, blob.ID(fmt.Sprintf("piece-%d", i))) })
			}
			if err := g.Wait(); err != nil {
				return finding{}, err
			}
			rate := float64(n) * checkPiece / (1 << 20) / time.Since(began).Seconds()
			return finding{text: fmt.Sprintf("%.1f MiB/s with %d at once", rate, checkParallel), rate: rate}, nil
		}
	}
	if c.try(ctx, "upload", measure(func(ctx context.Context, id blob.ID) error {
		return st.PutBlob(ctx, id, slice(piece), blob.PutOptions{})
	})) {
		c.try(ctx, "download", measure(func(ctx context.Context, id blob.ID) error { return same(ctx, st, id, 0, -1, piece) }))
	}
}

// skew judges how far the place's clock is from ours.
func skew(ahead time.Duration) (finding, error) {
	ahead = ahead.Round(time.Second)
	text := "the same as here, to a second"
	if ahead > time.Second {
		text = fmt.Sprintf("%v ahead of this machine's", ahead)
	} else if ahead < -time.Second {
		text = fmt.Sprintf("%v behind this machine's", -ahead)
	}
	switch away := max(ahead, -ahead); {
	case away > maxSkew:
		return finding{}, fault.Errorf(fault.Invalid, "the clock there is %s: set the wrong one, with NTP for example; maintenance goes by these clocks when it deletes", text)
	case away > suspectSkew:
		return warned("the clock there is %s; beyond %v maintenance cannot run", text, maxSkew), nil
	}
	return found("%s", text), nil
}

func (c *checker) listed(ctx context.Context, st blob.Storage, want []blob.ID) error {
	var got []blob.ID
	err := st.ListBlobs(ctx, "", func(m blob.Metadata) error {
		got = append(got, m.BlobID)
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fault.Errorf(fault.Corrupt, "there are %v, and listed are %v: a place that lists late or wrongly loses backups", want, got)
	}
	return nil
}

func same(ctx context.Context, st blob.Storage, id blob.ID, offset, length int64, want []byte) error {
	var got blobBytes
	if err := st.GetBlob(ctx, id, offset, length, &got); err != nil {
		if errors.Is(err, blob.ErrBlobNotFound) {
			return fault.Errorf(fault.Corrupt, "what was just written is said to be missing")
		}
		return err
	}
	if !bytes.Equal(got.Bytes(), want) {
		return fault.Errorf(fault.Corrupt, "other bytes come back than were written (%d for %d): look at proxies, network cards and memory on the way", got.Len(), len(want))
	}
	return nil
}

func missing(ctx context.Context, st blob.Storage, id blob.ID) error {
	var got blobBytes
	err := st.GetBlob(ctx, id, 0, -1, &got)
	switch {
	case errors.Is(err, blob.ErrBlobNotFound):
		return nil
	case err != nil:
		return err
	}
	return fault.Errorf(fault.Corrupt, "what is not there was read: %d bytes", got.Len())
}

func noise(n int) []byte {
	p := make([]byte, n)
	rand.Read(p) // never fails
	return p
}

// slice is a slice as kopia passes bytes around.
type slice []byte

func (s slice) Length() int { return len(s) }

func (s slice) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(s)
	return int64(n), err
}

func (s slice) Reader() io.ReadSeekCloser { return sliceReader{bytes.NewReader(s)} }

type sliceReader struct{ *bytes.Reader }

func (sliceReader) Close() error { return nil }
