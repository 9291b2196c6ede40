// Package conformance runs containerd's own suite for snapshotters against a snapshotter that listens on a socket, and
// against containerd's overlayfs.
package conformance

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/overlay"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// The suite leaves out what it knows a snapshotter of some name not to do ("overlayfs"): this name gets all of it.
const name = "conformance"

// TestSocket is for the snapshotter on the socket that CONFORMANCE_SOCKET names: one for all tests of the suite, which
// run at the same time.
func TestSocket(t *testing.T) {
	address := os.Getenv("CONFORMANCE_SOCKET")
	if address == "" {
		t.Fatal("CONFORMANCE_SOCKET is not set")
	}
	testsuite.SnapshotterSuite(t, name, func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		connection, err := grpc.Dial("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		client := snapshotsapi.NewSnapshotsClient(connection)
		return proxy.NewSnapshotter(client, "obdlab"), connection.Close, nil
	})
}

// TestOverlayfs is for containerd's own, in this process.
func TestOverlayfs(t *testing.T) {
	testsuite.SnapshotterSuite(t, name, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		snapshotter, err := overlay.NewSnapshotter(root)
		if err != nil {
			return nil, nil, err
		}
		return snapshotter, snapshotter.Close, nil
	})
}
