#!/usr/bin/env bash
# A Slurm of this one machine, for tests and for trying things out; needs Debian's slurm-wlm and munge, and root.
#
#   eval "$(slurm/one_machine_cluster.sh start FOLDER)"    sets SLURM_CONF, so that sbatch and the others find it
#   slurm/one_machine_cluster.sh stop FOLDER               stops the daemons of that folder and nothing else
#   slurm/one_machine_cluster.sh restart FOLDER            the controller alone, as after a crash of it
#
# Everything lives in FOLDER: keys, sockets, state, logs.  No accounting, no cgroups: it runs in a container, too.
# A job that goes back into the queue waits cred_expire seconds there; Slurm's own default is 120.
# CLUSTER_CPUS sets how many CPUs it claims to have (default: as many as there are, at least 4).
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

usage() { sed -n '4,6s/^# *//p' "$0" >&2; exit 2; }
fail() { echo "$*" >&2; exit 1; }

[ $# -eq 2 ] || usage
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export SLURM_CONF="$folder/slurm.conf"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

check() {
  for program in munged slurmctld slurmd; do
    command -v "$program" >/dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
  done
  [ "$(id -u)" -eq 0 ] || fail "slurmd starts jobs for users and needs root; this is $(id -un)."
  [ ! -e "$folder/slurmctld.pid" ] || fail "$folder holds a cluster already: stop it first."
}

configure() {
  local cpus=${CLUSTER_CPUS:-$(nproc)}
  mkdir -p "$folder"/{munge,state,spool}
  chmod 700 "$folder/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
  cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=3
MinJobAge=300
InactiveLimit=0
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$((cpus > 4 ? cpus : 4)) RealMemory=$(free -m | awk '/^Mem:/ {print $2}')
CONF
}

wait_for() {  # SECONDS DESCRIPTION COMMAND...
  local tries=$(($1 * 5)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "$what did not happen; see $folder/*.log and $folder/munge/log."
    sleep 0.2
  done
}

empty() { [ -z "$(squeue --noheader)" ]; }
idle() { [ "$(sinfo --noheader --format=%t)" = idle ]; }
gone() { ! kill -0 "$1" 2>/dev/null || grep -q '^State:.Z' "/proc/$1/status"; }  # a container may reap nothing

start() {
  check
  configure
  trap '[ $? -eq 0 ] || stop_daemons' EXIT
  munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --force >&2
  slurmctld -c >&2
  slurmd -c >&2
  wait_for 60 "An idle node" idle
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop_one() {  # a pid file of ours; the number counts only while it is that program
  local file=$1 program=$2 pid
  [ -s "$file" ] || return 0
  pid=$(cat "$file")
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$program" ]; then
    kill "$pid"
    wait_for 30 "The end of $program ($pid)" gone "$pid"
  fi
  rm -f "$file"
}

stop() {
  [ -e "$SLURM_CONF" ] || fail "$folder holds no cluster."
  if scontrol ping >/dev/null 2>&1; then
    scancel --user="$(id -un)"
    wait_for 60 "The end of the jobs" empty
  fi
  stop_daemons
}

stop_daemons() {
  stop_one "$folder/slurmctld.pid" slurmctld
  stop_one "$folder/slurmd.pid" slurmd
  stop_one "$folder/munge/pid" munged
}

restart() {
  stop_one "$folder/slurmctld.pid" slurmctld
  slurmctld >&2
  wait_for 60 "An answer of the controller" scontrol ping
}

case $1 in
  start | stop | restart) "$1" ;;
  *) usage ;;
esac
