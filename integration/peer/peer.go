// Package peer helps tests to run real servers beside themselves: on ports that are free, and with a guard that takes a
// server down when the test program is gone, however it went.
package peer

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Guard is a shell that outlives the test program to clean up after it.
type Guard struct {
	cmd *exec.Cmd
	in  io.Closer
}

// NewGuard runs a script in bash, with arguments. Its standard input ends when the guard is closed or the test program
// dies: the script waits for that (`read -r _`) and then cleans up.
func NewGuard(script string, args ...string) (*Guard, error) {
	cmd := exec.Command("bash", append([]string{"-c", script, "guard"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt at the terminal is not for it
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting a guard: %w", err)
	}
	return &Guard{cmd, in}, nil
}

// Close lets the guard clean up and waits until it has.
func (g *Guard) Close() error {
	if err := g.in.Close(); err != nil {
		return err
	}
	return g.cmd.Wait()
}

// Serve runs a server until the guard is closed, and removes the folder then. The server's output is in DIR/log.
func Serve(dir string, env []string, command ...string) (*Guard, error) {
	script := `
dir=$1; shift
env "${@:2:$1}" "${@:$(($1 + 2))}" >"$dir/log" 2>&1 & server=$!
read -r _
kill -9 "$server"
wait "$server" 2>/dev/null
rm -rf -- "$dir"`
	args := append([]string{dir, fmt.Sprint(len(env))}, env...)
	return NewGuard(script, append(args, command...)...)
}

// Stopped waits until a process that was sent SIGSTOP has: each of its threads has to come to it.
func Stopped(pid int) error {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			return err
		}
		still := len(threads) > 0
		for _, t := range threads {
			text, err := os.ReadFile(t)
			if err != nil {
				continue // ended
			}
			_, rest, _ := strings.Cut(string(text), ") ")
			still = still && strings.HasPrefix(rest, "T")
		}
		if still {
			return nil
		}
	}
	return fmt.Errorf("process %d does not stop", pid)
}

// Ports finds n free ports of the loopback device in a row and returns the first. They are below those that the kernel
// gives to outgoing connections (ip(7), ip_local_port_range), one of which would otherwise be in the way of a server that
// is started again, and a client's that was closed a minute ago in that of a new one.
func Ports(n int) (int, error) {
	const lowest = 10240
	highest := 32768
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		fmt.Sscan(string(text), &highest)
	}
	if highest-n <= lowest {
		return 0, fmt.Errorf("outgoing connections may take every port from %d on: no %d are left for servers (sysctl net.ipv4.ip_local_port_range)", highest, n)
	}
	for range 100 {
		port := lowest + rand.IntN(highest-n-lowest)
		var held []io.Closer
		for p := port; p < port+n; p++ {
			l, err := listen(p)
			if err != nil {
				break
			}
			held = append(held, l)
		}
		for _, l := range held {
			l.Close()
		}
		if len(held) == n {
			return port, nil
		}
	}
	return 0, fmt.Errorf("no %d free ports in a row", n)
}

func listen(port int) (net.Listener, error) {
	return net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
}

// Folder is a path of this module, from its root.
func Folder(elements ...string) (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "packages.sh")); err == nil {
			return filepath.Join(append([]string{dir}, elements...)...), nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("the working directory is not in the module")
		}
		dir = up
	}
}
