package adapters

import (
	"fmt"
	"slices"
	"strings"
)

// Nearest returns the known word that was probably meant by one that is not known: the one reached by the fewest
// insertions, deletions and replacements of letters, if those are at most a third of the word, and at least one is
// allowed. It returns "" if there is none.
func Nearest(word string, known []string) string {
	best, nearest := max(1, len(word)/3)+1, ""
	for _, k := range known {
		if d := distance(strings.ToLower(word), strings.ToLower(k)); d < best {
			best, nearest = d, k
		}
	}
	return nearest
}

// didYouMean is the end of a sentence about an unknown word: the nearest known one, or all of them.
func didYouMean(word string, known []string) string {
	if near := Nearest(word, known); near != "" {
		return fmt.Sprintf("; did you mean %q?", near)
	}
	if len(known) == 0 {
		return "; there is none"
	}
	return "; there is " + strings.Join(slices.Sorted(slices.Values(known)), ", ")
}

// distance is Levenshtein's, by bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
