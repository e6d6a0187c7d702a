package backup

import (
	"cmp"
	"context"
	"math"
	"time"
)

// Pace says how often a backup takes a checkpoint. Both must be met: so much was read since the last, and so much time
// has passed as makes the last one's duration a small share. And none is older than half an hour while something was
// done, so that kopia's maintenance, whose cycles are hours apart, always finds one. A zero field means its default.
type Pace struct {
	Bytes int64         // by default DefaultPaceBytes, or a sixteenth of what was read so far where that is more
	Time  time.Duration // by default a second, or twenty times the last checkpoint's duration where that is more
}

// DefaultPaceBytes is how much a backup reads, in bytes, between checkpoints at the least.
const DefaultPaceBytes = 64 << 20

const paceMax = 30 * time.Minute

// due decides, by what was read in all and until the last checkpoint, and by the time since then.
func (p Pace) due(read, last int64, since, cost time.Duration) bool {
	if since >= paceMax {
		return read > last
	}
	return read-last >= p.stride(last) && since >= cmp.Or(p.Time, max(time.Second, 20*cost))
}

// stride is how much is read from one checkpoint to the next at the least.
func (p Pace) stride(last int64) int64 { return cmp.Or(p.Bytes, max(DefaultPaceBytes, last/16)) }

// keeper takes a backup's checkpoints, one at a time and in the background of the line; the line waits only when it is far
// ahead of the one that is being taken.
type keeper struct {
	pace Pace
	// capture takes note of what is done, and gives what makes a checkpoint of it. It is called by step and last. nil: no
	// checkpoints are taken.
	capture func() func(context.Context) error

	running chan error // not nil while one is being taken
	kept    int64      // how much was done, in bytes, in the last one
	read    int64      // and bytes read until then
	began   time.Time  // when it was begun
	cost    time.Duration
}

// ahead is how many strides the line may be ahead of a checkpoint that is being taken.
const ahead = 4

// step begins a checkpoint if one is due, and returns the error of the one before. So many bytes are done, and so many were
// read for it.
func (k *keeper) step(ctx context.Context, done, read int64) error {
	if k.running != nil {
		if len(k.running) == 0 && read-k.read < ahead*k.pace.stride(k.read) {
			return nil
		}
		if err := k.wait(); err != nil {
			return err
		}
		k.cost = time.Since(k.began)
	}
	if k.capture == nil || done <= k.kept || !k.pace.due(read, k.read, time.Since(k.began), k.cost) {
		return nil
	}
	k.kept, k.read, k.began = done, read, time.Now()
	keep, running := k.capture(), make(chan error, 1)
	k.running = running
	ctx, end := lingering(ctx)
	go func() {
		defer end()
		running <- keep(ctx)
	}()
	return nil
}

// wait waits for the checkpoint that is being taken. After one that failed no other is taken: what it was to make durable is
// lost, and a later one would build on that.
func (k *keeper) wait() error {
	if k.running == nil {
		return nil
	}
	err := <-k.running
	if k.running = nil; err != nil {
		k.capture = nil
	}
	return err
}

// lastWords is how long an interrupted backup may take for its last checkpoint.
const lastWords = 20 * time.Second

// lingering is a context that ends lastWords after another one: a checkpoint that is being taken when a backup is
// interrupted comes to its end.
func lingering(ctx context.Context) (context.Context, context.CancelFunc) {
	long, cancel := context.WithCancel(context.WithoutCancel(ctx))
	timer := time.AfterFunc(time.Duration(math.MaxInt64), cancel)
	stop := context.AfterFunc(ctx, func() { timer.Reset(lastWords) })
	return long, func() {
		stop()
		timer.Stop()
		cancel()
	}
}

// last takes a checkpoint of an interrupted backup, whose context may be over. Nothing else of it may run any more.
func (k *keeper) last(ctx context.Context, done int64) error {
	if k.capture == nil || done <= k.kept {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWords)
	defer cancel()
	return k.capture()(ctx)
}
