#!/usr/bin/env bash
# Installs the proxy as a systemd service on this host, upgrades it, takes it away: see usage below, docs/deploy-host.md.
# For Ubuntu, Debian, Amazon Linux 2023 and their like. Whatever is checked is checked before the running service is
# touched; a new version or configuration that does not become healthy is undone; a run that was interrupted is undone
# by the next one.
set -euo pipefail
umask 022

base=/opt/mlflow-proxy
releases=$base/releases
undo=$base/undo # how things were before a change that is not proven yet
etc=/etc/mlflow-proxy
config=$etc/proxy.toml
state=/var/lib/mlflow-proxy
logs=/var/log/mlflow-proxy
unit=/etc/systemd/system/mlflow-proxy.service
command=/usr/local/bin/mlflow-proxy
user=mlflow-proxy
lock=/run/mlflow-proxy-install.lock
kept=3 # releases
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'USAGE'
Usage: install.sh [--config FILE] [--wheelhouse DIR] [--timeout SECONDS]
       install.sh uninstall [--purge]

Installs or upgrades the proxy, starts it, and waits until it is healthy; else goes back to what ran before.

  --config FILE       use this configuration; default: keep /etc/mlflow-proxy/proxy.toml
  --wheelhouse DIR    install from these wheels, without network; default: from this repository and a package index
  --timeout SECONDS   how long the service may take to become healthy; default: 60
  uninstall           stop the proxy and remove it; configuration, keys and audit log stay
  --purge             with uninstall: remove these, and the user, too

PYTHON names the interpreter, if it is not the newest of python3.13, python3.12, python3.11 and python3.
USAGE
}

say() { printf '%s\n' "$*"; }

fail() {
  printf 'Error: %s\n' "$*" >&2
  exit 1
}

systemd_runs() { [ -d /run/systemd/system ]; }

# Python

# What to run on this distribution for Python 3.11 or newer, venv included.
how_to_get_python() {
  local ID='' ID_LIKE='' VERSION_ID=''
  # shellcheck source=/dev/null
  [ ! -r /etc/os-release ] || . /etc/os-release
  case $ID:$VERSION_ID in
    ubuntu:22.04 | ubuntu:20.04)
      say "  apt-get update && apt-get install -y software-properties-common && add-apt-repository -y ppa:deadsnakes/ppa" \
        "&& apt-get install -y python3.12 python3.12-venv" ;;
    debian:10* | debian:11* | ubuntu:1*) say "  $ID $VERSION_ID has no Python 3.11: use a newer release of it" ;;
    amzn:2023*) say "  dnf install -y python3.13" ;;
    amzn:*) say "  this Amazon Linux has no Python 3.11: use Amazon Linux 2023" ;;
    *)
      case " $ID $ID_LIKE " in
        *' debian '* | *' ubuntu '*) say "  apt-get update && apt-get install -y python3 python3-venv" ;;
        *' fedora '* | *' rhel '*) say "  dnf install -y python3.12" ;;
        *) say "  install Python 3.11 or newer with its venv module as this system does it" ;;
      esac ;;
  esac
}

# The Python versions that a folder of wheels is for, such as 3.12; nothing if it is for all.
pythons_of() { find "$1" -name '*.whl' | sed -nE 's/.*-cp3([0-9]+)-cp3[0-9]+-.*/3.\1/p' | sort -u; }

# Says why an interpreter will not do; nothing if it will.
unfit() {
  "$1" -I - "$2" 2>/dev/null <<'PYTHON' || say "does not run, or lacks modules of its standard library (venv, ssl)"
import sys
if sys.version_info < (3, 11):
    sys.exit(print("is Python %d.%d" % sys.version_info[:2]))
import importlib.util, os, ssl, venv
wanted = sys.argv[1].split()
if wanted and "%d.%d" % sys.version_info[:2] not in wanted:
    print("is Python %d.%d" % sys.version_info[:2])
elif not wanted and importlib.util.find_spec("ensurepip") is None:
    print("lacks ensurepip (the package python3-venv)")
elif os.path.realpath(sys.executable).startswith(("/root/", "/home/")):
    print("is in a home folder, which the service cannot see")
PYTHON
}

# Sets `python`. Takes the versions that will do; nothing: 3.11 and newer, and it must be able to make pip.
find_python() {
  local wanted=$1 name path why seen=''
  # shellcheck disable=SC2086
  for name in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    path=$(command -v "$name") || continue
    why=$(unfit "$path" "$wanted")
    [ -n "$why" ] || { python=$path && return; }
    seen+="  $path $why"$'\n'
  done
  {
    if [ -n "$wanted" ]; then
      printf 'Error: the wheels are for Python %s, which this host does not have.\n' "${wanted//$'\n'/ or }"
    else
      printf 'Error: Python 3.11 or newer, with venv and ensurepip, is needed, and this host does not have it.\n'
    fi
    printf '%s' "$seen"
    printf 'Run this as root, then try again:\n%s\n' "$(how_to_get_python)"
    if [ -n "$wanted" ]; then
      printf 'Or make wheels for the Python that is there: python3 deploy/wheelhouse.py FOLDER --python 3.…\n'
    fi
  } >&2
  exit 1
}

# Releases

# Sets `wheels`, `requirements` and `python`: from the folder given, or made from this repository.
find_wheels() {
  if [ -n "$1" ]; then
    wheels=$(cd "$1" 2>/dev/null && pwd) || fail "--wheelhouse $1: there is no such folder"
    requirements=$(dirname "$wheels")/requirements.txt
    [ -f "$requirements" ] || fail "$requirements is missing; it belongs beside the folder of wheels"
    [ -n "$(find "$wheels" -name 'sagemaker_mlflow_proxy-*.whl')" ] || fail "$wheels holds no wheel of the proxy"
    [ -n "$(find "$wheels" -name 'pip-*.whl')" ] || fail "$wheels holds no wheel of pip, which the others need"
    local machine
    machine=$(uname -m)
    if [ -n "$(find "$wheels" -name '*linux*.whl' ! -name "*_$machine.whl")" ]; then
      fail "the wheels are for another kind of machine than this one ($machine); make others with python3 deploy/wheelhouse.py"
    fi
    find_python "$(pythons_of "$wheels")"
  else
    [ -f "$here/../pyproject.toml" ] || fail "this is not a clone of the repository; name a folder with --wheelhouse"
    find_python ''
    say "Fetching what the proxy needs …"
    scratch=$(mktemp -d)
    "$python" -m venv "$scratch/builder"
    "$scratch/builder/bin/python" "$here/wheelhouse.py" "$scratch/application"
    wheels=$scratch/application/wheelhouse requirements=$scratch/application/requirements.txt
  fi
}

# Sets `id` and `release`: the version, and a digest of all that is installed.
name_release() {
  local wheel version digest
  wheel=$(find "$wheels" -name 'sagemaker_mlflow_proxy-*.whl' -printf '%f\n' | sort -V | tail -n 1)
  version=${wheel#sagemaker_mlflow_proxy-}
  digest=$(cd "$wheels" && { "$python" -V && sha256sum -- *.whl "$requirements" | sed 's| .*/| |'; } | sha256sum)
  id=${version%%-*}-${digest:0:12}
  release=$releases/$id
}

# The release's environment, beside the others. Only with the file `complete` is it whole.
build_release() {
  if [ -e "$release/complete" ]; then
    say "Release $id is there already."
    return
  fi
  say "Installing release $id with $("$python" -V) ($python) …"
  rm -rf "$release"
  mkdir -p "$releases"
  "$python" -m venv --without-pip "$release"
  local pip
  pip=$(find "$wheels" -name 'pip-*.whl' | sort -V | tail -n 1)
  local install=("$release/bin/python" -m pip --isolated --quiet --disable-pip-version-check install --no-cache-dir
    --no-compile --no-index --find-links "$wheels")
  PYTHONPATH=$pip "${install[@]}" --require-hashes -r "$requirements"
  PYTHONPATH=$pip "${install[@]}" --no-deps "sagemaker-mlflow-proxy==${id%-*}"
  # The service may not write there, so what it needs at each start is compiled now.
  "$release/bin/python" -m compileall -qq -j 0 "$release/lib" || true
  "$release/bin/mlflow-proxy" --version >/dev/null
  touch "$release/complete"
}

# Users, folders, configuration

make_user() {
  getent group "$user" >/dev/null || groupadd --system "$user"
  id -u "$user" >/dev/null 2>&1 ||
    useradd --system --gid "$user" --home-dir "$state" --no-create-home --shell /usr/sbin/nologin "$user"
  install -d -o root -g "$user" -m 0750 "$etc"
  install -d -o "$user" -g "$user" -m 0750 "$state" "$logs"
}

# Reads a configuration with a release, as the service's user and with its variables. Prints where the service will
# answer and how long it may take to stop; lists all mistakes and fails if there are any.
read_configuration() {
  "$1/bin/python" -I - "$2" "$user" "$etc/environment" <<'PYTHON'
import os, pwd, sys
from pathlib import Path

file, user, variables = sys.argv[1:]
if os.path.exists(variables):
    for line in Path(variables).read_text("utf-8").splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and name[0] not in "#;":
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            os.environ[name.strip()] = value[1:-1] if quoted else value
entry = pwd.getpwnam(user)
os.initgroups(user, entry.pw_gid)
os.setgid(entry.pw_gid)
os.setuid(entry.pw_uid)
os.chdir(entry.pw_dir)

from mlflow_proxy import configuration

try:
    server = configuration.load(Path(file)).server
except configuration.SettingsError as error:
    sys.exit("\n".join(f"  ✗ {problem}" for problem in error.problems))
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
host = f"[{host}]" if ":" in host else host
print(f"{'https' if server.tls_certificate else 'http'}://{host}:{server.port}", round(server.drain_timeout) + 15)
PYTHON
}

# Sets `candidate`, `url`, `stop_seconds`: the configuration that will count, checked.
check_configuration() {
  candidate=$config
  if [ -n "$1" ]; then
    [ -r "$1" ] || fail "--config $1: there is no such file, or it cannot be read"
    candidate=$etc/.proxy.toml.new
    install -o root -g "$user" -m 0640 "$1" "$candidate"
  elif [ ! -e "$config" ]; then
    fail "there is no configuration yet; name one with --config (docs/configuration.md has the first ten lines)"
  fi
  local answer
  if ! answer=$(read_configuration "$release" "$candidate"); then
    [ "$candidate" = "$config" ] || rm -f "$candidate"
    fail "these are mistakes in ${1:-$config}, or in $etc/environment; nothing was changed"
  fi
  read -r url stop_seconds <<<"$answer"
}

# The service

# Whether the service answers at a URL, with one main process that stays. $2: seconds until it must.
healthy() {
  local end=$((SECONDS + $2)) pid before='' answers=0
  while [ "$SECONDS" -le "$end" ]; do
    systemctl is-failed --quiet mlflow-proxy && return 1
    [ "$(systemctl show --property=NRestarts --value mlflow-proxy)" -lt 3 ] || return 1
    pid=$(systemctl show --property=MainPID --value mlflow-proxy)
    if [ "$pid" != 0 ] && [ "$pid" = "${before:-$pid}" ] && answers "$1"; then
      answers=$((answers + 1))
      [ "$answers" -lt 3 ] || return 0
    else
      answers=0
    fi
    before=$pid
    sleep 0.5
  done
  return 1
}

answers() {
  "$base/current/bin/python" -I - "$1/-/health" 2>/dev/null <<'PYTHON'
import ssl, sys, urllib.request

# It is this host's own service, under an address that its certificate need not name.
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
sys.exit(opener.open(sys.argv[1], timeout=5).status != 200)
PYTHON
}

same() { [ -e "$2" ] && [ "$(sha256sum <"$1")" = "$(sha256sum <"$2")" ]; }

point_to() {
  ln -sfn "releases/$1" "$base/current.new"
  mv -T "$base/current.new" "$base/current"
}

# From here to `rm "$undo"` a change is under way: whatever ends this run before, the state before is in that folder.
switch() {
  rm -rf "$undo.new"
  mkdir "$undo.new"
  [ ! -e "$base/current" ] || basename "$(readlink "$base/current")" >"$undo.new/release"
  [ ! -e "$config" ] || cp -p "$config" "$undo.new/proxy.toml"
  [ ! -e "$unit" ] || cp -p "$unit" "$undo.new/unit"
  changing=yes
  mv -T "$undo.new" "$undo"

  [ "$candidate" = "$config" ] || mv "$candidate" "$config"
  install -m 0644 "$new_unit" "$unit.new"
  mv "$unit.new" "$unit"
  point_to "$id"
  touch "$release/complete" # the latest in use is the last to be removed
  ln -sfn "$base/current/bin/mlflow-proxy" "$command"
}

# Puts back what `switch` kept, and starts that.
go_back() {
  if [ -e "$undo/unit" ]; then cp -p "$undo/unit" "$unit"; else
    ! systemd_runs || [ ! -e "$unit" ] || systemctl --quiet disable --now mlflow-proxy || true
    rm -f "$unit"
  fi
  if [ -e "$undo/proxy.toml" ]; then
    cp -p "$undo/proxy.toml" "$config.new"
    mv "$config.new" "$config"
  else rm -f "$config"; fi
  if [ -e "$undo/release" ]; then point_to "$(cat "$undo/release")"; else rm -f "$base/current" "$command"; fi
  if systemd_runs; then
    systemctl daemon-reload
    [ ! -e "$undo/unit" ] || systemctl restart mlflow-proxy || true
  fi
}

undo_change() {
  local before
  before=$(cat "$undo/release" 2>/dev/null || true)
  go_back
  rm -rf "$undo"
  if [ -z "$before" ]; then
    say "Nothing was installed before, so nothing runs now." >&2
  elif systemd_runs; then
    local answer=''
    if answer=$(read_configuration "$base/current" "$config") && healthy "${answer% *}" "$timeout"; then
      say "Release $before runs again, with its configuration." >&2
    else
      say "Release $before is back with its configuration, but is not healthy either: systemctl status mlflow-proxy" >&2
    fi
  fi
}

# However a run ends in the middle of a change.
at_exit() {
  local code=$?
  trap - EXIT
  if [ "$changing" = yes ]; then
    say "Interrupted: going back …" >&2
    undo_change || true
  fi
  rm -rf "$scratch" "$new_unit"
  exit "$code"
}

start() {
  if ! systemd_runs; then
    if command -v systemctl >/dev/null; then systemctl --quiet enable mlflow-proxy; fi
    changing=no
    rm -rf "$undo"
    say "systemd is not running here, so nothing was started. The service starts when the host boots."
    return
  fi
  systemctl daemon-reload
  systemctl --quiet enable mlflow-proxy
  say "Starting …"
  if ! systemctl restart mlflow-proxy || ! healthy "$url" "$timeout"; then
    say "Release $id did not become healthy at $url/-/health. The journal's last lines:" >&2
    journalctl --unit mlflow-proxy --lines 20 --no-pager --output cat >&2 || true
    say "Going back …" >&2
    changing=no
    undo_change
    exit 1
  fi
  changing=no
  rm -rf "$undo"
}

# All but the latest releases, and what was never whole.
remove_old_releases() {
  local folder now
  now=$(basename "$(readlink "$base/current")")
  for folder in "$releases"/*/; do
    [ -e "$folder/complete" ] || rm -rf "$folder"
  done
  find "$releases" -mindepth 2 -maxdepth 2 -name complete -printf '%T@ %h\n' | sort -rn | tail -n +$((kept + 1)) |
    while read -r _ folder; do [ "$(basename "$folder")" = "$now" ] || rm -rf "$folder"; done
}

# The two commands

install_proxy() {
  if [ -e "$undo" ]; then
    say "An earlier run was interrupted: going back to what was before it …"
    go_back
    rm -rf "$undo"
  fi
  find_wheels "$wheelhouse"
  name_release
  build_release
  make_user
  check_configuration "$given_config"
  new_unit=$(mktemp)
  sed "s/^TimeoutStopSec=.*/TimeoutStopSec=$stop_seconds/" "$here/systemd/mlflow-proxy.service" >"$new_unit"

  if [ "$(readlink "$base/current" 2>/dev/null)" = "releases/$id" ] && same "$candidate" "$config" &&
    same "$new_unit" "$unit" && systemd_runs && systemctl is-enabled --quiet mlflow-proxy &&
    systemctl is-active --quiet mlflow-proxy && answers "$url"; then
    [ "$candidate" = "$config" ] || rm -f "$candidate"
    say "Nothing to do: release $id runs with this configuration and is healthy at $url/-/health."
    return
  fi
  switch
  start
  remove_old_releases
  say "Installed: $id, configuration $config"
  if systemd_runs; then say "Healthy:   $url/-/health    Log: journalctl -u mlflow-proxy    State: systemctl status mlflow-proxy"; fi
}

uninstall_proxy() {
  if systemd_runs && [ -e "$unit" ]; then systemctl --quiet disable --now mlflow-proxy; fi
  rm -f "$unit" /etc/systemd/system/multi-user.target.wants/mlflow-proxy.service
  if systemd_runs; then
    systemctl daemon-reload
    systemctl reset-failed mlflow-proxy 2>/dev/null || true
  fi
  [ "$(readlink "$command" 2>/dev/null)" != "$base/current/bin/mlflow-proxy" ] || rm -f "$command"
  rm -rf "$base"
  if [ "$purge" = yes ]; then
    rm -rf "$etc" "$state" "$logs" "$unit.d"
    ! id -u "$user" >/dev/null 2>&1 || userdel "$user"
    ! getent group "$user" >/dev/null || groupdel "$user"
    say "Removed, with configuration, keys and audit log."
  else
    say "Removed. Configuration, keys and audit log are still in $etc, $state and $logs; --purge removes these, too."
  fi
}

action=install given_config='' wheelhouse='' timeout=60 purge=no changing=no scratch='' new_unit=''
while [ $# -gt 0 ]; do
  case $1 in
    --config | --wheelhouse | --timeout)
      [ $# -gt 1 ] || fail "$1 needs a value; see --help"
      case $1 in --config) given_config=$2 ;; --wheelhouse) wheelhouse=$2 ;; --timeout) timeout=$2 ;; esac
      shift 2 ;;
    uninstall) action=uninstall && shift ;;
    --purge) purge=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail "$1: no such option; see --help" ;;
  esac
done
[[ $timeout =~ ^[1-9][0-9]{0,3}$ ]] || fail "--timeout $timeout: is not a number of seconds"
[ "$purge" = no ] || [ "$action" = uninstall ] || fail "--purge goes with uninstall"
[ "$(id -u)" = 0 ] || fail "this needs root; run it with sudo"
exec 9>"$lock"
flock -n 9 || fail "another run of this script is under way"
trap at_exit EXIT
trap 'exit 130' INT TERM HUP
"${action}_proxy"
