package lvmthin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// What a snapshot holds is a guest's business, and the same as what its volume holds: a filesystem of the same UUID, or
// a physical volume of a volume group inside. When LVM's lvchange activates it, udev looks into it: blkid finds the UUID,
// /dev/disk/by-uuid leads to the snapshot from then on instead of the volume, and pvscan may activate what is inside. The
// flags that keep udev from it are part of what tells the kernel to start the device, and LVM has no option for them: it
// sets them for devices that nobody shall see, such as a pool's metadata (_get_udev_flags in lvm2's
// lib/activate/dev_manager.c).
//
// So a snapshot is activated here as LVM would do it, with the same name, UUID and table, so that all LVM's commands
// see and respect it, and with the flags that LVM gives its hidden devices. It is done while the group's lock is held,
// as LVM does.

// The flags of libdevmapper.h. The kernel hands them to udev's rules (10-dm.rules or 55-dm.rules) in the upper half of
// a cookie. One without a lower half has no semaphore that anybody would wait on (_udevcomplete in lvm2's
// libdm/dm-tools/dmsetup.c).
const (
	udevNoSubsystemRules = 0x02 // LVM's: no /dev/VG/LV
	udevNoDiskRules      = 0x04 // no blkid, no links in /dev/disk
	udevNoOtherRules     = 0x08 // no pvscan, no unit of systemd's
	udevPrimarySource    = 0x40 // the flags are to be kept for later events of the device

	quietCookie = (udevNoSubsystemRules | udevNoDiskRules | udevNoOtherRules | udevPrimarySource) << 16
)

// thinDevice is a device of device-mapper over a thin device of a pool.
type thinDevice struct {
	name, uuid string
	pool       adapters.Device
	id         uint64 // in the pool
	size       int64  // bytes
	readOnly   bool
}

// start makes the device. One that is there already, whoever made it, is as good.
func (m mapper) start(d thinDevice) error {
	_, _, err := m.do(mapperCall{request: unix.DM_DEV_CREATE, name: d.name, uuid: d.uuid})
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
		return fault.Errorf(fault.Busy, "device-mapper has a device of the name %s already: %w", d.name, err)
	}
	if err != nil {
		return fmt.Errorf("device-mapper: making %s: %w", d.name, err)
	}
	load := mapperCall{request: unix.DM_TABLE_LOAD, uuid: d.uuid, targets: 1, payload: d.table()}
	if d.readOnly {
		load.flags = unix.DM_READONLY_FLAG
	}
	if _, _, err = m.do(load); err != nil {
		err = fault.Errorf(fault.Unavailable, "device-mapper: starting %s, number %d of its pool: %w; see the kernel's log", d.name, d.id, err)
	} else if _, _, err = m.do(mapperCall{request: unix.DM_DEV_SUSPEND, uuid: d.uuid, event: quietCookie}); err != nil {
		err = fmt.Errorf("device-mapper: starting %s: %w", d.name, err)
	}
	if err != nil {
		return errors.Join(err, m.stop(d.uuid))
	}
	return nil
}

// table is the device's only target, as struct dm_target_spec and a string behind it.
func (d thinDevice) table() []byte {
	b := make([]byte, unix.SizeofDmTargetSpec)
	binary.NativeEndian.PutUint64(b[8:], uint64(d.size/512))
	copy(b[24:], "thin")
	b = fmt.Appendf(b, "%s %d", numbers(d.pool), d.id)
	return append(b, make([]byte, 8-len(b)%8)...) // at least one NUL
}

// stop removes a device; one that is not there is as good. One that is in use is EBUSY.
func (m mapper) stop(uuid string) error {
	_, _, err := m.do(mapperCall{request: unix.DM_DEV_REMOVE, uuid: uuid, event: quietCookie})
	if err == nil || errors.Is(err, unix.ENXIO) {
		return nil
	}
	return fmt.Errorf("device-mapper: removing %s: %w", uuid, err)
}

// start activates a thin volume for us alone. What has an external origin needs more than one device, and is left to
// LVM, and so to udev.
func (a *Adapter) start(ctx context.Context, g *group, l *logical) error {
	if g.external(l) {
		return a.switchTo(ctx, "-ay", g, l)
	}
	return a.holding(ctx, g, func() error {
		g, err := a.reportLocked(ctx, g)
		if err != nil {
			return err
		}
		now := g.byID(l.id)
		if now == nil || now.kind != thinVolume {
			return fault.Errorf(fault.NotFound, "the logical volume %s is not there any more", l.name)
		}
		pool, _, err := g.poolOf(now)
		if err != nil {
			return err
		}
		carrier, err := a.mapper.find(pool.uuid)
		if err == nil && carrier == nil {
			err = inactive(unix.ENXIO, pool)
		}
		if err != nil {
			return err
		}
		d := thinDevice{name: mapperName(g.name, now.name), uuid: mapperUUID(g.id, now.id, ""), pool: carrier.device, id: now.thin, size: now.size, readOnly: now.readOnly}
		there, err := a.mapper.find(d.uuid)
		if err != nil || there != nil && there.live {
			return err
		}
		if there != nil { // who made it died before it had a table
			if err := a.mapper.stop(d.uuid); err != nil {
				return err
			}
		}
		return a.mapper.start(d)
	})
}

// stop deactivates a volume, unless it is in use. One that LVM activated, for somebody else perhaps, has a path that LVM must
// remove where no udev does.
func (a *Adapter) stop(ctx context.Context, g *group, l *logical) error {
	if _, err := os.Lstat("/dev/" + g.name + "/" + l.name); err == nil || g.external(l) {
		return a.switchTo(ctx, "-an", g, l)
	}
	return a.holding(ctx, g, func() error { return a.mapper.stop(mapperUUID(g.id, l.id, "")) })
}

// switchTo has LVM activate or deactivate a volume.
func (a *Adapter) switchTo(ctx context.Context, how string, g *group, l *logical) error {
	_, err := a.change(ctx, g, task{args: []string{"lvchange", "-q", "-y", how, "-K", g.name + "/" + l.name}})
	return err
}

// holding does something while it holds the lock that LVM takes when it changes a group.
func (a *Adapter) holding(ctx context.Context, g *group, do func() error) error {
	in, err := a.lvm.installed(ctx)
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, a.lvm.wait)
	defer cancel()
	release, err := a.lvm.queue(limited, task{group: g.id})
	if err == nil {
		defer release()
		lock, e := lockGroup(limited, intent{Group: g.name, Locks: in.locks})
		if e == nil {
			defer unlock(lock)
		}
		err = e
	}
	if err != nil {
		if ctx.Err() == nil && limited.Err() != nil {
			err = fault.Errorf(fault.Busy, "another program has locked the volume group %s for more than %v", g.name, a.lvm.wait)
		}
		return err
	}
	return do()
}

// reportLocked is a group as it is now, for a caller who has its lock.
func (a *Adapter) reportLocked(ctx context.Context, g *group) (*group, error) {
	if print, err := fingerprint(g.devices); err == nil && print == g.print {
		return g, nil
	}
	c, err := a.lvm.run(ctx, task{args: append(slices.Clone(reportArgs), "--nolocking", g.name), devices: g.devices})
	if err != nil {
		return nil, err
	}
	groups, err := parseReport(c.stdout)
	if err != nil || len(groups) != 1 || groups[0].id != g.id {
		return nil, errors.Join(err, fault.Errorf(fault.Unavailable, "the volume group %s is not there any more", g.name))
	}
	return groups[0], nil
}
