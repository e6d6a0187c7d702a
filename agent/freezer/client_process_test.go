package freezer

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/lab"
)

// A client in a process of its own, which can be killed and stopped: it freezes clientMount for 50 s by way of
// clientSocket, or, if that is "spawn", of a freezer that it spawns, writes a line, and waits.
const (
	clientSocket  = "STILLPOINT_TEST_SOCKET"
	clientMount   = "STILLPOINT_TEST_MOUNT"
	clientProgram = "STILLPOINT_TEST_PROGRAM"
	clientRecords = "STILLPOINT_TEST_RECORDS"
)

func clientProcess() {
	ctx := context.Background()
	connect := func() (*Client, error) { return Connect(ctx, os.Getenv(clientSocket)) }
	if os.Getenv(clientSocket) == "spawn" {
		connect = func() (*Client, error) {
			return Spawn(ctx, SpawnOptions{Program: os.Getenv(clientProgram), Records: os.Getenv(clientRecords)})
		}
	}
	c, err := connect()
	if err == nil {
		mounts, _ := readMounts("/proc/self/mountinfo")
		passed := route(mounts, os.Getenv(clientMount))
		m := passed[len(passed)-1]
		_, err = c.Freeze(ctx, Request{Filesystems: []Filesystem{{m.Point, m.Device, m.Type}}, MaxFreeze: 50 * time.Second, Heartbeat: 400 * time.Millisecond})
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("frozen")
	select {}
}

// client starts one, and returns when it has frozen.
func (r *rig) client(socket string, fs *lab.Filesystem) int {
	r.t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), clientSocket+"="+socket, clientMount+"="+fs.Mount, clientProgram+"="+r.program, clientRecords+"="+r.records)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, _ := bufio.NewReader(out).ReadString('\n')
	if line != "frozen\n" {
		r.t.Fatalf("the client says %q", line)
	}
	return cmd.Process.Pid
}
