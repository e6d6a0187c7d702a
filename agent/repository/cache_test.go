package repository

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kopia/kopia/repo/blob"

	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/s3"
)

// copies are the files in a cache, by their names.
func copies(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all[d.Name()] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// readAll opens a repository and reads everything in its backups.
func readAll(t *testing.T, at Location, o OpenOptions) (contents [][]byte, err error) {
	t.Helper()
	o.Host = "test"
	r, err := Open(t.Context(), at, secret, o)
	if err != nil {
		return nil, err
	}
	defer r.Close(t.Context())
	all, err := r.Backups(t.Context(), Filter{})
	if err != nil {
		return nil, err
	}
	for _, b := range all {
		if err := r.CheckDescription(t.Context(), b); err != nil {
			return nil, err
		}
		image, err := r.OpenImage(t.Context(), b)
		if err != nil {
			return nil, err
		}
		defer image.Close()
		p := make([]byte, image.Size())
		if _, err := image.ReadAt(t.Context(), p, 0); err != nil {
			return nil, err
		}
		contents = append(contents, p)
	}
	return contents, nil
}

// Indexes come from the cache and data from the store. Whatever happens to the cache, what is read is right.
func TestCache(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) { testCache(t, kind) })
	}
}

func testCache(t *testing.T, kind s3.Kind) {
	p, at := proxied(t, kind, 0)
	dir := t.TempDir()
	plant(t, at)
	cachedAt := at.with(func(s *S3) { s.Cache = dir })
	r := mustOpen(t, cachedAt, OpenOptions{})
	for _, id := range []string{"a", "b", "c"} {
		if _, err := commit(r, id, id[0], 7, 8); err != nil {
			t.Fatal(err)
		}
	}
	want, err := readAll(t, at, OpenOptions{})
	if err != nil || len(want) != 3 {
		t.Fatalf("%d, %v", len(want), err)
	}
	reads := func(from Location, o OpenOptions) (indexes, data int) {
		t.Helper()
		p.Seen()
		got, err := readAll(t, from, o)
		if err != nil || len(got) != len(want) {
			t.Fatalf("%d, %v", len(got), err)
		}
		for i := range got {
			if !bytes.Equal(got[i], want[i]) {
				t.Errorf("backup %d is different", i)
			}
		}
		for _, q := range p.Seen() {
			if q.Method != "GET" || strings.Contains(q.Query, "list-type") {
				continue
			}
			switch {
			case strings.HasPrefix(q.Object, "q"), strings.HasPrefix(q.Object, "xn"):
				indexes++
			case strings.HasPrefix(q.Object, "p"):
				data++
			}
		}
		return indexes, data
	}

	without, data := reads(at, OpenOptions{})
	if n, d := reads(cachedAt, OpenOptions{}); n != 0 || d != data || without == 0 || data == 0 {
		t.Errorf("%d reads of indexes and %d of data with a cache, %d and %d without", n, d, without, data)
	}
	all := copies(t, dir)
	for name, path := range all {
		if !strings.HasPrefix(name, "q") && !strings.HasPrefix(name, "xn") || !strings.HasPrefix(path, dir+"/"+identity(t, at)+"/") {
			t.Errorf("cached: %s", path)
		}
		content, err := os.ReadFile(path)
		if err != nil || bytes.Contains(content, []byte(`"volume"`)) {
			t.Errorf("%s is not encrypted: %v", path, err)
		}
	}

	// Who asks for the store's own gets it.
	if n, d := reads(cachedAt, OpenOptions{Uncached: true}); n != without || d != data {
		t.Errorf("%d reads of indexes and %d of data uncached", n, d)
	}

	if kind != s3.Versity {
		return // what follows is the same for all stores
	}
	for name, damage := range map[string]func(path string) error{
		"flipped": func(path string) error {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content[len(content)/2] ^= 1
			return os.WriteFile(path, content, 0o600)
		},
		"cut":     func(path string) error { return os.Truncate(path, 100) },
		"empty":   func(path string) error { return os.Truncate(path, 0) },
		"removed": os.Remove,
		"swapped": func(path string) error { return os.WriteFile(path, []byte("something else"), 0o600) },
	} {
		for _, path := range all {
			if err := damage(path); err != nil {
				t.Fatal(err)
			}
		}
		if n, _ := reads(cachedAt, OpenOptions{}); n == 0 {
			t.Errorf("%s: nothing was fetched again", name)
		}
		if n, _ := reads(cachedAt, OpenOptions{}); n != 0 {
			t.Errorf("%s: %d reads after everything was fetched again", name, n)
		}
	}
}

func identity(t *testing.T, at Location) string {
	t.Helper()
	id, err := at.identify(t.Context(), mustBucket(t, at))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Repositories with one cache folder keep apart in it.
func TestSharedCache(t *testing.T) {
	dir := t.TempDir()
	s := stores.Get(t, s3.Versity)
	for i := range 2 {
		at := bucketIn(t, s).with(func(s *S3) { s.Cache = dir })
		if err := Init(t.Context(), at, secret, Options{ChunkSize: MinChunkSize, Host: "test"}); err != nil {
			t.Fatal(err)
		}
		if _, err := commit(mustOpen(t, at, OpenOptions{}), "a", byte(i)); err != nil {
			t.Fatal(err)
		}
		if got, err := readAll(t, at, OpenOptions{}); err != nil || len(got) != 1 || got[0][0] != byte(i) {
			t.Errorf("%d: %v", i, err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != i+1 {
			t.Errorf("%d: %v, %v", i, entries, err)
		}
	}
}

// The cache keeps to its size, and to what was used last.
func TestCacheSize(t *testing.T) {
	b := mustBucket(t, bucketIn(t, stores.Get(t, s3.Versity)))
	dir := t.TempDir()
	const limit = 1 << 20
	c := withCache(t.Context(), b, dir, limit)
	content := map[blob.ID][]byte{}
	for i := range 30 {
		id := blob.ID("q" + string(rune('a'+i)))
		content[id] = noise(100_000 + i)
		if err := c.PutBlob(t.Context(), id, slice(content[id]), blob.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	held := func() (n int64) {
		for _, path := range copies(t, dir) {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			n += info.Size()
		}
		return n
	}
	if n := held(); n > limit || n < limit/2 {
		t.Errorf("%d bytes", n)
	}
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			for id, want := range content {
				for _, r := range [][2]int64{{0, -1}, {65_000, 2000}, {int64(len(want)) - 1, 1}, {3, 0}} {
					part := want
					if r[1] >= 0 {
						part = want[r[0] : r[0]+r[1]]
					}
					if err := same(t.Context(), c, id, r[0], r[1], part); err != nil {
						t.Errorf("%s %v: %v", id, r, err)
					}
				}
			}
		})
	}
	readers.Wait()
	if n := held(); n > limit+limit/4 {
		t.Errorf("%d bytes", n)
	}
	if err := c.DeleteBlob(t.Context(), "qa"); err != nil {
		t.Fatal(err)
	}
	if err := missing(t.Context(), c, "qa"); err != nil {
		t.Error(err)
	}
}

// A cache on a full disk, or where nothing can be written, costs time and nothing else.
func TestFullCache(t *testing.T) {
	disk, err := lab.Test(t).Pool(t.Context(), "cache", "ext4", 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	at := plant(t, bucketIn(t, stores.Get(t, s3.Versity)))
	file := filepath.Join(disk.Mount, "file")
	for name, dir := range map[string]string{"full": disk.Mount, "a file": file} {
		if err := os.WriteFile(file, noise(1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if name == "full" { // to the last block
			for err = error(nil); err == nil; {
				var f *os.File
				if f, err = os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
					_, err = f.Write(make([]byte, 4096))
					f.Close()
				}
			}
		}
		from := at.with(func(s *S3) { s.Cache = dir })
		if _, err := commit(mustOpen(t, from, OpenOptions{}), strings.ReplaceAll(name, " ", "-"), 1, 2); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got, err := readAll(t, from, OpenOptions{})
		if err != nil || len(got) == 0 {
			t.Errorf("%s: %d, %v", name, len(got), err)
		}
		for id, path := range copies(t, disk.Mount) {
			if path != file && strings.HasPrefix(id, newCopy) {
				t.Errorf("%s: left %s", name, path)
			}
		}
		os.Remove(file)
	}
}

// What was spoilt on its way from the store is fetched again and does not stay in the cache.
func TestSpoiltDownloads(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			p, at := proxied(t, kind, 0)
			r := mustOpen(t, plant(t, at), OpenOptions{})
			if _, err := commit(r, "a", 1, 2, 3); err != nil {
				t.Fatal(err)
			}
			for name, rule := range map[string]s3.Rule{
				"an index of contents": {Method: "GET", Object: "xn0_", Times: 1},
				"indexes, manifests":   {Method: "GET", Object: "q", Times: 1},
				"data":                 {Method: "GET", Object: "p", Times: 1},
			} {
				from := at.with(func(s *S3) { s.Cache = t.TempDir() })
				rule.Fault.FlipAnswer = true
				p.Break(rule)
				_, err := readAll(t, from, OpenOptions{})
				if hit := p.Heal(); hit != 1 || err != nil && fault.KindOf(err) != fault.Corrupt || err != nil && (kind == s3.Versity || name == "data") {
					t.Errorf("%s: disturbed %d: %v", name, hit, err)
				}
				if got, err := readAll(t, from, OpenOptions{}); err != nil || len(got) != 1 || got[0][0] != 1 {
					t.Errorf("%s, afterwards: %v", name, err)
				}
			}
		})
	}
}
