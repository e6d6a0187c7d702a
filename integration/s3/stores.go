// Package s3 gives tests real S3 stores on the loopback device, and a proxy that makes them fail in the ways stores and
// networks fail.
//
// The stores are versitygw, built once from the tools module in integration/versitygw, and Ceph's gateway. A test
// program has one Stores, whose stores are started when the first test asks for them.
package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"stillpoint.io/stillpoint/integration/ceph"
	"stillpoint.io/stillpoint/integration/peer"
)

// Kind is what a store is.
type Kind string

const (
	Versity    Kind = "versitygw"     // on a folder, with object versions
	VersityTLS Kind = "versitygw-tls" // the same with TLS, its certificate signed by a CA of its own
	Ceph       Kind = "ceph"          // Ceph's gateway
)

// Kinds are the stores that most tests run against.
var Kinds = []Kind{Versity, Ceph}

// Store is a running S3 store.
type Store struct {
	Kind                 Kind
	Endpoint             string // a URL
	AccessKey, SecretKey string
	Region               string
	CA                   []byte        // the certificate to trust, in PEM, of one with TLS
	Folder               string        // where versitygw keeps buckets, as folders
	Cluster              *ceph.Cluster // behind Ceph's gateway

	client *minio.Client
	close  func() error
}

// Stores are the stores of a test program. The zero value is ready. Close it at the program's end.
type Stores struct {
	mu      sync.Mutex
	running map[Kind]*starting
}

type starting struct {
	once  sync.Once
	store *Store
	err   error
}

// Get gives a store, started if it is the first time. Under -short the test is left out; otherwise a store that does not
// start fails it.
func (s *Stores) Get(t testing.TB, kind Kind) *Store {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real S3 store: left out by -short, `make test` runs it")
	}
	s.mu.Lock()
	if s.running == nil {
		s.running = map[Kind]*starting{}
	}
	r := s.running[kind]
	if r == nil {
		r = new(starting)
		s.running[kind] = r
	}
	s.mu.Unlock()
	r.once.Do(func() { r.store, r.err = Start(kind) })
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.store
}

// Close stops all stores and removes what was in them.
func (s *Stores) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, r := range s.running {
		if r.store != nil {
			errs = append(errs, r.store.Close())
		}
	}
	return errors.Join(errs...)
}

// Start starts a store until it answers. Close it.
func Start(kind Kind) (*Store, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // versitygw may have to be built
	defer cancel()
	var s *Store
	var err error
	if kind == Ceph {
		s, err = startCeph(ctx)
	} else {
		s, err = startVersity(ctx, kind)
	}
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", kind, err)
	}
	for { // it listens at once and answers soon
		if _, err = s.client.ListBuckets(ctx); err == nil {
			return s, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s does not answer: %w", kind, err), s.Close())
		}
	}
}

func startCeph(ctx context.Context) (*Store, error) {
	c, err := ceph.Start(ctx, ceph.Options{S3: true})
	if err != nil {
		return nil, err
	}
	s, err := OfCluster(c)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	s.close = c.Close
	return s, nil
}

// OfCluster is the gateway of a cluster that runs already, with which it goes.
func OfCluster(c *ceph.Cluster) (*Store, error) {
	s := &Store{Kind: Ceph, Endpoint: c.S3Endpoint, AccessKey: c.AccessKey, SecretKey: c.SecretKey, Region: "default", Cluster: c, close: func() error { return nil }}
	return s, s.connect(http.DefaultTransport)
}

func startVersity(ctx context.Context, kind Kind) (*Store, error) {
	module, err := peer.Folder("integration", "versitygw")
	if err != nil {
		return nil, err
	}
	// The go command builds it and keeps it in its cache, by content.
	binary, err := exec.CommandContext(ctx, "go", "-C", module, "tool", "-n", "versitygw").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("building versitygw: %w: %s", err, binary)
	}
	dir, err := os.MkdirTemp("", "versitygw-")
	if err != nil {
		return nil, err
	}
	s := &Store{Kind: kind, AccessKey: "TESTACCESSKEY0000002", SecretKey: "testsecretkey0000000000000000000000000002", Region: "north-1", Folder: filepath.Join(dir, "data")}
	for _, sub := range []string{s.Folder, filepath.Join(dir, "versions")} {
		if err := os.Mkdir(sub, 0o700); err != nil {
			return nil, err
		}
	}
	var transport http.RoundTripper = http.DefaultTransport
	scheme, extra := "http", []string(nil)
	if kind == VersityTLS {
		cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
		if s.CA, transport, err = certify(cert, key); err != nil {
			return nil, err
		}
		scheme, extra = "https", []string{"--cert", cert, "--key", key}
	}
	port, err := peer.Ports(1)
	if err != nil {
		return nil, err
	}
	s.Endpoint = fmt.Sprintf("%s://127.0.0.1:%d", scheme, port)
	command := append([]string{strings.TrimSpace(string(binary)), "--port", fmt.Sprintf("127.0.0.1:%d", port), "--region", s.Region, "--virtual-domain", "s3.test",
		"--keep-alive", "--quiet"}, extra...)
	guard, err := peer.Serve(dir, []string{"ROOT_ACCESS_KEY=" + s.AccessKey, "ROOT_SECRET_KEY=" + s.SecretKey},
		append(command, "posix", "--versioning-dir", filepath.Join(dir, "versions"), s.Folder)...)
	if err != nil {
		return nil, err
	}
	s.close = guard.Close
	return s, s.connect(transport)
}

// connect makes the client that the harness itself uses.
func (s *Store) connect(transport http.RoundTripper) (err error) {
	scheme, host, _ := strings.Cut(s.Endpoint, "://")
	s.client, err = minio.New(host, &minio.Options{Creds: credentials.NewStaticV4(s.AccessKey, s.SecretKey, ""), Secure: scheme == "https", Transport: transport, Region: s.Region, MaxRetries: 1})
	if err != nil {
		return errors.Join(err, s.Close())
	}
	return nil
}

// Close stops the store and removes everything in it.
func (s *Store) Close() error { return s.close() }

// Bucket makes an empty bucket with a new name.
func (s *Store) Bucket(t testing.TB) string { return s.bucket(t, false) }

// LockedBucket makes one with object lock.
func (s *Store) LockedBucket(t testing.TB) string { return s.bucket(t, true) }

func (s *Store) bucket(t testing.TB, lock bool) string {
	t.Helper()
	name := fmt.Sprintf("test-%d", time.Now().UnixNano())
	if err := s.client.MakeBucket(t.Context(), name, minio.MakeBucketOptions{ObjectLocking: lock}); err != nil {
		t.Fatalf("making a bucket in %s: %v", s.Kind, err)
	}
	return name
}

// Put writes an object.
func (s *Store) Put(t testing.TB, bucket, object string, content []byte) {
	t.Helper()
	if _, err := s.client.PutObject(t.Context(), bucket, object, bytes.NewReader(content), int64(len(content)), minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
}

// Objects lists the names of all objects of a bucket that begin with a prefix.
func (s *Store) Objects(t testing.TB, bucket, prefix string) []string {
	t.Helper()
	var names []string
	for o := range s.client.ListObjectsIter(t.Context(), bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		names = append(names, o.Key)
	}
	return names
}

// Retained is until when the newest version of an object is locked, zero if it is not.
func (s *Store) Retained(t testing.TB, bucket, object string) time.Time {
	t.Helper()
	info, err := s.client.StatObject(t.Context(), bucket, object, minio.StatObjectOptions{})
	if err != nil {
		t.Fatalf("%s: %v", object, err)
	}
	text := info.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date")
	if text == "" {
		return time.Time{}
	}
	until, err := time.Parse(time.RFC3339, text)
	if err != nil {
		t.Fatalf("%s: %v", object, err)
	}
	return until
}
