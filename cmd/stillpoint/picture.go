package main

import (
	"image"
	"image/color"
	"image/png"
	"io"
	"strings"

	"stillpoint.io/stillpoint/cbt"
)

// picture is a volume as a grid of cells, each an equal run of bytes, read row by row: how much of it is allocated,
// changed to data, changed to zero.
type picture struct {
	size  int64
	cells []cell
}

type cell struct{ allocated, changed, zeroed int64 }

func newPicture(size int64, cells int) *picture {
	return &picture{size: max(size, 1), cells: make([]cell, cells)}
}

// add spreads an extent over the cells it touches.
func (p *picture) add(e cbt.Extent, field func(*cell) *int64) {
	n := int64(len(p.cells))
	for at := e.Offset; at < min(e.End(), p.size); {
		i := min(p.index(at), n-1)
		end := min(e.End(), p.start(i+1))
		*field(&p.cells[i]) += end - at
		at = end
	}
}

// start is where a cell begins; cells differ by a byte at most. The arithmetic is exact up to 8 EiB.
func (p *picture) start(i int64) int64 {
	n := int64(len(p.cells))
	return p.size/n*i + p.size%n*i/n
}

func (p *picture) index(at int64) int64 {
	n := int64(len(p.cells))
	i := min(at/max(p.size/n, 1), n-1)
	for i > 0 && p.start(i) > at {
		i--
	}
	for i < n-1 && p.start(i+1) <= at {
		i++
	}
	return i
}

func allocated(c *cell) *int64 { return &c.allocated }

func changed(e cbt.Extent) func(*cell) *int64 {
	if e.Zero {
		return func(c *cell) *int64 { return &c.zeroed }
	}
	return func(c *cell) *int64 { return &c.changed }
}

// text draws the grid with width cells a line: a blank is unallocated, · allocated, ░▒▓█ changed by how much, ○ zeroed.
func (p *picture) text(width int) string {
	var b strings.Builder
	for i, c := range p.cells {
		if i%width == 0 {
			b.WriteString("  ")
		}
		span := p.start(int64(i)+1) - p.start(int64(i))
		switch {
		case c.changed > 0:
			b.WriteRune([]rune("░▒▓█")[min(3, 4*c.changed/max(span, 1))])
		case c.zeroed > 0:
			b.WriteRune('○')
		case c.allocated > 0:
			b.WriteRune('·')
		default:
			b.WriteByte(' ')
		}
		if i%width == width-1 {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// png draws the grid as an image with width cells a line and 6×6 pixels a cell: white is unallocated, grey allocated,
// orange changed (the darker the more), blue zeroed.
func (p *picture) png(w io.Writer, width int) error {
	const side = 6
	img := image.NewRGBA(image.Rect(0, 0, width*side+1, (len(p.cells)+width-1)/width*side+1))
	for i := range img.Pix {
		img.Pix[i] = 0xe8 // the lines between the cells; opaque enough with the alpha set below
	}
	for i := 3; i < len(img.Pix); i += 4 {
		img.Pix[i] = 0xff
	}
	for i, c := range p.cells {
		paint := c.colour(p.start(int64(i)+1) - p.start(int64(i)))
		for y := range side - 1 {
			for x := range side - 1 {
				img.SetRGBA(i%width*side+x+1, i/width*side+y+1, paint)
			}
		}
	}
	return png.Encode(w, img)
}

func (c cell) colour(span int64) color.RGBA {
	switch {
	case c.changed > 0:
		share := float64(c.changed) / float64(max(span, 1))
		return color.RGBA{0xf0 - uint8(0x30*share), 0x98 - uint8(0x60*share), 0x30, 0xff}
	case c.zeroed > 0:
		return color.RGBA{0x50, 0x90, 0xd8, 0xff}
	case c.allocated > 0:
		return color.RGBA{0xb0, 0xb4, 0xb8, 0xff}
	default:
		return color.RGBA{0xff, 0xff, 0xff, 0xff}
	}
}
