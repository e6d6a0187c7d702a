package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"stillpoint.io/stillpoint/cbt"
)

// printJSON prints one object as a line.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table prints rows under a head, columns aligned.
func (a *app) table(head ...string) (row func(cells ...any), flush func() error) {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, strings.Join(head, "\t"))
	return func(cells ...any) {
		for i, c := range cells {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, c)
		}
		fmt.Fprintln(w)
	}, w.Flush
}

func (a *app) say(format string, args ...any) { fmt.Fprintf(a.stdout, format+"\n", args...) }

// warn goes to stderr, in every mode.
func warn(w io.Writer, format string, args ...any) {
	fmt.Fprintf(w, "stillpoint: warning: "+format+"\n", args...)
}

// bytesize prints bytes as people read them, in binary units: 1.5 GiB.
type bytesize int64

func (b bytesize) String() string {
	const units = "KMGTPE"
	if b < 1024 {
		return fmt.Sprintf("%d B", int64(b))
	}
	v, u := float64(b)/1024, 0
	for v >= 1023.95 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[u])
}

// age prints a time span as people read it: by its two largest units, or fewer.
func age(d time.Duration) string {
	switch h := int(d.Hours()); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case h < 1:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case h < 48:
		return fmt.Sprintf("%dh", h)
	default:
		return fmt.Sprintf("%dd", h/24)
	}
}

// extentPrinter prints extents, a hundred thousand of them at a reasonable speed: JSON lines or a table.
type extentPrinter struct {
	json bool
	w    *bufio.Writer
	line []byte
}

func newExtentPrinter(a *app) *extentPrinter {
	p := &extentPrinter{json: a.json, w: bufio.NewWriter(a.stdout)}
	if !p.json {
		fmt.Fprintf(p.w, "%18s %18s  %s\n", "OFFSET", "LENGTH", "CONTENT")
	}
	return p
}

func (p *extentPrinter) print(e cbt.Extent) error {
	if !p.json {
		content := "data"
		if e.Zero {
			content = "zero"
		}
		_, err := fmt.Fprintf(p.w, "%18d %18d  %s\n", e.Offset, e.Length, content)
		return err
	}
	b := append(p.line[:0], `{"offset":`...)
	b = strconv.AppendInt(b, e.Offset, 10)
	b = append(b, `,"length":`...)
	b = strconv.AppendInt(b, e.Length, 10)
	b = append(b, `,"zero":`...)
	b = strconv.AppendBool(b, e.Zero)
	b = append(b, '}', '\n')
	p.line = b
	_, err := p.w.Write(b)
	return err
}

func (p *extentPrinter) flush() error { return p.w.Flush() }
