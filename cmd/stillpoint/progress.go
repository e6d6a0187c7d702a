package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/observe"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// progressFlags say how a command tells how far it is, to stderr and to a file of metrics.
type progressFlags struct{ mode, metrics string }

func (f *progressFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.mode, "progress", "auto", "how progress is shown on stderr: bar, lines, json (events, one a line), none, or auto (bar on a terminal, lines elsewhere, none with --json)")
	c.Flags().StringVar(&f.metrics, "metrics-file", "", "write Prometheus metrics to this `file` while the command runs and at its end")
}

// meter shows the progress of what runs, several things at once if need be.
type meter struct {
	metrics *observe.Metrics
	show    func(operation, subject string, p *backup.Progress) (end func(error))
	bars    *mpb.Progress
	stop    context.CancelFunc
	written chan error
}

// meter starts showing. Close it.
func (a *app) meter(ctx context.Context, f progressFlags) (*meter, error) {
	m := &meter{metrics: observe.New(), stop: func() {}}
	stderr, isFile := a.stderr.(*os.File)
	mode := f.mode
	if mode == "auto" {
		switch {
		case a.json:
			mode = "none"
		case isFile && term.IsTerminal(int(stderr.Fd())):
			mode = "bar"
		default:
			mode = "lines"
		}
	}
	switch mode {
	case "none":
		m.show = func(string, string, *backup.Progress) func(error) { return func(error) {} }
	case "bar":
		m.bars = mpb.New(mpb.WithOutput(a.stderr), mpb.WithWidth(50))
		m.show = m.bar
	case "lines":
		out := &serial{out: a.stderr}
		m.show = func(operation, subject string, p *backup.Progress) func(error) {
			return lines(out, operation+" of "+subject, p)
		}
	case "json":
		out := &serial{out: a.stderr}
		slog.SetDefault(slog.New(slog.NewJSONHandler(out, nil))) // so that every line of stderr is JSON
		m.show = observe.NewEvents(out).Begin
	default:
		return nil, fault.Errorf(fault.Invalid, "--progress %q: must be auto, bar, lines, json or none", f.mode)
	}
	if f.metrics != "" {
		ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
		m.stop, m.written = stop, make(chan error, 1)
		go func() { m.written <- m.metrics.Textfile(ctx, f.metrics) }()
	}
	return m, nil
}

// run does work and shows how far it is.
func (m *meter) run(operation, subject string, work func(*backup.Progress) error) error {
	p := new(backup.Progress)
	count := m.metrics.Begin(operation, subject, p)
	end := m.show(operation, subject, p)
	err := work(p)
	end(err)
	count(err)
	return err
}

// remote adds to the metrics how far the backups in a remote are proved: since when nobody looked at some stretch of a
// volume, and since when some backup was not verified.
func (m *meter) remote(ctx context.Context, r *repository.Repository) error {
	if m.written == nil {
		return nil
	}
	looked, err := backup.OldestUnaudited(ctx, r)
	if err != nil {
		return err
	}
	all, err := r.Backups(ctx, repository.Filter{})
	if err != nil {
		return err
	}
	m.metrics.Unverified(r.Remote(), all)
	return backup.UnauditedGauge(m.metrics.Registry(), r.Remote(), looked, time.Now())
}

// Close ends the showing and writes the metrics for the last time.
func (m *meter) Close() error {
	if m.bars != nil {
		m.bars.Wait()
	}
	m.stop()
	if m.written == nil {
		return nil
	}
	return <-m.written
}

// bar draws a bar of its own until end is called.
func (m *meter) bar(operation, subject string, p *backup.Progress) (end func(error)) {
	b := m.bars.AddBar(0,
		mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name(operation+" of "+subject+" "), decor.CountersKibiByte("% .1f / % .1f")),
		mpb.AppendDecorators(decor.Percentage(), decor.AverageSpeed(decor.SizeB1024(0), " % .1f"), decor.AverageETA(decor.ET_STYLE_GO, decor.WC{W: 6})),
	)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			b.SetTotal(max(p.Total.Load(), 1), false)
			b.SetCurrent(p.Done.Load())
			select {
			case <-tick.C:
			case <-stop:
				b.Abort(true)
				return
			}
		}
	}()
	return func(error) {
		close(stop)
		<-stopped
	}
}

// lines prints how far it is every few seconds until end is called.
func lines(w io.Writer, what string, p *backup.Progress) (end func(error)) {
	const every = 5 * time.Second
	stop, stopped := make(chan struct{}), make(chan struct{})
	begin := time.Now()
	go func() {
		defer close(stopped)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				total, done := p.Total.Load(), p.Done.Load()
				rate := float64(done) / time.Since(begin).Seconds()
				left := "unknown"
				if rate > 0 {
					left = time.Duration(float64(max(total-done, 0)) / rate * 1e9).Round(time.Second).String()
				}
				fmt.Fprintf(w, "%s: %v of %v, %v/s, %s left\n", what, bytesize(done), bytesize(total), bytesize(rate), left)
			case <-stop:
				return
			}
		}
	}()
	return func(error) {
		close(stop)
		<-stopped
	}
}

// serial is a writer that may be used in parallel.
type serial struct {
	mu  sync.Mutex
	out io.Writer
}

func (s *serial) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(p)
}
