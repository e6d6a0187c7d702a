package lab

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// ThinPool is an LVM volume group with one thin pool in it, by the group's name. LVM's environment is the caller's: see
// package vm, which makes one that sees no other disks.
type ThinPool string

// ThinVolume is a thin volume, as LVM names it: GROUP/NAME.
type ThinVolume string

// MakeThinPool makes a group on a disk, and all of it but a little a pool with blocks of 64 KiB.
func MakeThinPool(ctx context.Context, group, disk string) (ThinPool, error) {
	p := ThinPool(group)
	for _, command := range [][]string{
		{"vgcreate", "-q", group, disk},
		{"lvcreate", "-q", "--type", "thin-pool", "-l", "90%FREE", "-c", "64k", "--poolmetadatasize", "16M", "-Zn", "-n", "pool", group},
	} {
		if err := run(ctx, command[0], command[1:]...); err != nil {
			return p, errors.Join(err, p.Close())
		}
	}
	return p, nil
}

// Close removes the group and all in it.
func (p ThinPool) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return run(ctx, "vgremove", "-qfy", string(p))
}

// Volume makes a thin volume of size bytes, which goes with the lab.
func (p ThinPool) Volume(ctx context.Context, l *Lab, name string, size int64) (ThinVolume, error) {
	name += "-" + strings.ToLower(rand.Text()[:8])
	if err := run(ctx, "lvcreate", "-q", "-V", fmt.Sprintf("%db", size), "--thinpool", "pool", "-n", name, string(p)); err != nil {
		return "", err
	}
	v := ThinVolume(string(p) + "/" + name)
	l.thin = append(l.thin, v)
	return v, nil
}

// In makes mounted filesystems of a lab, as Lab.Pool does, each on a thin volume of its own.
func (p ThinPool) In(l *Lab) func(ctx context.Context, name, fstype string, size int64) (*Filesystem, error) {
	return func(ctx context.Context, name, fstype string, size int64) (*Filesystem, error) {
		v, err := p.Volume(ctx, l, name, size)
		if err != nil {
			return nil, err
		}
		fs := &Filesystem{Thin: v, Device: v.Device(), Mount: filepath.Join(l.Dir, "mnt-"+name), Type: fstype}
		if err := Mkfs(ctx, fstype, fs.Device); err != nil {
			return nil, err
		}
		return fs, fs.Up()
	}
}

// Device is the volume's device node: device-mapper's name doubles the hyphens of both names.
func (v ThinVolume) Device() string {
	group, name, _ := strings.Cut(string(v), "/")
	double := strings.NewReplacer("-", "--").Replace
	return "/dev/mapper/" + double(group) + "-" + double(name)
}

// remove removes the volume; its snapshots stay.
func (v ThinVolume) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return run(ctx, "lvremove", "-qfy", string(v))
}
