package adapters

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stillpoint.io/stillpoint/fault"
)

// Metrics counts calls and errors, and times calls, by backend and method:
//
//	stillpoint_adapter_calls_total{backend,method}
//	stillpoint_adapter_errors_total{backend,method,kind}   kind is fault.Kind in words, or "cancelled"
//	stillpoint_adapter_seconds{backend,method}             a histogram; streams are not in it: their pace is the reader's
//
// Backends that are given the same Registerer share its collectors. Put Metrics inside Retry to see every attempt.
func Metrics(a Adapter, backend string, r prometheus.Registerer) (Adapter, error) {
	calls := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "stillpoint_adapter_calls_total", Help: "Calls of adapters.",
	}, []string{"backend", "method"})
	failed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "stillpoint_adapter_errors_total", Help: "Calls of adapters that failed, by kind of error.",
	}, []string{"backend", "method", "kind"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "stillpoint_adapter_seconds", Help: "Time that calls of adapters took; streams are not timed.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10), // 0.1 ms to 26 s
	}, []string{"backend", "method"})
	if err := errors.Join(register(r, &calls), register(r, &failed), register(r, &seconds)); err != nil {
		return nil, err
	}
	return Decorate(a, Layer{Around: func(ctx context.Context, c Call, do Do) error {
		calls.WithLabelValues(backend, c.Method).Inc()
		start := time.Now()
		err := do(ctx, c)
		if !streams[c.Method] {
			seconds.WithLabelValues(backend, c.Method).Observe(time.Since(start).Seconds())
		}
		if err != nil {
			kind := fault.KindOf(err).String()
			if errors.Is(err, context.Canceled) {
				kind = "cancelled"
			}
			failed.WithLabelValues(backend, c.Method, kind).Inc()
		}
		return err
	}}), nil
}

// streams are the methods of calls that last as long as their caller reads.
var streams = map[string]bool{"Extents": true, "Snapshots": true, "Volumes": true, "Entries": true}

// register registers a collector, or replaces it by the one that is registered already.
func register[C prometheus.Collector](r prometheus.Registerer, c *C) error {
	err := r.Register(*c)
	if are, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		if same, ok := are.ExistingCollector.(C); ok {
			*c = same
			return nil
		}
	}
	return err
}
