package freezer

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The protocol: JSON objects, one a message, over a unix socket of type SOCK_SEQPACKET, which keeps messages apart.
// The server speaks first, with a hello. Requests carry an id that the reply repeats; a beat is answered by a beat,
// so that each side sees the other live; "lost" is sent by the server unasked, at most once a lease, and never before the reply to its freeze. All times are durations
// in nanoseconds, counted from the receipt of the message.
const (
	protocol   = 1
	maxMessage = 64 << 10 // bytes; a longer message, or one that is not JSON, ends the connection
)

type verb string

const (
	verbHello  verb = "hello"
	verbFreeze verb = "freeze"
	verbMore   verb = "more"
	verbBeat   verb = "beat"
	verbThaw   verb = "thaw"
	verbStatus verb = "status"
	verbLost   verb = "lost"
)

type message struct {
	Verb verb   `json:"verb"`
	ID   uint64 `json:"id,omitempty"`

	// hello
	Protocol int    `json:"protocol,omitempty"`
	Version  string `json:"version,omitempty"`

	// freeze; Count also of more
	Filesystems []Filesystem  `json:"filesystems,omitempty"`
	MaxFreeze   time.Duration `json:"max_freeze,omitempty"`
	Heartbeat   time.Duration `json:"heartbeat,omitempty"`
	Count       int           `json:"count,omitempty"` // how many of the filesystems to freeze now, 0 for all that are left

	// replies
	Error  *Error  `json:"error,omitempty"`
	Report Report  `json:"report,omitempty"`
	Status *Status `json:"status,omitempty"`
	Why    string  `json:"why,omitempty"` // of lost
}

// conn is one end of a connection. send may be called in parallel; recv may not.
//
// It is an os.File and not a net.Conn so that the freezer's binary, which is locked in memory whole, does without net.
type conn struct{ f *os.File }

func newConn(fd int) (conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return conn{}, err
	}
	return conn{os.NewFile(uintptr(fd), "freezer socket")}, nil
}

func (c conn) send(m message, within time.Duration) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("a message of %d bytes is too long: at most %d", len(b), maxMessage)
	}
	if err := c.f.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	_, err = c.f.Write(b)
	return err
}

func (c conn) recv(buf []byte) (message, error) {
	n, err := c.f.Read(buf)
	if err != nil {
		return message{}, err
	}
	if n > maxMessage {
		return message{}, errors.New("message too long")
	}
	var m message
	if err := json.Unmarshal(buf[:n], &m); err != nil {
		return message{}, err
	}
	return m, nil
}

func (c conn) close() { c.f.Close() }

// seqpacket opens an unconnected socket.
func seqpacket() (int, error) {
	return unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
}

// pair opens two connected sockets.
func pair() (ours, theirs int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	return fds[0], fds[1], err
}
