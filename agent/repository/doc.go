// Package repository keeps backups in a kopia repository.
package repository
