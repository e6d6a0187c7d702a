package backup

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// Unaudited says how far a volume's backups are proved by looking.
type Unaudited struct {
	Volume adapters.VolumeID
	// Since is the instant since which nobody looked at some stretch of the volume: what a backend missed there after it
	// would not have been noticed. Zero: all of the newest backup was held against its snapshot.
	Since time.Time
}

// OldestUnaudited tells it for each volume that has backups, the one that was neglected longest first and those without
// anything to look at last.
func OldestUnaudited(ctx context.Context, r *repository.Repository) ([]Unaudited, error) {
	all, err := r.Backups(ctx, repository.Filter{})
	if err != nil {
		return nil, err
	}
	var found []Unaudited
	seen := map[adapters.VolumeID]bool{}
	for _, b := range all { // newest first
		if seen[b.Volume] {
			continue
		}
		seen[b.Volume] = true
		if b.Form == adapters.TreeForm {
			continue // looked at as a whole every now and then, by its backups
		}
		known, err := loadAudited(ctx, r, b.Volume)
		if err != nil {
			return nil, err
		}
		u := Unaudited{Volume: b.Volume}
		if since := known.Coverage.Oldest(); since.Before(b.Created) {
			u.Since = since
		}
		found = append(found, u)
	}
	slices.SortStableFunc(found, func(a, b Unaudited) int {
		if a.Since.IsZero() != b.Since.IsZero() {
			if a.Since.IsZero() {
				return 1
			}
			return -1
		}
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Volume.String(), b.Volume.String()))
	})
	return found, nil
}

// UnauditedGauge is the metric of it, registered at to: for each volume the time since which nobody looked at some
// stretch of it, in seconds since 1970, or now if there is nothing to look at. `time() - …` is the age to alert on.
func UnauditedGauge(to prometheus.Registerer, remote string, volumes []Unaudited, now time.Time) error {
	gauge := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name:        "stillpoint_backup_unaudited_since_timestamp_seconds",
		Help:        "Since when nobody compared some stretch of the volume with its backup.",
		ConstLabels: prometheus.Labels{"remote": remote},
	}, []string{"volume"})
	for _, v := range volumes {
		since := v.Since
		if since.IsZero() {
			since = now
		}
		gauge.WithLabelValues(v.Volume.String()).Set(float64(since.UnixNano()) / 1e9)
	}
	return to.Register(gauge)
}
