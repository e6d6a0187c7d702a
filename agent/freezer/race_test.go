//go:build race

package freezer

func init() { raceFlags = []string{"-race"} }
