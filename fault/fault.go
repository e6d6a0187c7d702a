// Package fault gives errors a kind: the one thing that a caller far away may decide by.
//
// A kind survives wrapping with %w. Everything else about an error is prose for people: it names the thing that is
// wrong and says what to do about it. Kinds are few on purpose; a new one is justified only by a caller that would
// act differently on it.
//
//	return fault.Errorf(fault.NotFound, "snapshot %s: not in pool %s; `stillpoint snapshots` lists what is", id, pool)
//	...
//	if errors.Is(err, fault.NotFound) { ... }
package fault

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Kind says what a caller can do about an error. It is itself an error, so errors.Is(err, fault.Busy) works.
type Kind uint8

const (
	// Internal is everything that has no other kind: a bug, or a fault that nobody foresaw. Not worth a retry.
	Internal Kind = iota
	// NotFound: the thing named does not exist. For a deletion that is success.
	NotFound
	// Invalid: the request is wrong as it stands and will be wrong again: bad name, bad flag, sizes that do not fit.
	Invalid
	// Busy: somebody else holds the thing; it may be free later, but not because we try again at once.
	Busy
	// Unsupported: this backend, volume or kernel cannot do that. The caller takes the next best way.
	Unsupported
	// Corrupt: data is not what it must be. Never retried, never papered over.
	Corrupt
	// Exhausted: a quota, a rate limit or space is used up. RetryAfter says how long to wait where that is known.
	Exhausted
	// Unavailable: out of reach for now; trying again is right.
	Unavailable
	// Void: a cut lost its freeze or failed its verification; its snapshots were discarded. A new cut may succeed.
	Void
)

var names = [...]string{"internal", "not found", "invalid", "busy", "unsupported", "corrupt", "exhausted", "unavailable", "void"}

// String returns the kind in words, as logs and metrics show it.
func (k Kind) String() string {
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Error makes a Kind usable as a target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Error is an error with a kind. RetryAfter is set only with Exhausted and Unavailable, and only when the other side
// named a time.
type Error struct {
	Kind       Kind
	RetryAfter time.Duration
	Err        error
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap gives the cause, so that errors.As finds a vendor's type inside its own adapter.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is this error's kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// Errorf is fmt.Errorf with a kind. The outermost kind in a chain wins.
func Errorf(k Kind, format string, args ...any) error {
	return &Error{Kind: k, Err: fmt.Errorf(format, args...)}
}

// KindOf returns the kind of err: the outermost one in its chain. A deadline that passed is Unavailable; an error
// without a kind, a nil error and a cancelled context are Internal.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return Unavailable
	}
	return Internal
}

// RetryAfter returns how long the other side asked us to wait, or 0 if it said nothing.
func RetryAfter(err error) time.Duration {
	var e *Error
	if errors.As(err, &e) {
		return e.RetryAfter
	}
	return 0
}
