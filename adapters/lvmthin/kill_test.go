package lvmthin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt/thinmeta"
)

// helpers work until they are killed; they return only with an error, or when they are done.
var helpers = map[string]func(args []string) error{
	"volume": func(args []string) error {
		a, err := openHelper()
		if err == nil {
			_, err = a.Volume(context.Background(), typed(args[0]))
		}
		return err
	},
	"describe": func(args []string) error {
		a, err := openHelper()
		if err != nil {
			return err
		}
		v, err := a.Volume(context.Background(), typed(args[0]))
		return fmt.Errorf("freeze %v, %s, %w", v.Freeze, a.Capabilities().Quiesce, err)
	},
	"unprivileged": func(args []string) error {
		if err := syscall.Setuid(65534); err != nil {
			return err
		}
		a, err := openHelper()
		if err == nil {
			_, err = a.Volume(context.Background(), typed(args[0]))
		}
		return err
	},
	// hold reserves a pool's metadata snapshot, and is killed then.
	"hold": func(args []string) error {
		a, err := openHelper()
		if err != nil {
			return err
		}
		p, err := a.locate(context.Background(), typed(args[0]))
		if err != nil {
			return err
		}
		l, err := p.volume()
		if err != nil {
			return err
		}
		pool, _, err := p.group.poolOf(l)
		if err != nil {
			return err
		}
		return a.metadata.read(context.Background(), pool, func(*thinmeta.Metadata) error { return nil }, func(*thinmeta.Metadata) error {
			fmt.Println("held")
			select {}
		})
	},
	// read opens a snapshot, and is killed then.
	"read": func(args []string) error {
		a, err := openHelper()
		if err != nil {
			return err
		}
		i, err := a.Open(context.Background(), adapters.SnapshotID{Volume: typed(args[0]), Name: args[1]})
		if err != nil {
			return err
		}
		fmt.Println("open")
		_ = i
		select {}
	},
	// snapshot says which process makes it.
	"snapshot": func(args []string) error {
		a, err := openHelper()
		if err != nil {
			return err
		}
		if _, err := a.locate(context.Background(), typed(args[0])); err != nil {
			return err
		}
		go func() {
			for {
				if pid := programOf(a, "lvcreate"); pid != 0 {
					fmt.Println(pid)
					return
				}
				time.Sleep(time.Millisecond)
			}
		}()
		_, err = a.CreateSnapshot(context.Background(), typed(args[0]), args[1])
		return err
	},
	// stopped-snapshot stops the program that makes it as soon as that starts, says which it is, and is killed then.
	"stopped-snapshot": func(args []string) error {
		a, err := openHelper()
		if err != nil {
			return err
		}
		if _, err := a.locate(context.Background(), typed(args[0])); err != nil {
			return err
		}
		go a.CreateSnapshot(context.Background(), typed(args[0]), args[1])
		for {
			if pid := programOf(a, "lvcreate"); pid != 0 {
				if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
					return err
				}
				fmt.Println(pid)
				select {}
			}
			time.Sleep(time.Millisecond)
		}
	},
	"restore": func(args []string) error {
		a, err := openHelper()
		if err != nil {
			return err
		}
		target, err := a.Begin(context.Background(), adapters.VolumeSpec{ID: typed(args[0]), Size: 4 * chunk, Token: "killed"})
		if err == nil {
			err = target.WriteAt(context.Background(), bytes.Repeat([]byte{7}, chunk), 0)
		}
		if err != nil {
			return err
		}
		fmt.Println("written")
		select {}
	},
}

func openHelper() (*Adapter, error) {
	a, err := Kind().Open(context.Background(), adapters.Config{Name: "l", Parameters: map[string]string{"state": stateOf(nil)}})
	if err != nil {
		return nil, err
	}
	return a.(*Adapter), nil
}

// helper is a helper at work.
type helper struct {
	cmd  *exec.Cmd
	out  *os.File
	said chan string
	done chan struct{}
}

func startHelper(t testing.TB, program string, args ...string) *helper {
	t.Helper()
	r, w, err := os.Pipe()
	must(t, err)
	h := &helper{cmd: exec.Command(os.Args[0], args...), out: r, said: make(chan string, 1), done: make(chan struct{})}
	h.cmd.Env = append(os.Environ(), helperEnv+"="+program)
	h.cmd.Stdout, h.cmd.Stderr = w, os.Stderr
	must(t, h.cmd.Start())
	w.Close()
	go func() {
		b := make([]byte, 64)
		n, _ := r.Read(b)
		h.said <- strings.TrimSpace(string(b[:n]))
		h.cmd.Wait()
		close(h.done)
	}()
	t.Cleanup(func() { h.kill(t); r.Close() })
	return h
}

func (h *helper) over() bool {
	select {
	case <-h.done:
		return true
	default:
		return false
	}
}

// kill kills it, and nothing that it started.
func (h *helper) kill(t testing.TB) {
	t.Helper()
	if err := h.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	<-h.done
}

// says waits for the helper's first word.
func (h *helper) says(t testing.TB, word string) {
	t.Helper()
	select {
	case s := <-h.said:
		if s != word {
			t.Fatalf("the helper said %q instead of %q", s, word)
		}
	case <-time.After(time.Minute):
		t.Fatalf("the helper did not say %q", word)
	}
}

// pid waits for the process that the helper names.
func (h *helper) pid(t testing.TB) int {
	t.Helper()
	select {
	case s := <-h.said:
		pid, err := strconv.Atoi(s)
		must(t, err)
		return pid
	case <-time.After(time.Minute):
		t.Fatal("the helper named no process")
		return 0
	}
}

func waitUntil(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// programOf is the process of LVM's that an adapter has running a command, 0 if there is none.
func programOf(a *Adapter, command string) int {
	c := &a.lvm.commands
	c.mu.Lock()
	defer c.mu.Unlock()
	for r := range c.running {
		if strings.HasPrefix(r.line, "lvm "+command) {
			return r.cmd.Process.Pid
		}
	}
	return 0
}

// stopIn lets a process go on in steps, and stops it for good when it has a device suspended. It reports whether it
// could, and gives up when over says so.
func stopIn(t testing.TB, a *Adapter, pid int, uuid string, over func() bool) bool {
	t.Helper()
	for !over() {
		if syscall.Kill(pid, syscall.SIGSTOP) != nil {
			return false
		}
		d, err := a.mapper.find(uuid)
		must(t, err)
		if d != nil && d.suspended {
			return true
		}
		if syscall.Kill(pid, syscall.SIGCONT) != nil {
			return false
		}
		syscall.Syscall(syscall.SYS_SCHED_YIELD, 0, 0, 0) // a step; a sleep would be as long as a tick of the clock
	}
	return false
}
