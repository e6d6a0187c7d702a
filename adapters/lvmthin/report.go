package lvmthin

import (
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"

	"stillpoint.io/stillpoint/fault"
)

// group is a volume group as LVM reports it.
type group struct {
	name       string
	id         groupID
	sequence   int64 // counts the changes of its metadata
	extent     int64 // bytes that sizes are multiples of
	exported   bool
	partial    bool     // a physical volume is missing
	devices    []string // of its physical volumes
	logical    map[string]*logical
	duplicates bool   // another group on this node has its name
	print      string // the fingerprint of the metadata that were reported, or of older ones; empty if there is none
}

// logical is a logical volume as LVM reports it. Sizes are bytes.
type logical struct {
	name        string
	id          string
	hidden      bool // one of LVM's own, such as a pool's metadata
	kind        string
	pool        string // of a thin volume
	origin      string
	tags        []string
	readOnly    bool
	size        int64
	chunk       int64 // of a pool
	zeroes      bool  // of a pool: it zeroes blocks before their first use
	discards    string
	thin        uint64 // number in the pool
	transaction uint64 // of a pool: its count of changes; of a thin volume: that count when it was made
}

// volumesOf yields a group's logical volumes.
func volumesOf(g *group) iter.Seq[*logical] { return maps.Values(g.logical) }

// byID is the logical volume with a UUID, nil if there is none.
func (g *group) byID(id string) *logical {
	for _, l := range g.logical {
		if l.id == id {
			return l
		}
	}
	return nil
}

const (
	thinVolume = "thin"
	thinPool   = "thin-pool"
)

// reportArgs are the arguments of `lvm fullreport` for what parseReport reads. Fields: lvmreport(7) and `lvs -o help`.
// A report of segments has the fields of their volume too; only thin volumes and pools are looked at, which have one.
var reportArgs = []string{"fullreport", "-a", "--units", "b", "--nosuffix", "--reportformat", "json",
	"--configreport", "vg", "-o", "vg_name,vg_uuid,vg_seqno,vg_extent_size,vg_exported,vg_partial",
	"--configreport", "pv", "-o", "pv_name,pv_missing",
	"--configreport", "lv", "-o", "lv_name",
	"--configreport", "pvseg", "-o", "pvseg_start",
	"--configreport", "seg", "-o", "lv_uuid,lv_name,segtype,lv_permissions,lv_size,lv_tags,pool_lv,origin,thin_id,transaction_id,chunk_size,zero,discards",
}

// parseReport reads what `lvm fullreport` prints. Groups without a name are left out: they are stray physical volumes.
func parseReport(out []byte) ([]*group, error) {
	var all struct {
		Report []struct {
			VG, PV, Seg []map[string]string
		}
	}
	if len(strings.TrimSpace(string(out))) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(out, &all); err != nil {
		return nil, fault.Errorf(fault.Unsupported, "LVM's report is not what this version knows: %w", err)
	}
	var groups []*group
	names := map[string]int{}
	for _, r := range all.Report {
		if len(r.VG) != 1 || r.VG[0]["vg_name"] == "" {
			continue
		}
		g, err := parseGroup(r.VG[0], r.PV, r.Seg)
		if err != nil {
			return nil, err
		}
		names[g.name]++
		groups = append(groups, g)
	}
	for _, g := range groups {
		g.duplicates = names[g.name] > 1
	}
	return groups, nil
}

func parseGroup(vg map[string]string, pvs, segs []map[string]string) (*group, error) {
	p := parser{}
	g := &group{
		name:     vg["vg_name"],
		id:       groupID(vg["vg_uuid"]),
		sequence: p.number(vg["vg_seqno"]),
		extent:   p.number(vg["vg_extent_size"]),
		exported: vg["vg_exported"] != "",
		partial:  vg["vg_partial"] != "",
		logical:  map[string]*logical{},
	}
	for _, pv := range pvs {
		if pv["pv_missing"] != "" {
			g.partial = true
			continue
		}
		g.devices = append(g.devices, pv["pv_name"])
	}
	slices.Sort(g.devices)
	g.devices = slices.Compact(g.devices)
	for _, s := range segs {
		name, hidden := s["lv_name"], false
		if inner, ok := strings.CutPrefix(name, "["); ok {
			name, hidden = strings.TrimSuffix(inner, "]"), true
		}
		if name == "" || g.logical[name] != nil {
			continue
		}
		l := &logical{
			name:     name,
			id:       s["lv_uuid"],
			hidden:   hidden,
			kind:     s["segtype"],
			pool:     strings.Trim(s["pool_lv"], "[]"),
			origin:   strings.Trim(s["origin"], "[]"),
			readOnly: s["lv_permissions"] == "read-only",
			size:     p.number(s["lv_size"]),
			zeroes:   s["zero"] == "zero",
			discards: s["discards"],
		}
		if t := s["lv_tags"]; t != "" {
			l.tags = strings.Split(t, ",")
		}
		switch l.kind {
		case thinVolume:
			l.thin, l.transaction = uint64(p.number(s["thin_id"])), uint64(p.number(s["transaction_id"]))
		case thinPool:
			l.chunk, l.transaction = p.number(s["chunk_size"]), uint64(p.number(s["transaction_id"]))
		}
		g.logical[name] = l
	}
	if p.err != nil {
		return nil, fault.Errorf(fault.Unsupported, "LVM's report of the volume group %s is not what this version knows: %w", g.name, p.err)
	}
	return g, nil
}

// parser keeps the first error.
type parser struct{ err error }

func (p *parser) number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err == nil && n < 0 {
		err = fmt.Errorf("%q is negative", s)
	}
	if err != nil && p.err == nil {
		p.err = err
	}
	return n
}

// external reports whether a thin volume, or one that it descends from, has an external origin: what it has not mapped
// itself reads as that origin then, of which the pool's metadata know nothing.
func (g *group) external(l *logical) bool {
	for range len(g.logical) {
		if l.origin == "" {
			return false
		}
		o := g.logical[l.origin]
		if o == nil || o.kind != thinVolume || o.pool != l.pool {
			return true
		}
		l = o
	}
	return false
}
