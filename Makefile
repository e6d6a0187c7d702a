# make           builds bin/stillpoint and bin/stillpoint-freezer
# make demo      the main job on real filesystems, start to end (root); BACKEND=lvm-thin has it with a thin volume
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
CEPH        := ceph-mon=ceph-mon ceph-mgr=ceph-mgr ceph-osd=ceph-osd radosgw=radosgw ceph=ceph-common
GUEST       := linux.uml=user-mode-linux lvcreate=lvm2 dmsetup=dmsetup thin_delta=thin-provisioning-tools modprobe=kmod patchelf=patchelf
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSION     := $(shell git describe --always --dirty 2>/dev/null || echo development)
LDFLAGS     := -s -w -X main.version=$(VERSION)

# Packages whose tests run in a guest (package integration/vm), and once more with its newer kernel.
IN_GUESTS   := ./integration/vm ./integration/thin ./adapters/lvmthin

# With the race detector; not within scrypt, which has no goroutines and turns every passphrase into a key eight times as
# slowly under it.
RACE        := -race -gcflags=golang.org/x/crypto/scrypt=-race=false

# What the demo's volumes are on: reflink or lvm-thin.
BACKEND     := reflink

.PHONY: build demo check lint test soak versitygw bench clean

build:
	@./packages.sh
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

demo:
	@./packages.sh $(FILESYSTEMS) $(if $(filter lvm-thin,$(BACKEND)),$(GUEST))
	@$(MAKE) --no-print-directory build
	@go run ./integration/demo -backend $(BACKEND)

check: lint
	go test -short ./...

lint:
	@./packages.sh $(COMPILER)
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt differs in: $$unformatted"; exit 1; }
	go vet ./...
	go run $(STATICCHECK) ./...

test: lint versitygw
	@./packages.sh $(FILESYSTEMS) $(CEPH) $(THIN) $(GUEST)
	@go run ./integration/vm/fetch uml-newer
	go test $(RACE) -timeout 40m ./...
	STILLPOINT_VM=uml-newer go test $(RACE) -timeout 40m $(IN_GUESTS)

soak:
	@./packages.sh $(COMPILER) $(FILESYSTEMS)
	STILLPOINT_KILLS=1000 go test -timeout 24h -v -run Kill ./agent/backup ./agent/repository

# The S3 gateway for tests: the go command builds it once, in three minutes, and keeps it in its cache.
versitygw:
	@echo "building versitygw, if it is not in the build cache yet"
	@go -C integration/versitygw tool -n versitygw >/dev/null

bench: build
	@./packages.sh $(FILESYSTEMS) $(PEERS) $(THIN)
	go run ./bench

clean:
	rm -rf bin
