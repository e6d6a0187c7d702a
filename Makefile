# make           builds bin/stillpoint and bin/stillpoint-freezer
# make ceph      the same with the adapters for Ceph, linked with Ceph's libraries of this machine
# make demo      the main job on real filesystems, start to end (root); BACKEND=lvm-thin has it with a thin volume,
#                BACKEND=ceph-rbd with an RBD image of a Ceph cluster that it starts
# make check     format, vet, lint and unit tests: no root
# make test      every test, on real filesystems and with the race detector (root)
# make soak      a thousand kills of everything that can be killed, each followed by a full check (root, hours)
# make bench     the numbers of the README, against restic, borg and kopia (root)
# Each installs the Debian packages it needs, and says so. Go 1.26 must be there.

SHELL := /bin/bash
export PATH := $(PATH):/usr/sbin:/sbin:/usr/local/go/bin

COMPILER    := gcc=gcc /usr/include/stdlib.h=libc6-dev
FILESYSTEMS := mkfs.xfs=xfsprogs mkfs.btrfs=btrfs-progs mkfs.ext4=e2fsprogs mkfs.f2fs=f2fs-tools mount=mount cmp=diffutils
THIN        := thin_check=thin-provisioning-tools
PEERS       := restic=restic borg=borgbackup
CEPH        := ceph-mon=ceph-mon ceph-mgr=ceph-mgr ceph-osd=ceph-osd radosgw=radosgw ceph=ceph-common ceph-mds=ceph-mds rbd-fuse=rbd-fuse rbd-nbd=rbd-nbd
CEPH_BUILD  := gcc=gcc /usr/include/stdlib.h=libc6-dev /usr/include/rados/librados.h=librados-dev /usr/include/rbd/librbd.h=librbd-dev /usr/include/cephfs/libcephfs.h=libcephfs-dev
# The tags of a build with Ceph: go-ceph wants to be told of releases before squid, whose headers lack this function.
CEPH_TAGS    = ceph$(shell grep -qs rbd_encryption_load2 /usr/include/rbd/librbd.h || echo ,pacific)
# Packages that have files for a build with Ceph: the others are the same with and without.
WITH_CEPH    = $(addprefix ./,$(sort $(dir $(shell grep -rl --include=*.go '^//go:build.*ceph' adapters agent bench cbt cmd integration))))
GUEST       := linux.uml=user-mode-linux lvcreate=lvm2 dmsetup=dmsetup thin_delta=thin-provisioning-tools modprobe=kmod patchelf=patchelf /lib/systemd/systemd-udevd=udev
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSION     := $(shell git describe --always --dirty 2>/dev/null || echo development)
LDFLAGS     := -s -w -X main.version=$(VERSION)

# Packages whose tests run in a guest (package integration/vm), and once more with its newer kernel: the kernels freeze
# differently, which csi-sanity, the longest of them, does not see.
IN_GUESTS   := ./integration/vm ./integration/thin ./adapters/lvmthin

# The packages whose tests take longest. They begin first, so that none of them is alone at the end.
LONGEST     := ./integration/thin ./agent/backup ./adapters/lvmthin ./agent/repository

# With the race detector; not within scrypt, which has no goroutines and turns every passphrase into a key eight times as
# slowly under it.
RACE        := -race -gcflags=golang.org/x/crypto/scrypt=-race=false

# The tag of kopia's own tests: repositories that are made for a test alone have a key that takes no time to derive, see
# repository.Options.Quick. Nothing that is built for use has it.
QUICK       := testing

# What the demo's volumes are on: reflink, lvm-thin or ceph-rbd.
BACKEND     := reflink

# Tests are run without a vet of their own (-vet=off): lint has had the whole of it.
.PHONY: build ceph demo check lint lint-ceph test soak versitygw kubernetes bench clean

build:
	@./packages.sh
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

ceph:
	@./packages.sh $(CEPH_BUILD)
	CGO_ENABLED=1 go build -trimpath -tags $(CEPH_TAGS) -ldflags '$(LDFLAGS)' -o bin/ ./cmd/stillpoint
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/stillpoint-freezer

demo:
	@./packages.sh $(FILESYSTEMS) $(if $(filter lvm-thin,$(BACKEND)),$(GUEST)) $(if $(filter ceph-rbd,$(BACKEND)),$(CEPH))
	@$(MAKE) --no-print-directory $(if $(filter ceph-rbd,$(BACKEND)),ceph,build)
	@go run $(if $(filter ceph-rbd,$(BACKEND)),-tags $(CEPH_TAGS)) ./integration/demo -backend $(BACKEND)

check: lint
	go test -vet=off -short ./...

lint:
	@./packages.sh $(COMPILER)
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt differs in: $$unformatted"; exit 1; }
	go vet ./...
	go run $(STATICCHECK) $$(go list ./... | grep -v /adapters/ceph$$) # what only a build with Ceph uses is lint-ceph's

lint-ceph:
	@./packages.sh $(CEPH_BUILD)
	go vet -tags $(CEPH_TAGS) $(WITH_CEPH)
	go run $(STATICCHECK) -tags $(CEPH_TAGS) $(WITH_CEPH)

test: lint lint-ceph versitygw kubernetes
	@./packages.sh $(FILESYSTEMS) $(CEPH) $(THIN) $(GUEST)
	@go run ./integration/vm/fetch uml-newer
	go test -vet=off $(RACE) -tags $(CEPH_TAGS),$(QUICK) -timeout 40m $(LONGEST) ./...
	STILLPOINT_VM=uml-newer go test -vet=off -tags $(QUICK) -skip '^TestSanity$$' -timeout 40m $(IN_GUESTS)

soak:
	@./packages.sh $(COMPILER) $(FILESYSTEMS)
	STILLPOINT_KILLS=1000 go test -tags $(QUICK) -timeout 24h -v -run Kill ./agent/backup ./agent/repository

# The S3 gateway for tests: the go command builds it once, in three minutes, and keeps it in its cache.
versitygw:
	@echo "building versitygw, if it is not in the build cache yet"
	@go -C integration/versitygw tool -n versitygw >/dev/null

# The Kubernetes for tests, the snapshot controller and the CSI sidecars: built once, in five minutes on two idle cores, and
# kept in the user's cache.
kubernetes:
	@go run ./integration/kubernetes/build

bench: build
	@./packages.sh $(FILESYSTEMS) $(PEERS) $(THIN) $(CEPH) $(CEPH_BUILD)
	go run -tags $(CEPH_TAGS) ./bench

clean:
	rm -rf bin
