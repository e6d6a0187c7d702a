package class

import (
	"errors"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/fault"
)

func TestParse(t *testing.T) {
	parameters := map[string]string{
		"snap.stillpoint.io/adapter": "ceph-rbd", "snap.stillpoint.io/backend": "fast", "snap.stillpoint.io/max-freeze": "500ms",
		"snap.stillpoint.io/allow-crash-consistent": "true", "snap.stillpoint.io/type": "S3", "snap.stillpoint.io/remote-name": "offsite",
		"snap.stillpoint.io/allow-incremental": "false", "snap.stillpoint.io/delete-local": "true", "snap.stillpoint.io/s3-bucket": "backups",
		"snap.stillpoint.io/s3-endpoint": "s3.example:9000", "snap.stillpoint.io/s3-signing-region": "north-1", "snap.stillpoint.io/s3-use-path-style": "true",
		"csi.storage.k8s.io/volumesnapshot/name": "any",
	}
	got, err := Parse(Snapshots, parameters)
	want := Class{"ceph-rbd", "fast", Cut{500 * time.Millisecond, true, false},
		&Backup{"offsite", false, true, Bucket{"s3.example:9000", "backups", "north-1", true}}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = Parse(Volumes, map[string]string{"snap.stillpoint.io/adapter": "reflink"})
	if want := (Class{Adapter: "reflink", Cut: Cut{MaxFreeze: DefaultFreeze}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, k := range Keys() { // every key that is documented is known, to its kinds of classes only
		for _, kind := range []Kind{Volumes, Snapshots, Groups} {
			_, err := Parse(kind, map[string]string{"snap.stillpoint.io/adapter": "a", k.Name: "x"})
			has := false
			for _, of := range k.Kinds {
				has = has || of == kind
			}
			if refused := err != nil && strings.Contains(err.Error(), `"`+k.Name+`" is no parameter`); refused == has {
				t.Errorf("a %s with %s: %v", kind, k.Name, err)
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := map[string]string{"snap.stillpoint.io/adapter": "mem", "snap.stillpoint.io/type": "S3", "snap.stillpoint.io/remote-name": "r",
		"snap.stillpoint.io/s3-bucket": "b", "snap.stillpoint.io/s3-endpoint": "e"}
	if _, err := Parse(Groups, good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		change map[string]string // an empty value takes the key away
		says   []string
	}{
		{map[string]string{"snap.stillpoint.io/adaptor": "mem"}, []string{`"snap.stillpoint.io/adaptor"`, `did you mean "snap.stillpoint.io/adapter"?`}},
		{map[string]string{"s3-bucket": "b"}, []string{`did you mean "snap.stillpoint.io/s3-bucket"?`}},
		{map[string]string{"snap.stillpoint.com/backend": "b"}, []string{`did you mean "snap.stillpoint.io/backend"?`}},
		{map[string]string{"pool": "rbd"}, []string{`"pool"`, "there is snap.stillpoint.io/adapter, "}},
		{map[string]string{"snap.stillpoint.io/type": ""}, []string{"remote-name has no meaning without", "s3-bucket has no meaning without"}},
		{map[string]string{"snap.stillpoint.io/type": "s4"}, []string{`no type "s4"`}},
		{map[string]string{"snap.stillpoint.io/s3-endpoint": "", "snap.stillpoint.io/remote-name": ""}, []string{"s3-endpoint is required", "remote-name is required"}},
		{map[string]string{"snap.stillpoint.io/remote-name": "Off/Site"}, []string{`"Off/Site" is no name`}},
		{map[string]string{"snap.stillpoint.io/delete-local": "yes"}, []string{`delete-local: "yes" is not true or false`}},
		{map[string]string{"snap.stillpoint.io/max-freeze": "2m"}, []string{`"2m" is not a time of more than 0 and at most 1m0s`}},
		{map[string]string{"snap.stillpoint.io/max-freeze": "0s"}, []string{`"0s" is not a time`}},
	} {
		parameters := maps.Clone(good)
		for k, v := range c.change {
			if parameters[k] = v; v == "" {
				delete(parameters, k)
			}
		}
		_, err := Parse(Groups, parameters)
		if !errors.Is(err, fault.Invalid) {
			t.Errorf("%v: %v", c.change, err)
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%v: it does not say %q:\n%v", c.change, s, err)
			}
		}
	}
}

func TestParseSecrets(t *testing.T) {
	good := map[string]string{"access-key": "AKIA", "secret-key": "xyzzy", "passphrase": "plugh"}
	c, err := ParseSecrets(good)
	if err != nil || c.AccessKey.Reveal() != "AKIA" || c.SecretKey.Reveal() != "xyzzy" || c.Passphrase.Reveal() != "plugh" {
		t.Error(err)
	}
	_, err = ParseSecrets(map[string]string{"access-key": "AKIA", "secretkey": "xyzzy", "passphrase": ""})
	if !errors.Is(err, fault.Invalid) {
		t.Fatal(err)
	}
	for _, s := range []string{`"secretkey"; did you mean "secret-key"?`, `"secret-key" is required`, `"passphrase" is required`} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("it does not say %q: %v", s, err)
		}
	}
	if strings.Contains(err.Error(), "xyzzy") {
		t.Errorf("it tells a secret: %v", err)
	}
}

func TestConflict(t *testing.T) {
	with := func(remote, bucket string) Class {
		return Class{Backup: &Backup{Remote: remote, Bucket: Bucket{Name: bucket, Endpoint: "e"}}}
	}
	classes := map[string]Class{"a": with("one", "x"), "b": with("two", "y"), "c": with("one", "x"), "d": {}}
	if err := Conflict(classes); err != nil {
		t.Error(err)
	}
	classes["e"] = with("one", "y")
	err := Conflict(classes)
	if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "classes a and e") || !strings.Contains(err.Error(), "s3://y at e") {
		t.Error(err)
	}
}

func TestOriginOf(t *testing.T) {
	sidecar := map[string]string{"csi.storage.k8s.io/volumesnapshot/name": "s1", "csi.storage.k8s.io/volumesnapshot/namespace": "shop", "snap.stillpoint.io/adapter": "mem"}
	const uid = "1b8f9ab3-4923-427f-894f-595edcfcb4c8"
	if o, err := OriginOf(sidecar, "snapshot-"+uid); err != nil || o != (Origin{"shop", "s1", uid}) {
		t.Errorf("%+v, %v", o, err)
	}
	for _, wanted := range []string{"", "snapshot-1", "snapshot-" + uid[1:], "snapshot-" + strings.ToUpper(uid), uid + "-x"} {
		if _, err := OriginOf(sidecar, wanted); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", wanted, err)
		}
	}
	if _, err := OriginOf(nil, "snapshot-"+uid); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "--extra-create-metadata") {
		t.Error(err)
	}
}
