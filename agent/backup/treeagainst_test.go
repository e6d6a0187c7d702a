package backup

import (
	"math/rand/v2"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/fault"
)

// A tree is the same as its snapshot, and each difference to another one is found and named.
func TestTreeVerifyAgainst(t *testing.T) {
	t.Parallel()
	g := newGrove(t)
	rng := rand.New(rand.NewPCG(31, 32))
	g.grow(rng, 100)
	large := random(rng, 300<<10)
	write := func(path string, p []byte, off int64) func(m *adaptertest.TreeModel) error {
		return func(m *adaptertest.TreeModel) error { return m.Write(path, p, off, rng) }
	}
	g.apply(
		func(m *adaptertest.TreeModel) error { return m.Mkdir("against", rng) },
		write("against/large", large, 0), write("against/small", []byte("abc"), 0), write("against/gone", []byte("gone!"), 0),
	)
	s, _ := g.cutTree()
	r := g.backup(s)
	against := func(s adapters.SnapshotID) (AgainstReport, error) {
		return VerifyAgainst(t.Context(), AgainstRequest{Repository: g.repo, ID: backupID(t, r.Backup), Adapter: g.adapter, Snapshot: s})
	}
	b, err := g.repo.Backup(t.Context(), backupID(t, r.Backup))
	if err != nil {
		t.Fatal(err)
	}
	if report, err := against(s); err != nil || !report.Same || report.BytesCompared != b.Size || report.BytesDiffer != 0 {
		t.Fatalf("against its own snapshot: %+v, %v", report, err)
	}
	g.apply(func(m *adaptertest.TreeModel) error { return m.Remove("against/gone") }, write("against/large", []byte("other"), 200<<10), write("against/new", []byte("new"), 0))
	s, _ = g.cutTree()
	report, err := against(s)
	if fault.KindOf(err) != fault.Corrupt || report.Same || report.BytesDiffer != 64<<10+3+5 {
		t.Fatalf("against another snapshot: %+v, %v", report, err)
	}
	all := strings.Join(report.Differences, "\n")
	for _, words := range []string{`"against/large": 65536 bytes at 196608 are others`, `"against/new": a file of the snapshot`, `"against/gone": a file of the backup`} {
		if !strings.Contains(all, words) {
			t.Errorf("%s is not in:\n%s", words, all)
		}
	}
}
