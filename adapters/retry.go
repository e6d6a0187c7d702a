package adapters

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"

	"stillpoint.io/stillpoint/fault"
)

// RetryPolicy bounds how a call is tried again. A zero field means its default.
type RetryPolicy struct {
	Attempts int           // calls in all, the first one included; default 6
	First    time.Duration // the wait before the second; it doubles from then on, ±50 %; default 200 ms
	Longest  time.Duration // no wait is longer; default 30 s
}

// Retry tries again what failed as Unavailable, or as Exhausted with a time to wait (a full disk has none). Every call of the
// contract is idempotent, so all of them are tried again but these: Commit and Abort, which close their target; what makes
// something new in the target of a tree; and a stream that has passed an item on.
//
// It waits for at least what the other side asked for (fault.RetryAfter). It gives up at once, with the last error,
// when that is longer than the policy's longest wait, or when the context's deadline would pass meanwhile.
func Retry(a Adapter, p RetryPolicy) Adapter {
	p.Attempts = orElse(p.Attempts, 6)
	p.First = orElse(p.First, 200*time.Millisecond)
	p.Longest = orElse(p.Longest, 30*time.Second)
	return Decorate(a, Layer{Around: p.around})
}

func orElse[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

func (p RetryPolicy) around(ctx context.Context, c Call, do Do) error {
	waits := &backoff.ExponentialBackOff{InitialInterval: p.First, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: p.Longest}
	for attempt := 1; ; attempt++ {
		err := do(ctx, c)
		if err == nil || attempt >= p.Attempts || ctx.Err() != nil || !repeatable(c, err) {
			return err
		}
		asked := fault.RetryAfter(err)
		wait := min(max(waits.NextBackOff(), asked), p.Longest)
		if deadline, ok := ctx.Deadline(); asked > p.Longest || ok && time.Until(deadline) <= wait {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return errors.Join(err, ctx.Err())
		}
	}
}

// onlyOnce are the methods that fail when they are called again after they succeeded.
var onlyOnce = []string{"Commit", "Abort", "Mkdir", "Create", "Symlink", "Special", "Link"}

// repeatable reports whether a call that failed so may be made again, and is worth it.
func repeatable(c Call, err error) bool {
	switch {
	case slices.Contains(onlyOnce, c.Method), Begun(err):
		return false
	}
	k := fault.KindOf(err)
	return k == fault.Unavailable || k == fault.Exhausted && fault.RetryAfter(err) > 0
}
