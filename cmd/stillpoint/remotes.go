package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// remoteConfig is one remote: where its repository is, a folder or a bucket, and the files that hold its secrets.
type remoteConfig struct {
	Path           string `json:"path"`
	PassphraseFile string `json:"passphrase-file"`

	S3Bucket         string `json:"s3-bucket"`
	S3Endpoint       string `json:"s3-endpoint"` // no scheme means https
	S3Prefix         string `json:"s3-prefix"`
	S3SigningRegion  string `json:"s3-signing-region"`
	S3UsePathStyle   *bool  `json:"s3-use-path-style"`
	S3CAFile         string `json:"s3-ca-file"`
	AccessKeyFile    string `json:"access-key-file"`
	SecretKeyFile    string `json:"secret-key-file"`
	SessionTokenFile string `json:"session-token-file"`
	Cache            string `json:"cache"`
	CacheSize        string `json:"cache-size"`
}

const (
	envRemote         = "STILLPOINT_REMOTE"
	envPassphraseFile = "STILLPOINT_PASSPHRASE_FILE"
	envBucket         = "STILLPOINT_S3_BUCKET"
	envPathStyle      = "STILLPOINT_S3_USE_PATH_STYLE"
	envAccessKey      = "AWS_ACCESS_KEY_ID"
	envSecretKey      = "AWS_SECRET_ACCESS_KEY"
	envSessionToken   = "AWS_SESSION_TOKEN"
	defaultRemote     = "default"
)

// remoteFromEnvironment is the remote that the environment describes, and the variable that says so; "" if none does.
func remoteFromEnvironment() (r remoteConfig, from string, err error) {
	r = remoteConfig{
		Path: os.Getenv(envRemote), PassphraseFile: os.Getenv(envPassphraseFile),
		S3Bucket: os.Getenv(envBucket), S3Endpoint: os.Getenv("STILLPOINT_S3_ENDPOINT"), S3Prefix: os.Getenv("STILLPOINT_S3_PREFIX"),
		S3SigningRegion: os.Getenv("STILLPOINT_S3_SIGNING_REGION"), S3CAFile: os.Getenv("STILLPOINT_S3_CA_FILE"),
		AccessKeyFile: os.Getenv("STILLPOINT_S3_ACCESS_KEY_FILE"), SecretKeyFile: os.Getenv("STILLPOINT_S3_SECRET_KEY_FILE"),
		SessionTokenFile: os.Getenv("STILLPOINT_S3_SESSION_TOKEN_FILE"),
		Cache:            os.Getenv("STILLPOINT_S3_CACHE"), CacheSize: os.Getenv("STILLPOINT_S3_CACHE_SIZE"),
	}
	if s := os.Getenv(envPathStyle); s != "" {
		style, err := strconv.ParseBool(s)
		if err != nil {
			return r, "", fault.Errorf(fault.Invalid, "%s=%q: true or false", envPathStyle, s)
		}
		r.S3UsePathStyle = &style
	}
	switch {
	case r.Path != "":
		from = envRemote
	case r.S3Bucket != "":
		from = envBucket
	}
	return r, from, nil
}

// remote gives a configured remote's place and passphrase.
func (c config) remote(name string) (repository.Location, adapters.Secret, error) {
	at, err := c.location(name)
	if err != nil {
		return repository.Location{}, adapters.Secret{}, err
	}
	file := c.Remotes[name].PassphraseFile
	if file == "" {
		return repository.Location{}, adapters.Secret{}, fault.Errorf(fault.Invalid, "remote %q has no passphrase: set passphrase-file (or %s) to a file that holds it", name, envPassphraseFile)
	}
	pass, err := readSecret(file)
	if err != nil {
		return repository.Location{}, adapters.Secret{}, fmt.Errorf("remote %q, passphrase: %w", name, err)
	}
	return at, pass, nil
}

// location gives a configured remote's place, with the credentials to get there.
func (c config) location(name string) (repository.Location, error) {
	r, ok := c.Remotes[name]
	if !ok {
		if name == defaultRemote && len(c.Remotes) == 0 {
			return repository.Location{}, fault.Errorf(fault.NotFound,
				"no remote is configured: set %s to a folder or %s to a bucket, and %s to a file with the passphrase, or put remotes: into the --config file", envRemote, envBucket, envPassphraseFile)
		}
		return repository.Location{}, fault.Errorf(fault.NotFound, "remote %q is not configured; there is %s", name, list(c.Remotes))
	}
	switch {
	case r.Path != "" && r.S3Bucket != "":
		return repository.Location{}, fault.Errorf(fault.Invalid, "remote %q has both a path and an s3-bucket: keep the one that holds the repository", name)
	case r.Path != "":
		if r != (remoteConfig{Path: r.Path, PassphraseFile: r.PassphraseFile}) {
			return repository.Location{}, fault.Errorf(fault.Invalid, "remote %q is a folder, and has settings that only a bucket has: remove them or the path", name)
		}
		path, err := filepath.Abs(r.Path)
		return repository.Location{Path: path}, err
	case r.S3Bucket == "":
		return repository.Location{}, fault.Errorf(fault.Invalid, "remote %q has no path, the folder that holds the repository, and no s3-bucket", name)
	}
	s, err := r.s3()
	if err != nil {
		return repository.Location{}, fmt.Errorf("remote %q: %w", name, err)
	}
	return repository.Location{S3: s}, nil
}

// s3 reads what belongs to a bucket.
func (r remoteConfig) s3() (*repository.S3, error) {
	s := &repository.S3{Endpoint: r.S3Endpoint, Bucket: r.S3Bucket, Prefix: r.S3Prefix, Region: r.S3SigningRegion}
	if r.S3Endpoint == "" {
		return nil, fault.Errorf(fault.Invalid, "no s3-endpoint: name the store's host, for Amazon s3.amazonaws.com; http:// before it means without TLS")
	}
	if r.S3UsePathStyle != nil {
		s.Lookup = repository.LookupHost
		if *r.S3UsePathStyle {
			s.Lookup = repository.LookupPath
		}
	}
	var err error
	if r.S3CAFile != "" {
		if s.CA, err = os.ReadFile(r.S3CAFile); err != nil {
			return nil, fault.Errorf(fault.Invalid, "s3-ca-file: %w; name the file with the store's CA in PEM", err)
		}
	}
	if r.Cache != "" {
		if s.Cache, err = filepath.Abs(r.Cache); err != nil {
			return nil, err
		}
	}
	if r.CacheSize != "" {
		if r.Cache == "" {
			return nil, fault.Errorf(fault.Invalid, "cache-size without cache: name the folder, or leave the size out")
		}
		if s.CacheSize, err = adapters.ParseBytes(r.CacheSize); err != nil {
			return nil, fault.Errorf(fault.Invalid, "cache-size: %w", err)
		}
	}
	return s, r.credentials(s)
}

// credentials come from files or, when no file is named, from the environment; never from both, so that a token does not
// meet another's keys.
func (r remoteConfig) credentials(s *repository.S3) error {
	if r.AccessKeyFile == "" && r.SecretKeyFile == "" && r.SessionTokenFile == "" {
		access, secret := os.Getenv(envAccessKey), os.Getenv(envSecretKey)
		if strings.TrimSpace(access) == "" || strings.TrimSpace(secret) == "" {
			return fault.Errorf(fault.Invalid, "no credentials: set access-key-file and secret-key-file to files that hold them, or %s and %s in the environment", envAccessKey, envSecretKey)
		}
		s.AccessKey, s.SecretKey, s.SessionToken = adapters.NewSecret(access), adapters.NewSecret(secret), adapters.NewSecret(os.Getenv(envSessionToken))
		return nil
	}
	for _, f := range []struct {
		key, file string
		into      *adapters.Secret
		optional  bool
	}{{"access-key-file", r.AccessKeyFile, &s.AccessKey, false}, {"secret-key-file", r.SecretKeyFile, &s.SecretKey, false}, {"session-token-file", r.SessionTokenFile, &s.SessionToken, true}} {
		if f.file == "" {
			if f.optional {
				continue
			}
			return fault.Errorf(fault.Invalid, "%s is missing: with one of the keys in a file, all are read from files", f.key)
		}
		var err error
		if *f.into, err = readSecret(f.file); err != nil {
			return fmt.Errorf("%s: %w", f.key, err)
		}
	}
	return nil
}
