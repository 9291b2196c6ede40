#!/bin/busybox sh
# First process of the virtual machine: the host's files below, memory above, the job in between.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in /modules/*; do insmod "$module" || echo "init: $module not loaded"; done

share="trans=virtio,version=9p2000.L,msize=524288"
mount -t 9p -o "ro,cache=loose,$share" host /host || echo "init: no host file system"
mount -t tmpfs -o size=90% none /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work none /root || echo "init: no overlay"

mount -t tmpfs none /root/run
mkdir -p /root/run/lock /root/run/vm /root/run/tmp
mount -t 9p -o "rw,cache=none,$share" job /root/run/vm
mount -t proc none /root/proc
mount -t sysfs none /root/sys
mount -t devtmpfs none /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts none /root/dev/pts
mount -t tmpfs none /root/dev/shm
mount -t cgroup2 none /root/sys/fs/cgroup
mount -t debugfs none /root/sys/kernel/debug
# The kernel's own requests for a module (mount -t xfs, say) find its tree as well.
modules=/usr/lib/modules
mkdir -p "/root$modules"
mount -t tmpfs none "/root$modules"
mkdir "/root$modules/$(uname -r)"
mount -o bind "/host$(cat /root/run/vm/modules)" "/root$modules/$(uname -r)"
ip link set lo up
hostname vm

stty -F /dev/ttyS1 raw
setsid chroot /root /bin/sh /run/vm/job.sh </dev/null >/dev/ttyS1 2>&1
echo $? >/root/run/vm/status
sync
poweroff -f
