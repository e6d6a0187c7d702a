package audit

import "strings"

// before reports whether the source's version is known and lower than v. "6" is the same as "6.0".
func (s Source) before(v string) bool {
	have, known := parseVersion(s.Version)
	want, _ := parseVersion(v)
	return known && compareVersions(have, want) < 0
}

// from reports whether the source's version is known and v or higher.
func (s Source) from(v string) bool {
	_, known := parseVersion(s.Version)
	return known && !s.before(v)
}

// parseVersion reads the leading numbers of a version: 16.2.15 of "v16.2.15-1~bpo12".
func parseVersion(s string) (parts []int, known bool) {
	s = strings.TrimPrefix(s, "v")
	for {
		n, digits := 0, 0
		for digits < len(s) && digits < 12 && s[digits] >= '0' && s[digits] <= '9' {
			n = n*10 + int(s[digits]-'0')
			digits++
		}
		if digits == 0 {
			return parts, len(parts) > 0
		}
		parts = append(parts, n)
		if s = s[digits:]; !strings.HasPrefix(s, ".") {
			return parts, true
		}
		s = s[1:]
	}
}

// compareVersions compares part by part; a part that is missing is 0.
func compareVersions(a, b []int) int {
	for i := range max(len(a), len(b)) {
		var x, y int
		if i < len(a) {
			x = a[i]
		}
		if i < len(b) {
			y = b[i]
		}
		if x != y {
			return x - y
		}
	}
	return 0
}
