package cbt_test

import (
	"fmt"

	"stillpoint.io/stillpoint/cbt"
)

// What a full backup reads: the whole volume, in whole chunks, whatever the snapshot does not hold being zero.
func ExampleFill() {
	const size, chunk = 100, 16
	allocated := cbt.Of(cbt.Extent{Offset: 18, Length: 4}, cbt.Extent{Offset: 30, Length: 4})
	show(cbt.Align(cbt.Fill(cbt.Check(allocated, 0, size), 0, size), chunk, size))
	// Output:
	// 0+16 zero
	// 16+32 data
	// 48+52 zero
}

// What an incremental backup reads: a chunk of which only a part was zeroed holds unchanged bytes too.
func ExampleAlign() {
	const size, chunk = 100, 16
	changed := cbt.Of(cbt.Extent{Offset: 5, Length: 2}, cbt.Extent{Offset: 32, Length: 20, Zero: true}, cbt.Extent{Offset: 96, Length: 4, Zero: true})
	show(cbt.Align(changed, chunk, size))
	// Output:
	// 0+16 data
	// 32+16 zero
	// 48+16 data
	// 96+4 zero
}

// What an audit may sample: the volume without the delta.
func ExampleSubtract() {
	changed := cbt.Of(cbt.Extent{Offset: 20, Length: 10}, cbt.Extent{Offset: 60, Length: 40})
	show(cbt.Subtract(cbt.Of(cbt.Extent{Offset: 0, Length: 100}), changed))
	// Output:
	// 0+20 data
	// 30+30 data
}

func show(s cbt.Seq) {
	for e, err := range s {
		if err != nil {
			fmt.Println(err)
			return
		}
		kind := "data"
		if e.Zero {
			kind = "zero"
		}
		fmt.Printf("%d+%d %s\n", e.Offset, e.Length, kind)
	}
}
