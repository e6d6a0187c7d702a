package repository

import (
	"context"
	"errors"
)

// Kopia repeats a listing of its indexes that fails, for ever and whatever the reason; only between two tries it looks
// whether the context has ended. Nearly every call of kopia may list. So every call runs within a context that our storage
// ends when it gives a listing up.

type endKey struct{}

// given is the cause of a context that a storage ended.
type given struct{ err error }

func (g *given) Error() string { return g.err.Error() }

// Operation is a context for many calls of this package, until end is called: each would make one of its own otherwise.
// One that ctx has already is taken, unless ctx was made without the cancellation of what it comes from.
func Operation(ctx context.Context) (operation context.Context, end func()) {
	if _, ok := ctx.Value(endKey{}).(context.CancelCauseFunc); ok && ctx.Done() != nil {
		return ctx, nothing
	}
	ctx, cancel := context.WithCancelCause(ctx)
	return context.WithValue(ctx, endKey{}, cancel), func() { cancel(nil) }
}

func nothing() {}

// within runs calls of kopia as an operation.
func within(ctx context.Context, call func(context.Context) error) error {
	ctx, end := Operation(ctx)
	defer end()
	return reason(ctx, call(ctx))
}

// reason is why a call failed: what the storage gave up for, if that ended it.
func reason(ctx context.Context, err error) error {
	var g *given
	if err != nil && errors.As(context.Cause(ctx), &g) {
		return g.err
	}
	return err
}

// gaveUp ends what a listing that failed was for.
func gaveUp(ctx context.Context, err error) error {
	if end, ok := ctx.Value(endKey{}).(context.CancelCauseFunc); ok && err != nil && ctx.Err() == nil {
		end(&given{err})
	}
	return err
}
