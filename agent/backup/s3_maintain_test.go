package backup

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/integration/s3"
)

// later opens the repository a while later, with the bucket's clock ahead as well.
func (w *world) later(d time.Duration) *repository.Repository {
	w.t.Helper()
	r, err := repository.Open(w.t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test", Locks: w.t.TempDir()}.Skewed(d, d))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			w.t.Error(err)
		}
	})
	return r
}

// days makes a backup a day, of which one is kept, with a full cycle of maintenance: what is kept is right every day, and in the
// end the space of the others is back. It returns the kept backups and what is in them.
func (w *world) days(n int) (wants map[string]*model) {
	w.t.Helper()
	rng := rand.New(rand.NewPCG(71, 72))
	wants = map[string]*model{}
	var last string
	var used []int64
	for day := range n {
		w.repo = w.later(time.Duration(day) * 25 * time.Hour)
		if day < n-3 { // then nothing is left but to wait
			w.write(random(rng, 24<<20), 20<<20)
		}
		s, want := w.cut()
		r := w.backup(s)
		wants[r.Backup] = want
		if last != "" {
			if err := w.repo.Forget(w.t.Context(), backupID(w.t, last)); err != nil {
				w.t.Fatalf("day %d: %v", day, err)
			}
			delete(wants, last)
		}
		last = r.Backup
		m, err := w.repo.Maintain(w.t.Context(), repository.MaintainOptions{Full: true})
		if err != nil {
			w.t.Fatalf("day %d: %v", day, err)
		}
		used = append(used, m.After)
		all, err := w.repo.Backups(w.t.Context(), repositoryFilter)
		if err != nil || len(all) != 1 || all[0].Handle.String() != last {
			w.t.Fatalf("day %d: %v, %v", day, all, err)
		}
		if s, err := VerifyAll(w.t.Context(), VerifyRequest{Repository: w.repo, All: true}); err != nil {
			w.t.Fatalf("day %d: %+v, %v", day, s, err)
		}
	}
	mustEqual(w.t, last, w.content(last), wants[last])
	if most, now := slices.Max(used), used[n-1]; now > most/2 || now < 24<<20 {
		w.t.Errorf("the space did not come back: %v", used)
	}
	return wants
}

// kopiaAgrees has kopia's own command verify the repository and restore its only backup.
func (w *world) kopiaAgrees(wants map[string]*model) *kopia {
	w.t.Helper()
	k := newKopia(w.t.(*testing.T), w.at)
	k.run("snapshot", "verify", "--verify-files-percent=100")
	got, _ := k.restore(kopiaRoot(k.t, k))
	for handle, want := range wants {
		mustEqual(w.t, "kopia's "+handle, got, want)
	}
	return k
}

// Forgetting and maintenance in a bucket: what is kept is right on every day, space comes back, and kopia agrees.
func TestMaintainS3(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			w := newKopiaWorld(t, 64<<10, 50<<20)
			w.inBucket(stores.Get(t, kind), "", 0)
			w.kopiaAgrees(w.days(7))
		})
	}
}

// The same with object lock. In a bucket that locks and a repository that asks for nothing, deleted is what gets a marker. In
// one whose blobs are retained they cannot be deleted by anybody, maintenance begins their time anew, and what it deletes
// itself gets a marker as well.
func TestMaintainWithObjectLock(t *testing.T) {
	for _, kind := range s3.Kinds {
		for _, retain := range []time.Duration{0, 72 * time.Hour} {
			t.Run(fmt.Sprintf("%s retaining for %v", kind, retain), func(t *testing.T) {
				t.Parallel()
				s := stores.Get(t, kind)
				w := newKopiaWorld(t, 64<<10, 50<<20)
				w.inBucket(s, "", 0)
				w.at.S3.Bucket = s.LockedBucket(t)
				if err := repository.Init(t.Context(), w.at, passphrase, repository.Options{ChunkSize: 64 << 10, Host: "test", Retain: retain}); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				k := w.kopiaAgrees(w.days(7))
				status, err := w.repo.Status(t.Context())
				if err != nil || status.RetainSeconds != int64(retain/time.Second) {
					t.Errorf("%+v, %v", status, err)
				}
				if retain == 0 {
					return
				}
				for _, object := range s.Objects(t, w.at.S3.Bucket, w.at.S3.Prefix) {
					switch name := object[len(w.at.S3.Prefix):]; name {
					case "kopia.maintenance": // kopia's books: written anew each time
					default:
						until := s.Retained(t, w.at.S3.Bucket, object)
						if until.Before(began.Add(retain)) {
							t.Errorf("%s is retained until %v", name, until)
						}
					}
				}
				var params struct {
					ExtendObjectLocks bool `json:"extendObjectLocks"`
				}
				if text := k.run("maintenance", "info", "--json"); json.Unmarshal([]byte(text), &params) != nil || !params.ExtendObjectLocks {
					t.Errorf("kopia says %s", text)
				}
			})
		}
	}
}
