package cut

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"time"

	"stillpoint.io/stillpoint/fault"
)

// jump is how far the wall clock may move against the monotonic one during a cut. A machine that was suspended, or a
// guest that was stopped and moved, in the middle of a cut shows by it.
const jump = 500 * time.Millisecond

// verify proves the cut or voids it. It looks everything up once more and plans again: a filesystem mounted, a volume
// detached, resized or opened meanwhile gives another plan.
func (n Node) verify(ctx context.Context, r Request, members []member, p Plan, w *window) error {
	again, err := lookUp(ctx, r)
	if err != nil {
		return fmt.Errorf("looking the volumes up again after the cut: %w", err)
	}
	replan, err := plan(ctx, r, n, again)
	if err != nil {
		return fault.Errorf(fault.Void, "the cut %q is void: the same plan is not possible any more: %w", r.Name, err)
	}
	if faults := verdict(members, again, p, replan, w); len(faults) > 0 {
		return fault.Errorf(fault.Void, "the cut %q is void and was discarded: %s", r.Name, strings.Join(faults, "; "))
	}
	return nil
}

// verdict lists what voids the cut; nothing is the norm.
func verdict(before, after []member, p, replan Plan, w *window) (faults []string) {
	for _, l := range w.lost {
		faults = append(faults, "a freeze was lost: "+l)
	}
	for _, m := range w.moved {
		faults = append(faults, "something wrote below a frozen filesystem: "+m)
	}
	if w.jumped.Abs() > jump {
		faults = append(faults, fmt.Sprintf("the clock jumped by %v in the middle", w.jumped.Round(time.Millisecond)))
	}
	for i := range before {
		b, a := before[i].volume, after[i].volume
		switch {
		case a.Device != b.Device:
			faults = append(faults, fmt.Sprintf("%s was attached or detached in the middle", b.ID))
		case a.Size != b.Size:
			faults = append(faults, fmt.Sprintf("%s was resized in the middle", b.ID))
		}
	}
	if len(faults) == 0 && !reflect.DeepEqual(p, replan) {
		faults = append(faults, "what is mounted changed in the middle")
	}
	return faults
}
