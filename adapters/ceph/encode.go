package ceph

import (
	"encoding/binary"
	"time"
)

// What the OSDs' classes are called with, the way Ceph encodes it (src/include/encoding.h): little endian.

// encodeMetadata is one entry of an image's metadata as the class rbd's method metadata_set takes it: a map from texts to
// bytes.
func encodeMetadata(key, value string) []byte {
	return appendText(appendText(binary.LittleEndian.AppendUint32(nil, 1), key), value)
}

// encodeLock is what the class lock's method lock takes for an exclusive lock: cls_lock_lock_op of
// src/cls/lock/cls_lock_ops.h.
func encodeLock(name, cookie string, most time.Duration) []byte {
	const exclusive = 1
	b := append(appendText(nil, name), exclusive)
	b = appendText(b, cookie)
	b = appendText(b, "") // the tag
	b = appendText(b, "") // the description
	b = binary.LittleEndian.AppendUint32(b, uint32(most/time.Second))
	b = binary.LittleEndian.AppendUint32(b, uint32(most%time.Second))
	return versioned(append(b, 0)) // the flags
}

// encodeUnlock is what its method unlock takes: cls_lock_unlock_op.
func encodeUnlock(name, cookie string) []byte {
	return versioned(appendText(appendText(nil, name), cookie))
}

// versioned puts the version 1, and that version 1 can be read, before what is encoded: ENCODE_START(1, 1).
func versioned(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte{1, 1}, uint32(len(b))), b...)
}

// appendText appends a text as Ceph encodes it.
func appendText(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(s))), s...)
}
