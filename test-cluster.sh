#!/usr/bin/env bash
#
# Brings up a real cluster of processes on this machine, walks through what a
# user does, and checks every answer. It needs Go, leaves nothing behind, and
# its exit status is 0 only if all went well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# A flag of a node or a client that this shell has in its environment would
# be one that the commands below do not show.
unset "${!RAFT_KEY_VALUE_@}"

tmp=$(mktemp -d "${TMPDIR:-/tmp}/test-cluster.XXXXXX")
bin=$tmp/raft-key-value
pid=()     # of the nodes that run, by node id
addr=()    # of all nodes, by node id
command='' # the pid of the sub-command that runs
keys=()    # all keys that were written, and not deleted
values=()  # their values
reads=0    # how many values were read and found right
data=''    # the directory of all data directories; empty: all is in memory only
pki=''     # the directory of the certificates; empty: there is no TLS
list=''    # of nodes 1 to 3, which form a cluster by themselves, and 4 and 5 join; empty: by commands

cleanup() {
  local status=$? id
  trap - EXIT
  trap '' HUP INT PIPE TERM
  if ((status != 0 && status < 128)); then
    for id in ${addr[@]+"${!addr[@]}"}; do
      printf '\nThe last lines of the log of node %s:\n' "$id"
      tail -n 15 "$tmp/$id.log"
    done >&2
    printf '\ntest-cluster.sh: failed\n' >&2
  fi
  exec 2>/dev/null # Bash would tell of each process that it was killed.
  for id in ${command:-} ${pid[@]+"${pid[@]}"}; do kill -KILL "$id" || true; done
  for id in ${command:-} ${pid[@]+"${pid[@]}"}; do wait "$id" || true; done
  rm -rf "$tmp"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

fail() {
  printf '\ntest-cluster.sh: %s\n' "$*" >&2
  exit 1
}

part() { printf '\n== %s ==\n' "$*"; }

title() { printf '\n# %s\n' "$*"; }

# poll LIMIT WHAT COMMAND...: runs the command until it succeeds. No other
# function sleeps.
poll() {
  local deadline=$((SECONDS + $1)) what=$2 id
  shift 2
  until "$@"; do
    for id in ${pid[@]+"${!pid[@]}"}; do
      kill -0 "${pid[$id]}" 2>/dev/null || lost "$id"
    done
    ((SECONDS < deadline)) || fail "it took too long until $what"
    sleep 0.05
  done
}

# lost ID: a node has ended that should not have; its pid may be another's soon.
lost() {
  unset "pid[$1]"
  fail "node $1 has ended"
}

# quietly ARGS...: runs a sub-command and sets out, exactly, and status. In the
# background and waited for, so that a signal to this script ends it at once.
quietly() {
  status=0
  "$bin" "$@" >"$tmp/out" 2>"$tmp/err" &
  command=$!
  wait "$command" || status=$?
  command=''
  out=$(cat "$tmp/out" && printf x) # $() takes newlines at the end away
  out=${out%x}
}

# run STATUS ARGS...: shows a sub-command and its results, and checks its exit
# status.
run() {
  local want=$1
  shift
  printf '$ raft-key-value%s\n' "$(quote "$@")"
  quietly "$@"
  show
  ((status == want)) || fail "the exit status is $status instead of $want"
}

# quote prints words as one would type them.
quote() {
  local word
  for word in "$@"; do
    if [[ $word =~ ^[[:alnum:]_./:=,-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "$word"; fi
  done
}

show() {
  if [[ -n $out ]]; then printf '%s\n' "${out%$'\n'}"; fi
  cat "$tmp/err"
  if ((status != 0)); then printf '(exit status %s)\n' "$status"; fi
}

# start ID: starts a node, at the address that it had before if it had one, and
# waits until it is ready.
start() {
  local id=$1
  local args=(--id "$id" --addr "${addr[$1]:-127.0.0.1:0}")
  if [[ -n $data ]]; then args+=(--data-dir "$data/$id"); fi
  if [[ -n $pki ]]; then
    args+=(--cert-file "$pki/node$id.pem" --key-file "$pki/node$id.key" --trusted-ca-file "$pki/ca.pem")
  fi
  if [[ -n $list ]]; then
    if ((id <= 3)); then args+=(--initial-cluster "$list"); else args+=(--join "${addr[1]},${addr[2]},${addr[3]}"); fi
  fi
  printf '$ raft-key-value%s &' "$(quote "${args[@]}")"
  : >"$tmp/$id.log"
  "$bin" "${args[@]}" >"$tmp/$id.log" 2>&1 &
  pid[id]=$! addr[id]=''
  poll 10 "node $id is ready" ready "$id"
  printf '   # pid %s, %s\n' "${pid[$id]}" "${addr[$id]}"
}

ready() {
  addr[$1]=$(sed -n 's/.* msg=ready .* advertise=\([^ ]*\).*/\1/p' "$tmp/$1.log")
  [[ -n ${addr[$1]} ]]
}

# be NAME [PKI]: the sub-commands that follow show this certificate, of another directory if
# one is given. They trust the nodes' CA.
be() {
  export RAFT_KEY_VALUE_CERT_FILE=${2:-$pki}/$1.pem
  export RAFT_KEY_VALUE_KEY_FILE=${2:-$pki}/$1.key
  export RAFT_KEY_VALUE_TRUSTED_CA_FILE=$pki/ca.pem
  printf '$ export RAFT_KEY_VALUE_CERT_FILE=%s RAFT_KEY_VALUE_KEY_FILE=%s RAFT_KEY_VALUE_TRUSTED_CA_FILE=%s\n' \
    "$RAFT_KEY_VALUE_CERT_FILE" "$RAFT_KEY_VALUE_KEY_FILE" "$RAFT_KEY_VALUE_TRUSTED_CA_FILE"
}

# be_nobody: the sub-commands that follow do without TLS.
be_nobody() {
  local names='RAFT_KEY_VALUE_CERT_FILE RAFT_KEY_VALUE_KEY_FILE RAFT_KEY_VALUE_TRUSTED_CA_FILE'
  unset $names
  printf '$ unset %s\n' "$names"
}

# refused MESSAGE ARGS...: a sub-command must not be done, and has to say why.
refused() {
  local message=$1
  shift
  run 3 "$@"
  grep -q -F "$message" "$tmp/err" || fail "it does not say \"$message\""
}

# logs PATTERN ARGS...: a node logs that it refuses a sub-command, which is run until then: of
# all refusals, a node logs one a second. It shows the line.
logs() {
  poll 15 "a node logs: $1" is_logged "$@"
  grep -h -E "$1" "$tmp"/*.log | tail -n 1
}

is_logged() {
  local pattern=$1
  shift
  quietly "$@"
  grep -q -E "$pattern" "$tmp"/*.log
}

# says TEXT: what the last sub-command has printed has to have that in it.
says() {
  grep -q -F "$1" "$tmp/out" || fail "it does not print \"$1\""
}

# write ID KEY VALUE: writes through a node.
write() {
  run 0 set --endpoints "${addr[$1]}" "$2" "$3"
  [[ -z $out ]] || fail "set printed something"
  remember "$2" "$3"
}

remember() {
  keys+=("$1")
  values+=("$2")
}

# expect ID KEY VALUE [--local]: reads from a node.
expect() {
  run 0 get --endpoints "${addr[$1]}" ${4:+"$4"} "$2"
  found "$@"
}

# found ID KEY VALUE: what was read last has to be that.
found() {
  [[ $status == 0 && $out == "$3" ]] || fail "the value of $2 on node $1 is \"$out\" instead of \"$3\": $(cat "$tmp/err")"
  reads=$((reads + 1))
}

# absent ID KEY: a node must not have a key.
absent() {
  run 1 get --endpoints "${addr[$1]}" "$2"
  not_found "$2"
}

# not_found KEY: what was read last must not be there.
not_found() {
  [[ $status == 1 && -z $out ]] || fail "get $1: exit status $status, and it printed \"$out\""
  grep -q 'not found' "$tmp/err" || fail "get does not say that $1 is not there: $(cat "$tmp/err")"
  reads=$((reads + 1))
}

# lists KEYS ARGS...: list, with these arguments, has to print these keys, quoted, in a line.
lists() {
  local want=$1 got
  shift
  run 0 list --keys-only "$@"
  got=$(tr '\n' ' ' <"$tmp/out")
  [[ ${got% } == "$want" ]] || fail "list printed $got instead of $want"
}

# expect_all ID...: these nodes must have all keys. It shows the reads as one.
expect_all() {
  local id i at=''
  for id in "$@"; do at+=" ${addr[$id]}"; done
  printf '$ for node in%s; do for key in%s gone; do\n>   raft-key-value get --endpoints $node $key; done; done\n' "$at" "$(quote "${keys[@]}")"
  for id in "$@"; do
    for i in "${!keys[@]}"; do
      quietly get --endpoints "${addr[$id]}" "${keys[$i]}"
      found "$id" "${keys[$i]}" "${values[$i]}"
    done
    quietly get --endpoints "${addr[$id]}" gone
    not_found gone
  done
  printf '(all %s values are as they were written, and gone is not found)\n' "${#keys[@]}"
}

# await_status PATTERN...: shows the status once each pattern matches a line
# of it; the patterns take one space for any number of them.
await_status() {
  printf '$ raft-key-value status\n'
  poll 15 "status shows: $*" matches "$@"
  show
}

matches() {
  local lines pattern
  quietly status
  lines=$(sed -E 's/ +/ /g' "$tmp/out")
  for pattern in "$@"; do
    grep -q -E "$pattern" <<<"$lines" || return 1
  done
}

# stop SIGNAL ID: ends a node, and sets status.
stop() {
  printf '$ kill -%s %s   # node %s\n' "$1" "${pid[$2]}" "$2"
  status=0
  {
    kill "-$1" "${pid[$2]}"
    wait "${pid[$2]}" || status=$?
  } 2>/dev/null
  unset "pid[$2]"
}

# healed ID: waits until a node is back in its role.
healed() {
  run 0 health --endpoints "${addr[$1]}" --service raftkv.v1.restart --wait --timeout 15s
}

# find_leader: sets leader to the id of the node that all running nodes name.
find_leader() {
  printf '$ raft-key-value status -o json | grep -o '\''"leader":{"id":"[0-9]*"'\'' | sort | uniq -c\n'
  poll 15 "all nodes name the same leader" agree
  printf '%s\n' "$named"
}

agree() {
  quietly status -o json
  named=$(grep -o '"leader":{"id":"[0-9]*"' "$tmp/out" | sort | uniq -c)
  leader=$(sed -n -E "s/^ *${#pid[@]} \"leader\":\{\"id\":\"([0-9]+)\"\$/\1/p" <<<"$named")
  [[ -n $leader ]]
}

# raft_id ID: prints by which raft ID a node goes.
raft_id() {
  quietly status -o json --endpoints "${addr[$1]}"
  sed -n -E "s/.*\"metrics\":\{\"node\":\{\"id\":\"$1\",\"address\":\"[^\"]*\"\},\"raft_id\":\"([0-9]+)\".*/\1/p" "$tmp/out"
}

# walk: the sequence, with whatever data is.
walk() {
  pid=() keys=() values=()
  if [[ -z $list ]]; then addr=(); fi
  unset RAFT_KEY_VALUE_ENDPOINTS

  title 'Three nodes, each a process of its own'
  for id in 1 2 3; do start "$id"; done
  printf '$ export RAFT_KEY_VALUE_ENDPOINTS=%s\n' "${addr[1]}"
  export RAFT_KEY_VALUE_ENDPOINTS=${addr[1]}

  if [[ -n $list ]]; then
    title 'They form a cluster by themselves; any of them may lead, here the first shall'
    await_status '^1 .* ok yes' '^2 .* ok yes' '^3 .* ok yes'
    run 0 transfer-leader 1
  else
    title 'One of them becomes a cluster, the others learners, then voters'
    run 0 init "1=${addr[1]}"
    run 0 add-learner "2=${addr[2]}"
    run 0 add-learner "3=${addr[3]}"
    run 0 change-membership 1 2 3
  fi
  await_status '^1 .* ok yes leader 1 ' '^2 .* ok yes follower 1 ' '^3 .* ok yes follower 1 '

  title 'A write through a follower is there on every node'
  write 2 foo bar
  expect 2 foo bar --local # an acknowledged write is applied on the node that took it
  for id in 1 2 3; do expect "$id" foo bar; done

  title 'A key that was deleted is gone on every node, one that is empty is not'
  run 0 set --endpoints "${addr[3]}" gone soon
  expect 1 gone soon
  run 0 delete --endpoints "${addr[2]}" gone
  for id in 1 2 3; do absent "$id" gone; done
  run 1 delete gone
  write 1 empty ''
  for id in 1 2 3; do expect "$id" empty ''; done

  title 'A write may depend on the version of its key'
  run 0 set -o json --if-version 0 once first # 0: the key is not there
  version=$(sed -n 's/.*"version":"\([0-9]*\)".*/\1/p' "$tmp/out")
  run 1 set --if-version 0 once again
  grep -q 'compare failed' "$tmp/err" || fail "set does not say that the compare failed"
  run 0 set --endpoints "${addr[3]}" --if-version "$version" once second
  remember once second
  expect 1 once second

  title 'A local read may wait for a write'
  run 0 set -o json --endpoints "${addr[2]}" waited for
  version=$(sed -n 's/.*"version":"\([0-9]*\)".*/\1/p' "$tmp/out")
  remember waited for
  for id in 1 2 3; do
    run 0 get --endpoints "${addr[$id]}" --local --min-version "$version" waited
    found "$id" waited for
  done

  title 'Keys that begin alike are listed, and deleted'
  for id in 1 2 3; do run 0 set --endpoints "${addr[$id]}" "box/$id" "item $id"; done
  lists '"box/1" "box/2" "box/3"' --endpoints "${addr[3]}" box/
  lists '"box/2"' --start box/2 --end box/3
  run 2 delete --prefix box/ # there is no terminal to ask at
  run 0 delete --endpoints "${addr[2]}" --prefix box/ --yes
  [[ $out == $'deleted keys: 3\n' ]] || fail "delete printed \"$out\""
  lists '' box/
  run 1 delete --prefix box/ --yes

  title 'A watch tells of each write on these keys, also afterwards'
  run 0 watch --endpoints "${addr[1]}" --from-version "$version" --until-version "$((version + 4))" box/
  lines=$(cut -f 1,3 "$tmp/out" | tr '\t\n' ' ;')
  [[ $lines == '"box/1" "item 1";"box/2" "item 2";"box/3" "item 3";"box/1" deleted;"box/2" deleted;"box/3" deleted;' ]] ||
    fail "watch printed $lines"

  title 'Another node leads'
  find_leader
  to=$((leader % 3 + 1))
  run 0 transfer-leader "$to"
  await_status "^$to .* ok yes leader $to "
  write "$leader" after-transfer "written through node $leader"

  title 'Five voters'
  for id in 4 5; do
    start "$id"
    if [[ -z $list ]]; then run 0 add-learner "$id=${addr[$id]}"; fi
  done
  if [[ -n $list ]]; then await_status '^4 .* ok yes' '^5 .* ok yes'; fi
  run 2 change-membership 4 5 # that would remove the others
  grep -q 'it would remove nodes 1, 2 and 3' "$tmp/err" || fail "change-membership does not say whom it would remove"
  run 0 change-membership 1 2 3 4 5
  await_status '^1 .* ok yes' '^2 .* ok yes' '^3 .* ok yes' '^4 .* ok yes follower' '^5 .* ok yes follower'
  expect_all 4 5

  title 'The leader is killed'
  RAFT_KEY_VALUE_ENDPOINTS=$(IFS=, && printf '%s' "${addr[*]}")
  printf '$ export RAFT_KEY_VALUE_ENDPOINTS=%s\n' "$RAFT_KEY_VALUE_ENDPOINTS"
  find_leader
  killed=$leader
  was=$(raft_id "$killed")
  [[ -n $was ]] || fail "status does not name the raft ID of node $killed"
  stop KILL "$killed"
  run 0 set --timeout 15s after-kill 'written while the others elect a leader'
  remember after-kill 'written while the others elect a leader'
  for id in "${!pid[@]}"; do write "$id" "after-kill-$id" "written through node $id"; done
  find_leader
  [[ $leader != "$killed" ]] || fail "node $killed still leads"
  await_status "^$leader .* ok yes leader $leader " "^$killed .* unreachable yes"

  title 'All of it is on all nodes that are left'
  expect_all "${!pid[@]}"

  local as
  if [[ -n $data ]]; then
    title 'The killed leader comes back as what it was'
    as='^[0-9]+$'
  else
    title 'The killed leader comes back without its memory, and is healed'
    as='^$'
  fi
  start "$killed"
  healed "$killed"
  [[ $(raft_id "$killed" | grep -x "$was") =~ $as ]] || fail "node $killed went by the raft ID $was, and now by $(raft_id "$killed")"
  await_status "^$killed .* ok yes follower"
  expect_all "$killed"

  title 'All are restarted, one after another'
  for id in "${!pid[@]}"; do
    stop TERM "$id"
    ((status == 0)) || fail "the exit status of node $id is $status"
    start "$id"
    healed "$id"
  done
  await_status '^1 .* ok yes' '^2 .* ok yes' '^3 .* ok yes' '^4 .* ok yes' '^5 .* ok yes'
  expect_all "${!pid[@]}"
  run 0 list
  (($(wc -l <"$tmp/out") == ${#keys[@]})) || fail "list does not print ${#keys[@]} keys"
}

go build -buildvcs=false -o "$bin" .
SECONDS=0

part 'All in memory'
walk
for id in "${!pid[@]}"; do stop KILL "$id"; done

part 'With data directories, and TLS; nodes form the cluster, and join it, by themselves'
list="1=${addr[1]},2=${addr[2]},3=${addr[3]}"
data=$tmp/data
mkdir "$data"
pki=$tmp/pki
title 'A CA, and certificates for nodes, an admin, a client and a reader'
run 0 certs "$pki" --nodes 1=127.0.0.1,2=127.0.0.1,3=127.0.0.1,4=127.0.0.1,5=127.0.0.1
be admin
walk

title 'Whoever shows no certificate, or one of another CA, is refused'
run 0 certs "$tmp/other" --nodes 1=127.0.0.1
be_nobody
refused 'as a node does that wants TLS' get --timeout 1s foo
be admin "$tmp/other"
refused 'tls: ' get --timeout 1s foo
logs 'msg="a connection was refused" .*certificate signed by unknown authority' get --timeout 300ms foo

title 'A reader reads, a client writes, too, and neither does what admins do'
be reader
expect 1 foo bar
refused 'reader may not call raftkv.v1.KVService/OpenSession: that needs the role client or admin' set foo baz
be client
write 1 by-client 'written by a client'
refused 'client may not call raftkv.v1.ClusterService/AddLearner: that needs the role admin' add-learner "9=${addr[1]}"
be node1
refused 'node/1 may not call raftkv.v1.KVService/Get: that needs the role reader or client or admin' get foo
logs 'msg="a call was refused" .*by=node/1 .*KVService/Get' get foo
be admin

title 'All nodes are killed at once, and find everything when they start again'
for id in "${!pid[@]}"; do stop KILL "$id"; done
for id in "${!addr[@]}"; do start "$id"; done
for id in "${!pid[@]}"; do healed "$id"; done
expect_all "${!pid[@]}"

title 'A backup becomes a new cluster, which goes on from there'
list=''
run 0 backup "$tmp/backup"
run 3 backup "$tmp/backup" # it is there already
run 0 verify "$tmp/backup"
says 'a backup of a cluster'
for id in "${!pid[@]}"; do stop TERM "$id"; done
run 0 certs "$pki" --nodes 6=127.0.0.1,7=127.0.0.1,8=127.0.0.1,9=127.0.0.1 # by the same CA
addr[6]=${addr[1]}
export RAFT_KEY_VALUE_ENDPOINTS=${addr[6]}
run 0 restore "$tmp/backup" --data-dir "$data/6" --id 6 --addr "${addr[6]}"
run 3 restore "$tmp/backup" --data-dir "$data/6" --id 6 --addr "${addr[6]}" # it is not empty any more
start 6
healed 6
expect_all 6
write 6 after-restore 'written to the new cluster'
addr[7]='' && start 7
run 0 add-learner "7=${addr[7]}"
run 0 change-membership 6 7
await_status '^6 .* ok yes' '^7 .* ok yes'
expect_all 7

title 'Two of three machines are lost: what the third one has becomes a new cluster'
addr[8]='' && start 8
run 0 add-learner "8=${addr[8]}"
run 0 change-membership 6 7 8
await_status '^6 .* ok yes' '^7 .* ok yes' '^8 .* ok yes'
write 8 before-the-loss 'written before two machines are lost'
for id in 7 8; do
  stop KILL "$id"
  rm -r "${data:?}/$id"
done
refused 'there is no leader' get foo
refused 'another process uses it' verify "$data/6"
refused 'another process uses it' backup --data-dir "$data/6" "$tmp/rescued"
stop KILL 6
run 0 verify "$data/6"
says 'a data directory'
run 0 backup --data-dir "$data/6" "$tmp/rescued"
run 0 verify "$tmp/rescued"
says 'a backup of a data directory'
refused 'it is a directory, and no backup' restore "$data/6" --data-dir "$data/9" --id 9 --addr "${addr[6]}"
addr[9]=${addr[6]}
run 0 restore "$tmp/rescued" --data-dir "$data/9" --id 9 --addr "${addr[9]}"
start 9
healed 9
expect_all 9
write 9 after-the-loss 'written to what was saved'

printf '\nok: twice, in memory and with data directories over TLS, 5 nodes formed a cluster, whose leader was killed and came back, and all were restarted; strangers were refused, all were killed at once, a backup was restored, and what one of three had was saved; %s reads on all nodes found what had been written, in %s s\n' \
  "$reads" "$SECONDS"
