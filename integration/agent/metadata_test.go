package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
)

// The standard sidecar and its client library tell the blocks that a snapshot has, and those that changed since another one;
// the library's verifier makes the one of the other with them and nothing else.
func TestChangedBlocks(t *testing.T) {
	p, q := in(t, "blocks"), in(t, "strangers")
	handle := p.foreignClaim("data")
	mount := p.pod("data")
	p.write(mount+"/kept", strings.Repeat("the first version\n", 1<<16))
	p.snapshot("one", "data", "plain")
	_, one := p.ready("one")
	p.write(mount+"/kept", strings.Repeat("a second version\n", 1<<14))
	p.write(mount+"/new", strings.Repeat("more\n", 1<<16))
	p.snapshot("two", "data", "plain")
	_, two := p.ready("two")

	may := []rbacv1.PolicyRule{{APIGroups: []string{"snapshot.storage.k8s.io"}, Resources: []string{"volumesnapshots"}, Verbs: []string{"get"}}}
	for _, namespace := range []string{p.namespace, q.namespace} {
		_, err := p.ServiceAccount(p.ctx, namespace, "backup", may)
		p.must(err)
	}
	kubeconfig, err := p.Kubeconfig(p.Admin)
	p.must(err)
	p.must(p.sidecars.Ready(p.ctx))
	ask := func(namespace, snapshot string, arguments ...string) (string, error) {
		c, err := p.node.Start("changedblocks", nil, append([]string{p.Program("changedblocks"), "-kubeconfig=" + kubeconfig, "-namespace=" + namespace,
			"-snapshot=" + snapshot, "-service-account=backup", "-timeout=2m"}, arguments...)...)
		p.must(err)
		err = c.Wait(p.ctx)
		return c.Log(), err
	}
	dir := t.TempDir()
	copied := func(handle string) string { // of what a snapshot holds
		to := filepath.Join(dir, handle[strings.LastIndexByte(handle, '@')+1:])
		p.must(p.node.Inside(func() error {
			out, err := exec.CommandContext(p.ctx, "cp", p.file(handle), to).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		}))
		return to
	}
	first, second := copied(*one.Status.SnapshotHandle), copied(*two.Status.SnapshotHandle)
	zeros := filepath.Join(dir, "zeros")
	p.must(os.WriteFile(zeros, nil, 0o600))
	p.must(os.Truncate(zeros, 64<<20))
	if said, err := ask(p.namespace, "two", "-verify-source="+second, "-verify-target="+zeros); err != nil {
		t.Errorf("the allocated blocks: %v: %s", err, said)
	}
	if said, err := ask(p.namespace, "two", "-previous=one", "-verify-source="+second, "-verify-target="+first, "-max-results=3"); err != nil {
		t.Errorf("the changed blocks: %v: %s", err, said)
	}

	// A namespace's snapshots are compared with its own only. What else there is cannot be found out by asking.
	q.foreignClaimOf("data", handle)
	q.snapshot("theirs", "data", "plain")
	q.ready("theirs")
	answer := func(base string) string {
		_, err := ask(q.namespace, "theirs", "-previous-handle="+base)
		if err == nil {
			t.Fatalf("the blocks that changed since %s, another namespace's snapshot, are told", base)
		}
		_, words, _ := strings.Cut(err.Error(), "rpc error: ") // the tool's own have the handle
		return words
	}
	known := answer(*one.Status.SnapshotHandle)
	unknown := answer(strings.Split(*one.Status.SnapshotHandle, "@")[0] + "@none")
	if !strings.Contains(known, "NotFound") || known != unknown {
		t.Errorf("of another namespace's snapshot: %q; of none: %q", known, unknown)
	}
}
