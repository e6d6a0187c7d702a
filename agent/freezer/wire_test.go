package freezer

import (
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"verb":"freeze","id":1,"filesystems":[{"mount":"/a","device":"7:0","type":"ext4"}],"max_freeze":1}`))
	f.Add([]byte(`{"verb":"lost","why":"x","report":[{"device":"0:0"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m, again message
		if json.Unmarshal(b, &m) != nil {
			return
		}
		out, err := json.Marshal(m)
		if err != nil || json.Unmarshal(out, &again) != nil {
			t.Fatalf("%+v does not survive: %v", m, err)
		}
		if second, _ := json.Marshal(again); !reflect.DeepEqual(out, second) {
			t.Errorf("%s became %s", out, second)
		}
	})
}

// Rubbish, floods and clients that do not read neither stop the freezer nor delay a thaw.
func TestRubbishAndFloodsDoNotDelayAThaw(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	l := r.freeze(r.connect(), r.request(time.Second, fs))
	w := writer(t, fs)
	deadline := time.Now().Add(time.Second)
	raw := func() int {
		fd, err := seqpacket()
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: r.socket})
		}
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	stalled := raw() // asks and never reads
	defer unix.Close(stalled)
	random := rand.New(rand.NewPCG(1, 2))
	for time.Now().Before(deadline) {
		fd := raw()
		b := make([]byte, 1+random.IntN(maxMessage*2))
		for i := range min(len(b), 64) {
			b[i] = byte(random.Uint32())
		}
		unix.SendmsgN(fd, b, nil, nil, unix.MSG_DONTWAIT)
		unix.Close(fd)
		for range 100 {
			unix.SendmsgN(stalled, []byte(`{"verb":"status","id":1}`), nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		}
	}
	r.thawedAfter(deadline, "the deadline, in a flood", w)
	wantReason(t, r.lost(l), Lost)
	if _, err := r.connect().Status(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Every process may connect that can, but only root is served; and only so many.
func TestTooManyClients(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for range maxClients {
		r.connect()
	}
	_, err := Connect(t.Context(), r.socket)
	wantReason(t, err, Busy)
	_, err = Connect(t.Context(), r.socket+"x")
	wantReason(t, err, Unavailable)
}
