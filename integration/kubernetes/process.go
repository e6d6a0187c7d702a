package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"stillpoint.io/stillpoint/integration/peer"
)

// Process is a program of a cluster. Its output goes to a log that the cluster shows when a test fails. Methods may be
// called from any goroutine.
type Process struct {
	Name string

	place   *place
	command []string
	env     []string // beyond this process's own
	log     string
	again   bool // as a pod's container: when it ends by itself it is started again

	mu      sync.Mutex
	running *exec.Cmd     // nil while it is down
	ended   chan struct{} // closed when the program that was started last has ended
	err     error         // how it did
	down    bool          // somebody wants it to be
	owner   sync.WaitGroup
}

// restartDelay is what a kubelet's back-off would be, shortened: a program that ends at once shall not keep the machine busy.
const restartDelay = 200 * time.Millisecond

// Start starts the program, which must not be running.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running != nil {
		return fmt.Errorf("%s runs already", p.Name)
	}
	p.down = false
	return p.start()
}

// Kill ends the program at once and waits until it is gone; it stays down until Start. One that is down is no error.
func (p *Process) Kill() error { return p.end(syscall.SIGKILL) }

// Terminate asks the program to end, and waits until it has. One that is down is no error.
func (p *Process) Terminate() error { return p.end(syscall.SIGTERM) }

// Pause stops the program where it is: connections to it are accepted and get no answer. Resume lets it go on.
func (p *Process) Pause() error {
	if err := p.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return peer.Stopped(p.PID())
}

// Resume lets a paused program go on.
func (p *Process) Resume() error { return p.signal(syscall.SIGCONT) }

// PID is the number of the program's process, 0 while it is down.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running == nil {
		return 0
	}
	return p.running.Process.Pid
}

// Ended is closed when the program that was started last has ended, by itself or not.
func (p *Process) Ended() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended
}

// Wait waits until the program has ended by itself. One that ended with another code than 0 is an error that holds the end of
// its log.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.Ended():
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s: %w", p.Name, ctx.Err())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return fmt.Errorf("%s: %w: %s", p.Name, p.err, tail(p.Log(), 4000))
	}
	return nil
}

// Log is what the program has said so far, in all its lives.
func (p *Process) Log() string {
	text, _ := os.ReadFile(p.log) // none is nothing said
	return string(text)
}

// start is Start, locked.
func (p *Process) start() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(p.command[0], p.command[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = filepath.Dir(p.log), append(os.Environ(), p.env...), log, log
	if err := p.place.start(cmd); err != nil {
		return fmt.Errorf("starting %s: %w", p.Name, err)
	}
	ended := make(chan struct{})
	p.running, p.ended = cmd, ended
	p.owner.Go(func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.running, p.err = nil, err
		again := p.again && !p.down
		p.mu.Unlock()
		close(ended)
		if !again {
			return
		}
		time.Sleep(restartDelay)
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.down && p.running == nil {
			if err := p.start(); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	})
	return nil
}

func (p *Process) end(s syscall.Signal) error {
	p.mu.Lock()
	p.down = true
	running := p.running
	p.mu.Unlock()
	if running != nil {
		if err := running.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("ending %s: %w", p.Name, err)
		}
	}
	p.owner.Wait()
	return nil
}

func (p *Process) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running == nil {
		return fmt.Errorf("%s is down", p.Name)
	}
	return p.running.Process.Signal(s)
}

// tail is the end of a text, in whole lines.
func tail(text string, size int) string {
	if len(text) <= size {
		return text
	}
	text = text[len(text)-size:]
	_, text, _ = strings.Cut(text, "\n")
	return text
}

// since is the end of what a log holds beyond a size that it had before.
func since(log string, size int64, most int) string {
	text, err := os.ReadFile(log)
	if err != nil || int64(len(text)) <= size {
		return ""
	}
	return tail(string(bytes.TrimSpace(text[size:])), most)
}
