package backup

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// kopia is kopia's own command line, of the very version that this module uses, connected to a repository.
type kopia struct {
	t      *testing.T
	binary string
	env    []string
}

// kopiaBinary is kopia's command, built when the first test asks.
var kopiaBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(testDir, "kopia")
	out, err := exec.Command("go", "build", "-C", filepath.Join("..", "..", "integration", "kopia"), "-o", path, "github.com/kopia/kopia").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building kopia: %w\n%s", err, out)
	}
	return path, nil
})

func newKopia(t *testing.T, at repository.Location) *kopia {
	t.Helper()
	dir := t.TempDir()
	binary, err := kopiaBinary()
	if err != nil {
		t.Fatal(err)
	}
	k := &kopia{t: t, binary: binary, env: append(os.Environ(),
		"KOPIA_CONFIG_PATH="+filepath.Join(dir, "config"), "KOPIA_PASSWORD="+passphrase.Reveal(), "KOPIA_CHECK_FOR_UPDATES=false",
		"KOPIA_CACHE_DIRECTORY="+filepath.Join(dir, "cache"), "KOPIA_LOG_DIR="+filepath.Join(dir, "log"))}
	place := []string{"filesystem", "--path", at.Path}
	if s := at.S3; s != nil {
		place = []string{"s3", "--bucket", s.Bucket, "--prefix", s.Prefix, "--endpoint", strings.TrimPrefix(s.Endpoint, "http://"), "--disable-tls"}
		k.env = append(k.env, "AWS_ACCESS_KEY_ID="+s.AccessKey.Reveal(), "AWS_SECRET_ACCESS_KEY="+s.SecretKey.Reveal())
	}
	k.run(append([]string{"repository", "connect", "--override-username=stillpoint", "--override-hostname=test"}, place...)...)
	return k
}

func (k *kopia) run(args ...string) string {
	k.t.Helper()
	c := exec.CommandContext(k.t.Context(), k.binary, args...)
	c.Env = k.env
	var errors strings.Builder
	c.Stderr = &errors
	out, err := c.Output()
	if err != nil {
		k.t.Fatalf("kopia %s: %v\n%s%s", strings.Join(args, " "), err, out, errors.String())
	}
	return string(out)
}

// restore returns what kopia makes of a backup.
func (k *kopia) restore(manifest string) (image adapters.Image, description string) {
	k.t.Helper()
	dir := k.t.TempDir()
	k.run("restore", manifest, dir)
	text, err := os.ReadFile(filepath.Join(dir, "volume.json"))
	if err != nil {
		k.t.Fatal(err)
	}
	return openFile(k.t, filepath.Join(dir, "disk.img")), string(text)
}

// Kopia's own command lists, verifies and restores what Stillpoint wrote; and after a base is forgotten and kopia has
// thrown away all that nobody needs, every backup that is left is as it was, for kopia and for us.
func TestKopiaReadsIt(t *testing.T) {
	t.Parallel()
	w := newKopiaWorld(t, 64<<10, 70<<20+12345)
	rng := rand.New(rand.NewPCG(11, 12))
	w.write(random(rng, 9<<20), 60<<20)
	var handles []string
	var wants []*model
	for i := range 3 {
		w.write(random(rng, 300<<10), int64(i)*(20<<20)+999)
		w.zero(61<<20, int64(i)<<19)
		s, want := w.cut()
		r := w.backup(s)
		if i > 0 && r.Kind != repository.Incremental {
			t.Fatalf("%+v", r)
		}
		handles, wants = append(handles, r.Backup), append(wants, want)
	}

	k := newKopia(t, w.at)
	list := func() map[string]string { // manifests by backup id
		var all []struct {
			ID     string            `json:"id"`
			Source map[string]string `json:"source"`
			Tags   map[string]string `json:"tags"`
		}
		if err := json.Unmarshal([]byte(k.run("snapshot", "list", "--all", "--json")), &all); err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		for _, m := range all {
			if m.Source["userName"] != "stillpoint" || m.Source["host"] != "test" || m.Source["path"] != "/mem/local/vol" {
				t.Errorf("source %v", m.Source)
			}
			found[m.Tags["tag:backup"]] = m.ID
		}
		return found
	}
	check := func(when string) {
		t.Helper()
		found := list()
		if len(found) != len(handles) {
			t.Fatalf("%s: kopia lists %v", when, found)
		}
		k.run("snapshot", "verify", "--verify-files-percent=100")
		for i, h := range handles {
			id := backupID(t, h)
			if i < len(handles)-2 {
				continue // two are enough, and kopia takes its time
			}
			got, text := k.restore(found[id])
			mustEqual(t, fmt.Sprintf("%s: kopia's disk.img of %s", when, h), got, wants[i])
			if !strings.Contains(text, `"id": "`+id+`"`) {
				t.Errorf("%s: volume.json is %s", when, text)
			}
			mustEqual(t, when+": "+h, w.content(h), wants[i])
			if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: id}); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
	}
	check("as written")

	if err := w.repo.Forget(t.Context(), backupID(t, handles[0])); err != nil {
		t.Fatal(err)
	}
	handles, wants = handles[1:], wants[1:]
	k.run("snapshot", "pin", list()[backupID(t, handles[0])], "--add", "kept") // kopia writes the manifest anew
	for range 2 {
		k.run("maintenance", "run", "--full", "--safety=none")
	}
	check("after maintenance")

	// The next incremental finds its base as kopia left it.
	w.write(random(rng, 5000), 50<<20)
	s, want := w.cut()
	r := w.backup(s)
	if r.Kind != repository.Incremental || len(r.Warnings) > 0 {
		t.Errorf("%+v", r)
	}
	handles, wants = append(handles, r.Backup), append(wants, want)
	check("and one more")
}
