#!/usr/bin/env bash
# A Slurm cluster of two nodes on one machine, for tests: slurm_cluster.sh up | down FOLDER (root only).
#
# A node is a slurmd in network and UTS namespaces of its own: it has a host name, an address and a loopback.
# slurmctld sits on the bridge between them. Each node has two CPUs and four null devices for GPUs.
# All it writes is in FOLDER; clients need SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail

ACTION=${1:?up or down} ROOT=${2:?a folder}
NET=10.207.33 BRIDGE=brdejavu NODES=(dejavu1 dejavu2)
export SLURM_CONF=$ROOT/slurm.conf

alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }

write_configuration() {
  local host i
  host=$(hostname -s)
  mkdir -p "$ROOT"/{state,log,run,dev}
  chmod 755 "$ROOT"
  for i in 0 1 2 3; do [[ -e $ROOT/dev/nvidia$i ]] || mknod "$ROOT/dev/nvidia$i" c 1 3; done
  cat >"$ROOT/slurm.conf" <<END
ClusterName=dejavu
SlurmctldHost=$host($NET.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: so long does a requeued job wait, and 120 s by default
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool.%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
# neither systemd nor cgroups are needed: children are followed through /proc
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=120
KillWait=3
MinJobAge=600
DebugFlags=NO_CONF_HASH
GresTypes=gpu
NodeName=${NODES[0]} NodeAddr=$NET.11 CPUs=2 RealMemory=4000 Gres=gpu:4 State=UNKNOWN
NodeName=${NODES[1]} NodeAddr=$NET.12 CPUs=2 RealMemory=4000 Gres=gpu:4 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
END
  echo "CgroupPlugin=cgroup/v1" >"$ROOT/cgroup.conf"
  echo "Name=gpu File=$ROOT/dev/nvidia[0-3]" >"$ROOT/gres.conf"
  # what every node sees in place of /etc/hosts
  printf '%s\n' "127.0.0.1 localhost" "$NET.1 $host" "$NET.11 ${NODES[0]}" "$NET.12 ${NODES[1]}" >"$ROOT/hosts"
}

network_up() {
  local i node
  ip link add "$BRIDGE" type bridge
  ip addr add "$NET.1/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for i in 0 1; do
    node=${NODES[i]}
    ip netns add "$node"
    ip link add "v$node" type veth peer name "p$node"
    ip link set "v$node" master "$BRIDGE" up
    ip link set "p$node" netns "$node" name eth0
    ip netns exec "$node" ip link set lo up
    ip netns exec "$node" ip addr add "$NET.$((11 + i))/24" dev eth0
    ip netns exec "$node" ip link set eth0 up
  done
}

# on_node NODE COMMAND ... (not `ip netns exec`: that mounts a new /sys, in which slurmd misses its cgroups)
on_node() {
  nsenter --net="/run/netns/$1" unshare --uts --mount --propagation private \
    sh -c 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"' on_node "$ROOT/hosts" "$@"
}

munge_up() {
  local try
  (umask 077; head -c 128 /dev/urandom >"$ROOT/run/munge.key")
  munged --force --num-threads=4 --socket="$ROOT/run/munge.socket" --key-file="$ROOT/run/munge.key" \
    --pid-file="$ROOT/run/munged.pid" --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/run/munge.seed"
  for ((try = 0; try < 100; try++)); do
    munge -S "$ROOT/run/munge.socket" -n >/dev/null 2>&1 && return
    sleep 0.1
  done
  echo "munged gives no credential" >&2
  return 1
}

up() {
  local node try
  write_configuration
  network_up
  munge_up
  slurmctld -c
  for node in "${NODES[@]}"; do
    mkdir -p "$ROOT/spool.$node"
    on_node "$node" slurmd -N "$node"
  done
  for ((try = 0; try < 300; try++)); do
    [[ $(sinfo -h -N -o %T 2>/dev/null | grep -c '^idle') == 2 ]] && return
    sleep 0.1
  done
  echo "the nodes did not come up; see $ROOT/log" >&2
  return 1
}

stop() { # PIDFILE ...
  local file try
  for file in "$@"; do ! alive "$file" || kill "$(<"$file")" || true; done
  for file in "$@"; do
    for ((try = 0; try < 50; try++)); do alive "$file" || break; sleep 0.1; done
    ! alive "$file" || kill -9 "$(<"$file")" || true
  done
}

down() {
  local node
  if alive "$ROOT/run/slurmctld.pid"; then timeout 10 scancel --user root 2>/dev/null || true; fi
  stop "$ROOT"/run/slurmd.*.pid "$ROOT/run/slurmctld.pid" "$ROOT/run/munged.pid"
  for node in "${NODES[@]}"; do
    [[ -e /run/netns/$node ]] || continue
    ip netns pids "$node" | xargs -r kill -9 2>/dev/null || true # what its jobs have left
    ip netns del "$node"
  done
  ip link del "$BRIDGE" 2>/dev/null || true
}

"$ACTION"
