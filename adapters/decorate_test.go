package adapters_test

import (
	"context"
	"errors"
	"io"
	"iter"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/fault"
)

// volume is the one that tests of decorators use, of 1 MiB with two data extents.
var volume = adapters.VolumeID{Backend: "b", ID: "local/v"}

// fixture is a store with that volume and a verified snapshot "s" of it.
func fixture(t testing.TB) (*mem.Adapter, adapters.SnapshotID) {
	t.Helper()
	store := new(mem.Store)
	v, err := store.Create("v", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	v.WriteAt([]byte("first"), 0)
	v.WriteAt([]byte("second"), 512<<10)
	a := store.Adapter("b")
	s, err := a.CreateSnapshot(t.Context(), volume, "s")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Publish(t.Context(), s.ID, adapters.Notes{}); err != nil {
		t.Fatal(err)
	}
	return a, s.ID
}

// bare has the obligatory methods only.
type bare struct{ adapters.Adapter }

// listing can list, and nothing else.
type listing struct{ bare }

func (l listing) Volumes(ctx context.Context) iter.Seq2[adapters.Volume, error] {
	return func(yield func(adapters.Volume, error) bool) { yield(l.Volume(ctx, volume)) }
}

// decorators are all that there are, doing nothing that shows.
func decorators(t testing.TB) map[string]func(adapters.Adapter) adapters.Adapter {
	return map[string]func(adapters.Adapter) adapters.Adapter{
		"Retry":  func(a adapters.Adapter) adapters.Adapter { return adapters.Retry(a, adapters.RetryPolicy{}) },
		"Faults": func(a adapters.Adapter) adapters.Adapter { return adapters.Faults{}.Decorate(a) },
		"Metrics": func(a adapters.Adapter) adapters.Adapter {
			return must(adapters.Metrics(a, "b", prometheus.NewRegistry()))
		},
	}
}

// A decorated adapter has the abilities of what it wraps: no fewer, and no more.
func TestDecoratorsKeepAbilities(t *testing.T) {
	m, _ := fixture(t)
	for what, a := range map[string]adapters.Adapter{"mem": m, "bare": bare{m}, "listing": listing{bare{m}}} {
		want := adapters.CapabilitiesOf(a)
		if what == "bare" && slices.Contains(slices.Collect(maps.Values(want.Abilities)), true) {
			t.Fatalf("the bare adapter can %v", want.Abilities)
		}
		if what == "listing" && !want.Abilities["list"] {
			t.Fatalf("the listing adapter can %v", want.Abilities)
		}
		outer := a
		for name, decorate := range decorators(t) {
			if got := adapters.CapabilitiesOf(decorate(a)); !maps.Equal(got.Abilities, want.Abilities) || got.Quiesce != want.Quiesce {
				t.Errorf("%s around %s: %v instead of %v", name, what, got.Abilities, want.Abilities)
			}
			outer = decorate(outer)
		}
		if got := adapters.CapabilitiesOf(outer); !maps.Equal(got.Abilities, want.Abilities) {
			t.Errorf("all around %s: %v instead of %v", what, got.Abilities, want.Abilities)
		}
	}
}

// calls makes every call there is on a decorated adapter. It returns the errors by method.
func calls(ctx context.Context, a adapters.Adapter, s adapters.SnapshotID) map[string]error {
	errs := make(map[string]error)
	_, errs["Volume"] = a.Volume(ctx, volume)
	_, errs["CreateSnapshot"] = a.CreateSnapshot(ctx, volume, "other")
	errs["Publish"] = a.Publish(ctx, s, adapters.Notes{})
	_, errs["Snapshot"] = a.Snapshot(ctx, s)
	errs["DeleteSnapshot"] = a.DeleteSnapshot(ctx, adapters.SnapshotID{Volume: volume, Name: "other"})
	for _, err := range a.Snapshots(ctx, adapters.Filter{}) {
		errs["Snapshots"] = err
	}
	if l, ok := adapters.As[adapters.Lister](a); ok {
		for _, err := range l.Volumes(ctx) {
			errs["Volumes"] = err
		}
	}
	if g, ok := adapters.As[adapters.Gater](a); ok {
		_, errs["Gate"] = g.Gate(ctx, []adapters.VolumeID{volume})
	}
	if st, ok := adapters.As[adapters.Stager](a); ok {
		errs["Stage"], errs["Unstage"] = st.Stage(ctx, volume, "x"), st.Unstage(ctx, volume, "x")
	}
	if d, ok := adapters.As[adapters.Differ](a); ok {
		delta, err := d.Allocated(ctx, s, 0)
		if errs["Allocated"] = err; err == nil {
			for _, err := range delta.Extents {
				errs["Extents"] = err
			}
		}
		_, errs["Changed"] = d.Changed(ctx, s, s, 0)
	}
	if o, ok := adapters.As[adapters.Opener](a); ok {
		img, err := o.Open(ctx, s)
		if errs["Open"] = err; err == nil {
			_, errs["ReadAt"] = img.ReadAt(ctx, make([]byte, 8), 0)
			img.Close()
		}
	}
	if r, ok := adapters.As[adapters.Restorer](a); ok {
		for _, last := range []string{"Commit", "Abort"} {
			target, err := r.Begin(ctx, adapters.VolumeSpec{ID: volume, Size: 1 << 20, Token: "t", Overwrite: true})
			if errs["Begin"] = err; err != nil {
				continue
			}
			errs["WriteAt"], errs["Zero"] = target.WriteAt(ctx, []byte("x"), 9), target.Zero(ctx, 9, 1)
			if last == "Commit" {
				_, errs[last] = target.Commit(ctx)
			} else {
				errs[last] = target.Abort(ctx)
			}
			target.Close()
		}
	}
	return errs
}

// Every method passes through every decorator, is counted, and can be made to fail.
func TestEveryMethodIsDecorated(t *testing.T) {
	m, s := fixture(t)
	registry := prometheus.NewPedanticRegistry()
	var all []string
	for _, inner := range []adapters.Adapter{m, listing{bare{m}}} {
		a := must(adapters.Metrics(inner, "b", registry))
		for method, err := range calls(t.Context(), a, s) {
			if err != nil {
				t.Errorf("%s: %v", method, err)
			}
			if !slices.Contains(all, method) {
				all = append(all, method)
			}
			a := must(adapters.ParseFaults(method + "=corrupt")).Decorate(inner)
			if err := calls(t.Context(), a, s)[method]; !errors.Is(err, fault.Corrupt) {
				t.Errorf("%s was made to fail as corrupt: %v", method, err)
			}
			retried := adapters.Retry(must(adapters.ParseFaults(method+":1=unavailable")).Decorate(inner), adapters.RetryPolicy{First: time.Microsecond})
			if err := calls(t.Context(), retried, s)[method]; err != nil && method != "Commit" && method != "Abort" {
				t.Errorf("%s failed once and was not tried again: %v", method, err)
			} else if err == nil && (method == "Commit" || method == "Abort") {
				t.Errorf("%s closes its target and was tried again", method)
			}
		}
	}
	if len(all) != 20 {
		t.Errorf("%d methods are tested: %v", len(all), all)
	}
	counted := 0
	for _, f := range must(registry.Gather()) {
		if f.GetName() == "stillpoint_adapter_calls_total" {
			counted = len(f.GetMetric())
		}
	}
	if counted != len(all) {
		t.Errorf("%d methods are counted, %d exist", counted, len(all))
	}
	if err := m.Close(); err != nil {
		t.Errorf("a decorator left something open: %v", err)
	}
}

func TestMetrics(t *testing.T) {
	m, s := fixture(t)
	registry := prometheus.NewPedanticRegistry()
	faulty := must(adapters.ParseFaults("Snapshot:1=not-found, Snapshot:2=unavailable, Extents@512KiB=corrupt")).Decorate(m)
	a := must(adapters.Metrics(faulty, "one", registry))
	other := must(adapters.Metrics(m, "two", registry))
	ctx, cancel := context.WithCancel(t.Context())
	for range 3 {
		a.Snapshot(ctx, s)
	}
	other.Snapshot(ctx, s)
	cancel()
	a.Snapshot(ctx, s)
	d, _ := adapters.As[adapters.Differ](a)
	delta := must(d.Allocated(t.Context(), s, 0))
	for range delta.Extents {
	}
	o, _ := adapters.As[adapters.Opener](a)
	img := must(o.Open(t.Context(), s))
	if n, err := img.ReadAt(t.Context(), make([]byte, 8), 1<<20-4); n != 4 || err != io.EOF {
		t.Errorf("%d, %v", n, err)
	}
	img.Close()
	for name, want := range map[string]float64{"one": 4, "two": 1} {
		if got := sum(t, registry, "stillpoint_adapter_calls_total", "backend", name, "method", "Snapshot"); got != want {
			t.Errorf("%s: %v calls instead of %v", name, got, want)
		}
	}
	for kind, want := range map[string]float64{"not found": 1, "unavailable": 1, "cancelled": 1, "corrupt": 1, "internal": 0} {
		if got := sum(t, registry, "stillpoint_adapter_errors_total", "backend", "one", "kind", kind); got != want {
			t.Errorf("%v errors are %s, not %v", got, kind, want)
		}
	}
	if n := sum(t, registry, "stillpoint_adapter_seconds", "backend", "one", "method", "Extents"); n != 0 {
		t.Errorf("a stream was timed %v times", n)
	}
	if n := sum(t, registry, "stillpoint_adapter_seconds", "backend", "one", "method", "Snapshot"); n != 4 {
		t.Errorf("%v calls were timed", n)
	}
	wrong := prometheus.NewRegistry()
	wrong.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "stillpoint_adapter_calls_total", Help: "x"}))
	if _, err := adapters.Metrics(m, "b", wrong); err == nil {
		t.Error("a name that is taken by another collector was accepted")
	}
}

// sum adds the counters, or the numbers of observations, that bear the labels.
func sum(t testing.TB, g prometheus.Gatherer, name string, labels ...string) (total float64) {
	t.Helper()
	for _, family := range must(g.Gather()) {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			have := map[string]string{}
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			if have[labels[0]] == labels[1] && have[labels[2]] == labels[3] {
				total += m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return total
}

// flaky fails the first calls of Snapshot and notes when it was called.
type flaky struct {
	adapters.Adapter
	errs  []error
	calls []time.Duration // since start
	start time.Time
}

func (f *flaky) Snapshot(context.Context, adapters.SnapshotID) (adapters.Snapshot, error) {
	f.calls = append(f.calls, time.Since(f.start))
	if n := len(f.calls); n <= len(f.errs) {
		return adapters.Snapshot{}, f.errs[n-1]
	}
	return adapters.Snapshot{Wanted: "found"}, nil
}

func TestRetry(t *testing.T) {
	unavailable := fault.Errorf(fault.Unavailable, "gone for a moment")
	in := func(d time.Duration) error {
		return &fault.Error{Kind: fault.Exhausted, RetryAfter: d, Err: errors.New("slow down")}
	}
	forever := slices.Repeat([]error{unavailable}, 99)
	for name, c := range map[string]struct {
		errs     []error
		deadline time.Duration
		cancel   time.Duration
		calls    int
		kind     error
		atLeast  time.Duration // between the first call and the last
		atMost   time.Duration
	}{
		"once":               {errs: forever[:1], calls: 2, atLeast: 100 * time.Millisecond, atMost: 300 * time.Millisecond},
		"exponential":        {errs: forever[:4], calls: 5, atLeast: 1500 * time.Millisecond, atMost: 4500 * time.Millisecond},
		"bounded":            {errs: forever, calls: 6, kind: fault.Unavailable, atMost: 9300 * time.Millisecond},
		"deadline":           {errs: forever, deadline: time.Second, calls: 3, kind: fault.Unavailable, atMost: time.Second},
		"asked to wait":      {errs: []error{in(20 * time.Second)}, calls: 2, atLeast: 20 * time.Second, atMost: 20 * time.Second},
		"asked too much":     {errs: []error{in(time.Hour)}, calls: 1, kind: fault.Exhausted},
		"asked past the end": {errs: []error{in(20 * time.Second)}, deadline: 10 * time.Second, calls: 1, kind: fault.Exhausted},
		"cancelled":          {errs: forever, cancel: time.Millisecond, calls: 1, kind: context.Canceled, atMost: time.Second},
		"not found":          {errs: []error{fault.Errorf(fault.NotFound, "no")}, calls: 1, kind: fault.NotFound},
		"corrupt":            {errs: []error{fault.Errorf(fault.Corrupt, "no")}, calls: 1, kind: fault.Corrupt},
		"no kind":            {errs: []error{errors.New("no")}, calls: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if c.deadline > 0 {
					ctx, cancel = context.WithTimeout(ctx, c.deadline)
					defer cancel()
				}
				if c.cancel > 0 {
					time.AfterFunc(c.cancel, cancel)
				}
				f := &flaky{errs: c.errs, start: time.Now()}
				s, err := adapters.Retry(f, adapters.RetryPolicy{}).Snapshot(ctx, adapters.SnapshotID{})
				if err == nil && s.Wanted != "found" {
					t.Errorf("the answer is lost: %+v", s)
				}
				if c.kind != nil && !errors.Is(err, c.kind) || c.kind == nil && err != nil && name != "no kind" {
					t.Errorf("got %v, want %v", err, c.kind)
				}
				n, last := len(f.calls), f.calls[len(f.calls)-1]
				if name == "deadline" {
					if n < 2 || n > 4 || time.Since(f.start) > c.deadline {
						t.Errorf("%d calls, the last after %v", n, last)
					}
				} else if n != c.calls {
					t.Errorf("%d calls instead of %d", n, c.calls)
				}
				if last < c.atLeast || last > c.atMost {
					t.Errorf("the last call was after %v, not within %v and %v", last, c.atLeast, c.atMost)
				}
			})
		})
	}
}

// A stream is asked for again before its first item, never after it.
func TestRetryStreams(t *testing.T) {
	m, s := fixture(t)
	for text, want := range map[string]struct {
		extents int
		kind    error
	}{
		"Extents:1@0=unavailable":      {2, nil},
		"Extents:1=unavailable":        {2, nil},
		"Extents:1@512KiB=unavailable": {1, fault.Unavailable},
	} {
		a := adapters.Retry(must(adapters.ParseFaults(text)).Decorate(m), adapters.RetryPolicy{First: time.Microsecond})
		d, _ := adapters.As[adapters.Differ](a)
		delta := must(d.Allocated(t.Context(), s, 0))
		var err error
		n := 0
		for _, e := range delta.Extents {
			if err = e; err == nil {
				n++
			}
		}
		if n != want.extents || (want.kind == nil) != (err == nil) || want.kind != nil && !errors.Is(err, want.kind) || adapters.Begun(err) {
			t.Errorf("%s: %d extents, %v", text, n, err)
		}
	}
	for range 2 { // leaving early is no error
		a := adapters.Retry(m, adapters.RetryPolicy{})
		for _, err := range a.Snapshots(t.Context(), adapters.Filter{}) {
			if err != nil {
				t.Error(err)
			}
			break
		}
	}
}

func BenchmarkReadAtThroughThreeLayers(b *testing.B) {
	m, s := fixture(b)
	var a adapters.Adapter = m
	for _, decorate := range decorators(b) {
		a = decorate(a)
	}
	o, _ := adapters.As[adapters.Opener](a)
	img := must(o.Open(b.Context(), s))
	defer img.Close()
	p := make([]byte, 64<<10)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := img.ReadAt(b.Context(), p, 0); err != nil {
			b.Fatal(err)
		}
	}
}
