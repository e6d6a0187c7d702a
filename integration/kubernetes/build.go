package kubernetes

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"stillpoint.io/stillpoint/integration/peer"
)

// version is that of Kubernetes in integration/tools/go.mod. The servers report what the linker writes into them.
const version = "v1.36.3"

// The modules of integration/tools whose custom resources a cluster has, with the folder they are in.
var crds = []struct{ module, folder string }{
	{"github.com/kubernetes-csi/external-snapshotter/client/v8", "config/crd"},
	{"github.com/kubernetes-csi/external-snapshot-metadata/client", "config/crd"},
}

//go:embed build.go
var recipe []byte

// Build makes sure that the programs of a cluster are in the user's cache, and returns their folder there. The first time
// it compiles them, which takes some five minutes on two idle cores, 3 GB of Go's build cache and 2 GB of memory, and the
// network if their modules are not there yet; that is said in progress. The cache's key is the module's files, the
// compiler and this recipe.
func Build(ctx context.Context, progress io.Writer) (dir string, err error) {
	module, err := peer.Folder("integration", "tools")
	if err != nil {
		return "", err
	}
	key := sha256.New()
	fmt.Fprintln(key, runtime.Version(), runtime.GOARCH)
	key.Write(recipe)
	for _, name := range []string{"go.mod", "go.sum", "changedblocks/main.go", "fakecri/main.go"} {
		content, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return "", err
		}
		fmt.Fprintln(key, name, len(content))
		key.Write(content)
	}
	return peer.Cached(ctx, "kubernetes-"+version, fmt.Sprintf("%x", key.Sum(nil))[:12], func(draft, _ string) error {
		fmt.Fprintf(progress, "building Kubernetes %s and the CSI sidecars, once: this takes some minutes\n", version)
		return compile(ctx, module, draft, progress)
	})
}

// compile fills a folder with the programs, and with the definitions of the custom resources in crds/.
func compile(ctx context.Context, module, into string, progress io.Writer) error {
	variable := func(name, value string) string { return "-X k8s.io/component-base/version." + name + "=" + value }
	major, minor, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	flags := strings.Join([]string{"-s", "-w", variable("gitVersion", version), variable("gitMajor", major), variable("gitMinor", minor),
		variable("gitTreeState", "clean")}, " ")
	// Whoever else works on the machine shall not notice.
	build := exec.CommandContext(ctx, "nice", "-n", "10", "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", into+"/", "tool", "./...")
	build.Dir, build.Env = module, append(os.Environ(), "CGO_ENABLED=0")
	build.Stdout, build.Stderr = progress, progress
	if err := build.Run(); err != nil {
		return fmt.Errorf("building Kubernetes: %w", err)
	}
	// The go command names a program after the last element of its path that is no version.
	if err := os.Rename(filepath.Join(into, "server"), filepath.Join(into, "etcd")); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(into, "crds"), 0o755); err != nil {
		return err
	}
	for _, c := range crds {
		list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", c.module)
		list.Dir, list.Stderr = module, progress
		out, err := list.Output()
		if err != nil {
			return fmt.Errorf("finding %s: %w", c.module, err)
		}
		files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), c.folder, "*.storage.k8s.io_*.yaml"))
		if err != nil || len(files) == 0 {
			return fmt.Errorf("%s has no custom resources in %s", c.module, c.folder)
		}
		for _, f := range files {
			content, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(into, "crds", filepath.Base(f)), content, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
