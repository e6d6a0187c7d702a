package repository

import "github.com/kopia/kopia/repo/format"

// derivation is how kopia makes a key of a passphrase, by the name that kopia gives it.
type derivation string

// scrypt is kopia's own choice. It takes a good part of a second and 64 MiB, so that passphrases are not guessed.
const scrypt derivation = "scrypt-65536-8-1"

// Quick is for tests: in a program that is built with kopia's tag for tests, "testing", the passphrase is made into a key at
// once, by the algorithm that kopia's own tests use. In every other program nothing changes. Kopia's command as it is
// released does not open such a repository.
func (o Options) Quick() Options {
	o.derivation = format.DefaultKeyDerivationAlgorithm
	return o
}
