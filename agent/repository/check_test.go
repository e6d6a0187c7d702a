package repository

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/s3"
)

// checked is what a check reported, by the names of its steps.
func checked(ctx context.Context, at Location, o CheckOptions) (map[string]Step, error) {
	o.Bytes = 16 << 20
	steps := map[string]Step{}
	err := Check(ctx, at, o, func(s Step) { steps[s.Name] = s })
	return steps, err
}

var common = []string{"reach", "write", "read", "range", "metadata", "list", "missing", "replace", "latency", "delete", "leftovers", "clock", "upload", "download", "cleanup"}

// A good place passes every step, before and after there is a repository, and nothing of the check is left.
func TestCheck(t *testing.T) {
	good := func(t *testing.T, at Location, names ...string) {
		t.Helper()
		steps, err := checked(t.Context(), at, CheckOptions{})
		if err != nil {
			t.Error(err)
		}
		for _, name := range append(names, common...) {
			if s := steps[name]; s.Result != Passed || s.Text == "" {
				t.Errorf("%s: %+v", name, s)
			}
		}
		if steps["upload"].Rate <= 0 || steps["download"].Rate <= 0 {
			t.Errorf("no throughput: %v", steps)
		}
	}
	for _, kind := range allKinds {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			at := bucketIn(t, s).with(func(s *S3) { s.Prefix = "some/where" })
			good(t, at, "conditional")
			if left := s.Objects(t, at.S3.Bucket, ""); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			plant(t, at)
			before := s.Objects(t, at.S3.Bucket, "")
			good(t, at, "conditional")
			if after := s.Objects(t, at.S3.Bucket, ""); strings.Join(after, " ") != strings.Join(before, " ") {
				t.Errorf("%v, and before %v", after, before)
			}
			mustOpen(t, at, OpenOptions{})
		})
	}
	t.Run("folder", func(t *testing.T) {
		base := t.TempDir()
		fresh := Location{Path: filepath.Join(base, "not", "yet")}
		good(t, fresh, "permissions", "space")
		if entries, err := os.ReadDir(base); err != nil || len(entries) > 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
		at := mustInit(t, MinChunkSize)
		before, err := os.ReadDir(at.Path)
		if err != nil {
			t.Fatal(err)
		}
		good(t, at)
		if after, err := os.ReadDir(at.Path); err != nil || len(after) != len(before) {
			t.Errorf("left: %v, %v", after, err)
		}
		if err := os.Chmod(at.Path, 0o777); err != nil {
			t.Fatal(err)
		}
		if steps, err := checked(t.Context(), at, CheckOptions{}); err != nil || steps["permissions"].Result != Warning || !strings.Contains(steps["permissions"].Text, "chmod") {
			t.Errorf("%+v, %v", steps["permissions"], err)
		}
	})
}

// What a check left that was killed goes with the next one, an hour later and not before; nothing else does.
func TestCheckRemovesLeftovers(t *testing.T) {
	old := time.Now().Add(-61 * time.Minute)
	killed, running, other := checkFolder+"0123456789ab", checkFolder+"ba9876543210", checkFolder+"results"
	holds := func(t *testing.T, at Location, root string, list func() []string) {
		t.Helper()
		steps, err := checked(t.Context(), at, CheckOptions{})
		if err != nil || !strings.Contains(steps["leftovers"].Text, "1 earlier checks") {
			t.Errorf("%+v, %v", steps["leftovers"], err)
		}
		for _, name := range list() {
			if strings.HasPrefix(name, killed) || strings.HasPrefix(name, checkFolder) && !strings.HasPrefix(name, running) && !strings.HasPrefix(name, other) {
				t.Errorf("%s is left", name)
			}
		}
		for _, name := range []string{running, other, "mine"} {
			if _, err := os.Stat(filepath.Join(root, name, "one")); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	age := func(t *testing.T, root string) {
		t.Helper()
		for _, name := range []string{killed, other, "mine"} {
			for _, path := range []string{"one", ""} {
				if err := os.Chtimes(filepath.Join(root, name, path), old, old); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Run("folder", func(t *testing.T) {
		root := t.TempDir()
		for _, name := range []string{killed, running, other, "mine"} {
			if err := errors.Join(os.Mkdir(filepath.Join(root, name), 0o700), os.WriteFile(filepath.Join(root, name, "one"), []byte("x"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		age(t, root)
		holds(t, Location{Path: root}, root, func() []string {
			entries, err := os.ReadDir(root)
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			return names
		})
	})
	t.Run("bucket", func(t *testing.T) {
		s := stores.Get(t, s3.Versity)
		at := bucketIn(t, s).with(func(l *S3) { l.Prefix = "a/b" })
		for _, name := range []string{killed, running, other, "mine"} {
			s.Put(t, at.S3.Bucket, "a/b/"+name+"/one", []byte("x"))
		}
		root := filepath.Join(s.Folder, at.S3.Bucket, "a", "b")
		age(t, root)
		holds(t, at, root, func() []string {
			var names []string
			for _, o := range s.Objects(t, at.S3.Bucket, "") {
				names = append(names, strings.TrimPrefix(o, "a/b/"))
			}
			return names
		})
	})
}

// Object lock is tried where it is asked for.
func TestCheckObjectLock(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			at := bucketIn(t, s)
			steps, err := checked(t.Context(), at, CheckOptions{ObjectLock: true})
			if fault.KindOf(err) != fault.Unsupported || steps["object-lock"].Result != Failed || !strings.Contains(steps["object-lock"].Text, "make a new one") || steps["download"].Result != Passed {
				t.Errorf("without: %+v, %v", steps["object-lock"], err)
			}
			at = at.with(func(l *S3) { l.Bucket = s.LockedBucket(t) })
			steps, err = checked(t.Context(), at, CheckOptions{ObjectLock: true})
			if err != nil || steps["object-lock"].Result != Passed || steps["cleanup"].Result != Passed {
				t.Errorf("with: %+v, %v", steps, err)
			}
			if left, err := mustBucket(t, at).purgeOnce(t.Context()); left || err != nil || len(s.Objects(t, at.S3.Bucket, "")) > 0 {
				t.Errorf("%v, %v", left, err)
			}
		})
	}
	if _, err := checked(t.Context(), Location{Path: t.TempDir()}, CheckOptions{ObjectLock: true}); fault.KindOf(err) != fault.Unsupported {
		t.Errorf("a folder: %v", err)
	}
}

// What is wrong with a store is named, in the step where it shows, and the check cleans up.
func TestCheckFinds(t *testing.T) {
	p, good := proxied(t, s3.Versity, 20*time.Second)
	s := stores.Get(t, s3.Versity)
	for name, c := range map[string]struct {
		rules  []s3.Rule
		change func(*S3)
		step   string
		want   fault.Kind
		words  string
		alone  bool // no other step fails
	}{
		"wrong key":         {nil, func(s *S3) { s.SecretKey = adapters.NewSecret("wrong") }, "reach", fault.Invalid, "check the access key", false},
		"no bucket":         {nil, func(s *S3) { s.Bucket = "no-such-bucket" }, "reach", fault.NotFound, "make the bucket", false},
		"overloaded":        {[]s3.Rule{{Fault: s3.Fault{Status: 503}}}, nil, "reach", fault.Unavailable, "SlowDown", false},
		"skewed":            {[]s3.Rule{{Fault: s3.Fault{Status: 403, Code: "RequestTimeTooSkewed"}}}, nil, "reach", fault.Invalid, "clock", false},
		"no writing":        {[]s3.Rule{{Method: "PUT", Fault: s3.Fault{Status: 403, Code: "AccessDenied"}}}, nil, "write", fault.Invalid, "must be allowed to", false},
		"full":              {[]s3.Rule{{Method: "PUT", Fault: s3.Fault{Status: 403, Code: "QuotaExceeded"}}}, nil, "write", fault.Exhausted, "quota", false},
		"spoils uploads":    {[]s3.Rule{{Method: "PUT", Fault: s3.Fault{FlipUpload: true}}}, nil, "write", fault.Corrupt, "changed on their way", false},
		"spoils downloads":  {[]s3.Rule{{Method: "GET", Object: "one", Fault: s3.Fault{FlipAnswer: true}}}, nil, "read", fault.Corrupt, "other bytes come", false},
		"spoils large ones": {[]s3.Rule{{Method: "GET", Object: "piece", Fault: s3.Fault{FlipAnswer: true}}}, nil, "download", fault.Corrupt, "other bytes come", true},
		"lists late":        {[]s3.Rule{{Method: "GET", Query: "list-type", Skip: 1, Times: 1, Fault: s3.Fault{Stale: true}}}, nil, "list", fault.Corrupt, "lists late", true},
		"no deleting":       {[]s3.Rule{{Method: "DELETE", Times: 1, Fault: s3.Fault{Status: 403, Code: "AccessDenied"}}}, nil, "delete", fault.Invalid, "must be allowed to", true},
		"clock ahead":       {[]s3.Rule{{Fault: s3.Fault{Clock: time.Hour}}}, nil, "clock", fault.Invalid, "ahead of this machine", true},
		"clock behind":      {[]s3.Rule{{Fault: s3.Fault{Clock: -10 * time.Minute}}}, nil, "clock", fault.Invalid, "behind", true},
	} {
		t.Run(name, func(t *testing.T) {
			at := good
			if c.change != nil {
				at = at.with(c.change)
			}
			p.Break(c.rules...)
			defer p.Heal()
			steps, err := checked(t.Context(), at, CheckOptions{})
			if got := steps[c.step]; got.Result != Failed || !strings.Contains(got.Text, c.words) {
				t.Errorf("%+v", got)
			}
			if fault.KindOf(err) != c.want || !strings.HasPrefix(err.Error(), c.step+": ") {
				t.Errorf("%v (%s), want %s", err, fault.KindOf(err), c.want)
			}
			failed := 0
			for _, s := range steps {
				if s.Result == Failed {
					failed++
				}
			}
			if c.alone && failed != 1 {
				t.Errorf("also: %+v", steps)
			}
			if left := s.Objects(t, good.S3.Bucket, ""); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}

	// What is not wrong enough to fail.
	p.Break(s3.Rule{Fault: s3.Fault{Clock: 2 * time.Minute}})
	if steps, err := checked(t.Context(), good, CheckOptions{}); err != nil || steps["clock"].Result != Warning {
		t.Errorf("%+v, %v", steps["clock"], err)
	}
	p.Heal()
	// When it cannot clean up, that is a failure as well.
	p.Break(s3.Rule{Method: "DELETE", Skip: 1, Fault: s3.Fault{Status: 403, Code: "AccessDenied"}})
	if steps, err := checked(t.Context(), good, CheckOptions{}); fault.KindOf(err) != fault.Invalid || steps["cleanup"].Result != Failed {
		t.Errorf("%+v, %v", steps["cleanup"], err)
	}
	p.Heal()
	// Interrupted, it cleans up.
	at := bucketIn(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	err := Check(ctx, at, CheckOptions{}, func(s Step) {
		if s.Name == "list" {
			cancel()
		}
	})
	if left := s.Objects(t, at.S3.Bucket, ""); !errors.Is(err, context.Canceled) || len(left) > 0 {
		t.Errorf("%v, left %v", err, left)
	}
}

// A folder that cannot hold a repository is refused with the reason.
func TestCheckFolderFinds(t *testing.T) {
	disk, err := lab.Test(t).Pool(t.Context(), "check", "ext4", 24<<20)
	if err != nil {
		t.Fatal(err)
	}
	at := Location{Path: filepath.Join(disk.Mount, "remote")}
	if steps, err := checked(t.Context(), at, CheckOptions{}); err != nil || steps["space"].Result != Warning || !strings.Contains(steps["space"].Text, "make room") {
		t.Errorf("small: %+v, %v", steps["space"], err)
	}
	file := filepath.Join(disk.Mount, "file")
	if err := os.WriteFile(file, make([]byte, 15<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if steps, err := checked(t.Context(), at, CheckOptions{}); fault.KindOf(err) != fault.Exhausted || steps["upload"].Result != Failed || steps["cleanup"].Result != Passed {
		t.Errorf("full: %+v, %v", steps, err)
	}
	if steps, err := checked(t.Context(), Location{Path: file}, CheckOptions{}); fault.KindOf(err) != fault.Invalid || !strings.Contains(steps["reach"].Text, "a repository is a folder") {
		t.Errorf("a file: %+v, %v", steps, err)
	}
	if err := unix.Mount("", disk.Mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if steps, err := checked(t.Context(), at, CheckOptions{}); fault.KindOf(err) != fault.Invalid || !strings.Contains(steps["reach"].Text, "cannot be written") {
		t.Errorf("read-only: %+v, %v", steps, err)
	}
}
