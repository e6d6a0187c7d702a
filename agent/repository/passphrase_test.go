package repository

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/kopia/kopia/repo/blob"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// dying is a storage that does so many changes and no more.
type dying struct {
	blob.Storage
	left int
}

var errDied = errors.New("died")

func (d *dying) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, o blob.PutOptions) error {
	if d.left--; d.left < 0 {
		return errDied
	}
	return d.Storage.PutBlob(ctx, id, data, o)
}

func (d *dying) DeleteBlob(ctx context.Context, id blob.ID) error {
	if d.left--; d.left < 0 {
		return errDied
	}
	return d.Storage.DeleteBlob(ctx, id)
}

// Whatever a change of the passphrase comes to, one of the two opens the repository, and the backups are there. Who had it
// open meanwhile goes on.
func TestChangePassphrase(t *testing.T) {
	origin := mustInit(t, MinChunkSize)
	r := mustOpen(t, origin, OpenOptions{})
	if _, err := commit(r, "before", 1, 2); err != nil {
		t.Fatal(err)
	}
	next := adapters.NewSecret("another passphrase")
	for left := range 7 {
		at := Location{Path: t.TempDir()}
		if err := os.CopyFS(at.Path, os.DirFS(origin.Path)); err != nil {
			t.Fatal(err)
		}
		r := mustOpen(t, at, OpenOptions{})
		r.medium = &dying{r.medium, left}
		err := r.ChangePassphrase(t.Context(), secret, next)
		if whole := left >= 5; whole != (err == nil) || !whole && !errors.Is(err, errDied) {
			t.Errorf("after %d changes: %v", left, err)
		}
		opened := 0
		for _, s := range []adapters.Secret{secret, next} {
			again, err := Open(t.Context(), at, s, OpenOptions{Host: "test"})
			if fault.KindOf(err) == fault.Invalid {
				continue
			} else if err != nil {
				t.Fatal(err)
			}
			opened++
			if _, err := again.Backup(t.Context(), "before"); err != nil {
				t.Error(err)
			}
			if want := s == next; want != (left >= 3) {
				t.Errorf("after %d changes the new passphrase opens it: %v", left, want)
			}
			again.Close(t.Context())
		}
		if opened != 1 {
			t.Errorf("after %d changes %d of the two passphrases open it", left, opened)
		}
		if err != nil {
			continue
		}
		if _, err := commit(r, "meanwhile", 3); err != nil {
			t.Errorf("with the repository open: %v", err)
		}
	}
	if err := r.ChangePassphrase(t.Context(), next, next); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a wrong present passphrase: %v", err)
	}
	if err := r.ChangePassphrase(t.Context(), secret, adapters.NewSecret("")); fault.KindOf(err) != fault.Invalid {
		t.Errorf("an empty passphrase: %v", err)
	}
}
