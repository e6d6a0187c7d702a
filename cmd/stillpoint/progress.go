package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"stillpoint.io/stillpoint/agent/backup"
)

// withProgress runs work and shows how far it is: a bar with rate and time left on a terminal, a line every few
// seconds elsewhere, and nothing with --json. It goes to stderr.
func (a *app) withProgress(ctx context.Context, what string, work func(*backup.Progress) error) error {
	var p backup.Progress
	stop := make(chan struct{})
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		f, isFile := a.stderr.(*os.File)
		switch {
		case a.json:
		case isFile && term.IsTerminal(int(f.Fd())):
			bar(f, what, &p, stop)
		default:
			lines(a.stderr, what, &p, stop)
		}
	}()
	err := work(&p)
	close(stop)
	<-finished
	return err
}

// bar draws a progress bar until stop.
func bar(w io.Writer, what string, p *backup.Progress, stop <-chan struct{}) {
	all := mpb.New(mpb.WithOutput(w), mpb.WithWidth(50))
	b := all.AddBar(0,
		mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name(what+" "), decor.CountersKibiByte("% .1f / % .1f")),
		mpb.AppendDecorators(decor.Percentage(), decor.AverageSpeed(decor.SizeB1024(0), " % .1f"), decor.AverageETA(decor.ET_STYLE_GO, decor.WC{W: 6})),
	)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		b.SetTotal(max(p.Total.Load(), 1), false)
		b.SetCurrent(p.Done.Load())
		select {
		case <-tick.C:
		case <-stop:
			b.Abort(true)
			all.Wait()
			return
		}
	}
}

// lines prints how far it is every few seconds until stop.
func lines(w io.Writer, what string, p *backup.Progress, stop <-chan struct{}) {
	const every = 5 * time.Second
	tick := time.NewTicker(every)
	defer tick.Stop()
	begin := time.Now()
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
}
