package adapters

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"stillpoint.io/stillpoint/fault"
)

// Fault is one fault to inject, as a value. As text it reads METHOD[:N[+]][@PLACE]=EFFECT:
//
//	CreateSnapshot:2=unavailable    the second CreateSnapshot fails, as any kind of package fault (not-found, corrupt, …)
//	Publish:3+=hang                 every Publish from the third on hangs until its context ends
//	Gate=delay(50ms)                every Gate takes 50 ms longer
//	DeleteSnapshot:1=lost           the first one is done, but its answer is lost (Unavailable)
//	ReadAt@1MiB=corrupt             every read of the byte at 1 MiB fails
//	ReadAt:1@1MiB=short             the first such read stops before that byte, without a PLACE half-way (Unavailable)
//	Extents@8MiB=unavailable        every delta breaks off before the first extent that ends after 8 MiB
//	Snapshots@2=exhausted           every listing breaks off after two
//
// METHOD is a Call's, or * for all. N counts from 1 the calls that METHOD and PLACE fit.
type Fault struct {
	Method string
	Nth    int   // 0: every call
	On     bool  // and all after the Nth
	Place  int64 // bytes, or items of a listing; -1: anywhere
	Effect Effect
	Kind   fault.Kind    // of the effect Fail
	Delay  time.Duration // of the effect Delay
}

// Effect is what a fault does.
type Effect string

const (
	Fail  Effect = "fail"
	Hang  Effect = "hang"
	Delay Effect = "delay"
	Lost  Effect = "lost"
	Short Effect = "short"
)

// Faults is a list of faults. All that fit a call strike, in order. As text they are separated by commas.
type Faults []Fault

// methods are those that a fault can strike.
var methods = []string{"*", "Volume", "CreateSnapshot", "Publish", "Snapshot", "DeleteSnapshot", "Snapshots", "Volumes", "Gate", "Stage", "Unstage",
	"Allocated", "Changed", "Extents", "Open", "ReadAt", "Begin", "WriteAt", "Zero", "Commit", "Abort",
	"OpenTree", "Stat", "Entries", "OpenFile", "BeginTree", "Mkdir", "Create", "Symlink", "Special", "Link", "Describe"}

// placed are the methods that have places.
var placed = []string{"ReadAt", "WriteAt", "Zero", "Extents", "Snapshots", "Volumes", "Entries"}

// Decorate injects the faults into an adapter. It does the same in every run: only calls count, not time or chance.
// Each decorated adapter counts for itself.
func (f Faults) Decorate(a Adapter) Adapter {
	seen := make([]atomic.Int64, len(f)) // calls that fitted
	strike := func(ctx context.Context, item bool, c Call, do Do) error {
		for i := len(f) - 1; i >= 0; i-- {
			if f[i].fits(c, item) && f[i].due(seen[i].Add(1)) {
				inner := do
				do = func(ctx context.Context, c Call) error { return f[i].strike(ctx, c, inner) }
			}
		}
		return do(ctx, c)
	}
	return Decorate(a, Layer{
		Around: func(ctx context.Context, c Call, do Do) error { return strike(ctx, false, c, do) },
		Item: func(ctx context.Context, c Call) error {
			return strike(ctx, true, c, func(context.Context, Call) error { return nil })
		},
	})
}

// fits reports whether the fault is for the call, or for the item of a stream.
func (f Fault) fits(c Call, item bool) bool {
	if f.Method != c.Method && f.Method != "*" || streams[c.Method] && item != (f.Place >= 0) {
		return false
	}
	return f.Place < 0 || c.Offset <= f.Place && f.Place < c.Offset+c.Length
}

// due reports whether the fault strikes the n-th call that fits, counted from 1.
func (f Fault) due(n int64) bool {
	return f.Nth == 0 || n == int64(f.Nth) || f.On && n > int64(f.Nth)
}

// strike makes a call under the fault.
func (f Fault) strike(ctx context.Context, c Call, do Do) error {
	switch f.Effect {
	case Hang:
		<-ctx.Done()
		return ctx.Err()
	case Delay:
		timer := time.NewTimer(f.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
			return do(ctx, c)
		case <-ctx.Done():
			return ctx.Err()
		}
	case Lost:
		if err := do(ctx, c); err != nil {
			return err
		}
		return fault.Errorf(fault.Unavailable, "injected: %s: done, but the answer is lost", f)
	case Short:
		c.Length /= 2
		if f.Place >= 0 {
			c.Length = f.Place - c.Offset
		}
		if err := do(ctx, c); err != nil {
			return err
		}
		return fault.Errorf(fault.Unavailable, "injected: %s: %w", f, io.ErrUnexpectedEOF)
	default:
		return fault.Errorf(f.Kind, "injected: %s", f)
	}
}

// String returns the fault as ParseFaults reads it.
func (f Fault) String() string {
	var b strings.Builder
	b.WriteString(f.Method)
	if f.Nth > 0 {
		fmt.Fprintf(&b, ":%d", f.Nth)
	}
	if f.On {
		b.WriteByte('+')
	}
	if f.Place >= 0 {
		b.WriteString("@" + formatBytes(f.Place))
	}
	b.WriteByte('=')
	switch f.Effect {
	case Fail:
		b.WriteString(kindWord(f.Kind))
	case Delay:
		fmt.Fprintf(&b, "delay(%s)", f.Delay)
	default:
		b.WriteString(string(f.Effect))
	}
	return b.String()
}

// String returns the faults as ParseFaults reads them.
func (f Faults) String() string {
	texts := make([]string, len(f))
	for i := range f {
		texts[i] = f[i].String()
	}
	return strings.Join(texts, ", ")
}

// ParseFaults reads faults from text. Errors are Invalid.
func ParseFaults(s string) (Faults, error) {
	var all Faults
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		f, err := parseFault(part)
		if err != nil {
			return nil, fault.Errorf(fault.Invalid, "fault %q: %w; a fault is written METHOD[:N[+]][@PLACE]=EFFECT, e.g. CreateSnapshot:2=unavailable", part, err)
		}
		all = append(all, f)
	}
	return all, nil
}

func parseFault(s string) (f Fault, err error) {
	where, effect, ok := strings.Cut(s, "=")
	if !ok {
		return f, fmt.Errorf("no effect after =")
	}
	where, place, hasPlace := strings.Cut(where, "@")
	method, nth, hasNth := strings.Cut(where, ":")
	f = Fault{Method: method, Place: -1}
	if !slices.Contains(methods, method) {
		return f, fmt.Errorf("unknown method%s", didYouMean(method, methods))
	}
	if hasNth {
		nth, f.On = strings.CutSuffix(nth, "+")
		if f.Nth, err = strconv.Atoi(nth); err != nil || f.Nth < 1 {
			return f, fmt.Errorf("%q is not a number of a call, counted from 1", nth)
		}
	}
	if hasPlace {
		if f.Place, err = ParseBytes(place); err != nil {
			return f, err
		}
		if !slices.Contains(placed, method) {
			return f, fmt.Errorf("%s has no places", method)
		}
	}
	return f, f.parseEffect(effect)
}

func (f *Fault) parseEffect(s string) (err error) {
	if d, ok := strings.CutPrefix(s, "delay("); ok && strings.HasSuffix(d, ")") {
		f.Effect = Delay
		if f.Delay, err = time.ParseDuration(strings.TrimSuffix(d, ")")); err != nil || f.Delay < 0 {
			return fmt.Errorf("%q is not a duration like 50ms", s)
		}
		return nil
	}
	switch Effect(s) {
	case Hang, Lost:
		f.Effect = Effect(s)
		return nil
	case Short:
		f.Effect = Short
		if f.Method != "ReadAt" && f.Method != "WriteAt" {
			return fmt.Errorf("only ReadAt and WriteAt can be short")
		}
		return nil
	}
	known := []string{string(Hang), string(Lost), string(Short), "delay(50ms)"}
	for k := fault.Internal; k <= fault.Void; k++ {
		if kindWord(k) == s {
			f.Effect, f.Kind = Fail, k
			return nil
		}
		known = append(known, kindWord(k))
	}
	return fmt.Errorf("unknown effect %q%s", s, didYouMean(s, known))
}

// kindWord is a kind as one word: "not-found".
func kindWord(k fault.Kind) string { return strings.ReplaceAll(k.String(), " ", "-") }
