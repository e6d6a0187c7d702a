//go:build race

package vm

const withRaceDetector = true
