package kubernetes

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const envHang = "STILLPOINT_TEST_CLUSTER_TO_KILL"

// Two clusters run at once and know nothing of each other; one that is closed leaves nothing.
func TestSecondClusterAndClose(t *testing.T) {
	first, ctx := shared.Get(t), deadline(t)
	second, err := Start(ctx, Options{Nodes: 1})
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			second.Close()
		}
	}()
	namespaces := func(c *Cluster) string {
		list, err := c.Admin.Core.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return string(list.Items[0].UID)
	}
	if namespaces(first) == namespaces(second) {
		t.Error("they are one cluster")
	}
	network := networkOf(t, second.Server.PID())
	if networkOf(t, first.Server.PID()) == network {
		t.Error("they share a network")
	}
	if left := leftOf(t, second.dir, network); len(left) < 8 {
		t.Errorf("while it runs, there is only %v", left)
	}
	closed = true
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if left := leftOf(t, second.dir, network); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := first.Answers(ctx); err != nil {
		t.Error(err)
	}
}

// However the test program goes, nothing of its cluster stays.
func TestNothingOutlives(t *testing.T) {
	if os.Getenv(envHang) != "" {
		hang(t)
	}
	if testing.Short() {
		t.Skip("needs a real Kubernetes: left out by -short, `make test` runs it")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestNothingOutlives$")
	cmd.Env, cmd.Stderr = append(os.Environ(), envHang+"=1"), os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	dir, isDir := strings.CutPrefix(strings.TrimSpace(line), "hanging ")
	if err != nil || !isDir {
		cmd.Process.Kill()
		t.Fatalf("it says %q, %v; %v", line, err, cmd.Wait())
	}
	dir, server, _ := strings.Cut(dir, " ")
	var pid int
	fmt.Sscan(server, &pid)
	network := networkOf(t, pid)
	if left := leftOf(t, dir, network); len(left) < 8 {
		t.Errorf("while it runs, there is only %v", left)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // killed
	var left []string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if left = leftOf(t, dir, network); len(left) == 0 {
			return
		}
	}
	t.Errorf("left after 30 s: %v", left)
}

// hang is the program to be killed: it has a cluster with a volume mounted on a node.
func hang(t *testing.T) {
	ctx := deadline(t)
	c, err := Start(ctx, Options{Nodes: 1})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := c.Folder()
	if err != nil {
		t.Fatal(err)
	}
	n, image := c.Nodes[0], filepath.Join(dir, "image")
	p, err := n.Start("mount", nil, "sh", "-ec", `truncate -s 64M "$1/image"; mkfs.ext4 -q -F "$1/image"; mkdir "$1/mount"; mount -o loop "$1/image" "$1/mount"`, "sh", dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if loops := loopsOn(t, image); len(loops) != 1 {
		t.Fatalf("the loop devices of %s: %v", image, loops)
	}
	fmt.Println("hanging", c.dir, c.Server.PID())
	<-context.Background().Done()
}

// leftOf is what there is of a cluster: its folder, processes that name it or are in its network, mounts and loop devices.
func leftOf(t *testing.T, dir, network string) (left []string) {
	t.Helper()
	if _, err := os.Lstat(dir); err == nil {
		left = append(left, dir)
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if p == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		args, _ := os.ReadFile(p + "/cmdline") // a process may be gone
		mounts, _ := os.ReadFile(p + "/mountinfo")
		in, _ := os.Readlink(p + "/ns/net")
		if strings.Contains(string(args), dir) || strings.Contains(string(mounts), dir) || in == network {
			left = append(left, filepath.Base(p)+" "+strings.ReplaceAll(string(args), "\x00", " "))
		}
	}
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		left = append(left, "a mount")
	}
	return append(left, loopsOn(t, dir)...)
}

// loopsOn are the loop devices on a file, or below a folder.
func loopsOn(t *testing.T, path string) (loops []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		backing, _ := os.ReadFile(f) // a device may be gone
		if strings.HasPrefix(string(backing), path) {
			loops = append(loops, f)
		}
	}
	return loops
}

func networkOf(t *testing.T, pid int) string {
	t.Helper()
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		t.Fatal(err)
	}
	return link
}
