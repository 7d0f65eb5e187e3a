# What a device is, as key=value lines; changes nothing. For any POSIX shell: sh -s ROOT PYTHON DISTRIBUTION...
probe() {
    echo "time=$(date +%s)"
    root=$1 python=$2
    shift 2
    limit=
    timeout 5 true && limit='timeout 5'

    echo "arch=$(uname -m)"
    echo "os=$(uname -s) $(uname -r)"
    echo "distribution=$(. /etc/os-release && echo "$PRETTY_NAME")"
    echo "processor=$(cpuinfo 'model name')"
    echo "flags=$(cpuinfo flags)$(cpuinfo Features)"
    echo "cores=$(unset OMP_NUM_THREADS; nproc || grep -c '^processor' /proc/cpuinfo)"
    echo "memory_kb=$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)"
    echo "libc=$(getconf GNU_LIBC_VERSION || ldd --version 2>&1 | sed -n 's/^Version /musl /p')"
    echo "load=$(cut -d ' ' -f 1 /proc/loadavg)"
    for zone in /sys/class/thermal/thermal_zone*/temp; do
        echo "millidegrees=$(cat "$zone")"
    done

    place=$root
    while [ ! -e "$place" ]; do place=$(dirname -- "$place"); done
    echo "place=$place"
    [ -d "$place" ] && [ -w "$place" ] && [ -x "$place" ] && echo writable=yes
    echo "df=$(df -Pk -- "$place" | tail -n 1)"
    echo "environment=$(tr -d '\n' < "$root/environment/environment.json")"
    echo "current=$(basename -- "$(readlink -- "$root/current")")"
    { [ -e "$root/allowed_signers" ] || [ -L "$root/allowed_signers" ]; } && echo guarded=yes
    echo "lease=$(cat "$root/lease")"
    echo "boot=$(cat /proc/sys/kernel/random/boot_id)"
    echo "uptime=$(cut -d ' ' -f 1 /proc/uptime)"
    if [ -r "$root/lock" ] && command -v flock > /dev/null; then
        flock -n "$root/lock" true
        [ $? = 1 ] && echo "locked=$(fuser "$root/lock")"
    fi

    "$python" -c '
import sys
print("python=%d.%d.%d" % sys.version_info[:3])
from importlib import metadata, util
for name in sys.argv[1:]:
    try:
        print("package=%s %s" % (name, metadata.version(name)))
    except metadata.PackageNotFoundError:
        pass
if util.find_spec("tensorrt"):
    print("tensorrt_python=yes")
' "$@"

    $limit nvidia-smi --query-gpu=name,compute_cap,memory.total,temperature.gpu --format=csv,noheader,nounits |
        sed 's/^/gpu=/'
    for name in compatible model; do
        [ -e "/proc/device-tree/$name" ] && echo "$name=$(tr '\0' ' ' < "/proc/device-tree/$name")"
    done
    echo "driver=$(head -n 1 /proc/driver/nvidia/version)"
    echo "cuda=$(tr -d '\n' < /usr/local/cuda/version.json)"
    dpkg-query -W -f '${Package} ${Version}\n' 'libnvinfer*' | sed 's/^/debian=/'
    for program in "$TRTEXEC" "$(command -v trtexec)" /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
        [ -x "$program" ] && echo "trtexec=$program" && break
    done
    echo "tegra=$(head -n 1 /etc/nv_tegra_release)"
    echo "power=$($limit nvpmodel -q | tr '\n' ' ')"
    command -v nvpmodel > /dev/null && echo "power_set=$(may nvpmodel -m 0)"
    governor=/sys/devices/system/cpu/cpufreq/policy0/scaling_governor
    if command -v jetson_clocks > /dev/null; then
        echo "clocks=$(may jetson_clocks)"
    elif command -v nvidia-smi > /dev/null; then
        echo "clocks=$(may nvidia-smi -i 0 -pm 1)"
    elif [ -e "$governor" ]; then
        echo "clocks=$(may tee "$governor")"
    fi

    if command -v docker > /dev/null; then
        if answer=$($limit docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}' 2>&1); then
            echo "docker=$answer"
        else
            echo "docker_problem=$(echo "$answer" | tail -n 1)"
        fi
    fi
    command -v podman > /dev/null && echo podman=yes
    command -v nvidia-container-runtime-hook > /dev/null && echo hook=yes
    cat /etc/cdi/* /var/run/cdi/* | grep -q nvidia.com/gpu && echo cdi=yes
    echo end=yes
}

cpuinfo() {
    sed -n "s/^$1[[:space:]]*: *//p" /proc/cpuinfo | head -n 1
}

# Who may run a command: this user as root, through sudo without a password, or nobody
may() {
    program=$(command -v "$1")
    shift
    if [ "$(id -u)" = 0 ]; then
        echo root
    elif sudo -k -n -l "$program" "$@" > /dev/null; then
        echo sudo
    else
        echo no
    fi
}

probe "$@" < /dev/null 2> /dev/null
