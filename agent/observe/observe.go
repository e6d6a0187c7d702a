// Package observe tells how backups are doing: as Prometheus metrics, which a node exporter's textfile collector can pick
// up, and as events, one JSON object a line.
//
// # Metrics
//
//	stillpoint_progress_bytes{operation,subject,state}      state is done or total, while something runs
//	stillpoint_backup_last_success_timestamp_seconds{volume,remote}
//	stillpoint_backup_seconds{volume,remote}                how long the last one took
//	stillpoint_backup_bytes{volume,remote,what}             what is read, audited, new, reused, stored or resumed
//	stillpoint_backups_total{volume,remote,kind}            since the process started
//	stillpoint_failures_total{operation,kind}               kind is fault.Kind in words
//	stillpoint_distrusted_total{volume}                     backups made anew since changed blocks could not be trusted
//	stillpoint_backup_unverified_since_timestamp_seconds{remote}        of the backup that was verified longest ago, or made
//	stillpoint_backup_unaudited_since_timestamp_seconds{remote,volume}  see backup.UnauditedGauge
package observe

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// Metrics collects what one process does. Its methods are safe in parallel.
type Metrics struct {
	registry *prometheus.Registry

	mu      sync.Mutex
	running map[*backup.Progress]subject

	success, seconds, bytes    *prometheus.GaugeVec
	unverified                 *prometheus.GaugeVec
	made, failures, distrusted *prometheus.CounterVec
	progress                   *prometheus.Desc
}

// subject is something that runs: the backup of a volume, the verification of a backup.
type subject struct{ operation, name string }

// New makes an empty collection.
func New() *Metrics {
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "stillpoint_" + name, Help: help}, labels)
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stillpoint_" + name, Help: help}, labels)
	}
	m := &Metrics{
		registry:   prometheus.NewRegistry(),
		running:    map[*backup.Progress]subject{},
		success:    gauge("backup_last_success_timestamp_seconds", "When the last backup of a volume was complete.", "volume", "remote"),
		seconds:    gauge("backup_seconds", "How long the last backup of a volume took.", "volume", "remote"),
		bytes:      gauge("backup_bytes", "What the last backup of a volume read, audited, found new, reused, stored, and had from an interrupted run.", "volume", "remote", "what"),
		unverified: gauge("backup_unverified_since_timestamp_seconds", "When the backup that was verified longest ago was verified, or made.", "remote"),
		made:       counter("backups_total", "Backups made.", "volume", "remote", "kind"),
		failures:   counter("failures_total", "Operations that failed, by kind of error.", "operation", "kind"),
		distrusted: counter("distrusted_total", "Backups that were made again as full ones, since changed blocks could not be trusted.", "volume"),
		progress:   prometheus.NewDesc("stillpoint_progress_bytes", "How far what runs is.", []string{"operation", "subject", "state"}, nil),
	}
	m.registry.MustRegister(m, m.unverified, m.success, m.seconds, m.bytes, m.made, m.failures, m.distrusted)
	return m
}

// Registry is where the metrics are gathered, and where others may register theirs.
func (m *Metrics) Registry() *prometheus.Registry { return m.registry }

// Begin follows a progress until end is called, with the error of what ran.
func (m *Metrics) Begin(operation, name string, p *backup.Progress) (end func(error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.running[p] = subject{operation, name}
	return func(err error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.running, p)
		if err != nil {
			m.failures.WithLabelValues(operation, fault.KindOf(err).String()).Inc()
		}
	}
}

// Backup notes a backup that was made.
func (m *Metrics) Backup(volume, remote string, r backup.Report) {
	m.success.WithLabelValues(volume, remote).SetToCurrentTime()
	m.seconds.WithLabelValues(volume, remote).Set(r.Seconds)
	for what, n := range map[string]int64{
		"read": r.BytesRead, "audited": r.BytesAudited, "new": r.BytesNew, "reused": r.BytesReused, "stored": r.BytesStored, "resumed": r.BytesResumed,
	} {
		m.bytes.WithLabelValues(volume, remote, what).Set(float64(n))
	}
	m.made.WithLabelValues(volume, remote, string(r.Kind)).Inc()
	if r.Distrusted {
		m.distrusted.WithLabelValues(volume).Inc()
	}
}

// Unverified notes which of a remote's backups was verified longest ago.
func (m *Metrics) Unverified(remote string, all []repository.Backup) {
	if len(all) == 0 {
		return
	}
	oldest := slices.MinFunc(all, func(a, b repository.Backup) int { return a.KnownSound().Compare(b.KnownSound()) })
	m.unverified.WithLabelValues(remote).Set(float64(oldest.KnownSound().UnixNano()) / 1e9)
}

// Describe is for Prometheus.
func (m *Metrics) Describe(c chan<- *prometheus.Desc) { c <- m.progress }

// Collect is for Prometheus.
func (m *Metrics) Collect(c chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p, s := range m.running {
		for state, n := range map[string]int64{"done": p.Done.Load(), "total": p.Total.Load()} {
			c <- prometheus.MustNewConstMetric(m.progress, prometheus.GaugeValue, float64(n), s.operation, s.name, state)
		}
	}
}

// textfileEvery is how often a file of metrics is written while something runs.
const textfileEvery = 10 * time.Second

// Textfile writes the metrics to a file in Prometheus's text form, now and then and when the context ends; the file is
// replaced as a whole each time.
func (m *Metrics) Textfile(ctx context.Context, path string) error {
	tick := time.NewTicker(textfileEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := prometheus.WriteToTextfile(path, m.registry); err != nil {
				return fault.Errorf(fault.Invalid, "the file of metrics: %w", err)
			}
		case <-ctx.Done():
			if err := prometheus.WriteToTextfile(path, m.registry); err != nil {
				return fault.Errorf(fault.Invalid, "the file of metrics: %w", err)
			}
			return nil
		}
	}
}
