package observe

import (
	"encoding/json"
	"io"
	"sync"
	"time"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/fault"
)

// Event is one line of a log of events.
type Event struct {
	Time        time.Time `json:"time"`
	Event       string    `json:"event"`     // begin, progress, end
	Operation   string    `json:"operation"` // backup, restore, verify, scrub
	Subject     string    `json:"subject"`   // of what
	Done        int64     `json:"done"`      // bytes
	Total       int64     `json:"total"`     // bytes known so far
	Rate        float64   `json:"rate"`      // bytes a second since the beginning
	SecondsLeft float64   `json:"seconds_left,omitempty"`
	Error       string    `json:"error,omitempty"` // of end
	Kind        string    `json:"kind,omitempty"`  // of the error, in words
}

// Events writes events, one JSON object a line. Its methods are safe in parallel.
type Events struct {
	mu  sync.Mutex
	out io.Writer
}

// NewEvents writes to out.
func NewEvents(out io.Writer) *Events { return &Events{out: out} }

// eventEvery is how often a running operation says how far it is.
const eventEvery = time.Second

// Begin tells of an operation until end is called with its error.
func (e *Events) Begin(operation, name string, p *backup.Progress) (end func(error)) {
	began := time.Now()
	stop, stopped := make(chan struct{}), make(chan struct{})
	e.write(event("begin", operation, name, p, began))
	go func() {
		defer close(stopped)
		tick := time.NewTicker(eventEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				e.write(event("progress", operation, name, p, began))
			case <-stop:
				return
			}
		}
	}()
	return func(err error) {
		close(stop)
		<-stopped
		last := event("end", operation, name, p, began)
		if last.SecondsLeft = 0; err != nil {
			last.Error, last.Kind = err.Error(), fault.KindOf(err).String()
		}
		e.write(last)
	}
}

func event(what, operation, name string, p *backup.Progress, began time.Time) Event {
	e := Event{Time: time.Now().UTC(), Event: what, Operation: operation, Subject: name, Done: p.Done.Load(), Total: p.Total.Load()}
	if e.Rate = float64(e.Done) / time.Since(began).Seconds(); e.Rate > 0 {
		e.SecondsLeft = float64(max(e.Total-e.Done, 0)) / e.Rate
	}
	return e
}

func (e *Events) write(v Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	json.NewEncoder(e.out).Encode(v) // nobody is left to tell when this fails
}
