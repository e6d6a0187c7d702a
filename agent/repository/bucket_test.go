package repository

import (
	"context"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/integration/s3"
)

// bucketIn is a new bucket of a store.
func bucketIn(t testing.TB, s *s3.Store) Location {
	t.Helper()
	return Location{S3: &S3{
		Endpoint: s.Endpoint, Bucket: s.Bucket(t), CA: s.CA,
		AccessKey: adapters.NewSecret(s.AccessKey), SecretKey: adapters.NewSecret(s.SecretKey),
	}}
}

func mustInitAt(t testing.TB, at Location) Location {
	t.Helper()
	if err := Init(t.Context(), at, secret, Options{ChunkSize: MinChunkSize, Host: "test"}); err != nil {
		t.Fatal(err)
	}
	return at
}

func TestSmoke(t *testing.T) {
	for _, kind := range append(s3.Kinds, s3.VersityTLS) {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			at := bucketIn(t, s)
			mustInitAt(t, at)
			r := mustOpen(t, at, OpenOptions{})
			b, err := commit(r, "a", 1, 2, 3)
			t.Log(b.Handle, err, s.Objects(t, at.S3.Bucket, ""))
			st, err := r.Status(context.Background())
			t.Log(st, err)
		})
	}
}
