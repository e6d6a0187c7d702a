package adapters

import (
	"context"
	"errors"
	"io"
	"iter"

	"stillpoint.io/stillpoint/cbt"
)

// Layer is what a decorator does. Retry, Metrics and Faults are layers.
type Layer struct {
	// Around stands around every call that takes a context. It makes the call by do, once, never, or again, and
	// returns the error that the caller shall see. It passes on the context that it was given or one derived from it.
	// A stream is one call from its first item to its end, under the method "Extents", "Snapshots", "Volumes" or "Entries".
	Around func(ctx context.Context, c Call, do Do) error
	// Item, if there is one, is called before each item of a stream is passed on, with the item's place; its error
	// ends the stream there.
	Item func(ctx context.Context, c Call) error
}

// Do makes a call. A Call with a smaller Length than Around was given reads or writes less.
type Do func(ctx context.Context, c Call) error

// Call is a call of an adapter, image, target or stream.
type Call struct {
	Method string // as in the interfaces, e.g. "CreateSnapshot" or "ReadAt"
	// Offset and Length are bytes, of ReadAt, WriteAt, Zero and Extents (an item there reaches from the end of the
	// one before to its own end); in a listing they count items.
	Offset, Length int64
}

// Begun reports whether a stream failed after it had passed items on, so that it cannot be called again.
func Begun(err error) bool {
	var b begun
	return errors.As(err, &b)
}

type begun struct{ error }

func (b begun) Unwrap() error { return b.error }

// Decorate puts a layer around an adapter and around all that it hands out. The result has the abilities of a, no more.
func Decorate(a Adapter, l Layer) Adapter {
	d := &decorated{layered{l}, a, nil}
	add(d, func(in Lister) any { return lister{d.layered, in} })
	add(d, func(in Gater) any { return gater{d.layered, in} })
	add(d, func(in Stager) any { return stager{d.layered, in} })
	add(d, func(in Differ) any { return differ{d.layered, in} })
	add(d, func(in Opener) any { return opener{d.layered, in} })
	add(d, func(in Restorer) any { return restorer{d.layered, in} })
	add(d, func(in Cloner) any { return cloner{d.layered, in} })
	add(d, func(in Provisioner) any { return provisioner{d.layered, in} })
	add(d, func(in Trees) any { return trees{d.layered, in} })
	add(d, func(in TreeRestorer) any { return treeRestorer{d.layered, in} })
	return d
}

func add[T any](d *decorated, wrap func(T) any) {
	if inner, ok := As[T](d.inner); ok {
		d.abilities = append(d.abilities, wrap(inner))
	}
}

type decorated struct {
	layered
	inner     Adapter
	abilities []any
}

func (d *decorated) Abilities() []any           { return d.abilities }
func (d *decorated) Capabilities() Capabilities { return d.inner.Capabilities() }
func (d *decorated) Close() error               { return d.inner.Close() }

func (d *decorated) Volume(ctx context.Context, id VolumeID) (v Volume, err error) {
	err = d.call(ctx, "Volume", func(ctx context.Context) error { v, err = d.inner.Volume(ctx, id); return err })
	return v, err
}

func (d *decorated) CreateSnapshot(ctx context.Context, id VolumeID, wanted string) (s Snapshot, err error) {
	err = d.call(ctx, "CreateSnapshot", func(ctx context.Context) error { s, err = d.inner.CreateSnapshot(ctx, id, wanted); return err })
	return s, err
}

func (d *decorated) Publish(ctx context.Context, id SnapshotID, notes Notes) error {
	return d.call(ctx, "Publish", func(ctx context.Context) error { return d.inner.Publish(ctx, id, notes) })
}

func (d *decorated) Snapshot(ctx context.Context, id SnapshotID) (s Snapshot, err error) {
	err = d.call(ctx, "Snapshot", func(ctx context.Context) error { s, err = d.inner.Snapshot(ctx, id); return err })
	return s, err
}

func (d *decorated) DeleteSnapshot(ctx context.Context, id SnapshotID) error {
	return d.call(ctx, "DeleteSnapshot", func(ctx context.Context) error { return d.inner.DeleteSnapshot(ctx, id) })
}

func (d *decorated) Snapshots(ctx context.Context, f Filter) iter.Seq2[Snapshot, error] {
	return listing(ctx, d.layered, "Snapshots", func(ctx context.Context) iter.Seq2[Snapshot, error] { return d.inner.Snapshots(ctx, f) })
}

type lister struct {
	layered
	inner Lister
}

func (l lister) Volumes(ctx context.Context) iter.Seq2[Volume, error] {
	return listing(ctx, l.layered, "Volumes", l.inner.Volumes)
}

type gater struct {
	layered
	inner Gater
}

func (g gater) Gate(ctx context.Context, ids []VolumeID) (f Forecast, err error) {
	err = g.call(ctx, "Gate", func(ctx context.Context) error { f, err = g.inner.Gate(ctx, ids); return err })
	return f, err
}

type stager struct {
	layered
	inner Stager
}

func (s stager) Stage(ctx context.Context, id VolumeID, wanted string) error {
	return s.call(ctx, "Stage", func(ctx context.Context) error { return s.inner.Stage(ctx, id, wanted) })
}

func (s stager) Unstage(ctx context.Context, id VolumeID, wanted string) error {
	return s.call(ctx, "Unstage", func(ctx context.Context) error { return s.inner.Unstage(ctx, id, wanted) })
}

type differ struct {
	layered
	inner Differ
}

func (d differ) Allocated(ctx context.Context, id SnapshotID, from int64) (cbt.Delta, error) {
	return d.delta(ctx, "Allocated", from, func(ctx context.Context) (cbt.Delta, error) { return d.inner.Allocated(ctx, id, from) })
}

func (d differ) Changed(ctx context.Context, base, target SnapshotID, from int64) (cbt.Delta, error) {
	return d.delta(ctx, "Changed", from, func(ctx context.Context) (cbt.Delta, error) { return d.inner.Changed(ctx, base, target, from) })
}

// delta decorates the question and the stream of the answer. A stream is pulled once, so that a layer which makes the
// call again asks the question again.
func (d differ) delta(ctx context.Context, method string, from int64, ask func(context.Context) (cbt.Delta, error)) (cbt.Delta, error) {
	var delta cbt.Delta
	err := d.call(ctx, method, func(ctx context.Context) (err error) { delta, err = ask(ctx); return err })
	if err != nil {
		return cbt.Delta{}, err
	}
	first, at := delta.Extents, from
	open := func(ctx context.Context) cbt.Seq {
		if seq := first; seq != nil {
			first = nil
			return seq
		}
		again, err := ask(ctx)
		if err != nil {
			return func(yield func(cbt.Extent, error) bool) { yield(cbt.Extent{}, err) }
		}
		return again.Extents
	}
	delta.Extents = stream(ctx, d.layered, "Extents", open, func(e cbt.Extent) (off, length int64) {
		off, at = at, e.End()
		return off, at - off
	})
	return delta, nil
}

type opener struct {
	layered
	inner Opener
}

func (o opener) Open(ctx context.Context, id SnapshotID) (Image, error) {
	var img Image
	err := o.call(ctx, "Open", func(ctx context.Context) (err error) { img, err = o.inner.Open(ctx, id); return err })
	if err != nil {
		if img != nil {
			img.Close() // opened, but the layer says otherwise
		}
		return nil, err
	}
	return image{o.layered, img}, nil
}

type image struct {
	layered
	Image
}

func (m image) ReadAt(ctx context.Context, p []byte, off int64) (n int, err error) {
	end := false
	err = m.layer.Around(ctx, Call{"ReadAt", off, int64(len(p))}, func(ctx context.Context, c Call) (err error) {
		n, err = m.Image.ReadAt(ctx, p[:c.Length], off)
		if end = err == io.EOF; end {
			return nil
		}
		return err
	})
	if err == nil && end {
		err = io.EOF
	}
	return n, err
}

type restorer struct {
	layered
	inner Restorer
}

func (r restorer) Begin(ctx context.Context, spec VolumeSpec) (Target, error) {
	return begin(ctx, r.layered, "Begin", func(ctx context.Context) (Target, error) { return r.inner.Begin(ctx, spec) })
}

type cloner struct {
	layered
	inner Cloner
}

func (c cloner) BeginClone(ctx context.Context, id SnapshotID, spec VolumeSpec) (Target, error) {
	return begin(ctx, c.layered, "BeginClone", func(ctx context.Context) (Target, error) { return c.inner.BeginClone(ctx, id, spec) })
}

func begin(ctx context.Context, l layered, method string, do func(context.Context) (Target, error)) (Target, error) {
	var t Target
	err := l.call(ctx, method, func(ctx context.Context) (err error) { t, err = do(ctx); return err })
	if err != nil {
		if t != nil {
			t.Close() // begun, but the layer says otherwise
		}
		return nil, err
	}
	return target{fileTarget{l, t}, t}, nil
}

type target struct {
	fileTarget
	inner Target
}

func (t target) ReadsZero() bool { return t.inner.ReadsZero() }

func (t target) Commit(ctx context.Context) (v Volume, err error) {
	err = t.call(ctx, "Commit", func(ctx context.Context) error { v, err = t.inner.Commit(ctx); return err })
	return v, err
}

func (t target) Abort(ctx context.Context) error {
	return t.call(ctx, "Abort", t.inner.Abort)
}

// layered is what every decorated thing knows.
type layered struct{ layer Layer }

func (l layered) call(ctx context.Context, method string, do func(context.Context) error) error {
	return l.layer.Around(ctx, Call{Method: method}, func(ctx context.Context, _ Call) error { return do(ctx) })
}

// listing is a stream whose places are counted.
func listing[T any](ctx context.Context, l layered, method string, open func(context.Context) iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		n := int64(-1)
		stream(ctx, l, method, open, func(T) (off, length int64) { n++; return n, 1 })(yield)
	}
}

// stream decorates a stream; place tells where an item is.
func stream[T any](ctx context.Context, l layered, method string, open func(context.Context) iter.Seq2[T, error], place func(T) (off, length int64)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		passed, left := false, false
		err := l.layer.Around(ctx, Call{Method: method}, func(ctx context.Context, c Call) error {
			for v, err := range open(ctx) {
				if err == nil && l.layer.Item != nil {
					c.Offset, c.Length = place(v)
					err = l.layer.Item(ctx, c)
				}
				switch {
				case err != nil && passed:
					return begun{err}
				case err != nil:
					return err
				}
				passed = true
				if left = !yield(v, nil); left {
					return nil
				}
			}
			return nil
		})
		if b, ok := errors.AsType[begun](err); ok {
			err = b.error
		}
		if err != nil && !left {
			var none T
			yield(none, err)
		}
	}
}
