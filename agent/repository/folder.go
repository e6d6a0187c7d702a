package repository

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/sharded"
	"golang.org/x/sys/unix"
)

// A folder holds a repository's blobs as files, exactly as kopia's own "filesystem" storage lays them out, so that
// kopia reads and writes the same folder. It differs in how it writes:
//
//   - A blob is durable when PutBlob returns: file and directory are synced. Kopia syncs nothing, so that after a power
//     failure an index may name packs that are empty, and later backups would refer to them.
//   - Packs are written and read past the page cache where the filesystem allows: half the processor time, nobody
//     else's cache is lost, and what is read back comes from the medium.
//   - A failed write is an error at once and leaves no file. Kopia sleeps and retries ten times on a full disk, and
//     leaves ten pieces that keep it full.
//   - What a killed process left half-written is removed by the next one that writes.

// folderType is the word for a folder in kopia's connection information.
const folderType = "stillpoint-folder"

// folderOptions is the connection information. Its JSON never reaches a disk.
type folderOptions struct {
	Path string        `json:"path"`
	Skew time.Duration `json:"skew,omitempty"` // of the medium's clock: see Skewed
}

// registerFolder makes the storage known to kopia, whose own way to open a repository looks it up by its word.
var registerFolder = sync.OnceFunc(func() {
	blob.AddSupportedStorage(folderType, folderOptions{}, openFolder)
})

type folderStorage struct {
	sharded.Storage
	blob.DefaultProviderImplementation
}

// folderFiles is the part of the storage that sharded.Storage leaves to the medium.
type folderFiles struct {
	root string
	skew time.Duration
}

func openFolder(_ context.Context, o *folderOptions, create bool) (blob.Storage, error) {
	if create {
		if err := os.MkdirAll(o.Path, 0o700); err != nil {
			return nil, err
		}
	}
	return &folderStorage{
		Storage: sharded.New(&folderFiles{o.Path, o.Skew}, o.Path, sharded.Options{DirectoryShards: []int{1, 3}, ListParallelism: 4}, create),
	}, nil
}

func (s *folderStorage) ConnectionInfo() blob.ConnectionInfo {
	return blob.ConnectionInfo{Type: folderType, Config: &folderOptions{Path: s.RootPath}}
}

func (s *folderStorage) ListBlobs(ctx context.Context, prefix blob.ID, callback func(blob.Metadata) error) error {
	var stopped atomic.Bool
	err := s.Storage.ListBlobs(ctx, prefix, func(m blob.Metadata) error {
		err := callback(m)
		if err != nil {
			stopped.Store(true)
		}
		return err
	})
	if stopped.Load() {
		return err
	}
	return gaveUp(ctx, err)
}

func (s *folderStorage) DisplayName() string { return s.RootPath }

// IsReadOnly keeps kopia from compacting manifests, which it does while it lists them, where that cannot work.
func (s *folderStorage) IsReadOnly() bool { return unix.Access(s.RootPath, unix.W_OK) != nil }

func (f *folderFiles) GetBlobFromPath(ctx context.Context, _, path string, offset, length int64, output blob.OutputBuffer) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	output.Reset()
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return blob.ErrBlobNotFound
	} else if err != nil {
		return err
	}
	defer file.Close()
	n := length
	if n < 0 {
		info, err := file.Stat()
		if err != nil {
			return err
		}
		offset, n = 0, info.Size()
	}
	if n >= directMin {
		if _, err := setDirect(file, true); err != nil {
			return err
		}
	}
	p := buffers.Get().(*buffer)
	defer buffers.Put(p)
	for n > 0 {
		skip := offset % blockSize
		want := min(n, int64(len(p))-skip)
		padded := (skip + want + blockSize - 1) / blockSize * blockSize
		got, err := file.ReadAt(p[:padded], offset-skip)
		if int64(got) < skip+want {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("%s is too short: %w", path, blob.ErrInvalidRange)
			}
			return err
		}
		if _, err := output.Write(p[skip : skip+want]); err != nil {
			return err
		}
		offset, n = offset+want, n-want
	}
	return nil
}

func (f *folderFiles) GetMetadataFromPath(_ context.Context, _, path string) (blob.Metadata, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return blob.Metadata{}, blob.ErrBlobNotFound
	} else if err != nil {
		return blob.Metadata{}, err
	}
	return blob.Metadata{Length: info.Size(), Timestamp: info.ModTime()}, nil
}

func (f *folderFiles) PutBlobInPath(ctx context.Context, dir, path string, data blob.Bytes, o blob.PutOptions) error {
	if o.HasRetentionOptions() || o.DoNotRecreate {
		return blob.ErrUnsupportedPutBlobOption
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := f.mkdir(dir); err != nil {
		return err
	}
	partial, err := f.create()
	if err != nil {
		return err
	}
	defer partial.Close()
	err = fill(ctx, partial, data)
	if f.skew != 0 && o.SetModTime.IsZero() {
		o.SetModTime = time.Now().Add(f.skew)
	}
	if err == nil && !o.SetModTime.IsZero() {
		err = os.Chtimes(partial.Name(), o.SetModTime, o.SetModTime)
	}
	if err == nil {
		err = partial.Sync()
	}
	if err == nil {
		err = os.Rename(partial.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(partial.Name()))
	}
	if o.GetModTime != nil {
		info, err := partial.Stat()
		if err != nil {
			return err
		}
		*o.GetModTime = info.ModTime()
	}
	return syncDir(dir)
}

func (f *folderFiles) DeleteBlobInPath(_ context.Context, _, path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (f *folderFiles) ReadDir(_ context.Context, path string) ([]os.FileInfo, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	infos := make([]os.FileInfo, 0, len(entries))
	for _, e := range entries {
		if path == f.root && e.Name() == partialDir {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted since it was listed
		} else if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// partialDir is where files are while they are written. Their writers hold a lock on them.
const partialDir = ".partial"

// create makes a file to be written, locked until it is closed.
func (f *folderFiles) create() (*os.File, error) {
	dir := filepath.Join(f.root, partialDir)
	if err := f.mkdir(dir); err != nil {
		return nil, err
	}
	for {
		file, err := os.CreateTemp(dir, "")
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("locking %s: %w", file.Name(), err), file.Close(), os.Remove(file.Name()))
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &st); err != nil {
			return nil, errors.Join(err, file.Close())
		}
		if st.Nlink > 0 { // no sweep came between the creation and the lock
			return file, nil
		}
		file.Close()
	}
}

// sweepPartial removes the files that nobody writes any more.
func sweepPartial(root string) error {
	dir := filepath.Join(root, partialDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		file, err := os.OpenFile(filepath.Join(dir, e.Name()), os.O_RDONLY, 0)
		if err != nil {
			continue // gone, or not ours to remove
		}
		if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = os.Remove(file.Name())
		}
		file.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// mkdir makes a directory below the root, with what is missing between, durably.
func (f *folderFiles) mkdir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	switch {
	case err == nil:
		return syncDir(filepath.Dir(dir))
	case errors.Is(err, fs.ErrExist):
		return nil
	case errors.Is(err, fs.ErrNotExist) && dir != f.root:
		if err := f.mkdir(filepath.Dir(dir)); err != nil {
			return err
		}
		return f.mkdir(dir)
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// blockSize is the alignment, in bytes, that direct writes need on every device we know of.
const blockSize = 4096

// buffer is page-aligned, as the start of an anonymous mapping.
type buffer [1 << 20]byte

var buffers = sync.Pool{New: func() any {
	raw := make([]byte, len(buffer{})+blockSize)
	skip := -int(uintptr(unsafe.Pointer(&raw[0]))) & (blockSize - 1)
	return (*buffer)(raw[skip:])
}}

// directMin is from how many bytes on a read is worth passing the page cache by. Smaller ones are of indexes, and come
// again.
const directMin = 64 << 10

// setDirect turns direct access to a file on or off and says whether it is on: some filesystems have none.
func setDirect(file *os.File, on bool) (bool, error) {
	flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return false, fmt.Errorf("%s: %w", file.Name(), err)
	}
	if !on {
		flags &^= unix.O_DIRECT
	} else {
		flags |= unix.O_DIRECT
	}
	_, err = unix.FcntlInt(file.Fd(), unix.F_SETFL, flags)
	if on && errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return on && err == nil, err
}

// fill writes data to a new file: whole blocks directly, the rest through the page cache.
func fill(ctx context.Context, file *os.File, data blob.Bytes) error {
	direct := false
	if data.Length() >= blockSize {
		var err error
		if direct, err = setDirect(file, true); err != nil {
			return err
		}
	}
	in := data.Reader()
	defer in.Close()
	p := buffers.Get().(*buffer)
	defer buffers.Put(p)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(in, p[:])
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return err
		}
		whole := n
		if direct && last {
			whole = n &^ (blockSize - 1)
		}
		if whole > 0 {
			if _, err := file.Write(p[:whole]); err != nil {
				return err
			}
		}
		if !last {
			continue
		}
		if whole < n {
			if _, err := setDirect(file, false); err != nil {
				return err
			}
			if _, err := file.Write(p[whole:n]); err != nil {
				return err
			}
		}
		return nil
	}
}
