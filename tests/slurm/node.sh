#!/usr/bin/env bash
# A real SLURM of one node on this machine, for tests/test_slurm.py.
#
#   node.sh install              install what it needs from Debian's packages (root)
#   node.sh start FOLDER         start munged, slurmctld and slurmd, all of whose files lie in FOLDER
#   node.sh stop FOLDER          cancel the jobs and end these three daemons, and no others
#   node.sh stop-controller FOLDER, start-controller FOLDER
#                                the controller alone; jobs go on running meanwhile
#
# Configuration, keys, sockets, logs and state are private to FOLDER, and a munge of the system's own is not touched. While
# the node runs, /etc/slurm/slurm.conf is a link to FOLDER/slurm.conf: Snakemake's job step takes SLURM_CONF out of the
# environment before it calls srun. Where such a file is there already, nothing is started. Starting and stopping needs root,
# since slurmd starts jobs as their owners. Works without systemd and without cgroups, so in containers too.
set -euo pipefail

CONF=/etc/slurm/slurm.conf

say() { echo "node.sh: $*" >&2; }
die() {
    say "$@"
    exit 1
}

until_true() { # until_true SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || die "waited in vain for $what; see the logs in $FOLDER"
        sleep 0.2
    done
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    # The packages would start daemons that have no configuration.
    local policy=/usr/sbin/policy-rc.d own=no
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        own=yes
    fi
    trap '[ "'"$own"'" = no ] || rm -f "'"$policy"'"' EXIT
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends munge slurm-client slurmctld slurmd >/dev/null
}

configure() {
    local name memory cgroup=cgroup/v1
    name=$(hostname -s)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$FOLDER/controller" "$FOLDER/node"
    # Older slurmd wants a cgroup file system even where no plugin uses one; this plugin does nothing until asked.
    [ "$(printf '24.05\n%s\n' "$(slurmd -V | awk '{print $2}')" | sort -V | head -n 1)" != 24.05 ] || cgroup=disabled
    echo "CgroupPlugin=$cgroup" >"$FOLDER/cgroup.conf"
    cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# a job starts when it can, not at the next tick
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
# a job that can never run is refused at once
EnforcePartLimits=ALL
# finished jobs stay in squeue for longer than Snakemake waits between two looks
MinJobAge=3600
# the time limit is looked at often, and what is over it ends soon
OverTimeLimit=0
KillWait=2
ReturnToService=2
# node and controller meet again soon after a restart
SlurmctldTimeout=60
SlurmdTimeout=120
SlurmctldPort=${SLURM_TEST_PORT:-46817}
SlurmdPort=$((${SLURM_TEST_PORT:-46817} + 1))
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
StateSaveLocation=$FOLDER/controller
SlurmdSpoolDir=$FOLDER/node
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.log
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
# the partitions of profiles/slurm
PartitionName=cpu Nodes=$name Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=$name MaxTime=INFINITE State=UP
CONF
}

alive() { # alive NAME: whether the daemon of this name that was started in FOLDER lives
    local pid
    pid=$(cat "$FOLDER/$1.pid" 2>/dev/null) || return 1
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

end() { # end NAME
    local pid
    alive "$1" || return 0
    pid=$(cat "$FOLDER/$1.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do
        [ -d "/proc/$pid" ] || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
}

link() { # clients that are told nothing find this node
    [ "$(readlink "$CONF" 2>/dev/null)" != "$FOLDER/slurm.conf" ] || return 0
    # A link that leads nowhere is left from a run that was killed.
    if [ -L "$CONF" ] && [ ! -e "$CONF" ]; then rm "$CONF"; fi
    [ ! -e "$CONF" ] || die "$CONF is there: this machine belongs to a SLURM already; start the node elsewhere"
    mkdir -p "${CONF%/*}"
    ln -s "$FOLDER/slurm.conf" "$CONF"
}

unlink_own() {
    [ "$(readlink "$CONF" 2>/dev/null)" != "$FOLDER/slurm.conf" ] || rm "$CONF"
}

start_controller() {
    alive slurmctld || slurmctld -f "$FOLDER/slurm.conf"
    until_true 30 "slurmctld" scontrol ping
}

start() {
    local name
    for name in munged slurmctld slurmd; do
        command -v "$name" >/dev/null || die "$name is missing; run: $0 install"
    done
    mkdir -p "$FOLDER"
    chmod 755 "$FOLDER"
    link
    configure
    [ -s "$FOLDER/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge.key")
    alive munged || munged --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" \
        --pid-file="$FOLDER/munged.pid" --log-file="$FOLDER/munged.log" --seed-file="$FOLDER/munge.seed"
    until_true 10 "munged" munge --no-input --socket="$FOLDER/munge.socket"
    start_controller
    alive slurmd || slurmd -f "$FOLDER/slurm.conf"
    until_true 60 "the node" sh -c 'sinfo --noheader --format %T | grep -qx idle'
}

stop() {
    if alive slurmctld; then
        timeout 20 scancel --user=root 2>/dev/null || true
        for _ in $(seq 50); do
            [ -n "$(timeout 5 squeue --noheader --states=running,completing 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    end slurmd
    end slurmctld
    end munged
    unlink_own
}

[ $# -ge 1 ] || die "usage: node.sh install | start FOLDER | stop FOLDER | stop-controller FOLDER | start-controller FOLDER"
if [ "$1" = install ]; then
    install_packages
    exit
fi
[ $# -eq 2 ] || die "name the folder: node.sh $1 FOLDER"
FOLDER=$(realpath -m "$2")
export SLURM_CONF=$FOLDER/slurm.conf
case $1 in
start) start ;;
stop) stop ;;
stop-controller) end slurmctld ;;
start-controller) start_controller ;;
*) die "unknown command: $1" ;;
esac
