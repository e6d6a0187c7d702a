package repository

import (
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/minio/minio-go/v7/pkg/s3utils"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// S3 names a bucket of an S3 store, and who we are there.
type S3 struct {
	// Endpoint is the store's address: host, host:port, or a URL without a path. Without http:// before it, it is spoken to
	// with TLS.
	Endpoint string
	Bucket   string // exists already
	// Prefix is what the names of all our objects begin with, a folder so to say: a / is added at its end if it has none.
	// Repositories with different prefixes share a bucket without noticing each other.
	Prefix string
	Region string // that requests are signed for; empty: the store is asked for the bucket's
	Lookup Lookup
	CA     []byte // certificates in PEM of the authorities to trust, instead of the system's; empty: the system's

	AccessKey    adapters.Secret
	SecretKey    adapters.Secret
	SessionToken adapters.Secret // of temporary credentials only

	// Cache is a folder for copies of the repository's indexes, empty for none. Data is never cached. Repositories may
	// share the folder: each has one of its own in it, by its id.
	Cache     string
	CacheSize int64 // bytes that the copies of one repository may take, DefaultCacheSize if 0

	// Patience is how long a call goes on trying while the store is out of reach or overloaded, DefaultPatience if 0; a fifth
	// of it when a repository is opened, a sixtieth when one is made. All waits in between are in proportion to it.
	Patience time.Duration
}

// Lookup is where requests name the bucket.
type Lookup int

const (
	// LookupAuto is what the store is known to want: the host's name for Amazon, Google and Aliyun, the path for others.
	LookupAuto Lookup = iota
	LookupPath        // https://host/bucket/object, "path style"
	LookupHost        // https://bucket.host/object, "virtual-hosted style"
)

const (
	DefaultPatience  = 5 * time.Minute
	DefaultCacheSize = 1 << 30 // bytes
)

// String returns s3://BUCKET/PREFIX at ENDPOINT, without any secret.
func (s *S3) String() string {
	return fmt.Sprintf("s3://%s/%s at %s", s.Bucket, s.prefix(), s.Endpoint)
}

// GoString keeps the type out of %#v.
func (s *S3) GoString() string { return s.String() }

func (s *S3) prefix() string {
	if s.Prefix == "" || strings.HasSuffix(s.Prefix, "/") {
		return s.Prefix
	}
	return s.Prefix + "/"
}

// address is the store's host with its port if it has one, and whether it is spoken to with TLS.
func (s *S3) address() (host string, secure bool, err error) {
	bad := func(format string, args ...any) (string, bool, error) {
		return "", false, fault.Errorf(fault.Invalid, "S3 endpoint %q: "+format, append([]any{s.Endpoint}, args...)...)
	}
	if s.Endpoint == "" {
		return "", false, fault.Errorf(fault.Invalid, "bucket %q has no endpoint: name the store's host, for Amazon s3.amazonaws.com", s.Bucket)
	}
	text := s.Endpoint
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	switch {
	case err != nil: // its text repeats the URL, which may hold what should not be there
		return bad("not a host, a host:port or a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("the scheme is http or https")
	case u.User != nil:
		return "", false, fault.Errorf(fault.Invalid, "S3 endpoint %q: credentials do not belong into it; give them as keys", u.Host)
	case u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return bad("a host with nothing behind it is wanted; the bucket and the prefix are named apart")
	}
	return u.Host, u.Scheme == "https", nil
}

// check finds what is wrong without asking the store.
func (s *S3) check() error {
	host, secure, err := s.address()
	if err != nil {
		return err
	}
	bad := func(format string, args ...any) error {
		return fault.Errorf(fault.Invalid, "%s: "+format, append([]any{s}, args...)...)
	}
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = strings.Trim(host, "[]")
	}
	switch {
	case s.Bucket == "":
		return fault.Errorf(fault.Invalid, "S3 endpoint %s: the bucket is not named", s.Endpoint)
	case s3utils.CheckValidBucketName(s.Bucket) != nil:
		return bad("%q cannot be a bucket's name: it has 3 to 63 of [a-z0-9.-] (and capitals and _ in old ones)", s.Bucket)
	case strings.HasPrefix(s.Prefix, "/") || strings.Contains(s.Prefix, "//"):
		return bad("a prefix does not begin with a / and has no empty part")
	case s.AccessKey.Reveal() == "" || s.SecretKey.Reveal() == "":
		return bad("it needs credentials, an access key and a secret key")
	case s.Lookup == LookupHost && net.ParseIP(name) != nil:
		return bad("a bucket cannot be part of the host's name when that is an address; use path style")
	case s.Lookup == LookupHost && secure && strings.Contains(s.Bucket, "."):
		return bad("no certificate is valid for a host's name with this bucket's dots in it; use path style")
	case len(s.CA) > 0 && !secure:
		return bad("there is no certificate to be checked against the CA without TLS; drop http:// or the CA")
	case len(s.CA) > 0 && !x509.NewCertPool().AppendCertsFromPEM(s.CA):
		return bad("the CA is no certificate in PEM")
	case s.Cache != "" && !filepath.IsAbs(s.Cache):
		return bad("the cache %q must be an absolute path", s.Cache)
	case s.CacheSize < 0 || s.Patience < 0:
		return bad("the size of the cache and the patience cannot be negative")
	}
	return nil
}
