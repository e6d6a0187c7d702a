package freezer

import (
	"sync"
	"sync/atomic"
	"time"
)

// session is one client's connection.
type session struct {
	h       *holder
	c       conn
	gone    chan struct{}         // closed when the connection has ended
	grant   atomic.Pointer[grant] // its lease, from before its first freeze until its Thaw
	running sync.WaitGroup        // a freeze, and who waits for a lease's loss
}

func (s *session) read() {
	buf := make([]byte, maxMessage+1)
	for {
		m, err := s.c.recv(buf)
		if err != nil {
			return
		}
		received := boottime()
		switch m.Verb {
		case verbBeat:
			if g := s.grant.Load(); g != nil {
				g.beat(s.h.ledger)
			}
			s.answer(message{Verb: verbBeat})
		case verbFreeze:
			if s.grant.Load() != nil {
				s.answer(message{ID: m.ID, Error: errorf(Invalid, "", "this connection has a lease already: thaw it first")})
				continue
			}
			g := newGrant(Request{Filesystems: m.Filesystems, First: m.Count, MaxFreeze: m.MaxFreeze, Heartbeat: m.Heartbeat}, received)
			s.grant.Store(g)
			s.running.Go(func() { s.freeze(g, m) })
		case verbMore:
			s.running.Go(func() { s.more(m) })
		case verbThaw:
			s.thaw(m.ID)
		case verbStatus:
			s.answer(message{ID: m.ID, Status: s.h.status()})
		default:
			return
		}
	}
}

// freeze answers when everything is frozen, or when it is known that it will not be; then it waits for the lease's
// end and tells the client, if that was not its own Thaw.
func (s *session) freeze(g *grant, m message) {
	if err := s.h.freeze(g, s.gone); err != nil {
		s.grant.CompareAndSwap(g, nil)
		s.answer(message{ID: m.ID, Error: asError(err)})
		return
	}
	s.answer(message{ID: m.ID})
	<-g.over
	if g.mu.Lock(); !g.asked {
		g.mu.Unlock()
		s.answer(message{Verb: verbLost, Why: g.reason()})
		return
	}
	g.mu.Unlock()
}

// more freezes more of the lease's filesystems.
func (s *session) more(m message) {
	g := s.grant.Load()
	if g == nil {
		s.answer(message{ID: m.ID, Error: errorf(Invalid, "", "this connection has no lease")})
		return
	}
	if err := s.h.more(g, m.Count, s.gone); err != nil {
		s.answer(message{ID: m.ID, Error: asError(err)})
		return
	}
	s.answer(message{ID: m.ID})
}

// thaw ends the lease and answers with its report. Without an id nobody waits: a freeze under way is cancelled, and
// its own reply says so.
func (s *session) thaw(id uint64) {
	g := s.grant.Load()
	if g == nil {
		if id != 0 {
			s.answer(message{ID: id, Error: errorf(Invalid, "", "this connection has no lease")})
		}
		return
	}
	s.h.end(g, "it was thawed on request", true)
	if id == 0 {
		return
	}
	timeout := time.NewTimer(thawAnswer)
	defer timeout.Stop()
	select {
	case <-g.retired:
	case <-timeout.C:
	}
	s.grant.CompareAndSwap(g, nil)
	s.answer(message{ID: id, Report: g.finalReport(s.h.ledger)})
}

// answer sends, and gives up a client that does not read.
func (s *session) answer(m message) {
	if s.c.send(m, reply) != nil {
		s.c.close()
	}
}
