package lab

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Writer writes to several filesystems without pause, so that snapshots of them can be judged. Step n appends the
// number n to the journal on the first filesystem, then to the journal on the second, and so on; beside the journals
// it rewrites random blocks of a data file at a steady rate. In snapshots of one instant every journal holds 1, 2, …
// without a gap, and the last numbers never rise from one filesystem to the next nor differ by more than one: see
// Instant.
type Writer struct {
	stop chan struct{}
	done sync.WaitGroup
	err  error
}

const (
	journalName = "journal"
	dataName    = "data"
	dataBlock   = 64 << 10
)

// StartWriter starts a writer on the folders, rewriting random blocks in a data file of size bytes in each at rate
// bytes a second in all. Stop it before the filesystems go.
func StartWriter(folders []string, size, rate int64) (*Writer, error) {
	var journals, data []*os.File
	for _, dir := range folders {
		j, err := os.Create(filepath.Join(dir, journalName))
		if err != nil {
			return nil, err
		}
		d, err := os.OpenFile(filepath.Join(dir, dataName), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		journals, data = append(journals, j), append(data, d)
	}
	w := &Writer{stop: make(chan struct{})}
	w.done.Go(func() {
		w.err = w.run(journals, data, size, rate)
		for i := range journals {
			w.err = errors.Join(w.err, journals[i].Close(), data[i].Close())
		}
	})
	return w, nil
}

// Stop ends the writer and returns what went wrong in it.
func (w *Writer) Stop() error {
	close(w.stop)
	w.done.Wait()
	return w.err
}

func (w *Writer) run(journals, data []*os.File, size, rate int64) error {
	var number [8]byte
	block := make([]byte, dataBlock)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range block {
		block[i] = byte(random.Uint32())
	}
	start, written := time.Now(), int64(0)
	for n := uint64(1); ; n++ {
		select {
		case <-w.stop:
			return nil
		default:
		}
		binary.LittleEndian.PutUint64(number[:], n)
		for _, j := range journals {
			if _, err := j.Write(number[:]); err != nil {
				return err
			}
		}
		for _, d := range data {
			binary.LittleEndian.PutUint64(block[random.IntN(dataBlock-8):], random.Uint64())
			if _, err := d.WriteAt(block, random.Int64N(max(size/dataBlock, 1))*dataBlock); err != nil {
				return err
			}
			written += dataBlock
		}
		if ahead := time.Duration(float64(written)/float64(rate)*1e9) - time.Since(start); ahead > 0 {
			time.Sleep(min(ahead, 10*time.Millisecond))
		}
	}
}

// Instant judges the journals on snapshots of the writer's filesystems, in the writer's order of folders: it returns
// the last number of each, and an error if together they are not one instant.
func Instant(folders []string) ([]uint64, error) {
	var last []uint64
	for _, dir := range folders {
		n, err := journalEnd(filepath.Join(dir, journalName))
		if err != nil {
			return nil, err
		}
		last = append(last, n)
	}
	for i := 1; i < len(last); i++ {
		if last[i] > last[i-1] || last[i-1] > last[len(last)-1]+1 {
			return last, fmt.Errorf("not one instant: the journals end at %v", last)
		}
	}
	return last, nil
}

func journalEnd(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r := bufio.NewReader(f)
	var number [8]byte
	for n := uint64(1); ; n++ {
		switch _, err := io.ReadFull(r, number[:]); {
		case errors.Is(err, io.EOF):
			return n - 1, nil
		case err != nil:
			return 0, fmt.Errorf("%s ends in the middle of number %d: %w", path, n, err)
		case binary.LittleEndian.Uint64(number[:]) != n:
			return 0, fmt.Errorf("%s: number %d is %d", path, n, binary.LittleEndian.Uint64(number[:]))
		}
	}
}
