//go:build !race

package backup

// raceDetector says that memory is not what it would be without the race detector.
const raceDetector = false
