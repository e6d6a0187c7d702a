//go:build !race

package vm

const withRaceDetector = false
