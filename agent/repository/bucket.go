package repository

import (
	"cmp"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// A bucket holds a repository's blobs as objects, exactly as kopia's own "s3" storage names them, so that kopia reads
// and writes the same bucket. It differs in how it speaks to the store:
//
//   - An upload bears its SHA-256, in the signature and as a checksum, so that every store refuses other bytes than ours.
//     Kopia sends an MD5, which takes twice the processor time.
//   - It waits for a store that is out of reach, minutes and not seconds, and lets go of a connection that stands still.
//   - A missing bucket, wrong credentials or a wrong clock are told apart and said; kopia takes any 404 for a missing
//     blob, which makes an empty repository of a missing bucket.
//   - Connections are kept for all workers. Kopia keeps two, and with TLS every other read pays for a new one.
//   - Where the bucket is named, in the path or in the host's name, can be chosen.

// bucketType is the word for a bucket in kopia's connection information.
const bucketType = "stillpoint-s3"

// bucketOptions is the connection information, with the secrets as they are: its JSON is only ever in memory.
type bucketOptions struct {
	Endpoint, Bucket, Prefix, Region   string
	Lookup                             Lookup
	CA                                 []byte
	AccessKey, SecretKey, SessionToken string
	CacheDir                           string // of this repository, empty for none
	CacheSize                          int64
	Patience                           time.Duration
	Skew                               time.Duration // of the medium's clock: see Skewed
}

func (s *S3) options(repository string, cached bool) *bucketOptions {
	o := &bucketOptions{
		Endpoint: s.Endpoint, Bucket: s.Bucket, Prefix: s.Prefix, Region: s.Region, Lookup: s.Lookup, CA: s.CA,
		AccessKey: s.AccessKey.Reveal(), SecretKey: s.SecretKey.Reveal(), SessionToken: s.SessionToken.Reveal(), Patience: s.Patience,
	}
	if s.Cache != "" && cached {
		o.CacheDir, o.CacheSize = filepath.Join(s.Cache, repository), cmp.Or(s.CacheSize, DefaultCacheSize)
	}
	return o
}

// registerBucket makes the storage known to kopia, whose own way to open a repository looks it up by its word.
var registerBucket = sync.OnceFunc(func() {
	blob.AddSupportedStorage(bucketType, bucketOptions{}, func(ctx context.Context, o *bucketOptions, _ bool) (blob.Storage, error) {
		b, err := openBucket(&S3{
			Endpoint: o.Endpoint, Bucket: o.Bucket, Prefix: o.Prefix, Region: o.Region, Lookup: o.Lookup, CA: o.CA,
			AccessKey: adapters.NewSecret(o.AccessKey), SecretKey: adapters.NewSecret(o.SecretKey), SessionToken: adapters.NewSecret(o.SessionToken),
			Patience: o.Patience,
		})
		if err == nil && o.Skew != 0 {
			return &ahead{Storage: b, skew: o.Skew}, nil
		}
		if err != nil || o.CacheDir == "" {
			return b, err
		}
		return withCache(ctx, b, o.CacheDir, o.CacheSize), nil
	})
})

type bucket struct {
	blob.DefaultProviderImplementation
	at        *S3
	prefix    string
	core      minio.Core
	transport *http.Transport
	patience  patience
}

func openBucket(at *S3) (*bucket, error) {
	host, secure, err := at.address()
	if err != nil {
		return nil, err
	}
	patience := newPatience(cmp.Or(at.Patience, DefaultPatience))
	dialer := &net.Dialer{Timeout: patience.stall, KeepAlive: 30 * time.Second}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &movingConn{c, patience.stall}, nil
		},
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout: patience.stall,
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     patience.stall * 3 / 4,
		WriteBufferSize:     256 << 10,
		ReadBufferSize:      64 << 10,
		DisableCompression:  true,
	}
	if len(at.CA) > 0 {
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(at.CA)
	}
	client, err := minio.New(host, &minio.Options{
		Creds:        credentials.NewStaticV4(at.AccessKey.Reveal(), at.SecretKey.Reveal(), at.SessionToken.Reveal()),
		Secure:       secure,
		Transport:    &observer{transport},
		Region:       at.Region,
		BucketLookup: map[Lookup]minio.BucketLookupType{LookupAuto: minio.BucketLookupAuto, LookupPath: minio.BucketLookupPath, LookupHost: minio.BucketLookupDNS}[at.Lookup],
		MaxRetries:   1, // patience is ours
	})
	if err != nil {
		return nil, fault.Errorf(fault.Invalid, "%s: %w", at, err)
	}
	client.SetAppInfo("stillpoint", "1")
	return &bucket{at: at, prefix: at.prefix(), core: minio.Core{Client: client}, transport: transport, patience: patience}, nil
}

// impatient is the same bucket with a part of the patience, for calls that a mistyped address should not keep for minutes.
func (b *bucket) impatient(part time.Duration) *bucket {
	quick := *b
	quick.patience.longest /= part
	return &quick
}

func (b *bucket) key(id blob.ID) string { return b.prefix + string(id) }

func (b *bucket) GetBlob(ctx context.Context, id blob.ID, offset, length int64, output blob.OutputBuffer) error {
	_, err := b.get(ctx, id, offset, length, output)
	return err
}

// get reads a blob or a part of it. verified says that it is known to be what was uploaded: a whole blob that has the
// checksum which the store keeps of it. A blob of another checksum is read again, and is Corrupt if that does not help.
func (b *bucket) get(ctx context.Context, id blob.ID, offset, length int64, output blob.OutputBuffer) (verified bool, err error) {
	if offset < 0 {
		return false, fmt.Errorf("reading %s: %w", id, blob.ErrInvalidRange)
	}
	err = b.again(ctx, "reading "+string(id), func(ctx context.Context) error {
		output.Reset()
		o := minio.GetObjectOptions{Checksum: length < 0}
		switch {
		case length == 0: // no range says that
			_, err := b.core.StatObject(ctx, b.at.Bucket, b.key(id), o)
			return err
		case length > 0:
			if err := o.SetRange(offset, offset+length-1); err != nil {
				return blob.ErrInvalidRange
			}
		}
		body, info, _, err := b.core.GetObject(ctx, b.at.Bucket, b.key(id), o)
		if err != nil {
			return err
		}
		defer body.Close()
		to, right := io.Writer(onlyWriter{output}), func() bool { return false }
		switch {
		case length >= 0:
		case info.ChecksumSHA256 != "":
			sum := sha256.New()
			to, right = io.MultiWriter(to, sum), func() bool { return base64.StdEncoding.EncodeToString(sum.Sum(nil)) == info.ChecksumSHA256 }
		default: // an ETag may be the MD5, or anything
			sum := md5.New()
			to, right = io.MultiWriter(to, sum), func() bool { return hex.EncodeToString(sum.Sum(nil)) == info.ETag }
		}
		p := buffers.Get().(*buffer)
		defer buffers.Put(p)
		if _, err := io.CopyBuffer(to, body, p[:]); err != nil {
			return err
		}
		if verified = right(); !verified && length < 0 && info.ChecksumSHA256 != "" {
			return fault.Errorf(fault.Corrupt, "other bytes come from the store than it keeps, by its own checksum: look at proxies, network cards and memory on the way")
		}
		return blob.EnsureLengthExactly(output.Length(), length)
	})
	return verified, err
}

// onlyWriter hides what else a writer can do, so that the buffer given is the buffer used.
type onlyWriter struct{ io.Writer }

func (b *bucket) GetMetadata(ctx context.Context, id blob.ID) (m blob.Metadata, err error) {
	err = b.again(ctx, "looking for "+string(id), func(ctx context.Context) error {
		info, err := b.core.StatObject(ctx, b.at.Bucket, b.key(id), minio.StatObjectOptions{})
		m = blob.Metadata{BlobID: id, Length: info.Size, Timestamp: info.LastModified}
		return err
	})
	return m, err
}

func (b *bucket) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, o blob.PutOptions) error {
	switch {
	case o.DoNotRecreate:
		return blob.ErrUnsupportedPutBlobOption
	case !o.SetModTime.IsZero():
		return blob.ErrSetTimeUnsupported
	}
	put, sum, err := upload(data)
	if err != nil {
		return err
	}
	if o.RetentionPeriod != 0 {
		put.Mode, put.RetainUntilDate = minio.RetentionMode(o.RetentionMode), time.Now().Add(o.RetentionPeriod).UTC()
	}
	err = b.again(ctx, "writing "+string(id), func(ctx context.Context) error {
		in := &body{from: data.Reader()}
		defer in.end()
		_, err := b.core.PutObject(ctx, b.at.Bucket, b.key(id), in, int64(data.Length()), "", hex.EncodeToString(sum), put)
		return err
	})
	if err == nil && o.GetModTime != nil {
		var m blob.Metadata
		m, err = b.GetMetadata(ctx, id)
		*o.GetModTime = m.Timestamp
	}
	return err
}

// body is what a request sends. A request that failed may go on reading in the background for a while, when the data has
// long gone to the next: from the end on there is nothing to read.
type body struct {
	mu   sync.Mutex
	from io.ReadCloser // nil: ended
}

func (r *body) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.from == nil {
		return 0, io.ErrClosedPipe
	}
	return r.from.Read(p)
}

// end waits for a Read that is under way.
func (r *body) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.from.Close()
	r.from = nil
}

// upload says how data is uploaded: with its SHA-256, which signs it and which the store checks and keeps. A store with
// object lock demands a checksum.
func upload(data io.WriterTo) (minio.PutObjectOptions, []byte, error) {
	h := sha256.New()
	if _, err := data.WriteTo(h); err != nil {
		return minio.PutObjectOptions{}, nil, err
	}
	sum := h.Sum(nil)
	return minio.PutObjectOptions{
		ContentType:          "application/x-kopia",
		DisableContentSha256: true, // that is, do not sign it in pieces
		UserMetadata:         map[string]string{"x-amz-checksum-sha256": base64.StdEncoding.EncodeToString(sum)},
	}, sum, nil
}

func (b *bucket) DeleteBlob(ctx context.Context, id blob.ID) error {
	err := b.again(ctx, "deleting "+string(id), func(ctx context.Context) error {
		return b.core.RemoveObject(ctx, b.at.Bucket, b.key(id), minio.RemoveObjectOptions{})
	})
	if errors.Is(err, blob.ErrBlobNotFound) {
		return nil
	}
	return err
}

// ExtendBlobRetention is for maintenance, which goes through a list: what somebody deleted meanwhile need not be retained.
func (b *bucket) ExtendBlobRetention(ctx context.Context, id blob.ID, o blob.ExtendOptions) error {
	mode, until := minio.RetentionMode(o.RetentionMode), time.Now().Add(o.RetentionPeriod).UTC()
	err := b.again(ctx, "retaining "+string(id), func(ctx context.Context) error {
		return b.core.PutObjectRetention(ctx, b.at.Bucket, b.key(id), minio.PutObjectRetentionOptions{Mode: &mode, RetainUntilDate: &until})
	})
	if err == nil {
		return nil
	}
	if _, lost := b.GetMetadata(ctx, id); errors.Is(lost, blob.ErrBlobNotFound) {
		return nil
	}
	return err
}

// ListBlobs goes on after an outage where it was.
func (b *bucket) ListBlobs(ctx context.Context, prefix blob.ID, callback func(blob.Metadata) error) error {
	last, stopped := "", error(nil)
	err := b.again(ctx, "listing", func(ctx context.Context) error {
		for o := range b.core.ListObjectsIter(ctx, b.at.Bucket, minio.ListObjectsOptions{Prefix: b.key(prefix), StartAfter: last}) {
			if o.Err != nil {
				return o.Err
			}
			id := strings.TrimPrefix(o.Key, b.prefix)
			if strings.Contains(id, "/") {
				continue // a folder below, perhaps with another repository
			}
			if stopped = callback(blob.Metadata{BlobID: blob.ID(id), Length: o.Size, Timestamp: o.LastModified}); stopped != nil {
				return nil
			}
			last = o.Key
		}
		return ctx.Err()
	})
	if stopped != nil {
		return stopped
	}
	return gaveUp(ctx, err)
}

// ConnectionInfo says which bucket it is and leaves out who we are there.
func (b *bucket) ConnectionInfo() blob.ConnectionInfo {
	return blob.ConnectionInfo{Type: bucketType, Config: &bucketOptions{Endpoint: b.at.Endpoint, Bucket: b.at.Bucket, Prefix: b.at.Prefix}}
}

func (b *bucket) DisplayName() string { return b.at.String() }

func (b *bucket) Close(context.Context) error {
	b.transport.CloseIdleConnections()
	return nil
}

// movingConn is a connection that breaks when no byte has moved on it for a while.
type movingConn struct {
	net.Conn
	stall time.Duration
}

func (c *movingConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.stall)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// Write also puts off the end of a Read that waits for the answer meanwhile.
func (c *movingConn) Write(p []byte) (int, error) {
	if err := c.SetDeadline(time.Now().Add(c.stall)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}
