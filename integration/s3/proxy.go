package s3

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Proxy stands between a client and a store and does, by rules, what breaks in between. Without rules it passes
// everything on. Its methods are safe in parallel.
type Proxy struct {
	URL string // what clients take for the store

	mu      sync.Mutex
	rules   []*Rule
	seen    []Request
	server  *http.Server
	serving sync.WaitGroup
	addr    string
	target  *url.URL
	open    http.RoundTripper
}

// Request is what a proxy remembers of one.
type Request struct{ Method, Object, Query string }

// Rule says which requests are disturbed, and how. Empty conditions hold for every request.
type Rule struct {
	Method string // GET, PUT, …
	Object string // the object's name, behind the last /, begins with this
	Query  string // the query contains this, as in "list-type"
	Skip   int    // so many requests are let through before
	Times  int    // so many are disturbed; 0: all from then on

	Fault Fault

	seen, hit int
}

// Fault is what is done to a request. Exactly one of its fields is set.
type Fault struct {
	Status     int           // this is answered instead: 500 as InternalError, 503 as SlowDown, 403 as RequestTimeTooSkewed, …
	Code       string        // with Status: another code of S3
	Wait       time.Duration // the answer comes so much later
	Rate       int64         // the bodies of request and answer flow at so many bytes a second
	Hang       bool          // nothing is answered until the client gives up
	CutAnswer  int64         // the connection breaks after so many bytes of the answer's body
	CutRequest bool          // the connection breaks when half of the request's body was passed on
	FlipAnswer bool          // a bit in the middle of the answer's body is flipped
	FlipUpload bool          // a bit in the middle of the request's body is flipped on its way to the store
	Stale      bool          // a listing leaves out its first object
	Clock      time.Duration // the store's clock goes so far ahead, as its answers show
}

// NewProxy starts a proxy before a store, for as long as the test runs.
func NewProxy(t testing.TB, s *Store) *Proxy {
	t.Helper()
	target, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{target: target, open: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}}
	if err := p.listen("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	p.URL = "http://" + p.addr
	t.Cleanup(p.Down)
	return p
}

func (p *Proxy) listen(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: p}
	p.mu.Lock()
	p.server, p.addr = server, l.Addr().String()
	p.mu.Unlock()
	p.serving.Go(func() { server.Serve(l) }) // until Down
	return nil
}

// Down makes the store vanish: every connection breaks, and new ones are refused.
func (p *Proxy) Down() {
	p.mu.Lock()
	server := p.server
	p.server = nil
	p.mu.Unlock()
	if server != nil {
		server.Close()
		p.serving.Wait()
	}
}

// Up brings it back at the same address.
func (p *Proxy) Up(t testing.TB) {
	t.Helper()
	if err := p.listen(p.addr); err != nil {
		t.Fatal(err)
	}
}

// Break adds rules. The first that fits a request is applied.
func (p *Proxy) Break(rules ...Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range rules {
		p.rules = append(p.rules, &r)
	}
}

// Heal drops all rules and says how many requests they disturbed.
func (p *Proxy) Heal() (disturbed int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.rules {
		disturbed += r.hit
	}
	p.rules = nil
	return disturbed
}

func (p *Proxy) faultFor(r *http.Request) Fault {
	_, object, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	q := Request{r.Method, object, r.URL.RawQuery}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = append(p.seen, q)
	for _, rule := range p.rules {
		if !rule.fits(q) {
			continue
		}
		if rule.seen++; rule.seen <= rule.Skip || rule.Times > 0 && rule.hit >= rule.Times {
			continue
		}
		rule.hit++
		return rule.Fault
	}
	return Fault{}
}

// Seen are the requests since the proxy started or was asked last.
func (p *Proxy) Seen() []Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.seen
	p.seen = nil
	return seen
}

func (r *Rule) fits(q Request) bool {
	return (r.Method == "" || r.Method == q.Method) && strings.HasPrefix(path.Base(q.Object), r.Object) && strings.Contains(q.Query, r.Query)
}

// ServeHTTP answers one request.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := p.faultFor(r)
	switch {
	case f.Status != 0:
		io.Copy(io.Discard, r.Body)
		answer(w, r, f)
		return
	case f.Hang:
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
		return
	case f.Wait > 0 && !pause(r.Context(), f.Wait):
		return
	}
	proxy := httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.SetURL(p.target)
			pr.Out.Host = pr.In.Host // it is signed
			f.spoilRequest(pr.Out)
		},
		ModifyResponse: f.spoilAnswer,
		Transport:      p.open,
		FlushInterval:  -1, // so that what is cut off goes out up to there
		ErrorLog:       log.New(io.Discard, "", 0),
		ErrorHandler:   func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	proxy.ServeHTTP(w, r)
}

// answer says what a store would say.
func answer(w http.ResponseWriter, r *http.Request, f Fault) {
	code := f.Code
	if code == "" {
		code = map[int]string{500: "InternalError", 503: "SlowDown", 507: "InsufficientStorage", 403: "RequestTimeTooSkewed"}[f.Status]
	}
	body := fmt.Sprintf("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code><Message>the proxy says so</Message><Resource>%s</Resource><RequestId>1</RequestId></Error>", code, r.URL.EscapedPath())
	w.Header().Set("Content-Type", "application/xml")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(f.Status)
	io.WriteString(w, body)
}

func (f Fault) spoilRequest(r *http.Request) {
	if r.Body == nil || r.ContentLength <= 0 {
		return
	}
	half := r.ContentLength / 2
	switch {
	case f.FlipUpload:
		r.Body = &body{r.Body, &flipReader{r: r.Body, at: half}}
	case f.CutRequest:
		r.Body = &body{r.Body, io.MultiReader(io.LimitReader(r.Body, half), failing{})}
	case f.Rate > 0:
		r.Body = &body{r.Body, &slowReader{r.Context(), r.Body, f.Rate}}
	}
}

func (f Fault) spoilAnswer(a *http.Response) error {
	switch {
	case f.Clock != 0:
		for _, h := range []string{"Date", "Last-Modified"} {
			if t, err := http.ParseTime(a.Header.Get(h)); err == nil {
				a.Header.Set(h, t.Add(f.Clock).Format(http.TimeFormat))
			}
		}
	case f.Stale:
		return replace(a, func(p []byte) []byte {
			if from, to := bytes.Index(p, []byte("<Contents>")), bytes.Index(p, []byte("</Contents>")); from >= 0 && to > from {
				p = append(p[:from], p[to+len("</Contents>"):]...)
			}
			return p
		})
	case f.FlipAnswer:
		return replace(a, func(p []byte) []byte {
			if len(p) > 0 {
				p[len(p)/2] ^= 1
			}
			return p
		})
	case f.CutAnswer > 0:
		a.Body = &body{a.Body, io.MultiReader(io.LimitReader(a.Body, f.CutAnswer), failing{})}
	case f.Rate > 0:
		a.Body = &body{a.Body, &slowReader{a.Request.Context(), a.Body, f.Rate}}
	}
	return nil
}

// replace changes the whole body of an answer.
func replace(a *http.Response, change func([]byte) []byte) error {
	p, err := io.ReadAll(a.Body)
	if err != nil {
		return err
	}
	a.Body.Close()
	p = change(p)
	a.Body = io.NopCloser(bytes.NewReader(p))
	if a.ContentLength >= 0 {
		a.ContentLength = int64(len(p))
		a.Header.Set("Content-Length", strconv.Itoa(len(p)))
	}
	return nil
}

// body is a spoilt body that closes the real one.
type body struct {
	io.Closer
	io.Reader
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, fmt.Errorf("cut off by the proxy") }

type flipReader struct {
	r        io.Reader
	at, done int64
}

func (f *flipReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if at := f.at - f.done; at >= 0 && at < int64(n) {
		p[at] ^= 1
	}
	f.done += int64(n)
	return n, err
}

type slowReader struct {
	ctx  context.Context
	r    io.Reader
	rate int64
}

func (s *slowReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p[:min(int64(len(p)), max(s.rate/20, 1))])
	if !pause(s.ctx, time.Duration(int64(n)*int64(time.Second)/s.rate)) {
		return n, s.ctx.Err()
	}
	return n, err
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
