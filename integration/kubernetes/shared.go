package kubernetes

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Shared is the cluster of a test program, started when the first test asks for it. Close it at the program's end.
type Shared struct {
	Options Options

	once    sync.Once
	cluster *Cluster
	err     error
}

// Get gives the cluster. When the test fails, what the cluster's programs said meanwhile is shown. Under -short the test is
// left out; otherwise a cluster that does not start fails it.
func (s *Shared) Get(t testing.TB) *Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real Kubernetes: left out by -short, `make test` runs it")
	}
	first := false
	s.once.Do(func() {
		first = true
		// The programs may have to be built.
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
		defer cancel()
		s.cluster, s.err = Start(ctx, s.Options)
	})
	if s.err != nil && first {
		t.Fatal(s.err)
	} else if s.err != nil {
		t.Fatal("the cluster did not start, as an earlier test says")
	}
	s.cluster.Watch(t)
	return s.cluster
}

// Close ends the cluster, if there is one.
func (s *Shared) Close() error {
	if s.cluster == nil {
		return nil
	}
	return s.cluster.Close()
}

// Watch shows, when the test fails, the end of what each program of the cluster said since.
func (c *Cluster) Watch(t testing.TB) {
	before := map[string]int64{}
	for _, log := range c.allLogs() {
		if info, err := os.Stat(log); err == nil {
			before[log] = info.Size()
		}
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, log := range c.allLogs() {
			if said := since(log, before[log], 3000); said != "" {
				t.Logf("--- %s\n%s", filepath.Base(log), said)
			}
		}
	})
}

func (c *Cluster) allLogs() []string {
	logs, _ := filepath.Glob(filepath.Join(c.logs, "*")) // the pattern is a good one
	return logs
}
