package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
	kopias3 "github.com/kopia/kopia/repo/blob/s3"
	"github.com/minio/minio-go/v7"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/s3"
)

// bucketIn is a new bucket of a store.
func bucketIn(t testing.TB, s *s3.Store) Location {
	t.Helper()
	return Location{S3: &S3{
		Endpoint: s.Endpoint, Bucket: s.Bucket(t), CA: s.CA,
		AccessKey: adapters.NewSecret(s.AccessKey), SecretKey: adapters.NewSecret(s.SecretKey),
		Patience: 30 * time.Second,
	}}
}

// with is the same location with something changed.
func (l Location) with(change func(*S3)) Location {
	s := *l.S3
	change(&s)
	return Location{S3: &s}
}

// empty is a repository in a folder, made once: deriving the key for a new one takes a good part of a second.
var empty = sync.OnceValues(func() (string, error) {
	path := filepath.Join(testDir, "empty")
	return path, Init(context.Background(), Location{Path: path}, secret, Options{ChunkSize: MinChunkSize, Host: "test"})
})

// plant puts an empty repository into a bucket: the blobs of a folder's are the objects of a bucket's.
func plant(t testing.TB, at Location) Location {
	t.Helper()
	path, err := empty()
	if err != nil {
		t.Fatal(err)
	}
	from, err := openFolder(t.Context(), &folderOptions{Path: path}, false)
	if err != nil {
		t.Fatal(err)
	}
	to := mustBucket(t, at)
	if err := from.ListBlobs(t.Context(), "", func(m blob.Metadata) error {
		var p blobBytes
		if err := from.GetBlob(t.Context(), m.BlobID, 0, -1, &p); err != nil {
			return err
		}
		return to.PutBlob(t.Context(), m.BlobID, slice(p.Bytes()), blob.PutOptions{})
	}); err != nil {
		t.Fatal(err)
	}
	return at
}

func mustBucket(t testing.TB, at Location) *bucket {
	t.Helper()
	b, err := openBucket(at.S3)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close(context.Background()) })
	return b
}

var allKinds = append(slices.Clone(s3.Kinds), s3.VersityTLS)

// A repository in a bucket is made, opened, written and read like one in a folder; everybody sees the same.
func TestRepositoryInBucket(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			at := bucketIn(t, s).with(func(s *S3) { s.Prefix = "backups/main" })
			if err := Init(t.Context(), at, secret, Options{ChunkSize: MinChunkSize, Host: "test"}); err != nil {
				t.Fatal(err)
			}
			if err := Init(t.Context(), at, secret, Options{}); fault.KindOf(err) != fault.Busy {
				t.Errorf("twice: %v", err)
			}
			writer := mustOpen(t, at, OpenOptions{Remote: "main"})
			other := mustOpen(t, at, OpenOptions{Remote: "main", ReadOnly: true})
			for i, id := range []string{"a", "b"} {
				if _, err := commit(writer, id, byte(i+1), 7); err != nil {
					t.Fatal(err)
				}
			}
			if err := writer.Forget(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			for i, r := range []*Repository{writer, other, mustOpen(t, at, OpenOptions{Remote: "main"})} {
				got, err := r.Backups(t.Context(), Filter{})
				if err != nil || len(got) != 1 || got[0].ID != "b" {
					t.Fatalf("%d: %v, %v", i, got, err)
				}
				status, err := r.Status(t.Context())
				if err != nil || status.Backups != 1 || status.Stored == 0 || !strings.Contains(status.Location, at.S3.Bucket+"/backups/main/") {
					t.Errorf("%d: %+v, %v", i, status, err)
				}
				image, err := r.OpenImage(t.Context(), got[0])
				if err != nil {
					t.Fatal(err)
				}
				p := make([]byte, 2)
				if _, err := image.ReadAt(t.Context(), p, MinChunkSize-1); err != nil || p[0] != 2 || p[1] != 7 {
					t.Errorf("%d: read %v: %v", i, p, err)
				}
				image.Close()
			}
			for _, name := range s.Objects(t, at.S3.Bucket, "") {
				if !strings.HasPrefix(name, "backups/main/") {
					t.Errorf("outside of the prefix: %s", name)
				}
			}

			ctx, cancel := context.WithTimeout(t.Context(), -1)
			defer cancel()
			if _, err := Open(ctx, at, secret, OpenOptions{}); fault.KindOf(err) != fault.Unavailable {
				t.Errorf("after the deadline: %v", err)
			}
		})
	}
}

// What goes wrong on the way to a repository is said, in the kind that it is.
func TestBucketRefuses(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			at := plant(t, bucketIn(t, s))
			open := func(at Location, pass adapters.Secret) error {
				r, err := Open(t.Context(), at, pass, OpenOptions{Host: "test"})
				if err == nil {
					r.Close(t.Context())
				}
				return err
			}
			if err := open(at, secret); err != nil {
				t.Fatal(err)
			}
			free, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			free.Close()
			for name, c := range map[string]struct {
				at    Location
				pass  adapters.Secret
				want  fault.Kind
				words string
			}{
				"wrong passphrase": {at, adapters.NewSecret("wrong"), fault.Invalid, "wrong passphrase"},
				"wrong secret key": {at.with(func(s *S3) { s.SecretKey = adapters.NewSecret("wrong") }), secret, fault.Invalid, "check the access key, the secret key"},
				"wrong access key": {at.with(func(s *S3) { s.AccessKey = adapters.NewSecret("NOBODY") }), secret, fault.Invalid, "check the access key, the secret key"},
				"wrong bucket":     {at.with(func(s *S3) { s.Bucket = "no-such-bucket" }), secret, fault.NotFound, "make the bucket first"},
				"another prefix":   {at.with(func(s *S3) { s.Prefix = "elsewhere" }), secret, fault.NotFound, "stillpoint remote init"},
				"TLS to one without": {at.with(func(s *S3) { s.Endpoint = strings.TrimPrefix(s.Endpoint, "http://") }), secret, fault.Invalid,
					"does not speak TLS"},
				"nobody there": {at.with(func(s *S3) { s.Endpoint, s.Patience = "http://"+free.Addr().String(), 3*time.Second }), secret, fault.Unavailable, "cannot be reached"},
			} {
				if err := open(c.at, c.pass); fault.KindOf(err) != c.want || !strings.Contains(err.Error(), c.words) {
					t.Errorf("%s: %v (%s)", name, err, fault.KindOf(err))
				}
			}
			if err := Init(t.Context(), at.with(func(s *S3) { s.Bucket = "no-such-bucket" }), secret, Options{}); fault.KindOf(err) != fault.NotFound {
				t.Errorf("making one in no bucket: %v", err)
			}
			other := bucketIn(t, s)
			if err := mustBucket(t, other).PutBlob(t.Context(), "something", slice("else"), blob.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := Init(t.Context(), other, secret, Options{}); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "something") {
				t.Errorf("where something is: %v", err)
			}
		})
	}
}

// A store's certificate is believed only from the CA that was named, or from the system's when none was.
func TestBucketCA(t *testing.T) {
	at := plant(t, bucketIn(t, stores.Get(t, s3.VersityTLS)))
	other, err := s3.NewCA()
	if err != nil {
		t.Fatal(err)
	}
	for name, ca := range map[string][]byte{"none": nil, "another": other} {
		_, err := Open(t.Context(), at.with(func(s *S3) { s.CA = ca }), secret, OpenOptions{})
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "s3-ca-file") {
			t.Errorf("%s: %v (%s)", name, err, fault.KindOf(err))
		}
	}
	mustOpen(t, at, OpenOptions{})
	if _, err := Open(t.Context(), at.with(func(s *S3) { s.Endpoint, s.CA = "http"+strings.TrimPrefix(s.Endpoint, "https"), nil }), secret, OpenOptions{}); fault.KindOf(err) == fault.Internal {
		t.Errorf("without TLS: %v", err)
	}
}

// Repositories share a bucket without noticing each other, one at its root included.
func TestPrefixes(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			root := bucketIn(t, stores.Get(t, kind))
			var all []*Repository
			for i, prefix := range []string{"", "a", "a/b"} {
				at := plant(t, root.with(func(s *S3) { s.Prefix = prefix }))
				r := mustOpen(t, at, OpenOptions{})
				if _, err := commit(r, fmt.Sprintf("backup-%d", i), byte(i)); err != nil {
					t.Fatal(err)
				}
				all = append(all, r)
			}
			for i, r := range all {
				if got, err := r.Backups(t.Context(), Filter{}); err != nil || len(got) != 1 || got[0].ID != fmt.Sprintf("backup-%d", i) {
					t.Errorf("%d: %v, %v", i, got, err)
				}
				if s, err := r.Status(t.Context()); err != nil || s.Stored > 40<<10 {
					t.Errorf("%d: %+v, %v", i, s, err)
				}
			}
		})
	}
}

// The region is asked for or named; a wrong one is said to be wrong, with the right one where the store tells it.
func TestRegion(t *testing.T) {
	s := stores.Get(t, s3.Versity)
	at := bucketIn(t, s)
	put := func(region string) error {
		return mustBucket(t, at.with(func(s *S3) { s.Region = region })).PutBlob(t.Context(), "x", slice("x"), blob.PutOptions{})
	}
	for _, region := range []string{"", s.Region} {
		if err := put(region); err != nil {
			t.Errorf("%q: %v", region, err)
		}
	}
	if err := put("south-9"); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "s3-signing-region") || !strings.Contains(err.Error(), s.Region) {
		t.Errorf("a wrong one: %v (%s)", err, fault.KindOf(err))
	}
}

// The bucket is named in the path or in the host's name, as is wanted.
func TestLookup(t *testing.T) {
	s := stores.Get(t, s3.Versity)
	at := bucketIn(t, s)
	address := strings.TrimPrefix(s.Endpoint, "http://")
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	for lookup, host := range map[Lookup]string{LookupAuto: address, LookupPath: address, LookupHost: at.S3.Bucket + ".s3.test:" + port} {
		b := mustBucket(t, at.with(func(s *S3) {
			s.Lookup = lookup
			if lookup == LookupHost {
				s.Endpoint = "http://s3.test:" + port
			}
		}))
		asked := ""
		b.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			asked = addr
			return new(net.Dialer).DialContext(ctx, network, address)
		}
		want := slice(fmt.Sprint("content ", lookup))
		if err := b.PutBlob(t.Context(), "x", want, blob.PutOptions{}); err != nil {
			t.Fatalf("%v: %v", lookup, err)
		}
		if err := same(t.Context(), b, "x", 0, -1, want); err != nil || asked != host {
			t.Errorf("%v: asked %s: %v", lookup, asked, err)
		}
	}
}

// A bucket does what kopia asks of a storage.
func TestBucketStorage(t *testing.T) {
	for _, kind := range allKinds {
		t.Run(string(kind), func(t *testing.T) {
			ctx := t.Context()
			b := mustBucket(t, bucketIn(t, stores.Get(t, kind)).with(func(s *S3) { s.Prefix = "p" }))
			data := noise(3<<20 + 17)
			var at time.Time
			if err := b.PutBlob(ctx, "x", slice(data), blob.PutOptions{GetModTime: &at}); err != nil || time.Since(at).Abs() > time.Minute {
				t.Fatalf("%v, %v", at, err)
			}
			for _, r := range [][2]int64{{0, -1}, {0, 1}, {1000, 2 << 20}, {int64(len(data)) - 1, 1}, {5, 0}} {
				want := data
				if r[1] >= 0 {
					want = data[r[0] : r[0]+r[1]]
				}
				if err := same(ctx, b, "x", r[0], r[1], want); err != nil {
					t.Errorf("%v: %v", r, err)
				}
			}
			for _, r := range [][2]int64{{int64(len(data)), 1}, {int64(len(data)) - 1, 2}, {-1, 1}} {
				var p blobBytes
				if err := b.GetBlob(ctx, "x", r[0], r[1], &p); !errors.Is(err, blob.ErrInvalidRange) {
					t.Errorf("%v: %v", r, err)
				}
			}
			if m, err := b.GetMetadata(ctx, "x"); err != nil || m.Length != int64(len(data)) || !m.Timestamp.Equal(at) {
				t.Errorf("%+v, %v", m, err)
			}
			if err := b.PutBlob(ctx, "empty", slice{}, blob.PutOptions{}); err != nil {
				t.Error(err)
			}
			if err := same(ctx, b, "empty", 0, -1, nil); err != nil {
				t.Error(err)
			}
			var p blobBytes
			if err := b.GetBlob(ctx, "nothing", 0, -1, &p); !errors.Is(err, blob.ErrBlobNotFound) {
				t.Error(err)
			}
			if _, err := b.GetMetadata(ctx, "nothing"); !errors.Is(err, blob.ErrBlobNotFound) {
				t.Error(err)
			}
			if err := b.PutBlob(ctx, "y", slice("y"), blob.PutOptions{DoNotRecreate: true}); !errors.Is(err, blob.ErrUnsupportedPutBlobOption) {
				t.Error(err)
			}
			if err := b.PutBlob(ctx, "y", slice("y"), blob.PutOptions{SetModTime: time.Now()}); !errors.Is(err, blob.ErrSetTimeUnsupported) {
				t.Error(err)
			}
			for range 2 {
				if err := b.DeleteBlob(ctx, "x"); err != nil {
					t.Error(err)
				}
			}
			stop := errors.New("stop")
			if err := b.ListBlobs(ctx, "", func(blob.Metadata) error { return stop }); !errors.Is(err, stop) {
				t.Errorf("a listing that is stopped: %v", err)
			}
			if text := fmt.Sprintf("%v %+v %#v", b.ConnectionInfo(), b.at, b.at); strings.Contains(text, b.at.SecretKey.Reveal()) {
				t.Error("the secret key shows: " + text)
			}
		})
	}
}

// What kopia's own S3 storage writes we read, and what we write it reads.
func TestKopiasStorage(t *testing.T) {
	for _, kind := range allKinds {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			at := bucketIn(t, s).with(func(s *S3) { s.Prefix = "here" })
			scheme, host, _ := strings.Cut(s.Endpoint, "://")
			theirs, err := kopias3.New(t.Context(), &kopias3.Options{
				BucketName: at.S3.Bucket, Prefix: "here/", Endpoint: host, DoNotUseTLS: scheme == "http", RootCA: s.CA, AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey,
			}, false)
			if err != nil {
				t.Fatal(err)
			}
			ours := mustBucket(t, at)
			data := noise(100_000)
			for id, st := range map[blob.ID][2]blob.Storage{"ours": {ours, theirs}, "theirs": {theirs, ours}} {
				if err := st[0].PutBlob(t.Context(), id, slice(data), blob.PutOptions{}); err != nil {
					t.Fatal(err)
				}
				if err := same(t.Context(), st[1], id, 10, 1000, data[10:1010]); err != nil {
					t.Errorf("%s: %v", id, err)
				}
				m, err := st[1].GetMetadata(t.Context(), id)
				if err != nil || m.Length != int64(len(data)) {
					t.Errorf("%s: %+v, %v", id, m, err)
				}
			}
			for _, st := range []blob.Storage{ours, theirs} {
				all, err := blob.ListAllBlobs(t.Context(), st, "")
				if err != nil || len(all) != 2 || all[0].BlobID != "ours" || all[1].BlobID != "theirs" {
					t.Errorf("%v, %v", all, err)
				}
			}
		})
	}
}

// A retained object stays, and its time can be extended.
func TestRetention(t *testing.T) {
	for _, kind := range s3.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			at := bucketIn(t, s).with(func(l *S3) { l.Bucket = s.LockedBucket(t) })
			b := mustBucket(t, at)
			o := blob.PutOptions{RetentionMode: blob.Governance, RetentionPeriod: time.Hour}
			if err := b.PutBlob(t.Context(), "x", slice("x"), o); err != nil {
				t.Fatal(err)
			}
			if err := b.ExtendBlobRetention(t.Context(), "x", blob.ExtendOptions{RetentionMode: blob.Governance, RetentionPeriod: 2 * time.Hour}); err != nil {
				t.Error(err)
			}
			info, err := b.core.StatObject(t.Context(), at.S3.Bucket, "x", minio.StatObjectOptions{})
			if err != nil {
				t.Fatal(err)
			}
			until, err := time.Parse(time.RFC3339, info.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date"))
			if err != nil || time.Until(until) < 110*time.Minute || info.Metadata.Get("X-Amz-Object-Lock-Mode") != "GOVERNANCE" {
				t.Errorf("%v: %v", info.Metadata, err)
			}
			if err := b.core.RemoveObject(t.Context(), at.S3.Bucket, "x", minio.RemoveObjectOptions{VersionID: info.VersionID}); err == nil {
				t.Error("deleted though retained")
			}
		})
	}
}

// A repository whose blobs are to be retained is refused where that cannot be, and then nothing is made.
func TestRetentionRefused(t *testing.T) {
	s := stores.Get(t, s3.Versity)
	open, folder := bucketIn(t, s), Location{Path: filepath.Join(t.TempDir(), "new")}
	for words, c := range map[string]struct {
		at   Location
		o    Options
		want fault.Kind
	}{
		"has no object lock: most":  {open, Options{Retain: MinRetain}, fault.Unsupported},
		"a folder has no":           {folder, Options{Retain: MinRetain}, fault.Unsupported},
		"retained for 47h0m0s":      {open, Options{Retain: 47 * time.Hour}, fault.Invalid},
		"retained for 0s":           {open, Options{RetainMode: Compliance}, fault.Invalid},
		"must be governance or com": {open, Options{Retain: MinRetain, RetainMode: "legal"}, fault.Invalid},
	} {
		if err := Init(t.Context(), c.at, secret, c.o); fault.KindOf(err) != c.want || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", words, err)
		}
	}
	if left := s.Objects(t, open.S3.Bucket, ""); len(left) > 0 {
		t.Errorf("made: %v", left)
	}
	if _, err := os.Stat(folder.Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("made: %v", err)
	}
}

// A location that cannot be right is refused without a word to any store.
func TestLocationRefuses(t *testing.T) {
	good := Location{S3: &S3{Endpoint: "s3.example.com", Bucket: "bucket", AccessKey: adapters.NewSecret("a"), SecretKey: adapters.NewSecret("b")}}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for words, at := range map[string]Location{
		"needs a place":           {},
		"either":                  {Path: "/x", S3: good.S3},
		"has no endpoint":         good.with(func(s *S3) { s.Endpoint = "" }),
		"the scheme is":           good.with(func(s *S3) { s.Endpoint = "ftp://host" }),
		"nothing behind it":       good.with(func(s *S3) { s.Endpoint = "https://host/bucket" }),
		"do not belong into it":   good.with(func(s *S3) { s.Endpoint = "https://key:geheim@host" }),
		"not a host":              good.with(func(s *S3) { s.Endpoint = "https://ho st" }),
		"bucket is not named":     good.with(func(s *S3) { s.Bucket = "" }),
		"3 to 63 of":              good.with(func(s *S3) { s.Bucket = "b" }),
		"begin with a /":          good.with(func(s *S3) { s.Prefix = "/x" }),
		"needs credentials":       good.with(func(s *S3) { s.SecretKey = adapters.NewSecret("") }),
		"when that is an address": good.with(func(s *S3) { s.Endpoint, s.Lookup = "10.0.0.1:9000", LookupHost }),
		"this bucket's dots":      good.with(func(s *S3) { s.Bucket, s.Lookup = "a.b", LookupHost }),
		"without TLS":             good.with(func(s *S3) { s.Endpoint, s.CA = "http://host", []byte("x") }),
		"no certificate in PEM":   good.with(func(s *S3) { s.CA = []byte("x") }),
		"absolute path":           good.with(func(s *S3) { s.Cache = "cache" }),
		"cannot be negative":      good.with(func(s *S3) { s.CacheSize = -1 }),
	} {
		for _, err := range []error{
			Init(t.Context(), at, secret, Options{}),
			Check(t.Context(), at, CheckOptions{}, func(s Step) { t.Errorf("%s: tried %v", words, s) }),
			func() error { _, err := Open(t.Context(), at, secret, OpenOptions{}); return err }(),
		} {
			if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), words) || strings.Contains(err.Error(), "geheim") {
				t.Errorf("%q: %v (%s)", words, err, fault.KindOf(err))
			}
		}
	}
}

// More objects than one answer lists come all, in order, once each, also when the store fails in the middle.
func TestLongListing(t *testing.T) {
	s := stores.Get(t, s3.Versity)
	p := s3.NewProxy(t, s)
	at := bucketIn(t, s)
	direct := mustBucket(t, at)
	const n = 2100
	var puts sync.WaitGroup
	for w := range 8 {
		puts.Go(func() {
			for i := w; i < n; i += 8 {
				if err := direct.PutBlob(t.Context(), blob.ID(fmt.Sprintf("x%04d", i)), slice("x"), blob.PutOptions{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	puts.Wait()
	p.Break(s3.Rule{Method: "GET", Query: "list-type", Skip: 1, Times: 1, Fault: s3.Fault{Status: 500}},
		s3.Rule{Method: "GET", Query: "list-type", Skip: 2, Times: 1, Fault: s3.Fault{CutAnswer: 5000}})
	var got bytes.Buffer
	next := 0
	err := mustBucket(t, at.with(func(s *S3) { s.Endpoint, s.Region = p.URL, stores.Get(t, s3.Versity).Region })).ListBlobs(t.Context(), "x", func(m blob.Metadata) error {
		if m.BlobID != blob.ID(fmt.Sprintf("x%04d", next)) || m.Length != 1 {
			fmt.Fprintf(&got, "%d: %v\n", next, m)
		}
		next++
		return nil
	})
	if err != nil || next != n || got.Len() > 0 {
		t.Errorf("%d: %v\n%s", next, err, got.String())
	}
	if hit := p.Heal(); hit != 2 {
		t.Errorf("%d faults", hit)
	}
}

// What a request goes on reading after it failed is not the data of the next: kopia gives its memory to somebody else.
func TestBodyEnds(t *testing.T) {
	text := strings.Repeat("x", 1<<20)
	in := &body{from: io.NopCloser(strings.NewReader(text))}
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			p := make([]byte, 64)
			for {
				if n, err := in.Read(p); err != nil {
					if n != 0 {
						t.Errorf("%d bytes with %v", n, err)
					}
					return
				}
			}
		})
	}
	in.end()
	if n, err := in.Read(make([]byte, 64)); n != 0 || !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("%d bytes after the end, %v", n, err)
	}
	readers.Wait()
}
