package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/fault"
)

// A program that is killed while it makes a thin volume does worse than leave a volume suspended. LVM writes down what
// it is about to do (a message queued for the pool, and the pool's next transaction), tells the kernel to make the thin
// device, then to count up the transaction. Killed between the last two, it leaves a device that the pool has and a
// message that says to make it: from then on every command of LVM's that changes anything in the pool sends that
// message, hears "File exists", and fails with "Manual intervention may be required".
//
// For a volume that was to be ours the intervention is known: the half-made device is of nobody's use, so the pool is
// told to delete it, and LVM's next command makes it anew, as it wanted. (That is no point in time; the mark says
// cutting.)

// stuck is what LVM says then.
const stuck = "already contain thin device"

// change runs a command that changes a group. If the group is stuck with a volume of ours, that is put right first.
func (a *Adapter) change(ctx context.Context, g *group, t task) (*command, error) {
	t.devices, t.group = g.devices, g.id
	c, err := a.lvm.run(ctx, t)
	if c == nil || !strings.Contains(c.stderr, stuck) || c.made(t) {
		return c, err
	}
	if wrong := a.repair(ctx, g); wrong != nil {
		return c, errors.Join(err, wrong)
	}
	return a.lvm.run(ctx, t)
}

// repair deletes a thin device that a killed program of ours left half-made. All is looked at while the group's lock is
// held, so that no program of LVM's is just at that point.
func (a *Adapter) repair(ctx context.Context, g *group) error {
	return a.holding(ctx, g, func() error {
		now, err := a.reportLocked(ctx, g)
		if err != nil {
			return err
		}
		return a.repairLocked(ctx, now)
	})
}

func (a *Adapter) repairLocked(ctx context.Context, g *group) error {
	for pool := range volumesOf(g) {
		if pool.kind != thinPool {
			continue
		}
		ref := poolRef{name: g.name + "/" + pool.name, uuid: mapperUUID(g.id, pool.id, "tpool")}
		status, err := a.mapper.poolStatus(ref)
		if err != nil {
			continue // not active: nothing can have been half-made in it by a program of this boot
		}
		l := halfMade(g, pool, status)
		if l == nil {
			continue
		}
		if err := a.deleteDevice(ctx, ref, l, status.transaction); err != nil {
			return fmt.Errorf("the half-made thin volume %s/%s: %w", g.name, l.name, err)
		}
	}
	return nil
}

// halfMade decides which volume of a pool a killed program may have left half-made: the pool is one transaction behind
// what LVM has written down, and one volume was to be made in that one, which is marked as ours and not finished. Nil
// if there is none, or more than one.
func halfMade(g *group, pool *logical, status poolStatus) (half *logical) {
	if status.failed || status.transaction+1 != pool.transaction {
		return nil
	}
	for l := range volumesOf(g) {
		if l.kind != thinVolume || l.pool != pool.name || l.transaction != status.transaction {
			continue
		}
		r, ours := readRecord(l.tags)
		if half != nil || !(ours && r.mark != "verified" && strings.HasPrefix(l.name, snapshotPrefix) || unfinished(l) || isScratch(l)) {
			return nil
		}
		half = l
	}
	return half
}

// deleteDevice has the pool delete the thin device of a volume, if it was made in the transaction that is not finished.
func (a *Adapter) deleteDevice(ctx context.Context, pool poolRef, l *logical, transaction uint64) error {
	half := false
	err := a.metadata.read(ctx, pool, func(*thinmeta.Metadata) error { return nil }, func(m *thinmeta.Metadata) error {
		d, err := m.Device(ctx, thinmeta.DeviceID(l.thin))
		if fault.KindOf(err) == fault.NotFound {
			return nil
		}
		half = err == nil && d.Transaction == transaction
		return err
	})
	if err != nil || !half {
		return err
	}
	return a.mapper.message(pool.uuid, fmt.Sprintf("delete %d", l.thin))
}
