package repository

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/maintenance"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/s3"
)

// rotten is a repository of two backups, with every kind of blob that kopia writes: a killed session's marker and a
// schedule of maintenance are there too.
type rotten struct {
	t    *testing.T
	at   Location
	last blob.ID // the pack that holds the manifest of the second backup
}

func newRotten(t *testing.T) *rotten {
	t.Helper()
	w := &rotten{t: t, at: mustInit(t, MinChunkSize)}
	r, err := Open(t.Context(), w.at, secret, OpenOptions{Host: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close(context.Background())
	for i, id := range []string{"a", "b"} {
		if _, err := commit(r, id, 1, byte(2+i)); err != nil {
			t.Fatal(err)
		}
	}
	w.last = newestPack(t, w.at)
	killed, err := r.NewWriter(t.Context())
	if err == nil {
		_, _, err = killed.Write(t.Context(), bytes.Repeat([]byte("killed"), 1000))
	}
	if err == nil {
		err = repo.DirectWriteSession(t.Context(), r.kopia, repo.WriteSessionOptions{}, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return maintenance.SetSchedule(ctx, w, &maintenance.Schedule{NextFullMaintenanceTime: time.Now().Add(time.Hour)})
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// copy is the same repository somewhere else.
func (w *rotten) copy(t *testing.T) *rotten {
	t.Helper()
	c := &rotten{t: t, at: Location{Path: t.TempDir()}, last: w.last}
	if err := os.CopyFS(c.at.Path, os.DirFS(w.at.Path)); err != nil {
		t.Fatal(err)
	}
	return c
}

// newestPack is the metadata pack that was written last.
func newestPack(t *testing.T, at Location) blob.ID {
	var newest os.FileInfo
	var id blob.ID
	for path := range folderBlobs(t, at) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if name := blobName(at, path); strings.HasPrefix(name, "q") && (newest == nil || info.ModTime().After(newest.ModTime())) {
			newest, id = info, blob.ID(name)
		}
	}
	return id
}

// folderBlobs reads all files of a repository.
func folderBlobs(t *testing.T, at Location) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(at.Path, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".f") {
			return err
		}
		p, err := os.ReadFile(path)
		all[path] = string(p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func blobName(at Location, path string) string {
	rel, _ := filepath.Rel(at.Path, path)
	return strings.TrimSuffix(strings.ReplaceAll(rel, string(filepath.Separator), ""), ".f")
}

// find gives the files of blobs that begin so.
func (w *rotten) find(prefix string) []string {
	w.t.Helper()
	var found []string
	for path := range folderBlobs(w.t, w.at) {
		if name := blobName(w.at, path); name == prefix || strings.HasPrefix(name, prefix) && !strings.HasPrefix(name, "kopia.") {
			found = append(found, path)
		}
	}
	slices.Sort(found)
	if len(found) == 0 {
		w.t.Fatalf("no blobs %s", prefix)
	}
	return found
}

// damageAt is where in a blob something hurts: a pack begins with its contents and ends with padding.
func damageAt(w *rotten, path string, size int) int {
	if strings.HasPrefix(blobName(w.at, path), "q") {
		return 100
	}
	return size * 3 / 4
}

var damages = map[string]func(t *testing.T, w *rotten, path string){
	"flipped": func(t *testing.T, w *rotten, path string) {
		p, err := os.ReadFile(path)
		if err == nil {
			p[damageAt(w, path, len(p))] ^= 1
			err = os.WriteFile(path, p, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	},
	"cut short": func(t *testing.T, w *rotten, path string) {
		info, err := os.Stat(path)
		if err == nil {
			err = os.Truncate(path, int64(damageAt(w, path, int(info.Size()))))
		}
		if err != nil {
			t.Fatal(err)
		}
	},
	"missing": func(t *testing.T, w *rotten, path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	},
	"swapped": func(t *testing.T, w *rotten, path string) { // with a pack
		for _, other := range w.find("p") {
			if other == path {
				continue
			}
			p, err := os.ReadFile(other)
			if err == nil {
				err = os.WriteFile(path, p, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			return
		}
		t.Fatal("nothing to swap it with")
	},
}

// Damage to any blob that makes a repository one is found and named; a dry run of Mend changes nothing; after Mend every
// backup is listed as it was.
func TestMend(t *testing.T) {
	all := []string{"flipped", "cut short", "missing", "swapped"}
	sound := newRotten(t)
	found, want := sound.look()
	if len(found) > 0 || len(want) != 2 {
		t.Fatalf("%v, %v", found, want)
	}
	for _, c := range []struct {
		prefix  string // of the blobs that are damaged
		damages []string
		no      string // a damage that nobody can see, and that does no harm
	}{
		{prefix: "kopia.repository", damages: []string{"flipped", "missing", "swapped"}}, // opening derives a key, which takes its time
		{prefix: "kopia.repository.copy", damages: []string{"missing"}},
		{prefix: "kopia.blobcfg", damages: []string{"flipped", "missing"}},
		{prefix: "kopia.maintenance", damages: []string{"cut short", "swapped", "missing"}, no: "missing"},
		{prefix: "xn", damages: all},
		{prefix: "s", damages: []string{"flipped", "swapped", "missing"}, no: "missing"},
		{prefix: string(sound.last), damages: all},
	} {
		for _, name := range c.damages {
			t.Run(c.prefix+" "+name, func(t *testing.T) {
				t.Parallel()
				w := sound.copy(t)
				paths := w.find(c.prefix)
				for _, path := range paths {
					damages[name](t, w, path)
				}
				found, listed := w.look()
				if c.no == name {
					if len(found) > 0 || !maps.Equal(listed, want) {
						t.Errorf("harmless, yet found: %v", found)
					}
					return
				}
				if len(found) == 0 {
					t.Fatal("nothing is found")
				}
				before := folderBlobs(t, w.at)
				planned, err := Mend(t.Context(), w.at, secret, OpenOptions{Host: "test"}, true)
				if err != nil || len(planned) == 0 {
					t.Fatalf("planned %+v: %v", planned, err)
				}
				if !maps.Equal(before, folderBlobs(t, w.at)) {
					t.Error("a dry run changed something")
				}
				if c.prefix == "s" { // it might be alive
					if !planned[0].Left {
						t.Errorf("%+v", planned)
					}
					old := time.Now().Add(-100 * time.Hour)
					if err := os.Chtimes(paths[0], old, old); err != nil {
						t.Fatal(err)
					}
				}
				mended, err := Mend(t.Context(), w.at, secret, OpenOptions{Host: "test"}, false)
				if err != nil || len(mended) == 0 {
					t.Fatalf("mended %+v: %v", mended, err)
				}
				if name != "missing" || c.prefix != "xn" { // what is not there cannot be named; the packs that it knew are
					if !slices.ContainsFunc(mended, func(m Mended) bool { return strings.HasPrefix(m.Blob, c.prefix) }) {
						t.Errorf("it is not named: %+v", mended)
					}
				}
				if found, listed := w.look(); len(found) > 0 || !maps.Equal(listed, want) {
					t.Errorf("after Mend: %v; listed %v, want %v", found, listed, want)
				}
			})
		}
	}
}

// A repository in a bucket is mended like one in a folder, whatever this machine's cache remembers of it.
func TestMendBucket(t *testing.T) {
	w := newRotten(t)
	at := bucketIn(t, stores.Get(t, s3.Versity))
	b := mustBucket(t, at)
	for path, text := range folderBlobs(t, w.at) {
		id := blob.ID(blobName(w.at, path))
		switch {
		case strings.HasPrefix(string(id), "xn"):
			continue
		case id == "kopia.blobcfg", id == "kopia.repository":
			text = "rot"
		}
		if err := b.PutBlob(t.Context(), id, slice(text), blob.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	c := &rotten{t: t, at: at}
	if found, _ := c.look(); len(found) != 1 || !strings.Contains(found[0], "kopia.repository") {
		t.Errorf("found %v", found)
	}
	if mended, err := Mend(t.Context(), at, secret, OpenOptions{Host: "test"}, false); err != nil || len(mended) < 4 {
		t.Errorf("%+v, %v", mended, err)
	}
	_, want := w.look()
	if found, listed := c.look(); len(found) > 0 || !maps.Equal(listed, want) {
		t.Errorf("after Mend: %v; listed %v, want %v", found, listed, want)
	}
}

// A wrong passphrase is that and not damage, and a place without a repository stays one.
func TestMendRefuses(t *testing.T) {
	at := mustInit(t, MinChunkSize)
	if got, err := Mend(t.Context(), at, adapters.NewSecret("wrong"), OpenOptions{}, false); fault.KindOf(err) != fault.Invalid || len(got) > 0 {
		t.Errorf("wrong passphrase: %+v, %v", got, err)
	}
	if got, err := Mend(t.Context(), Location{Path: t.TempDir()}, secret, OpenOptions{}, false); fault.KindOf(err) != fault.NotFound || len(got) > 0 {
		t.Errorf("nothing there: %+v, %v", got, err)
	}
	if got, err := Mend(t.Context(), at, secret, OpenOptions{}, false); err != nil || len(got) > 0 {
		t.Errorf("nothing wrong: %+v, %v", got, err)
	}
}

// The marker of the current epoch is lost: kopia overlooks the indexes of the epochs after the next one.
func TestLostEpoch(t *testing.T) {
	w := newRotten(t)
	for _, path := range w.find("xn") { // as if they had been written in epoch 5
		name := filepath.Join(w.at.Path, strings.Replace(strings.TrimPrefix(path, w.at.Path), "n0_", "n5_", 1))
		if !strings.Contains(name, "n5_") {
			t.Fatalf("cannot rename %s", path)
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err == nil {
			err = os.Rename(path, name)
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := Open(t.Context(), w.at, secret, OpenOptions{Host: "test"}); fault.KindOf(err) != fault.Corrupt || !strings.Contains(err.Error(), "xe5") {
		t.Errorf("the error names no marker: %v", err)
	}
	mended, err := Mend(t.Context(), w.at, secret, OpenOptions{Host: "test"}, false)
	if err != nil || len(mended) != 1 || mended[0].Blob != "xe5" {
		t.Errorf("%+v, %v", mended, err)
	}
	if found, listed := w.look(); len(found) > 0 || len(listed) != 2 {
		t.Errorf("%v, %v", found, listed)
	}
}

// look opens the repository, surveys it and lists the backups with their images. Whatever is wrong comes as words.
func (w *rotten) look() (found []string, listed map[string]string) {
	w.t.Helper()
	r, err := Open(w.t.Context(), w.at, secret, OpenOptions{Host: "test"})
	if fault.KindOf(err) == fault.Corrupt {
		return []string{err.Error()}, nil
	} else if err != nil {
		w.t.Fatal(err)
	}
	defer r.Close(context.Background())
	m, err := r.OpenMedium(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	defer m.Close(context.Background())
	rot, err := m.Survey(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range rot {
		found = append(found, r.String())
	}
	all, err := r.Backups(w.t.Context(), Filter{})
	if err != nil {
		w.t.Fatal(err)
	}
	listed = map[string]string{}
	for _, b := range all {
		listed[b.ID] = fmt.Sprint(b.Image, b.root)
	}
	return found, listed
}
