#!/usr/bin/env bash
# Start a real Slurm cluster on a single machine to test job scripts and sweeps. Needs root, but no systemd or database.
#
#   apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
#   eval "$(scripts/slurm/local_cluster.sh up /tmp/slurm [CPUS])"     # CPUS: number of CPUs that the node reports
#   sinfo
#   scripts/slurm/local_cluster.sh down /tmp/slurm
#
# There are two partitions, low (the default) and high. A job in low is requeued if a job in high needs its resources. A
# killed job has five seconds to end, and a requeued job waits five seconds; on real clusters these are 30 and 120.
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
# time in seconds that a requeued job waits
AuthInfo=cred_expire=5
# do not listen on external addresses
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# no cgroups, because a container does not provide them
ProctrackType=proctrack/linuxproc
# allow more processors than the machine has, if the caller requests it
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
# ended jobs remain in squeue, which the sacct next to this script queries
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
    for _ in $(seq 100); do # otherwise their processes would keep running
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

# Terminate the process named in a PID file and wait until it has ended.
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

# In a container, there may be no parent process that reaps a daemon, which then remains as a zombie.
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
