package repository

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/cenkalti/backoff/v5"

	"stillpoint.io/stillpoint/fault"
)

// patience is how a bucket waits for its store.
type patience struct {
	longest time.Duration // a call is given up when this has passed since its first try
	first   time.Duration // the wait before the second try, which doubles from then on, ±50 %
	pause   time.Duration // no wait is longer
	stall   time.Duration // a connection on which nothing moves for so long is broken
	silent  time.Duration // an outage is told of when it has lasted so long
}

func newPatience(longest time.Duration) patience {
	return patience{longest: longest, first: longest / 3000, pause: longest / 20, stall: longest / 5, silent: longest / 30}
}

// spoiltTries is how often bytes that changed on their way are sent again. Once may be the network; what happens every
// time is something else.
const spoiltTries = 3

// again does a call until it succeeds, fails for good, or patience ends; then the last failure is the answer, with its
// kind. It gives up early when the context's deadline would pass meanwhile.
func (b *bucket) again(ctx context.Context, doing string, call func(context.Context) error) error {
	p := b.patience
	waits := &backoff.ExponentialBackOff{InitialInterval: p.first, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: p.pause}
	began, told, spoilt := time.Now(), false, 0
	for {
		var seen sight
		err := call(context.WithValue(ctx, sightKey{}, &seen))
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
		}
		err = storeFault(err)
		kind := fault.KindOf(err)
		if kind == fault.Corrupt {
			spoilt++
		}
		if kind != fault.Unavailable && (kind != fault.Corrupt || spoilt >= spoiltTries) {
			return fmt.Errorf("%s: %w", doing, err)
		}
		wait, passed := max(waits.NextBackOff(), min(seen.retryAfter, p.longest)), time.Since(began)
		deadline, limited := ctx.Deadline()
		if passed+wait > p.longest || limited && time.Until(deadline) <= wait {
			return fmt.Errorf("%s, tried for %v: %w", doing, passed.Round(time.Millisecond), err)
		}
		if passed >= p.silent && !told {
			told = true
			slog.WarnContext(ctx, "the S3 store does not answer as it should; trying again", "store", b.at.String(), "doing", doing,
				"since", began, "at_most", p.longest, "error", err.Error())
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%s: %w (%w)", doing, context.Cause(ctx), err)
		}
	}
}

// sight is what the headers of an answer say beside what the client passes on.
type sight struct {
	retryAfter time.Duration // how long the store asks to be left alone
	date       time.Time     // the store's clock, in whole seconds
}

type sightKey struct{}

// observer notes what the headers of answers say for who asks in the context.
type observer struct{ *http.Transport }

func (o *observer) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := o.Transport.RoundTrip(r)
	if s, ok := r.Context().Value(sightKey{}).(*sight); ok && err == nil {
		if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
			s.retryAfter = time.Duration(n) * time.Second
		}
		s.date, _ = http.ParseTime(resp.Header.Get("Date"))
	}
	return resp, err
}
