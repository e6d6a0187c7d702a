//go:build ceph && cgo

package ceph

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"github.com/ceph/go-ceph/rbd"
	"golang.org/x/sync/semaphore"

	"stillpoint.io/stillpoint/cbt"
)

const (
	// asking is how many calls ask for exact changes at once. Within one, librbd asks about many objects at once.
	asking = 32
	// waiting is how many answers are kept until it is their turn.
	waiting = 64
	// aheadMax is about how many objects at most, in spans of any length, the two are.
	aheadMax = 1024
)

// ask lists exactly what changed since the snapshot of that name, or since nothing, within a set of objects; nil is all
// of them. The calls run in parallel, their answers come in order. At most about aheadMax objects' answers are in memory, 24
// bytes for each extent. When the stream is left early, the calls that run are left to themselves.
func (d *diff) ask(ctx context.Context, since string, set objectSet, from int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		type answer struct {
			extents []cbt.Extent
			err     error
		}
		type question struct {
			objects int64
			answer  chan answer
		}
		ctx, stop := context.WithCancel(ctx)
		var group sync.WaitGroup
		defer group.Wait() // for goroutines only: what they wait for ends with the context
		defer stop()
		questions := make(chan question, waiting)
		turns, ahead := make(chan struct{}, asking), semaphore.NewWeighted(aheadMax)
		group.Go(func() {
			defer close(questions)
			for next := from / d.objects; ; {
				s, ok := d.span(set, next)
				if !ok {
					return
				}
				next = s.end
				q := question{s.end - s.first, make(chan answer, 1)}
				if ahead.Acquire(ctx, q.objects) != nil {
					return
				}
				select {
				case questions <- q:
				case <-ctx.Done():
					return
				}
				select {
				case turns <- struct{}{}:
				case <-ctx.Done():
					q.answer <- answer{err: ctx.Err()}
					return
				}
				group.Go(func() {
					defer func() { <-turns }()
					extents, err := d.within(ctx, since, s)
					q.answer <- answer{extents, err}
				})
			}
		})
		for q := range questions {
			a := <-q.answer
			ahead.Release(q.objects)
			if a.err != nil {
				yield(cbt.Extent{}, a.err)
				return
			}
			for _, e := range a.extents {
				if e.End() <= from {
					continue
				}
				if e.Offset < from {
					e = cbt.Extent{Offset: from, Length: e.End() - from, Zero: e.Zero}
				}
				if !yield(e, nil) {
					return
				}
			}
		}
		if err := ctx.Err(); err != nil {
			yield(cbt.Extent{}, err)
		}
	}
}

// span is the next run of objects to ask about.
func (d *diff) span(set objectSet, from int64) (span, bool) {
	objects := (d.size + d.objects - 1) / d.objects
	s := span{from, min(from+spanMax, objects)}
	if set != nil {
		var ok bool
		if s, ok = set.nextSpan(from); !ok {
			return s, false
		}
		s.end = min(s.end, objects)
	}
	return s, s.first < s.end
}

// within asks about a run of objects. Its ends are objects' ends: between them some librbds answer wrongly
// (https://tracker.ceph.com/issues/53784).
func (d *diff) within(ctx context.Context, since string, s span) ([]cbt.Extent, error) {
	return diffCall(ctx, d, func(one *call) ([]cbt.Extent, error) {
		var extents []cbt.Extent
		start, end := s.first*d.objects, min(s.end*d.objects, d.size)
		err := d.rbd.DiffIterate(rbd.DiffIterateConfig{
			SnapName: since,
			Offset:   uint64(start),
			Length:   uint64(end - start),
			Callback: func(offset, length uint64, exists int, _ any) int {
				if one.wanted() != nil {
					return stopped
				}
				extents = append(extents, cbt.Extent{Offset: int64(offset), Length: int64(length), Zero: exists == 0})
				return 0
			},
		})
		if err != nil && one.wanted() != nil {
			err = one.wanted()
		}
		slices.SortFunc(extents, func(a, b cbt.Extent) int { return cmp.Compare(a.Offset, b.Offset) }) // striping mixes them
		return extents, err
	})
}

// stopped is what a callback answers to end its call: -ECANCELED.
const stopped = -125
