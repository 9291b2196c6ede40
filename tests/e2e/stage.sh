# The machine of tests/e2e/stage.py: sourced by bash in namespaces of its own, before a page's commands.
# STAGE: an empty directory; IMAGES: what fill_storage made; CHECKOUT: this checkout.

ended() { [ "$2" = any ] || [ "$1" = "$2" ] || { echo "##STATUS $1, wanted $2"; exit 1; }; }
# Waits for a condition, a minute at most.
until_true() { for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; return 1; }
# Begins a server, and waits for its first line.
in_background() {
    "${@:2}" >"$STAGE/output.$1" 2>&1 &
    until_true grep -q . "$STAGE/output.$1" || echo "##SILENT $(cat "$STAGE/output.$1")"
}
serve_registry() {  # name, address, rest of the section "http"
    mkdir -p "$STAGE/$1"
    echo "{version: '0.1', log: {accesslog: {disabled: true}, level: error}, storage: {filesystem: {rootdirectory: \
$STAGE/storage}, delete: {enabled: true}}, http: {addr: '$2', secret: tests $3}}" >"$STAGE/$1/config.yml"
    OTEL_TRACES_EXPORTER=none docker-registry serve "$STAGE/$1/config.yml" >"$STAGE/$1/log" 2>&1 &
    disown
}
start_containerd() {
    containerd --config /etc/containerd/config.toml >"$STAGE/containerd.log" 2>&1 &
    disown
    until_true ctr version
}
start_snapshotter() {
    mkdir -p /run/obdlab
    obdlab serve snapshotter --root /var/lib/obdlab/snapshotter --address /run/obdlab/snapshotter.sock \
        ${SNAPSHOTTER_CONFIG:+--config "$SNAPSHOTTER_CONFIG"} \
        >"$STAGE/snapshotter.log" 2>&1 &
    disown; until_true test -S /run/obdlab/snapshotter.sock
}
use_snapshotter() {
    mkdir -p /etc/containerd
    printf 'version = 2\n[proxy_plugins.obdlab]\n type = "snapshot"\n address = "/run/obdlab/snapshotter.sock"\n' \
        >/etc/containerd/config.toml
    start_snapshotter && start_containerd
}
# Experiments as short as can be, on the smallest image, below the names of the checkout's.
small_experiments() {
    cd "$CHECKOUT" && rm -rf results && mkdir results && cp experiments/peers.toml experiments/declared.toml
    for name in quick peers; do
        printf 'images = ["tiny"]\nsnapshotters = ["overlayfs", "obdlab"]\nrepeats = 1\nwarm_starts = 0\n%s\n' \
            'a_a = false
quiet_wait_s = 0
load_limit = 1000' >experiments/$name.toml
    done
    printf 'kind = "fio"\nrepeats = 1\nquiet_wait_s = 0\nload_limit = 1000\na_a = false\n%s\n' '[axes]
device = ["loop", "obdlab-raw"]
iodepth = [1]
rw = ["randread"]
bs = [8192]
[options]
image = "tiny"
size_mib = 8
seconds = 0.1
[quick]
options = { size_mib = 4, seconds = 0.1 }' >experiments/fio.toml
}
overlay_of() {  # directory, name
    mkdir -p "$STAGE/over/$2" "$STAGE/over/work/$2"
    mount -t overlay -o "lowerdir=$1,upperdir=$STAGE/over/$2,workdir=$STAGE/over/work/$2" overlay "$1"
}
clean_stage() { obdlab cleanup --force >/dev/null 2>&1; }
trap clean_stage EXIT
set -e
mount --make-rprivate /
cp -r $IMAGES/storage $STAGE/storage
mkdir -p $STAGE/over $STAGE/home
mount -t tmpfs tmpfs $STAGE/over
for place in etc var/lib; do
    overlay_of "/$place" "$place"
done
for place in /var/lib/obdlab /var/lib/containerd /etc/obdlab /etc/containerd /etc/overlaybd /run /mnt; do
    mkdir -p $place; mount -t tmpfs tmpfs $place
done
overlay_of "$CHECKOUT" checkout
mkdir -p /run/netns /run/lock /run/obdlab
mount --bind /run/netns /run/netns; mount --make-shared /run/netns
ip link set lo up
for address in 10.0.0.1 10.0.0.2; do ip address add $address/32 dev lo; done
echo '127.0.0.1 localhost registry.example docker.example' >/etc/hosts
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=registry.example \
    -addext subjectAltName=DNS:registry.example,DNS:docker.example \
    -keyout $STAGE/key.pem -out $STAGE/cert.pem 2>/dev/null
for host in registry.example docker.example; do
    mkdir -p /etc/docker/certs.d/$host; cp $STAGE/cert.pem /etc/docker/certs.d/$host/ca.crt
done
serve_registry plain 127.0.0.1:5000 ""
serve_registry tls 127.0.0.1:443 ", tls: {certificate: $STAGE/cert.pem, key: $STAGE/key.pem}"
until_true curl -sf http://127.0.0.1:5000/v2/
until_true curl -skf https://127.0.0.1:443/v2/
set +e
mkdir -p "$STAGE/here"; cd "$STAGE/here"
