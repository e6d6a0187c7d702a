#!/bin/bash
# ceph-up.sh: a real single-node Ceph (Debian 12: pacific 16.2.15) on 127.0.0.1, everything under one folder.
#   ceph-up.sh start DIR     mon + mgr + osd (+ mds + CephFS) (+ radosgw), from nothing or from a stopped DIR
#   ceph-up.sh osd   DIR     start the osd again after it was killed
#   ceph-up.sh stop  DIR     stop every daemon of DIR (by pid file), keep the data
#   ceph-up.sh purge DIR     stop and delete DIR
# Environment: STORE=bluestore|memstore (bluestore)  OSD_SIZE=32G (sparse file)  PORT=6700 (range PORT..PORT+49)
#              MDS=1|0  RGW=1|0  RGW_PORT=PORT+40  LEASE=7 (seconds that the osd may answer reads on its own)
#              WATCH=30 (seconds that a client that died is taken for alive)
# After it: export CEPH_CONF=DIR/ceph.conf  (client.admin key is at DIR/keyring, named in that conf)
set -euo pipefail
CMD=${1:?start|osd|stop|purge} DIR=$(mkdir -p "${2:?DIR}" && cd "$2" && pwd)
STORE=${STORE:-bluestore} OSD_SIZE=${OSD_SIZE:-32G} PORT=${PORT:-6700} MDS=${MDS:-1} RGW=${RGW:-1} LEASE=${LEASE:-7} WATCH=${WATCH:-30}
RGW_PORT=${RGW_PORT:-$((PORT + 40))}
S3_KEY=${S3_KEY:-TESTACCESSKEY0000001} S3_SECRET=${S3_SECRET:-testsecretkey0000000000000000000000000001}
export CEPH_CONF=$DIR/ceph.conf PATH=/usr/bin:/usr/sbin:/bin:/sbin   # /usr/bin first: the ceph CLI needs Debian's python3
unset CEPH_ARGS
t0=$(date +%s%N); say() { printf '%6d ms  %s\n' $((($(date +%s%N) - t0) / 1000000)) "$*"; }

# pid of daemon $1 if it runs and is of this DIR (a zombie counts as gone: pid 1 here reaps only every 2 s)
alive() {
    local p; p=$(cat "$DIR/run/$1.pid" 2>/dev/null) && [ -n "$p" ] || return 1
    tr '\0' ' ' <"/proc/$p/cmdline" 2>/dev/null | grep -qF -- "$DIR/ceph.conf" || return 1
    ! grep -qs '^State:.Z' "/proc/$p/status" && echo "$p"
}
gone() { local n; for n; do ! alive "$n" >/dev/null || return 1; done; }
signal() { local s=$1 n p; shift; for n; do if p=$(alive "$n"); then kill "-$s" "$p" 2>/dev/null || true; fi; done; }
stop() { # clients first, then osd, mgr, mon; KILL what has not gone after 10 s
    local g
    for g in "client.rgw.a mds.a" "osd.0" "mgr.x mon.a"; do
        signal TERM $g
        for _ in $(seq 100); do gone $g && break; sleep 0.1; done
        gone $g || { say "killing $g"; signal KILL $g; }
    done
    rm -f "$DIR"/run/*; say "stopped"
}

# one Python process for many mon commands (the ceph CLI costs ~0.3 s of CPU a call)
moncmds() {
    timeout 60 /usr/bin/python3 - "$@" <<'EOF'
import json, os, sys, rados
c = rados.Rados(conffile=os.environ["CEPH_CONF"], name="client.admin"); c.connect(timeout=30)
for line in sys.argv[1:]:
    r, out, err = c.mon_command(line, b"")
    if r: print("moncmd:", line, r, err, file=sys.stderr); sys.exit(1)
c.shutdown()
EOF
}

wait_for() { # SECONDS WHAT CMD...
    local end=$(($(date +%s) + $1)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt "$end" ] || { say "TIMEOUT waiting for $what"; return 1; }; sleep 0.1; done
    say "$what"
}

conf() {
    local fsid=$1
    cat >"$DIR/ceph.conf" <<EOF
[global]
fsid = $fsid
mon initial members = a
mon host = [v2:127.0.0.1:$PORT/0,v1:127.0.0.1:$((PORT + 1))/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = $((PORT + 2))
ms bind port max = $((PORT + 39))
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = $DIR/keyring
run dir = $DIR/run
pid file = $DIR/run/\$name.pid
admin socket = $DIR/run/\$name.\$pid.asok
crash dir = $DIR/crash
log file = $DIR/log/\$name.log
log to stderr = false
# small and quick
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
# In units of osd_heartbeat_grace, 20 s.
osd pool default read lease ratio = $(printf '%d.%02d' $((LEASE / 20)) $((LEASE % 20 * 5)))
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data avail warn = 2
mon data avail crit = 1
mon max pg per osd = 1000
paxos propose interval = 0.05
paxos min wait = 0.01
mon tick interval = 1
mon cluster log to syslog = false
mon cluster log file = $DIR/log/cluster.log
# images: object-map + fast-diff are already in pacific's default (layering,exclusive-lock,object-map,fast-diff,deep-flatten)
rbd default features = 61

[mon.a]
mon data = $DIR/mon
mon osd full ratio = .97
mon osd nearfull ratio = .96
mon osd backfillfull ratio = .965

[mgr.x]
mgr data = $DIR/mgr
mgr initial modules =

[osd]
osd data = $DIR/osd
osd objectstore = $STORE
osd class load list = *
osd class default list = *
osd memory target = 1073741824
osd max object name len = 2048
bluestore block create = true
bluestore block path =
bluestore block size = $(numfmt --from=iec "$OSD_SIZE")
bluestore block db create = false
bluestore block wal create = false
bdev aio poll ms = 20   # default 250: every open and close of the device waits that long, 14 times in a first start
osd client watch timeout = $WATCH
bluestore fsck on mount = false
bluestore fsck quick fix on mount = false
memstore device bytes = $(numfmt --from=iec "$OSD_SIZE")

[mds.a]
mds data = $DIR/mds
mds cache memory limit = 268435456
mds beacon interval = 1
mds tick interval = 0.5   # default 5 s: unmount, clone and subvolume rm wait for it
mds scatter nudge interval = 0.5   # default 5 s: so long a recursive time may take to the directory above

[client.rgw.a]
rgw data = $DIR/rgw
rgw frontends = beast endpoint=127.0.0.1:$RGW_PORT tcp_nodelay=1
rgw thread pool size = 64
rgw dns name = localhost
rgw run sync thread = false
EOF
}

fresh() {
    local k fsid osduuid n
    mkdir -p "$DIR"/{run,log,crash,mon,mgr,osd,mds,rgw}
    fsid=$(cat /proc/sys/kernel/random/uuid); osduuid=$(cat /proc/sys/kernel/random/uuid)
    conf "$fsid"
    # every key goes into the mon's first keyring: no 'ceph auth add' later
    ceph-authtool --create-keyring "$DIR/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
    chmod 600 "$DIR/keyring"
    key() { ceph-authtool "$DIR/keyring" --gen-key -n "$@" >/dev/null; }
    key client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mds 'allow *' --cap mgr 'allow *'
    key mgr.x --cap mon 'allow profile mgr' --cap osd 'allow *' --cap mds 'allow *'
    key osd.0 --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *'
    key mds.a --cap mon 'allow profile mds' --cap osd 'allow rwx' --cap mds 'allow *' --cap mgr 'allow profile mds'
    key client.rgw.a --cap mon 'allow rw' --cap osd 'allow rwx' --cap mgr 'allow rw'
    monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$PORT,v1:127.0.0.1:$((PORT + 1))]" "$DIR/monmap" >/dev/null
    ceph-osd -c "$CEPH_CONF" -i 0 --mkfs --osd-uuid "$osduuid" --no-mon-config >"$DIR/log/osd-mkfs.out" 2>&1 & local mkfs=$!
    ceph-mon -c "$CEPH_CONF" -i a --mkfs --monmap "$DIR/monmap" --keyring "$DIR/keyring"
    say "mon mkfs"
    ceph-mon -c "$CEPH_CONF" -i a
    say "mon started"
    ceph-mgr -c "$CEPH_CONF" -i x
    moncmds '{"prefix":"osd new","uuid":"'"$osduuid"'","id":0}' \
        '{"prefix":"config set","who":"mgr","name":"mgr/devicehealth/enable_monitoring","value":"false","force":true}'
    wait $mkfs; say "mgr started, osd mkfs"
    ceph-osd -c "$CEPH_CONF" -i 0
    say "osd started"
    moncmds '{"prefix":"osd pool create","pool":"rbd","pg_num":8}' \
        '{"prefix":"osd pool application enable","pool":"rbd","app":"rbd"}'
    if [ "$MDS" = 1 ]; then
        moncmds '{"prefix":"osd pool create","pool":"cephfs_metadata","pg_num":4}' \
            '{"prefix":"osd pool create","pool":"cephfs_data","pg_num":8}' \
            '{"prefix":"fs new","fs_name":"cephfs","metadata":"cephfs_metadata","data":"cephfs_data"}'
        ceph-mds -c "$CEPH_CONF" -i a; say "mds started"
    fi
    if [ "$RGW" = 1 ]; then
        timeout 90 radosgw-admin -c "$CEPH_CONF" user create --uid test --display-name test \
            --access-key "$S3_KEY" --secret-key "$S3_SECRET" >"$DIR/log/rgw-user.out" 2>&1
        say "rgw user"
        radosgw -c "$CEPH_CONF" -n client.rgw.a; say "rgw started"
    fi
    touch "$DIR/made"
}

again() {
    mkdir -p "$DIR/run"
    ceph-mon -c "$CEPH_CONF" -i a; ceph-mgr -c "$CEPH_CONF" -i x; ceph-osd -c "$CEPH_CONF" -i 0
    [ ! -d "$DIR/mds" ] || [ "$MDS" != 1 ] || ceph-mds -c "$CEPH_CONF" -i a
    [ "$RGW" != 1 ] || radosgw -c "$CEPH_CONF" -n client.rgw.a
    say "daemons started"
}

healthy() { timeout 20 ceph health 2>/dev/null | grep -q HEALTH_OK; }
osdactive() { timeout 20 ceph --admin-daemon "$DIR"/run/osd.0.*.asok status | grep -q '"state": "active"'; }
mdsup() { timeout 20 ceph mds stat 2>/dev/null | grep -q 'up:active'; }
volumesup() { timeout 20 ceph fs volume ls; }
rgwup() { (exec 3<>"/dev/tcp/127.0.0.1/$RGW_PORT") 2>/dev/null; }

case $CMD in
start)
    trap 'rc=$?; [ $rc = 0 ] || { tail -n 4 "$DIR"/log/*.log >&2; signal KILL client.rgw.a mds.a osd.0 mgr.x mon.a; say "start failed ($rc), daemons killed" >&2; }' EXIT
    if [ -e "$DIR/made" ]; then again; else fresh; fi
    [ "$MDS" != 1 ] || wait_for 60 "mds active" mdsup
    [ "$MDS" != 1 ] || wait_for 60 "volumes module" volumesup
    [ "$RGW" != 1 ] || wait_for 60 "rgw listening" rgwup
    wait_for 90 "HEALTH_OK" healthy || { ceph health detail; exit 1; }
    ;;
osd) # on other ports: who still calls the dead one's would be answered by a stranger, and call again at once, without end
    if ! alive osd.0 >/dev/null; then
        rm -f "$DIR"/run/osd.0.*
        n=$(($(cat "$DIR/starts" 2>/dev/null || echo 0) + 1)); echo "$n" >"$DIR/starts"
        min=$((PORT + 12 + n % 2 * 10))
        ceph-osd -c "$CEPH_CONF" -i 0 --ms-bind-port-min "$min" --ms-bind-port-max $((PORT + 39))
    fi
    wait_for 60 "osd active" osdactive || { tail -n 20 "$DIR/log/osd.0.log"; exit 1; }
    ;;
stop) stop ;;
purge) signal KILL client.rgw.a mds.a osd.0 mgr.x mon.a; say killed; rm -rf -- "$DIR" ;;
*) echo "start|osd|stop|purge" >&2; exit 2 ;;
esac
