package fault_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"stillpoint.io/stillpoint/fault"
)

func TestKindSurvivesWrapping(t *testing.T) {
	for k := fault.Internal; k <= fault.Void; k++ {
		err := fault.Errorf(k, "volume x: %w", io.ErrUnexpectedEOF)
		for range 3 {
			err = fmt.Errorf("cutting: %w", err)
		}
		joined := errors.Join(errors.New("first"), err)
		for _, e := range []error{err, joined} {
			if fault.KindOf(e) != k || !errors.Is(e, k) || !errors.Is(e, io.ErrUnexpectedEOF) {
				t.Errorf("%v lost its kind %v: %v", e, k, fault.KindOf(e))
			}
		}
		if other := (k + 1) % (fault.Void + 1); errors.Is(err, other) {
			t.Errorf("%v is also %v", err, other)
		}
		if fault.KindOf(k) != k {
			t.Errorf("the bare kind %v is %v", k, fault.KindOf(k))
		}
	}
}

func TestKindOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		want fault.Kind
	}{
		{nil, fault.Internal},
		{io.EOF, fault.Internal},
		{context.Canceled, fault.Internal},
		{context.DeadlineExceeded, fault.Unavailable},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), fault.Unavailable},
		{fault.Errorf(fault.Busy, "outer: %w", fault.Errorf(fault.NotFound, "inner")), fault.Busy},
		{fmt.Errorf("x: %w", fault.Corrupt), fault.Corrupt},
	} {
		if got := fault.KindOf(c.err); got != c.want {
			t.Errorf("%v is %v, not %v", c.err, got, c.want)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	err := fmt.Errorf("x: %w", &fault.Error{Kind: fault.Exhausted, RetryAfter: time.Minute, Err: io.EOF})
	if fault.RetryAfter(err) != time.Minute || fault.RetryAfter(io.EOF) != 0 || fault.RetryAfter(nil) != 0 {
		t.Error(fault.RetryAfter(err))
	}
}

func TestWords(t *testing.T) {
	if s := fault.Errorf(fault.NotFound, "volume %d", 7).Error(); s != "volume 7" {
		t.Error(s)
	}
	if s := fault.NotFound.Error(); s != "not found" {
		t.Error(s)
	}
	if s := fault.Kind(200).String(); s != "kind(200)" {
		t.Error(s)
	}
}
