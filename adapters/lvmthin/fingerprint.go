package lvmthin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// A report of LVM's takes a tenth of a second and a lock; that it is still true can be told in a tenth of a
// millisecond.
//
// LVM commits a change of a group by writing the header of the metadata area on its physical volumes, which then leads
// to the new text of the metadata and holds its checksum; the text has a number that every change counts up (struct
// mda_header in lvm2's lib/format_text/layout.h, _vg_commit_raw_rlocn in format-text.c). So as long as the headers are,
// byte for byte, those of before a report, so is the group. What cannot be fingerprinted is reported anew every time.

const (
	headerOffset = 4096 // where LVM puts the first metadata area of a physical volume (LVM_MDA… and pv_header)
	headerSize   = 512  // MDA_HEADER_SIZE
	headerMagic  = " LVM2 x[5A%r0N*>"
	headerSeed   = 0xf597a6cf // INITIAL_CRC in lib/misc/crc.h
)

// fingerprint is that of a group's metadata; empty if it has none.
func fingerprint(devices []string) (string, error) {
	var all strings.Builder
	found := false
	for _, d := range devices {
		h, err := readHeader(d)
		if err != nil {
			return "", err
		}
		found = found || upToDate(h)
		all.Write(h)
		all.WriteByte('\n')
	}
	if !found {
		return "", errNoHeader
	}
	return all.String(), nil
}

var errNoHeader = fault.Errorf(fault.Unsupported, "no metadata area is where LVM puts the first one")

// readHeader reads the header of a physical volume, past the page cache; nil if there is none.
func readHeader(device string) ([]byte, error) {
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	page := aligned(4096)
	if _, err := f.ReadAt(page, headerOffset); err != nil {
		return nil, err
	}
	return parseHeader(page[:headerSize])
}

// parseHeader checks a header: a checksum, the magic, version 1. What is none is nil; a damaged one is an error, since
// LVM may be writing it at this moment.
func parseHeader(b []byte) ([]byte, error) {
	if len(b) < headerSize || !bytes.Equal(b[4:20], []byte(headerMagic)) {
		return nil, nil
	}
	sum := binary.LittleEndian.Uint32(b)
	// LVM's CRC-32 is the usual one from another start, without the inversions of hash/crc32.
	if got := ^crc32.Update(^uint32(headerSeed), crc32.IEEETable, b[4:headerSize]); got != sum {
		return nil, errors.New("the checksum of a metadata area's header is wrong")
	}
	return bytes.Clone(b[:headerSize]), nil
}

// upToDate reports whether a header leads to metadata, and LVM keeps it up to date (struct raw_locn: offset, and the flag
// RAW_LOCN_IGNORED, set by pvchange --metadataignore).
func upToDate(h []byte) bool {
	return len(h) == headerSize && binary.LittleEndian.Uint64(h[40:]) != 0 && binary.LittleEndian.Uint32(h[60:])&1 == 0
}

// aligned returns n bytes at an address that direct I/O can use.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & 4095
	return b[skip:][:n]
}
