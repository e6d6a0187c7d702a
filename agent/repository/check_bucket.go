package repository

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"stillpoint.io/stillpoint/fault"
)

// bucket checks a bucket, in a folder of that name below the prefix.
func (c *checker) bucket(ctx context.Context, name string) (err error) {
	s := *c.at.S3
	s.Prefix = s.prefix() + name
	b, err := openBucket(&s)
	if err != nil {
		return err
	}
	defer b.Close(ctx)
	b = b.impatient(60)
	if !c.try(ctx, "reach", func(ctx context.Context) (finding, error) { return b.reach(ctx) }) {
		return c.first
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		c.try(ctx, "cleanup", func(ctx context.Context) (finding, error) { return found("nothing of the check is left"), b.purge(ctx) })
		err = c.first
	}()
	if !c.contract(ctx, b) {
		return c.first
	}
	c.try(ctx, "leftovers", func(ctx context.Context) (finding, error) { return b.sweepChecks(ctx, name) })
	c.try(ctx, "conditional", b.conditional)
	c.try(ctx, "clock", b.clock)
	if c.o.ObjectLock {
		c.try(ctx, "object-lock", b.objectLock)
	}
	c.throughput(ctx, b)
	return c.first
}

// reach makes sure that the bucket is there and open to us.
func (b *bucket) reach(ctx context.Context) (finding, error) {
	if err := b.ListBlobs(ctx, "", func(blob.Metadata) error { return nil }); err != nil {
		return finding{}, err
	}
	region, err := b.core.GetBucketLocation(ctx, b.at.Bucket)
	if err != nil {
		return finding{}, storeFault(err)
	}
	tls := "without TLS: what is stored is encrypted, who reads along learns sizes and times"
	if _, secure, _ := b.at.address(); secure {
		tls = "with TLS"
	}
	return found("the bucket %s, in the region %s, %s", b.at.Bucket, region, tls), nil
}

// conditional asks the store not to replace an object.
func (b *bucket) conditional(ctx context.Context) (finding, error) {
	put, sum, err := upload(slice("another"))
	if err != nil {
		return finding{}, err
	}
	put.SetMatchETagExcept("*")
	err = b.again(ctx, "writing what exists", func(ctx context.Context) error {
		_, err := b.core.PutObject(ctx, b.at.Bucket, b.key("one"), bytes.NewReader([]byte("another")), int64(len("another")), "", hex.EncodeToString(sum), put)
		if a := new(minio.ErrorResponse); errors.As(err, a) && a.Code == minio.PreconditionFailed {
			return errRefused
		}
		return err
	})
	switch {
	case errors.Is(err, errRefused):
		return found("the store refuses to replace an object when asked to (If-None-Match)"), nil
	case err == nil:
		return warned("in this bucket the store replaces an object though it is asked not to (If-None-Match). Stillpoint can do without: it never gives a name twice"), nil
	case fault.KindOf(err) == fault.Unsupported || fault.KindOf(err) == fault.Invalid:
		return warned("the store does not know conditional writes (If-None-Match): %v. Stillpoint can do without: it never gives a name twice", err), nil
	}
	return finding{}, err
}

var errRefused = errors.New("refused")

// clock compares the clocks: the store's as it answers, and as it stamps objects.
func (b *bucket) clock(ctx context.Context) (finding, error) {
	var seen sight
	ctx = context.WithValue(ctx, sightKey{}, &seen)
	put, sum, err := upload(slice("tick"))
	if err != nil {
		return finding{}, err
	}
	before := time.Now()
	if _, err := b.core.PutObject(ctx, b.at.Bucket, b.key("clock"), bytes.NewReader([]byte("tick")), int64(len("tick")), "", hex.EncodeToString(sum), put); err != nil {
		return finding{}, storeFault(err)
	}
	after := time.Now()
	info, err := b.core.StatObject(ctx, b.at.Bucket, b.key("clock"), minio.StatObjectOptions{})
	if err != nil {
		return finding{}, storeFault(err)
	}
	ahead := apart(info.LastModified, before, after)
	if d := apart(seen.date, before, time.Now()); !seen.date.IsZero() && d.Abs() > ahead.Abs() {
		ahead = d
	}
	return skew(ahead)
}

// apart is how far a time in whole seconds is from a stretch of time: 0 within.
func apart(stamp, from, to time.Time) time.Duration {
	switch {
	case stamp.After(to):
		return stamp.Sub(to)
	case stamp.Add(time.Second).Before(from):
		return stamp.Add(time.Second).Sub(from)
	}
	return 0
}

// lockTime is for how long the check has an object retained.
const lockTime = 5 * time.Second

// locks is Unsupported if the bucket has no object lock.
func (b *bucket) locks(ctx context.Context) error {
	enabled, _, _, _, err := b.core.GetObjectLockConfig(ctx, b.at.Bucket)
	if a := new(minio.ErrorResponse); errors.As(err, a) && strings.HasPrefix(a.Code, "ObjectLockConfigurationNotFound") || err == nil && enabled != "Enabled" {
		return fault.Errorf(fault.Unsupported, "the bucket has no object lock: most stores allow it only when a bucket is made, so make a new one with it")
	}
	return storeFault(err)
}

// objectLock makes sure that an object which is retained stays.
func (b *bucket) objectLock(ctx context.Context) (finding, error) {
	if err := b.locks(ctx); err != nil {
		return finding{}, err
	}
	put, sum, err := upload(slice("kept"))
	if err != nil {
		return finding{}, err
	}
	put.Mode, put.RetainUntilDate = minio.Governance, time.Now().Add(lockTime).UTC().Truncate(time.Second).Add(time.Second)
	kept, err := b.core.PutObject(ctx, b.at.Bucket, b.key("kept"), bytes.NewReader([]byte("kept")), int64(len("kept")), "", hex.EncodeToString(sum), put)
	if err != nil {
		return finding{}, storeFault(err)
	}
	if kept.VersionID == "" {
		return finding{}, fault.Errorf(fault.Unsupported, "the bucket keeps no versions, without which object lock is worth nothing")
	}
	err = b.core.RemoveObject(ctx, b.at.Bucket, b.key("kept"), minio.RemoveObjectOptions{VersionID: kept.VersionID})
	if err == nil {
		return finding{}, fault.Errorf(fault.Unsupported, "an object was deleted though it was retained: object lock does not hold here")
	}
	if k := fault.KindOf(storeFault(err)); k != fault.Invalid { // AccessDenied or InvalidRequest
		return finding{}, storeFault(err)
	}
	return found("an object that is retained cannot be deleted"), nil
}

// purge removes every object below the prefix, with all its versions.
func (b *bucket) purge(ctx context.Context) error {
	for {
		left, err := b.purgeOnce(ctx)
		if err == nil || !left {
			return err
		}
		select { // what is retained can be deleted a little later
		case <-time.After(time.Second):
		case <-ctx.Done():
			return err
		}
	}
}

// purgeOnce says whether something is left that may go later.
func (b *bucket) purgeOnce(ctx context.Context) (left bool, err error) {
	all, err := b.versions(ctx, b.prefix)
	if err != nil {
		return false, err
	}
	for _, o := range all {
		opts := minio.RemoveObjectOptions{VersionID: o.VersionID}
		if strings.HasSuffix(o.Key, "/kept") && !o.IsDeleteMarker {
			opts.GovernanceBypass = true
		}
		e := b.core.RemoveObject(ctx, b.at.Bucket, o.Key, opts)
		if e != nil && opts.GovernanceBypass {
			left = true
		}
		if e = storeFault(e); e != nil && !errors.Is(e, blob.ErrBlobNotFound) {
			err = errors.Join(err, e)
		}
	}
	return left, err
}

// versions lists the objects whose names begin with a prefix, with all their versions where the store keeps them.
func (b *bucket) versions(ctx context.Context, prefix string) ([]minio.ObjectInfo, error) {
	list := func(versions bool) (all []minio.ObjectInfo, err error) {
		for o := range b.core.ListObjectsIter(ctx, b.at.Bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true, WithVersions: versions}) {
			if o.Err != nil {
				return nil, storeFault(o.Err)
			}
			all = append(all, o)
		}
		return all, nil
	}
	all, err := list(true)
	if err != nil { // a store without versions may not know how to list them
		return list(false)
	}
	return all, nil
}

// sweepChecks removes what checks left beside this one, which were killed.
func (b *bucket) sweepChecks(ctx context.Context, own string) (finding, error) {
	parent := strings.TrimSuffix(b.prefix, own+"/")
	all, err := b.versions(ctx, parent+checkFolder)
	if err != nil {
		return finding{}, err
	}
	last := map[string]time.Time{}
	for _, o := range all {
		folder, _, _ := strings.Cut(strings.TrimPrefix(o.Key, parent), "/")
		if o.LastModified.After(last[folder]) {
			last[folder] = o.LastModified
		}
	}
	old := leftovers(last, own)
	for _, name := range old {
		gone := *b
		gone.prefix = parent + name + "/"
		if err := gone.purge(ctx); err != nil {
			return finding{}, err
		}
	}
	return swept(old), nil
}
