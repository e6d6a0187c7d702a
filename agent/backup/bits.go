package backup

import "iter"

// bits is a bit for each chunk of a volume.
type bits []uint64

func newBits(n int64) bits { return make(bits, (n+63)/64) }

func (b bits) has(i int64) bool { return b[i/64]&(1<<(i%64)) != 0 }

// set sets the bits [from, to).
func (b bits) set(from, to int64) {
	for from < to {
		word, bit := from/64, from%64
		n := min(64-bit, to-from)
		b[word] |= (^uint64(0) >> (64 - n)) << bit
		from += n
	}
}

// runs gives the runs [from, to) of bits that are set, of the first n.
func (b bits) runs(n int64) iter.Seq2[int64, int64] {
	return func(yield func(from, to int64) bool) {
		for i := int64(0); i < n; i++ {
			switch {
			case b[i/64] == 0:
				i |= 63
				continue
			case !b.has(i):
				continue
			}
			from := i
			for i < n && b.has(i) {
				i++
			}
			if !yield(from, i) {
				return
			}
		}
	}
}
