package registry_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
	"stillpoint.io/stillpoint/fault"
)

var update = flag.Bool("update", false, "write the README's table of capabilities, but for adapters that this build is without")

// The lines around the table in the README.
const (
	tableBegins = "<!-- capabilities: `go test -tags ceph,pacific ./adapters/registry -update` writes this table -->\n"
	tableEnds   = "<!-- end of capabilities -->\n"
)

// The README's table says of every adapter what its code does.
func TestCapabilitiesInTheReadme(t *testing.T) {
	path := filepath.Join("..", "..", "README.md")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := bytes.Cut(text, []byte(tableBegins))
	old, after, ok2 := bytes.Cut(rest, []byte(tableEnds))
	if !ok || !ok2 {
		t.Fatalf("the README has not the lines %q and %q", tableBegins, tableEnds)
	}
	table := capabilitiesTable(t, string(old))
	if *update {
		text := slices.Concat(before, []byte(tableBegins), []byte(table), []byte(tableEnds), after)
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if table != string(old) {
		t.Errorf("the README's table of capabilities is not that of the code (-update writes it). It is:\n%s\nand should be:\n%s", old, table)
	}
}

// capabilitiesTable is the table in Markdown. Of an adapter that this build is without, it has the row of the old one.
func capabilitiesTable(t *testing.T, old string) string {
	t.Helper()
	names := slices.Sorted(maps.Keys(adapters.CapabilitiesOf(nothing{}).Abilities))
	var b strings.Builder
	fmt.Fprintf(&b, "| adapter | %s | changes | volumes |\n|---%s|---|---|\n", strings.Join(names, " | "), strings.Repeat("|:-:", len(names)))
	for _, k := range registry.Kinds() {
		a, err := k.Open(t.Context(), adapters.Config{Name: k.Name})
		if errors.Is(err, fault.Unsupported) {
			b.WriteString(rowOf(old, k.Name))
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", k.Name, err)
		}
		c := adapters.CapabilitiesOf(a)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "| `%s` ", k.Name)
		for _, name := range names {
			b.WriteString("| " + map[bool]string{true: "yes", false: "–"}[c.Abilities[name]] + " ")
		}
		fmt.Fprintf(&b, "| %s | %s |\n", c.Confidence, map[bool]string{true: "of one node", false: "shared"}[c.NodeLocal])
	}
	return b.String()
}

// rowOf finds an adapter's row in a table.
func rowOf(table, name string) string {
	for line := range strings.Lines(table) {
		if strings.HasPrefix(line, "| `"+name+"` ") {
			return line
		}
	}
	return fmt.Sprintf("| `%s` is missing: this build is without it |\n", name)
}

// nothing is an adapter without abilities: what it lacks is all that there are.
type nothing struct{ adapters.Adapter }

func (nothing) Capabilities() adapters.Capabilities { return adapters.Capabilities{} }
