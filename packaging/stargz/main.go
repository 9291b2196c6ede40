// containerd-stargz-grpc: stargz-snapshotter's lazy snapshotter as a containerd proxy plugin.
//
// Debian ships the library and the client (ctr-remote), not this daemon. It takes the options of the project's own
// daemon that experiments use, so either can be installed; build it with scripts/build-stargz.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/log"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/pelletier/go-toml"
	"google.golang.org/grpc"
)

// The library's Debian version, set by scripts/build-stargz.
var version = "unknown"

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-stargz-grpc:", err)
		os.Exit(1)
	}
}

func run() error {
	address := flag.String("address", "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock", "socket to listen on")
	root := flag.String("root", "/var/lib/containerd-stargz-grpc", "directory of snapshots and caches")
	configPath := flag.String("config", "", "configuration of stargz-snapshotter (TOML)")
	level := flag.String("log-level", "info", "least level of messages")
	tell := flag.Bool("version", false, "print the version")
	flag.Parse()
	if *tell {
		fmt.Println("containerd-stargz-grpc", version)
		return nil
	}
	if err := log.SetLevel(*level); err != nil {
		return err
	}
	config, err := readConfig(*configPath)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	snapshotter, err := service.NewStargzSnapshotterService(ctx, *root, config)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", *address)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		server.Stop()
	}
	return errors.Join(err, snapshotter.Close())
}

func readConfig(path string) (*service.Config, error) {
	config := &service.Config{}
	if path == "" {
		return config, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := toml.Unmarshal(data, config); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return config, nil
}
