package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/kube/class"
)

// Recorder puts events on VolumeSnapshots. Telling never waits for the API server: events wait in a queue, for as long as
// the server is away, and what does not fit into it or is refused is lost and counted. An event that was told before raises
// the count of the one that is there. Close it.
type Recorder struct {
	api    *API
	source corev1.EventSource
	queue  chan told
	lost   atomic.Int64
	cancel context.CancelFunc
	owner  sync.WaitGroup
	counts map[string]int32 // by the event's name; of the worker only
}

type told struct {
	origin class.Origin
	event  Event
	when   time.Time
}

const (
	queueLength = 1024
	mostCounts  = 4096             // events whose counts are remembered: some 100 bytes each
	tryLimit    = 10 * time.Second // of one request
	tryAgain    = time.Second
)

// NewRecorder makes one for a component on a node, such as "stillpoint-agent".
func (a *API) NewRecorder(component, node string) *Recorder {
	ctx, cancel := context.WithCancel(context.Background())
	r := &Recorder{api: a, source: corev1.EventSource{Component: component, Host: node}, queue: make(chan told, queueLength), cancel: cancel, counts: map[string]int32{}}
	r.owner.Go(func() { r.work(ctx) })
	return r
}

// Tell puts an event on a VolumeSnapshot.
func (r *Recorder) Tell(o class.Origin, e Event) {
	select {
	case r.queue <- told{o, e, time.Now()}:
	default:
		r.lost.Add(1)
	}
}

// Lost is how many events nobody will see.
func (r *Recorder) Lost() int64 { return r.lost.Load() }

// Close ends it: what is still in the queue is lost. Nothing may be told afterwards.
func (r *Recorder) Close() {
	r.cancel()
	r.owner.Wait()
}

func (r *Recorder) work(ctx context.Context) {
	for {
		select {
		case t := <-r.queue:
			r.write(ctx, t)
		case <-ctx.Done():
			return
		}
	}
}

// write writes one event, until the server takes or refuses it.
func (r *Recorder) write(ctx context.Context, t told) {
	for {
		err := r.try(ctx, t)
		switch {
		case err == nil:
			return
		case ctx.Err() != nil, refused(err):
			r.lost.Add(1)
			slog.WarnContext(ctx, "an event is lost", "snapshot", t.origin.String(), "event", t.event.Message, "error", err.Error())
			return
		}
		select {
		case <-time.After(tryAgain):
		case <-ctx.Done():
		}
	}
}

// refused says whether the server read the event and will never take it: we may not, or the namespace is gone.
func refused(err error) bool {
	return apierrors.IsForbidden(err) || apierrors.IsNotFound(err) || apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)
}

func (r *Recorder) try(ctx context.Context, t told) error {
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	event := t.object(r.source)
	events := r.api.core.CoreV1().Events(t.origin.Namespace)
	if _, known := r.counts[event.Name]; !known {
		_, err := events.Create(ctx, event, metav1.CreateOptions{})
		if err == nil {
			r.remember(event.Name, 1)
		}
		if !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	// It was told before: by this process, which knows how often, or by another, which counted on its own.
	change := map[string]any{"lastTimestamp": event.LastTimestamp}
	if n, known := r.counts[event.Name]; known {
		change["count"] = n + 1
	}
	patch, err := json.Marshal(change)
	if err != nil {
		return err
	}
	now, err := events.Patch(ctx, event.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) { // API servers forget events, after an hour by default
		delete(r.counts, event.Name)
		_, err = events.Create(ctx, event, metav1.CreateOptions{})
		return err
	}
	if err == nil {
		r.remember(event.Name, now.Count)
	}
	return err
}

// remember keeps a count; when there are too many it starts anew, and counts go on from what the server says.
func (r *Recorder) remember(name string, count int32) {
	if len(r.counts) >= mostCounts {
		clear(r.counts)
	}
	r.counts[name] = count
}

// object is the event as the API has it. Its name follows from what it says, so that telling it again finds it.
func (t told) object(source corev1.EventSource) *corev1.Event {
	name := adapters.ShortName(fmt.Sprintf("%q %q %q %q", t.origin.UID, t.event.Type, t.event.Reason, t.event.Message))
	when := metav1.NewTime(t.when)
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: t.origin.Namespace, Name: "stillpoint." + name},
		InvolvedObject: corev1.ObjectReference{APIVersion: "snapshot.storage.k8s.io/v1", Kind: "VolumeSnapshot", Namespace: t.origin.Namespace,
			Name: t.origin.Name, UID: types.UID(t.origin.UID)},
		Type: t.event.Type, Reason: t.event.Reason, Message: truncated(t.event.Message), Source: source, FirstTimestamp: when, LastTimestamp: when, Count: 1,
	}
}

// mostMessage is how long a message may be, in bytes: the API refuses longer ones of the newer kind of events.
const mostMessage = 1024

func truncated(s string) string {
	if len(s) <= mostMessage {
		return s
	}
	const more = " …"
	return strings.ToValidUTF8(s[:mostMessage-len(more)], "") + more
}
