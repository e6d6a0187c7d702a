package backup

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/s3"
)

// inBucket moves a world's repository into a new bucket of a store, behind an endpoint if one is given.
func (w *world) inBucket(s *s3.Store, endpoint string, patience time.Duration) {
	w.t.Helper()
	at := &repository.S3{
		Endpoint: s.Endpoint, Bucket: s.Bucket(w.t), Prefix: "a/prefix/", Region: s.Region, Patience: patience,
		AccessKey: adapters.NewSecret(s.AccessKey), SecretKey: adapters.NewSecret(s.SecretKey),
	}
	// The blobs of an empty repository in a folder are the objects of one in a bucket.
	folder := emptyRepository(w.t, w.options)
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		rel, isBlob := strings.CutSuffix(strings.TrimPrefix(path, folder+"/"), ".f")
		if err != nil || !isBlob {
			return err
		}
		content, err := os.ReadFile(path)
		s.Put(w.t, at.Bucket, at.Prefix+strings.ReplaceAll(rel, "/", ""), content)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.at = repository.Location{S3: at}
	if endpoint != "" {
		at.Endpoint = endpoint
	}
	w.repo = openRepository(w.t, w.at)
}

// restored is what a restore of a backup makes.
func (w *world) restored(handle, name string) (adapters.Image, error) {
	w.t.Helper()
	r, err := Restore(w.t.Context(), RestoreRequest{Source: FromBackup(w.repo, backupID(w.t, handle)), Target: w.adapter, Volume: target(name)})
	if err != nil {
		return nil, err
	}
	h, err := adapters.ParseHandle(r.Volume)
	if err != nil {
		return nil, err
	}
	return w.volumeContent(h.Volume), nil
}

// Backups in a bucket: full, incremental, verified, restored, forgotten; and kopia's own command reads them.
func TestBackupToS3(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			w := newKopiaWorld(t, 64<<10, 70<<20+12345)
			w.inBucket(stores.Get(t, kind), "", 0)
			rng := rand.New(rand.NewPCG(21, 22))
			w.write(random(rng, 30<<20), 20<<20)
			first, wantFirst := w.cut()
			a := w.backup(first)
			w.write(random(rng, 300<<10), 25<<20+7)
			second, wantSecond := w.cut()
			b := w.backup(second)
			if a.Kind != repository.Full || b.Kind != repository.Incremental || b.BytesStored > 2<<20 {
				t.Errorf("%+v\n%+v", a, b)
			}
			for handle, want := range map[string]*model{a.Backup: wantFirst, b.Backup: wantSecond} {
				if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, handle)}); err != nil {
					t.Error(err)
				}
				got, err := w.restored(handle, "restored-"+backupID(t, handle))
				if err != nil {
					t.Fatal(err)
				}
				mustEqual(t, handle, got, want)
			}
			if err := w.repo.Forget(t.Context(), backupID(t, a.Backup)); err != nil {
				t.Fatal(err)
			}
			if all, err := w.repo.Backups(t.Context(), repositoryFilter); err != nil || len(all) != 1 || all[0].Handle.String() != b.Backup {
				t.Errorf("%v, %v", all, err)
			}
			if kind == s3.Versity {
				k := newKopia(t, w.at)
				k.run("snapshot", "verify", "--verify-files-percent=100")
				got, _ := k.restore(kopiaRoot(t, k))
				mustEqual(t, "kopia's", got, wantSecond)
			}
		})
	}
}

// kopiaRoot is the manifest of the only backup.
func kopiaRoot(t *testing.T, k *kopia) string {
	t.Helper()
	_, id, ok := strings.Cut(k.run("snapshot", "list", "--all", "--json"), `"id":"`)
	id, _, ok2 := strings.Cut(id, `"`)
	if !ok || !ok2 {
		t.Fatal("kopia lists nothing")
	}
	return id
}

// Whatever a store or the way to it does to a backup, none that is listed is wrong, and the next one is made as if nothing
// had been. What passes is survived.
func TestS3FaultsInBackup(t *testing.T) {
	every := func(f s3.Fault, skip, times int, methods ...string) (rules []s3.Rule) {
		for _, m := range methods {
			rules = append(rules, s3.Rule{Method: m, Skip: skip, Times: times, Fault: f})
		}
		return rules
	}
	for name, c := range map[string]struct {
		rules []s3.Rule
		want  fault.Kind // of the backup's error; Void: it succeeds
	}{
		"500 for a while":             {every(s3.Fault{Status: 500}, 1, 3, "PUT", "GET", "HEAD"), fault.Void},
		"503 for a while":             {every(s3.Fault{Status: 503}, 1, 3, "PUT", "GET", "HEAD"), fault.Void},
		"slow":                        {every(s3.Fault{Rate: 60 << 20}, 0, 0, "PUT", "GET"), fault.Void},
		"answers cut off":             {every(s3.Fault{CutAnswer: 50}, 0, 3, "PUT", "GET"), fault.Void},
		"uploads cut off":             {every(s3.Fault{CutRequest: true}, 0, 3, "PUT"), fault.Void},
		"uploads spoilt, twice":       {every(s3.Fault{FlipUpload: true}, 0, 2, "PUT"), fault.Void},
		"uploads of data spoilt":      {[]s3.Rule{{Method: "PUT", Object: "p", Fault: s3.Fault{FlipUpload: true}}}, fault.Corrupt},
		"uploads of indexes spoilt":   {[]s3.Rule{{Method: "PUT", Object: "q", Fault: s3.Fault{FlipUpload: true}}}, fault.Corrupt},
		"a manifest's upload spoilt":  {[]s3.Rule{{Method: "PUT", Object: "q", Skip: 1, Fault: s3.Fault{FlipUpload: true}}}, fault.Corrupt},
		"data comes back spoilt":      {[]s3.Rule{{Method: "GET", Object: "p", Fault: s3.Fault{FlipAnswer: true}}}, fault.Corrupt},
		"data comes back spoilt once": {[]s3.Rule{{Method: "GET", Object: "p", Times: 1, Fault: s3.Fault{FlipAnswer: true}}}, fault.Void},
		"indexes come back spoilt":    {[]s3.Rule{{Method: "GET", Object: "q", Fault: s3.Fault{FlipAnswer: true}}}, fault.Corrupt},
		"500 for ever":                {every(s3.Fault{Status: 500}, 2, 0, "PUT", "GET", "HEAD"), fault.Unavailable},
		"hangs for ever":              {[]s3.Rule{{Method: "PUT", Skip: 1, Fault: s3.Fault{Hang: true}}}, fault.Unavailable},
		"full":                        {[]s3.Rule{{Method: "PUT", Skip: 2, Fault: s3.Fault{Status: 403, Code: "QuotaExceeded"}}}, fault.Exhausted},
		"access withdrawn":            {[]s3.Rule{{Skip: 2, Fault: s3.Fault{Status: 403, Code: "AccessDenied"}}}, fault.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := stores.Get(t, s3.Versity)
			p := s3.NewProxy(t, s)
			w := newWorld(t, 64<<10, 40<<20)
			patience := 20 * time.Second
			if c.want == fault.Unavailable {
				patience = time.Second
			}
			w.inBucket(s, p.URL, patience)
			w.write(random(rand.New(rand.NewPCG(31, 32)), 28<<20), 1<<20)
			first, wantFirst := w.cut()

			p.Break(c.rules...)
			a, err := Run(t.Context(), w.request(first))
			if hit := p.Heal(); hit == 0 {
				t.Error("the fault did not happen")
			}
			if c.want == fault.Void && err != nil || c.want != fault.Void && (err == nil || fault.KindOf(err) != c.want) {
				t.Errorf("%v (%s)", err, fault.KindOf(err))
			}
			w.at.S3.Patience = 0 // from here on nothing is disturbed
			w.repo = openRepository(t, w.at)
			all, listErr := w.repo.Backups(t.Context(), repositoryFilter)
			if listErr != nil || err == nil && len(all) != 1 || err != nil && len(all) != 0 {
				t.Errorf("%d backups are listed: %v", len(all), listErr)
			}
			if err == nil {
				mustEqual(t, "a backup that survived", w.content(a.Backup), wantFirst)
			}

			w.write([]byte("more"), 35<<20)
			second, wantSecond := w.cut()
			b := w.backup(second)
			if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, b.Backup)}); err != nil {
				t.Error(err)
			}
			mustEqual(t, "the next backup", w.content(b.Backup), wantSecond)
		})
	}
}

// A store that vanishes for less than our patience is waited for, in a backup and in a restore.
func TestS3Vanishes(t *testing.T) {
	t.Parallel()
	s := stores.Get(t, s3.Versity)
	p := s3.NewProxy(t, s)
	w := newWorld(t, 64<<10, 40<<20)
	w.inBucket(s, p.URL, 3*time.Minute) // a busy machine may need it
	w.write(random(rand.New(rand.NewPCG(41, 42)), 28<<20), 1<<20)
	snapshot, want := w.cut()
	during := func(what, method string, run func() error) {
		t.Helper()
		p.Break(s3.Rule{Method: method, Object: "p", Fault: s3.Fault{Rate: 20 << 20}}) // so that it is under way for a while
		p.Seen()
		done := make(chan error, 1)
		go func() { done <- run() }()
		for under := false; !under; {
			for _, q := range p.Seen() {
				under = under || q.Method == method && strings.HasPrefix(q.Object, "a/prefix/p")
			}
			select {
			case err := <-done:
				t.Fatalf("%s: over before the store vanished: %v", what, err)
			case <-time.After(time.Millisecond):
			}
		}
		p.Down()
		select {
		case err := <-done:
			t.Errorf("%s: over while nobody was there: %v", what, err)
		case <-time.After(3 * time.Second):
		}
		p.Up(t)
		if err := <-done; err != nil {
			t.Errorf("%s: %v", what, err)
		}
		p.Heal()
	}
	var r Report
	during("backup", "PUT", func() (err error) {
		r, err = Run(t.Context(), w.request(snapshot))
		return err
	})
	mustEqual(t, "the backup", w.content(r.Backup), want)
	var got adapters.Image
	during("restore", "GET", func() (err error) {
		got, err = w.restored(r.Backup, "restored")
		return err
	})
	mustEqual(t, "the restored volume", got, want)
}

// A restore through what a store and the way to it do is right, or fails and makes no volume.
func TestS3FaultsInRestore(t *testing.T) {
	s := stores.Get(t, s3.Versity)
	p := s3.NewProxy(t, s)
	w := newWorld(t, 64<<10, 30<<20)
	w.inBucket(s, p.URL, 4*time.Second)
	w.write(random(rand.New(rand.NewPCG(51, 52)), 20<<20), 1<<20)
	snapshot, want := w.cut()
	b := w.backup(snapshot).Backup
	for name, c := range map[string]struct {
		rule s3.Rule
		want fault.Kind
	}{
		"500":          {s3.Rule{Times: 5, Fault: s3.Fault{Status: 500}}, fault.Void},
		"503":          {s3.Rule{Times: 5, Fault: s3.Fault{Status: 503}}, fault.Void},
		"slow":         {s3.Rule{Fault: s3.Fault{Rate: 60 << 20}}, fault.Void},
		"cut off":      {s3.Rule{Object: "p", Times: 5, Fault: s3.Fault{CutAnswer: 1000}}, fault.Void},
		"spoilt once":  {s3.Rule{Object: "p", Times: 1, Fault: s3.Fault{FlipAnswer: true}}, fault.Void},
		"spoilt":       {s3.Rule{Object: "p", Skip: 10, Fault: s3.Fault{FlipAnswer: true}}, fault.Corrupt},
		"gone":         {s3.Rule{Object: "p", Skip: 10, Fault: s3.Fault{Status: 404, Code: "NoSuchKey"}}, fault.Corrupt},
		"500 for ever": {s3.Rule{Skip: 10, Fault: s3.Fault{Status: 500}}, fault.Unavailable},
	} {
		p.Break(c.rule)
		volume := strings.ReplaceAll(name, " ", "-")
		got, err := w.restored(b, volume)
		if p.Heal() == 0 {
			t.Errorf("%s: the fault did not happen", name)
		}
		if c.want == fault.Void {
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			mustEqual(t, name, got, want)
			continue
		}
		if fault.KindOf(err) != c.want {
			t.Errorf("%s: %v (%s)", name, err, fault.KindOf(err))
		}
		if _, err := w.adapter.Volume(t.Context(), target(volume)); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%s: a volume was made: %v", name, err)
		}
	}
	if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, b)}); err != nil {
		t.Error(err)
	}
}

// A deadline ends a backup to a store that does not answer, soon after it.
func TestS3Deadline(t *testing.T) {
	s := stores.Get(t, s3.Versity)
	p := s3.NewProxy(t, s)
	w := newWorld(t, 64<<10, 30<<20)
	w.inBucket(s, p.URL, 0)
	w.write(random(rand.New(rand.NewPCG(61, 62)), 25<<20), 0)
	snapshot, _ := w.cut()
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	defer slog.SetDefault(before)
	for name, f := range map[string]s3.Fault{"hangs": {Hang: true}, "500": {Status: 500}} {
		p.Break(s3.Rule{Method: "PUT", Fault: f})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		began := time.Now()
		_, err := Run(ctx, w.request(snapshot))
		cancel()
		p.Heal()
		if took := time.Since(began); fault.KindOf(err) != fault.Unavailable || took > 10*time.Second {
			t.Errorf("%s: after %v %v (%s)", name, took, err, fault.KindOf(err))
		}
		if all := log.String() + err.Error(); strings.Contains(all, s.SecretKey) || strings.Contains(all, passphrase.Reveal()) {
			t.Errorf("a secret shows: %s", all)
		}
	}
}
