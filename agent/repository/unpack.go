package repository

import (
	"bytes"
	"context"
	"crypto/aes"
	"encoding/hex"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/encryption"

	"stillpoint.io/stillpoint/fault"
)

// decrypt is how kopia decrypts. The types for the bytes are internal to it; bufferFor makes one of the second kind.
type decrypt[Bytes, Buffer any] = func(cipherText Bytes, contentID []byte, output *Buffer) error

func bufferFor[Bytes, Buffer any](decrypt[Bytes, Buffer]) *Buffer { return new(Buffer) }

type unpack = func(i content.Info, packed, into []byte) (length int64, err error)

// unpacker gives a function that decrypts a content as it lies in its pack, decompresses it, and makes sure that it is
// what its id says. It returns how many bytes the content has, puts them into the slice it is given if they are as many
// as that has room for, and allocates nothing of that size. It is for one goroutine.
//
// Kopia derives a content's key and authenticates it by the last 16 bytes of its hash (repo/content,
// getPackedContentIV); the compressor is in the index.
func (r *Repository) unpacker(e encryption.Encryptor) unpack {
	plain, unpacked := bufferFor(e.Decrypt), bufferFor(e.Decrypt)
	packedList := make([][]byte, 1)
	cipher := argument((*content.WriteManager)(nil).WriteContent)
	cipher.Slices = packedList
	var hash [64]byte
	return func(i content.Info, packed, into []byte) (int64, error) {
		if i.EncryptionKeyID != 0 {
			return 0, fault.Errorf(fault.Corrupt, "encrypted with key %d, of which nothing is known", i.EncryptionKeyID)
		}
		plain.Reset()
		defer plain.Reset()
		packedList[0] = packed
		h := i.ContentID.Hash()
		if err := e.Decrypt(cipher, h[len(h)-aes.BlockSize:], plain); err != nil {
			return 0, fault.Errorf(fault.Corrupt, "%w", err)
		}
		result := plain.Bytes()
		if i.CompressionHeaderID != 0 {
			c := compression.ByHeaderID[i.CompressionHeaderID]
			if c == nil {
				return 0, fault.Errorf(fault.Corrupt, "compressed by %x, of which nothing is known", uint32(i.CompressionHeaderID))
			}
			unpacked.Reset()
			defer unpacked.Reset()
			in := result.Reader()
			defer in.Close()
			if err := c.Decompress(unpacked, in, true); err != nil {
				return 0, fault.Errorf(fault.Corrupt, "decompressing: %w", err)
			}
			result = unpacked.Bytes()
		}
		if !bytes.Equal(r.hash(hash[:0], result), h) {
			return 0, fault.Errorf(fault.Corrupt, "decrypts to something else")
		}
		if len(into) == result.Length() {
			result.AppendToSlice(into[:0])
		}
		return int64(result.Length()), nil
	}
}

// checkNamed reads a blob that is encrypted as a whole, as indexes and markers of sessions are, and makes sure that it is
// what its name says: PREFIX, the hash in hexadecimal, a dash, and what it belongs to.
func (r *Repository) checkNamed(ctx context.Context, in blob.Reader, e encryption.Encryptor, id blob.ID) error {
	name, _, _ := strings.Cut(string(id), "-")
	hash, err := hex.DecodeString(name[max(0, len(name)-2*hashLength):])
	if err != nil || len(hash) != hashLength {
		return fault.Errorf(fault.Corrupt, "blob %s: not a name that kopia gives", id)
	}
	var packed blobBytes
	if err := in.GetBlob(ctx, id, 0, -1, &packed); err != nil {
		return err
	}
	plain := bufferFor(e.Decrypt)
	defer plain.Close()
	cipher := argument((*content.WriteManager)(nil).WriteContent)
	cipher.Slices = [][]byte{packed.Bytes()}
	if err := e.Decrypt(cipher, hash[hashLength-aes.BlockSize:], plain); err != nil {
		return fault.Errorf(fault.Corrupt, "blob %s: %w", id, err)
	}
	if !bytes.Equal(r.hash(nil, plain.Bytes()), hash) {
		return fault.Errorf(fault.Corrupt, "blob %s: decrypts to something else", id)
	}
	return nil
}
