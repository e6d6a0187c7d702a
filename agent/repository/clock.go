package repository

import "time"

// skews are how far the clocks of a repository are ahead of this machine's: kopia's, and the medium's, which dates blobs.
// They are 0 outside of tests, in which days pass in seconds.
type skews struct{ kopia, medium time.Duration }

// Skewed is for tests: kopia's clock and the medium's are ahead of this machine's by that much, or behind.
func (o OpenOptions) Skewed(kopia, medium time.Duration) OpenOptions {
	o.skews = skews{kopia, medium}
	return o
}

// now is kopia's clock, nil where it is this machine's.
func (s skews) now() func() time.Time {
	if s.kopia == 0 {
		return nil
	}
	return func() time.Time { return time.Now().Round(0).Add(s.kopia) }
}
