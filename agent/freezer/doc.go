// Package freezer freezes filesystems under a lease, and thaws them whatever happens.
package freezer
