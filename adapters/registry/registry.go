// Package registry is the table of the adapters that there are. It is apart from package adapters because every
// adapter imports that one.
package registry

import (
	"fmt"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/ceph"
	"stillpoint.io/stillpoint/adapters/lvmthin"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/fault"
)

// Kinds lists the adapters. A new adapter is one line here.
func Kinds() []adapters.Kind {
	return []adapters.Kind{
		reflink.Kind(),
		lvmthin.Kind(),
		ceph.RBD(),
		ceph.FS(),
		mem.Kind(),
	}
}

// Find finds an adapter by its name. A name that is not known is Invalid.
func Find(name string) (adapters.Kind, error) {
	var names []string
	for _, k := range Kinds() {
		if k.Name == name {
			return k, nil
		}
		names = append(names, k.Name)
	}
	guess := ""
	if near := adapters.Nearest(name, names); near != "" {
		guess = fmt.Sprintf("did you mean %q? ", near)
	}
	return adapters.Kind{}, fault.Errorf(fault.Invalid, "there is no adapter %q; %sthere is %s", name, guess, strings.Join(names, ", "))
}
