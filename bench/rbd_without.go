//go:build !ceph || !cgo

package main

import (
	"context"
	"errors"
)

var errWithoutCeph = errors.New("this needs Ceph's libraries: `make bench` builds the benchmark with them")

func (b *bench) rbd(context.Context) error { return errWithoutCeph }

func (b *bench) cephfs(context.Context) error { return errWithoutCeph }

func rbdRead(context.Context, string) error { return errWithoutCeph }
