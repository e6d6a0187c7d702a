package s3

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// through is a client that goes through the proxy and never tries again.
func through(t *testing.T, p *Proxy, s *Store) *minio.Client {
	t.Helper()
	c, err := minio.New(strings.TrimPrefix(p.URL, "http://"), &minio.Options{Creds: credentials.NewStaticV4(s.AccessKey, s.SecretKey, ""), Region: s.Region, MaxRetries: 1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// What a proxy passes on is what the store gets and gives; and each fault is what its name says.
func TestProxy(t *testing.T) {
	s := stores.Get(t, Versity)
	p := NewProxy(t, s)
	c, bucket := through(t, p, s), s.Bucket(t)
	data := bytes.Repeat([]byte("0123456789abcdef"), 10000)
	put := func(ctx context.Context) error {
		_, err := c.PutObject(ctx, bucket, "x", bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
		return err
	}
	get := func(ctx context.Context) ([]byte, error) {
		o, err := c.GetObject(ctx, bucket, "x", minio.GetObjectOptions{})
		if err != nil {
			return nil, err
		}
		defer o.Close()
		return io.ReadAll(o)
	}
	whole := func(t *testing.T) {
		t.Helper()
		if got, err := get(t.Context()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	if err := put(t.Context()); err != nil {
		t.Fatal(err)
	}
	whole(t)
	code := func(err error) string { return minio.ToErrorResponse(err).Code }

	for name, c := range map[string]struct {
		rule Rule
		try  func(ctx context.Context) error
		want func(err error) bool
	}{
		"status": {Rule{Fault: Fault{Status: 503}}, put, func(err error) bool { return code(err) == "SlowDown" }},
		"code":   {Rule{Method: "PUT", Fault: Fault{Status: 403, Code: "QuotaExceeded"}}, put, func(err error) bool { return code(err) == "QuotaExceeded" }},
		"hang":   {Rule{Fault: Fault{Hang: true}}, put, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
		"cut answer": {Rule{Method: "GET", Fault: Fault{CutAnswer: 1000}}, func(ctx context.Context) error { _, err := get(ctx); return err },
			func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		"cut request": {Rule{Method: "PUT", Fault: Fault{CutRequest: true}}, put, func(err error) bool { return err != nil && code(err) == "" }},
		"flip upload": {Rule{Method: "PUT", Fault: Fault{FlipUpload: true}}, put, func(err error) bool { return err != nil && code(err) != "" }},
		"flip answer": {Rule{Method: "GET", Fault: Fault{FlipAnswer: true}}, func(ctx context.Context) error {
			got, err := get(ctx)
			if err == nil && len(got) == len(data) && !bytes.Equal(got, data) {
				err = errFlipped
			}
			return err
		}, func(err error) bool { return errors.Is(err, errFlipped) }},
		"clock": {Rule{Fault: Fault{Clock: time.Hour}}, func(ctx context.Context) error {
			info, err := c.StatObject(ctx, bucket, "x", minio.StatObjectOptions{})
			if err == nil && time.Until(info.LastModified) > 30*time.Minute {
				err = errFlipped
			}
			return err
		}, func(err error) bool { return errors.Is(err, errFlipped) }},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			p.Break(c.rule)
			if err := c.try(ctx); !c.want(err) {
				t.Errorf("%v (%s)", err, code(err))
			}
			if n := p.Heal(); n == 0 {
				t.Error("the rule was not applied")
			}
			whole(t) // and the store still has what it had
		})
	}

	p.Break(Rule{Method: "GET", Skip: 1, Times: 1, Fault: Fault{Status: 500}})
	whole(t)
	if _, err := get(t.Context()); code(err) != "InternalError" {
		t.Errorf("the second: %v", err)
	}
	whole(t)
	p.Heal()

	p.Break(Rule{Method: "GET", Fault: Fault{Rate: int64(len(data)) * 5}})
	began := time.Now()
	whole(t)
	if took := time.Since(began); took < 150*time.Millisecond {
		t.Errorf("slow, and yet %v", took)
	}
	p.Heal()

	p.Down()
	put(t.Context()) // perhaps on a connection that was there
	if err := put(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("down: %v", err)
	}
	p.Up(t)
	whole(t)
}

var errFlipped = errors.New("flipped")

// Every kind of store starts, keeps what it is given, and is gone after Close, with its files.
func TestStores(t *testing.T) {
	for _, kind := range []Kind{Versity, VersityTLS, Ceph} {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			if again := stores.Get(t, kind); again != s {
				t.Error("started twice")
			}
			bucket := s.Bucket(t)
			if _, err := s.client.PutObject(t.Context(), bucket, "a/b", strings.NewReader("x"), 1, minio.PutObjectOptions{}); err != nil {
				t.Fatal(err)
			}
			if got := s.Objects(t, bucket, "a/"); len(got) != 1 || got[0] != "a/b" {
				t.Error(got)
			}
			if got := s.Objects(t, s.LockedBucket(t), ""); len(got) != 0 {
				t.Error(got)
			}
		})
	}
	s, err := Start(Versity)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.Folder); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	if _, err := net.DialTimeout("tcp", strings.TrimPrefix(s.Endpoint, "http://"), time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("still there: %v", err)
	}
}
