package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/s3"
)

// proxied is a bucket behind a proxy, with patience for so long.
func proxied(t *testing.T, kind s3.Kind, patience time.Duration) (*s3.Proxy, Location) {
	t.Helper()
	s := stores.Get(t, kind)
	p := s3.NewProxy(t, s)
	return p, bucketIn(t, s).with(func(l *S3) { l.Endpoint, l.Region, l.Patience = p.URL, s.Region, patience })
}

// What passes is waited for, whatever it is.
func TestPatience(t *testing.T) {
	p, at := proxied(t, s3.Versity, 20*time.Second)
	data := noise(1 << 20)
	try := func(b *bucket) error {
		if err := b.PutBlob(t.Context(), "x", slice(data), blob.PutOptions{}); err != nil {
			return err
		}
		if err := same(t.Context(), b, "x", 0, -1, data); err != nil {
			return err
		}
		if _, err := b.GetMetadata(t.Context(), "x"); err != nil {
			return err
		}
		if all, err := blob.ListAllBlobs(t.Context(), b, ""); err != nil || len(all) != 1 {
			return fmt.Errorf("listed %v: %w", all, err)
		}
		return b.DeleteBlob(t.Context(), "x")
	}
	for name, f := range map[string]s3.Fault{
		"500": {Status: 500}, "502": {Status: 502}, "503": {Status: 503}, "429": {Status: 429, Code: "TooManyRequests"},
		"cut answer": {CutAnswer: 100}, "cut request": {CutRequest: true}, "late": {Wait: 100 * time.Millisecond}, "slow": {Rate: 4 << 20},
		"flipped on the way up": {FlipUpload: true}, "hangs": {Hang: true},
	} {
		t.Run(name, func(t *testing.T) {
			patience, times := 20*time.Second, 2
			if f.Hang {
				patience, times = 3*time.Second, 1 // a hanging connection is broken after a fifth of it
			}
			for _, method := range []string{"PUT", "GET", "HEAD", "DELETE"} {
				p.Break(s3.Rule{Method: method, Times: times, Fault: f})
			}
			if err := try(mustBucket(t, at.with(func(s *S3) { s.Patience = patience }))); err != nil {
				t.Error(err)
			}
			if p.Heal() < 4 {
				t.Error("the faults did not happen")
			}
		})
	}

	done := make(chan error, 1)
	p.Down()
	go func() { done <- try(mustBucket(t, at)) }()
	select {
	case err := <-done:
		t.Errorf("with nobody there: %v", err)
	case <-time.After(4 * time.Second): // of 20, as a minute of five
	}
	p.Up(t)
	if err := <-done; err != nil {
		t.Errorf("after it vanished: %v", err)
	}
}

// What does not pass is not waited for; what lasts too long ends, with its kind.
func TestImpatience(t *testing.T) {
	p, at := proxied(t, s3.Versity, 2*time.Second)
	b := mustBucket(t, at)
	put := func(ctx context.Context) error { return b.PutBlob(ctx, "x", slice("x"), blob.PutOptions{}) }
	for name, c := range map[string]struct {
		fault s3.Fault
		want  fault.Kind
		tries int
		words string
	}{
		"denied":         {s3.Fault{Status: 403, Code: "AccessDenied"}, fault.Invalid, 1, "must be allowed to"},
		"quota":          {s3.Fault{Status: 403, Code: "QuotaExceeded"}, fault.Exhausted, 1, "raise the quota"},
		"full":           {s3.Fault{Status: 507}, fault.Exhausted, 1, "make room"},
		"skewed":         {s3.Fault{Status: 403, Code: "RequestTimeTooSkewed"}, fault.Invalid, 1, "clock"},
		"expired token":  {s3.Fault{Status: 400, Code: "ExpiredToken"}, fault.Invalid, 1, "temporary credentials"},
		"no bucket":      {s3.Fault{Status: 404, Code: "NoSuchBucket"}, fault.NotFound, 1, "make the bucket"},
		"unknown":        {s3.Fault{Status: 501, Code: "NotImplemented"}, fault.Unsupported, 1, "NotImplemented"},
		"always flipped": {s3.Fault{FlipUpload: true}, fault.Corrupt, spoiltTries, "changed on their way"},
	} {
		t.Run(name, func(t *testing.T) {
			p.Break(s3.Rule{Method: "PUT", Fault: c.fault})
			err := put(t.Context())
			if hit := p.Heal(); fault.KindOf(err) != c.want || hit != c.tries || !strings.Contains(err.Error(), c.words) {
				t.Errorf("tried %d times, %v (%s)", hit, err, fault.KindOf(err))
			}
		})
	}
	for name, f := range map[string]s3.Fault{"500": {Status: 500}, "hangs": {Hang: true}, "cut": {CutRequest: true}} {
		p.Break(s3.Rule{Method: "PUT", Fault: f})
		began := time.Now()
		if err := put(t.Context()); fault.KindOf(err) != fault.Unavailable || time.Since(began) > 10*time.Second {
			t.Errorf("%s for ever: after %v %v (%s)", name, time.Since(began), err, fault.KindOf(err))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		began = time.Now()
		if err := put(ctx); fault.KindOf(err) != fault.Unavailable || time.Since(began) > time.Second {
			t.Errorf("%s until the deadline: after %v %v (%s)", name, time.Since(began), err, fault.KindOf(err))
		}
		cancel()
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, cancel)
		began = time.Now()
		if err := put(ctx); !errors.Is(err, context.Canceled) || time.Since(began) > time.Second {
			t.Errorf("%s until it is cancelled: after %v %v", name, time.Since(began), err)
		}
		p.Heal()
	}
}

// An outage is told of, once a call, and without a secret.
func TestOutageIsTold(t *testing.T) {
	p, at := proxied(t, s3.Versity, 3*time.Second)
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(before)
	p.Break(s3.Rule{Fault: s3.Fault{Status: 503}})
	err := mustBucket(t, at).PutBlob(t.Context(), "x", slice("x"), blob.PutOptions{})
	if fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "tried for") {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "does not answer"); n != 1 {
		t.Errorf("told %d times: %s", n, log.String())
	}
	if all := log.String() + err.Error(); strings.Contains(all, at.S3.SecretKey.Reveal()) || strings.Contains(all, at.S3.AccessKey.Reveal()) {
		t.Errorf("a secret shows: %s", all)
	}
}

// The kinds of what stores say, as far as it can be said without one.
func TestAnswers(t *testing.T) {
	for _, c := range []struct {
		code   string
		status int
		want   fault.Kind
	}{
		{"AccessDenied", 403, fault.Invalid}, {"InvalidAccessKeyId", 403, fault.Invalid}, {"SignatureDoesNotMatch", 403, fault.Invalid},
		{"InvalidToken", 400, fault.Invalid}, {"PermanentRedirect", 301, fault.Invalid}, {"400 Bad Request", 400, fault.Invalid},
		{"RequestTimeTooSkewed", 403, fault.Invalid}, {"NoSuchBucket", 404, fault.NotFound}, {"404 Not Found", 404, fault.NotFound},
		{"QuotaExceeded", 403, fault.Exhausted}, {"XMinioStorageFull", 507, fault.Exhausted}, {"507 Insufficient Storage", 507, fault.Exhausted},
		{"SlowDown", 503, fault.Unavailable}, {"SlowDown", 429, fault.Unavailable}, {"InternalError", 500, fault.Unavailable},
		{"504 Gateway Timeout", 504, fault.Unavailable}, {"RequestTimeout", 400, fault.Unavailable}, {"", 200, fault.Unavailable},
		{"BadDigest", 400, fault.Corrupt}, {"XAmzContentSHA256Mismatch", 400, fault.Corrupt}, {"NotImplemented", 501, fault.Unsupported},
	} {
		err := storeFault(minio.ErrorResponse{Code: c.code, StatusCode: c.status, Message: "words"})
		if fault.KindOf(err) != c.want || !strings.Contains(err.Error(), "words") {
			t.Errorf("%s, HTTP %d: %v (%s), want %s", c.code, c.status, err, fault.KindOf(err), c.want)
		}
	}
	for code, want := range map[string]error{"NoSuchKey": blob.ErrBlobNotFound, "NoSuchVersion": blob.ErrBlobNotFound, "InvalidRange": blob.ErrInvalidRange} {
		if err := storeFault(minio.ErrorResponse{Code: code, StatusCode: 404}); !errors.Is(err, want) || fault.KindOf(err) != fault.Internal {
			t.Errorf("%s: %v", code, err)
		}
	}
}
