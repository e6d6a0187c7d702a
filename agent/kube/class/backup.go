package class

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Backup is how a class wants snapshots backed up.
type Backup struct {
	Remote      string // the first part of a backup's handle
	Incremental bool   // read what changed since the newest backup, where the backend can tell
	DeleteLocal bool   // delete the backend's snapshot when no backup needs it any more
	Bucket      Bucket
}

// Bucket is where backups are. It is comparable: two that are equal are one place, spoken to in one way.
type Bucket struct {
	Endpoint  string // host, host:port or a URL; without a scheme it is spoken to with TLS
	Name      string
	Region    string // empty: the store is asked
	PathStyle bool
}

// String names the bucket for people.
func (b Bucket) String() string { return fmt.Sprintf("s3://%s at %s", b.Name, b.Endpoint) }

// TypeS3 is the one value of the key type.
const TypeS3 = "S3"

// backup reads the keys of a backup: nil without a type.
func (r *reader) backup() *Backup {
	kind, is := r.given[keyType]
	if !is {
		for _, key := range []string{keyRemote, keyIncremental, keyDeleteLocal, keyBucket, keyEndpoint, keyRegion, keyPathStyle} {
			if _, is := r.given[key]; is {
				r.fail("%s has no meaning without %s: %s", full(key), full(keyType), TypeS3)
			}
		}
		return nil
	}
	if kind != TypeS3 {
		r.fail("%s: there is no type %q of backups; there is %s", full(keyType), kind, TypeS3)
	}
	for _, key := range []string{keyRemote, keyBucket, keyEndpoint} {
		if r.given[key] == "" {
			r.fail("%s is required with %s: %s", full(key), full(keyType), TypeS3)
		}
	}
	if name := r.given[keyRemote]; name != "" && !isName(name) {
		r.fail("%s: %q is no name: it has at most 32 of [a-z0-9-], the first and the last of [a-z0-9]", full(keyRemote), name)
	}
	return &Backup{
		Remote:      r.text(keyRemote),
		Incremental: r.flag(keyIncremental, true),
		DeleteLocal: r.flag(keyDeleteLocal, false),
		Bucket:      Bucket{Endpoint: r.text(keyEndpoint), Name: r.text(keyBucket), Region: r.text(keyRegion), PathStyle: r.flag(keyPathStyle, false)},
	}
}

// isName says whether a remote's name can stand in a handle, whose length is limited: the same names as a backend's.
func isName(s string) bool {
	return len(s) <= 32 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == "" && !strings.HasPrefix(s, "-") && !strings.HasSuffix(s, "-")
}

// The keys of the secret of a class with backups.
const (
	secretAccessKey  = "access-key"
	secretSecretKey  = "secret-key"
	secretPassphrase = "passphrase"
)

// Credentials are what the secret of a class with backups holds.
type Credentials struct {
	AccessKey, SecretKey adapters.Secret // of the S3 store
	Passphrase           adapters.Secret // of the repository
}

// ParseSecrets reads the secret of a class with backups. Invalid if one is missing, empty or not known; values are never
// in an error.
func ParseSecrets(secrets map[string]string) (Credentials, error) {
	known := []string{secretAccessKey, secretSecretKey, secretPassphrase}
	var wrong []error
	for _, key := range slices.Sorted(maps.Keys(secrets)) {
		if !slices.Contains(known, key) {
			wrong = append(wrong, fmt.Errorf("there is no key %q%s", key, Meant(key, known)))
		}
	}
	for _, key := range known {
		if secrets[key] == "" {
			wrong = append(wrong, fmt.Errorf("the key %q is required", key))
		}
	}
	if len(wrong) > 0 {
		const where = "it is the one that the class names by csi.storage.k8s.io/snapshotter-secret-name and -namespace"
		return Credentials{}, fault.Errorf(fault.Invalid, "the secret of a class with backups (%s): %w", where, errors.Join(wrong...))
	}
	return Credentials{adapters.NewSecret(secrets[secretAccessKey]), adapters.NewSecret(secrets[secretSecretKey]), adapters.NewSecret(secrets[secretPassphrase])}, nil
}

// Conflict finds two classes that give one remote's name to two places: Invalid, naming both. Backups' handles say
// the remote only, so either class's backups would be looked for in the other's bucket.
func Conflict(classes map[string]Class) error {
	first := map[string]string{} // by remote, the class
	for _, name := range slices.Sorted(maps.Keys(classes)) {
		b := classes[name].Backup
		if b == nil {
			continue
		}
		other, is := first[b.Remote]
		if !is {
			first[b.Remote] = name
			continue
		}
		if theirs := classes[other].Backup.Bucket; theirs != b.Bucket {
			return fault.Errorf(fault.Invalid, "the classes %s and %s both name a remote %q, but one has %s and the other %s: give one of the remotes another name",
				other, name, b.Remote, theirs, b.Bucket)
		}
	}
	return nil
}
