#!/usr/bin/env bash
# Start a real Slurm on this one machine, to try job scripts and sweeps. Needs root, but no systemd and no database.
#
#   apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
#   eval "$(scripts/slurm/local_cluster.sh up /tmp/slurm [CPUS])"     # CPUS: as many as the node claims to have
#   sinfo
#   scripts/slurm/local_cluster.sh down /tmp/slurm
#
# Two partitions: low (the default) and high; a job of low is requeued when one of high needs its place. A killed job has
# five seconds to end, and a requeued one waits as long; on real clusters these are 30 and 120 seconds.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

configure() {
  cat > "$folder/slurm.conf" << CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# how long a requeued job waits, in seconds
AuthInfo=cred_expire=5
# nothing listens outside of this machine
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# no cgroups: a container has none to give
ProctrackType=proctrack/linuxproc
# more processors than there are, if the caller says so
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
# ended jobs stay in squeue, where sacct (beside this script) looks
MinJobAge=3600
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo) State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=01:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=01:00:00 PriorityTier=10 PreemptMode=OFF
CONF
}

up() {
  mkdir -p "$folder/state" "$folder/spool"
  folder=$(cd "$folder" && pwd)
  configure
  export SLURM_CONF=$folder/slurm.conf
  if ! munge --no-input > /dev/null 2>&1; then
    install -d -o munge -g munge -m 755 /run/munge
    runuser -u munge -- munged
    touch "$folder/munged.ours"
  fi
  slurmctld
  slurmd
  for _ in $(seq 100); do
    if sinfo -h -o %T 2> /dev/null | grep -q idle; then
      # shellcheck disable=SC2016  # the caller's PATH
      printf 'export SLURM_CONF=%q\nexport PATH=%q:"$PATH"\n' "$SLURM_CONF" "$here"
      return
    fi
    sleep 0.1
  done
  tail -n 20 "$folder"/*.log >&2
  echo "local_cluster.sh: the node is not idle after 10 s; the logs in $folder say why" >&2
  exit 1
}

down() {
  export SLURM_CONF=$folder/slurm.conf
  if scancel --user="$(id -un)" 2> /dev/null; then
    for _ in $(seq 100); do # or their processes would stay
      [ -n "$(squeue --noheader)" ] || break
      sleep 0.1
    done
  fi
  for daemon in slurmd slurmctld; do
    end "$folder/$daemon.pid"
  done
  if [ -e "$folder/munged.ours" ]; then
    end /run/munge/munged.pid
    rm -f "$folder/munged.ours"
  fi
}

# End the process of a pid file and wait until it is gone.
end() {
  local process
  [ -s "$1" ] || return 0
  process=$(< "$1")
  kill "$process" 2> /dev/null || return 0
  for _ in $(seq 100); do
    is_alive "$process" || return 0
    sleep 0.1
  done
  kill -KILL "$process" 2> /dev/null || true
}

# In a container there may be no process that waits for a daemon: after its end it stays as a zombie.
is_alive() {
  [ -e "/proc/$1/status" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2> /dev/null
}

here=$(cd "$(dirname "$0")" && pwd)
host=$(hostname -s)
[ $# -ge 2 ] || usage
folder=$2
cpus=${3:-$(nproc)}
case $1 in
  up) up ;;
  down) down ;;
  *) usage ;;
esac
