//go:build ceph && cgo

package ceph

import (
	"strings"

	"github.com/ceph/go-ceph/rados"
)

// metadataPage is how many entries of an image's metadata are asked for at once.
const metadataPage = 256

// metadata reads the entries of an image's metadata whose keys have a prefix. It reads the image's header, as listings
// do: librbd has no way to ask for some of them only.
func (m *image) metadata(one *call, prefix string) (map[string]string, error) {
	found := map[string]string{}
	for last, more := "", true; more; {
		if err := one.wanted(); err != nil {
			return nil, err
		}
		page, err := m.pool.GetOmapValues(headerObject+m.id, last, metadataKey+prefix, metadataPage)
		if err != nil {
			return nil, ignore(err)
		}
		for key, value := range page {
			last = max(last, key)
			found[strings.TrimPrefix(key, metadataKey)] = string(value)
		}
		more = len(page) == metadataPage
	}
	return found, nil
}

// setMetadata writes an entry of an image's metadata, by the method of the OSDs' class rbd that rbd_metadata_set() calls.
// That function itself would first take the image's exclusive lock from whoever uses the image, who would take it back for
// the next write, which costs both more than the snapshot does; and it fails where the lock is not given away
// (rbd map -o exclusive). No client keeps entries in memory but those that begin with conf_.
func (m *image) setMetadata(key, value string) error {
	return m.modify("metadata_set", encodeMetadata(key, value))
}

// removeMetadata removes an entry of an image's metadata likewise. One that is not there is success.
func (m *image) removeMetadata(key string) error {
	return ignore(m.modify("metadata_remove", appendText(nil, key)))
}

// modify calls a method of the class rbd that changes the image's header.
func (m *image) modify(name string, in []byte) error {
	op := rados.CreateWriteOp()
	defer op.Release()
	op.AssertExists() // the method would make the header of an image that was just removed
	op.Exec("rbd", name, in)
	return op.Operate(m.pool, headerObject+m.id, rados.OperationNoFlag)
}

// method calls one that changes nothing, of any of the image's objects.
func (m *image) method(object, name string, in []byte) ([]byte, error) {
	op := rados.CreateReadOp()
	defer op.Release()
	step := op.Exec("rbd", name, in)
	if err := op.Operate(m.pool, object, rados.OperationNoFlag); err != nil {
		return nil, err
	}
	return step.Bytes()
}
