//go:build ceph && cgo

package ceph

// #cgo LDFLAGS: -lcephfs
// #cgo CPPFLAGS: -D_FILE_OFFSET_BITS=64
// #define FUSE_USE_VERSION 26
// #include <errno.h>
// #include <stdlib.h>
// #include <string.h>
// #include <cephfs/libcephfs.h>
//
// // make_snapshot is ceph_mksnap() with one pair of metadata.
// static int make_snapshot(struct ceph_mount_info *m, const char *dir, const char *name, const char *key, const char *value) {
// 	struct snap_metadata tag = {key, value};
// 	return ceph_mksnap(m, dir, name, 0755, &tag, 1);
// }
//
// // snapshot_tag gives the number of the snapshot at a path, and a copy of one of its metadata, NULL if it has not that key.
// static int snapshot_tag(struct ceph_mount_info *m, const char *path, const char *key, uint64_t *number, char **value) {
// 	struct snap_info info;
// 	memset(&info, 0, sizeof info);
// 	*value = NULL;
// 	int r = ceph_get_snap_info(m, path, &info);
// 	if (r < 0)
// 		return r;
// 	*number = info.id;
// 	for (size_t i = 0; i < info.nr_snap_metadata; i++)
// 		if (strcmp(info.snap_metadata[i].key, key) == 0)
// 			*value = strdup(info.snap_metadata[i].value);
// 	if (info.nr_snap_metadata > 0)
// 		ceph_free_snap_info_buffer(&info);
// 	return 0;
// }
//
// // link_node is linkat(2), which ceph_link() is not: that one follows a symbolic link at the old name.
// static int link_node(struct ceph_mount_info *m, const char *old, const char *dir, const char *name) {
// 	struct Inode *in = NULL, *to = NULL;
// 	struct ceph_statx stx;
// 	UserPerm *perms = ceph_mount_perms(m);
// 	int r = ceph_ll_walk(m, old, &in, &stx, CEPH_STATX_INO, AT_SYMLINK_NOFOLLOW, perms);
// 	if (r == 0)
// 		r = ceph_ll_walk(m, dir, &to, &stx, CEPH_STATX_INO, AT_SYMLINK_NOFOLLOW, perms);
// 	if (r == 0)
// 		r = ceph_ll_link(m, in, to, name, perms);
// 	if (in)
// 		ceph_ll_put(m, in);
// 	if (to)
// 		ceph_ll_put(m, to);
// 	return r;
// }
import "C"

import (
	"reflect"
	"syscall"
	"time"
	"unsafe"

	"github.com/ceph/go-ceph/cephfs"

	"stillpoint.io/stillpoint/fault"
)

// What go-ceph has no calls for, with the handle of its mounts.

type rawMount = *C.struct_ceph_mount_info

// rawOf takes the handle out of go-ceph's value, which is a struct around it and nothing else.
func rawOf(m *cephfs.MountInfo) (rawMount, error) {
	if t := reflect.TypeFor[cephfs.MountInfo](); t.NumField() != 1 || t.Field(0).Name != "mount" || t.Field(0).Type.Kind() != reflect.Pointer {
		return nil, fault.Errorf(fault.Unsupported, "this program was built with a go-ceph that it does not know: %v is no longer a handle of libcephfs", t)
	}
	return *(*rawMount)(unsafe.Pointer(m)), nil
}

// libError is an errno of libcephfs.
type libError int

func (e libError) Error() string  { return "cephfs: " + syscall.Errno(e.ErrorCode()).Error() }
func (e libError) ErrorCode() int { return max(int(e), -int(e)) }

func libErr(r C.int) error {
	if r >= 0 {
		return nil
	}
	return libError(r)
}

func cString(s string) (*C.char, func()) {
	c := C.CString(s)
	return c, func() { C.free(unsafe.Pointer(c)) }
}

// makeSnapshot makes a snapshot of a directory, with a tag.
func makeSnapshot(m rawMount, dir, name, tag string) error {
	cDir, freeDir := cString(dir)
	defer freeDir()
	cName, freeName := cString(name)
	defer freeName()
	cKey, freeKey := cString(fsTagKey)
	defer freeKey()
	cTag, freeTag := cString(tag)
	defer freeTag()
	return libErr(C.make_snapshot(m, cDir, cName, cKey, cTag))
}

// snapshotTag gives a snapshot's number and tag, which is empty if it has none of ours.
func snapshotTag(m rawMount, path string) (snapshotNumber, string, error) {
	cPath, freePath := cString(path)
	defer freePath()
	cKey, freeKey := cString(fsTagKey)
	defer freeKey()
	var number C.uint64_t
	var value *C.char
	if err := libErr(C.snapshot_tag(m, cPath, cKey, &number, &value)); err != nil {
		return 0, "", err
	}
	defer C.free(unsafe.Pointer(value)) // NULL is fine
	if value == nil {
		return snapshotNumber(number), "", nil
	}
	return snapshotNumber(number), C.GoString(value), nil
}

// makeNode is mknod(2), with the whole number of a device.
func makeNode(m rawMount, path string, mode uint32, device uint64) error {
	cPath, freePath := cString(path)
	defer freePath()
	return libErr(C.ceph_mknod(m, cPath, C.mode_t(mode), C.dev_t(device)))
}

// linkNode gives what is at a path, itself if it is a link, another name.
func linkNode(m rawMount, old, path string) error {
	dir, name := splitPath(path)
	cOld, freeOld := cString(old)
	defer freeOld()
	cDir, freeDir := cString(dir + "/")
	defer freeDir()
	cName, freeName := cString(name)
	defer freeName()
	return libErr(C.link_node(m, cOld, cDir, cName))
}

// setOwner and setModeAndTime set what is at a path, itself if it is a link. They are two steps: a change of the owner takes
// set-user-id bits away.
func setOwner(m rawMount, path string, uid, gid uint32) error {
	var s C.struct_ceph_statx
	s.stx_uid, s.stx_gid = C.uint32_t(uid), C.uint32_t(gid)
	return setAttributesOf(m, path, &s, C.CEPH_SETATTR_UID|C.CEPH_SETATTR_GID)
}

func setModeAndTime(m rawMount, path string, mode uint32, withMode bool, modified time.Time) error {
	var s C.struct_ceph_statx
	s.stx_mode = C.uint16_t(mode)
	s.stx_mtime = C.struct_timespec{tv_sec: C.__time_t(modified.Unix()), tv_nsec: C.__syscall_slong_t(modified.Nanosecond())}
	mask := C.int(C.CEPH_SETATTR_MTIME)
	if withMode {
		mask |= C.CEPH_SETATTR_MODE
	}
	return setAttributesOf(m, path, &s, mask)
}

func setAttributesOf(m rawMount, path string, s *C.struct_ceph_statx, mask C.int) error {
	cPath, freePath := cString(path)
	defer freePath()
	return libErr(C.ceph_setattrx(m, cPath, s, mask, C.AT_SYMLINK_NOFOLLOW))
}

// setAttribute is lsetxattr(2). To libcephfs a value at no address is none, so an empty one gets an address.
func setAttribute(m rawMount, path, name string, value []byte) error {
	cPath, freePath := cString(path)
	defer freePath()
	cName, freeName := cString(name)
	defer freeName()
	cValue := C.CBytes(append(value[:len(value):len(value)], 0))
	defer C.free(cValue)
	return libErr(C.ceph_lsetxattr(m, cPath, cName, cValue, C.size_t(len(value)), 0))
}
