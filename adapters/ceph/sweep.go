//go:build ceph && cgo

package ceph

import (
	"errors"
	"time"

	"github.com/ceph/go-ceph/rbd"
)

// draftAge is how old a snapshot being made must be to be nobody's work any more: far beyond any call's deadline.
const draftAge = 10 * time.Minute

// sweep removes what dead processes left in an image: snapshots from before a time that never got their name, records
// without a snapshot, and the name of a holder that is no more. A clone has more of the latter two, from its parent.
func (m *image) sweep(one *call, before time.Time) error {
	all, err := m.numbers()
	if err != nil {
		return err
	}
	if err := m.sweepDrafts(one, all, before); err != nil {
		return err
	}
	return m.sweepMetadata(one, all)
}

func (m *image) sweepDrafts(one *call, all []rbd.SnapInfo, before time.Time) error {
	for _, s := range all {
		if !isDraft(s.Name) {
			continue
		}
		if err := one.wanted(); err != nil {
			return err
		}
		at, err := m.rbd.GetSnapTimestamp(s.Id)
		if err == nil && time.Unix(at.Sec, at.Nsec).Before(before) {
			err = m.remove(snapshotNumber(s.Id))
		}
		if ignore(err) != nil {
			return err
		}
	}
	return nil
}

func (m *image) sweepMetadata(one *call, all []rbd.SnapInfo) error {
	records, err := m.metadata(one, recordPrefix)
	if err != nil {
		return err
	}
	numbers := make([]snapshotNumber, len(all))
	for i, s := range all {
		numbers[i] = snapshotNumber(s.Id)
	}
	keys := orphans(records, m.id, numbers)
	holders, err := m.metadata(one, holderKey)
	if err != nil {
		return err
	}
	if h, ok := decodeHolder(holders[holderKey]); ok && h.Process.isDead() {
		keys = append(keys, holderKey)
	}
	for _, key := range keys {
		err = errors.Join(err, one.wanted())
		if err == nil {
			err = m.removeMetadata(key)
		}
	}
	return err
}
