package cut

import (
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
)

func TestJudge(t *testing.T) {
	at := time.Unix(1e9, 0)
	snapshot := func(volume string, mark adapters.Mark, cut, instant string) *adapters.Snapshot {
		return &adapters.Snapshot{
			ID:      adapters.SnapshotID{Volume: adapters.VolumeID{Backend: "b", ID: volume}, Name: "n"},
			Created: at, Mark: mark, Notes: adapters.Notes{Cut: cut, Instant: instant},
		}
	}
	both := instantOf([]adapters.Snapshot{*snapshot("x", "", "", ""), *snapshot("y", "", "", "")})
	for _, c := range []struct {
		name  string
		found []*adapters.Snapshot
		want  leftover
	}{
		{"nothing there", []*adapters.Snapshot{nil, nil}, nothing},
		{"died before publishing", []*adapters.Snapshot{snapshot("x", adapters.Cutting, "", ""), snapshot("y", adapters.Cutting, "", "")}, remove},
		{"died between two snapshots", []*adapters.Snapshot{snapshot("x", adapters.Cutting, "", ""), nil}, remove},
		{"died while publishing", []*adapters.Snapshot{snapshot("x", adapters.Verified, "n", both), snapshot("y", adapters.Cutting, "", "")}, finish},
		{"published", []*adapters.Snapshot{snapshot("x", adapters.Verified, "n", both), snapshot("y", adapters.Verified, "n", both)}, whole},
		{"a cut over other volumes", []*adapters.Snapshot{snapshot("x", adapters.Verified, "n", both), nil}, foreign},
		{"an unverified one beside another cut's", []*adapters.Snapshot{snapshot("x", adapters.Verified, "n", "other"), snapshot("y", adapters.Cutting, "", "")}, foreign},
		{"another cut's name", []*adapters.Snapshot{snapshot("x", adapters.Verified, "m", both), snapshot("y", adapters.Verified, "m", both)}, foreign},
	} {
		if got := judge("n", c.found); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestInstantDependsOnEverySnapshotAndItsTime(t *testing.T) {
	one := adapters.Snapshot{ID: adapters.SnapshotID{Volume: adapters.VolumeID{Backend: "b", ID: "x"}, Name: "n"}, Created: time.Unix(1, 0)}
	two := one
	two.Created = time.Unix(1, 1)
	other := one
	other.ID.Volume.ID = "y"
	seen := map[string]bool{}
	for _, set := range [][]adapters.Snapshot{{one}, {two}, {other}, {one, other}} {
		seen[instantOf(set)] = true
	}
	if len(seen) != 4 {
		t.Errorf("%d different instants, want 4", len(seen))
	}
	if instantOf([]adapters.Snapshot{one, other}) != instantOf([]adapters.Snapshot{other, one}) {
		t.Error("the order of the snapshots matters")
	}
}
