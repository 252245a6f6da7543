# Sourced by run, test and .ci/run: `plugmesh_setup EXTRA` makes .venv once, with this repository installed in it.
# Prints to standard error only. Does nothing when what is there still fits, which is asked of a stamp file.

plugmesh_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
plugmesh_python="$plugmesh_root/.venv/bin/python"

_plugmesh_say() { printf 'plugmesh setup: %s\n' "$*" >&2; }

# A working Python 3.11 or newer; 3.11 first because it is what the tests run on.
_plugmesh_find_python() {
  local candidate
  for candidate in "${PLUGMESH_PYTHON:-python3.11}" python3.11 python3 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return 0
    fi
  done
  _plugmesh_say "no Python 3.11 or newer with the venv module was found (on Debian: apt install python3 python3-venv)"
  return 1
}

# What an installation depends on: the project file and the list of package folders (an editable install maps names to
# folders once), and for which extra.
_plugmesh_key() {
  (
    cd "$plugmesh_root"
    echo "$1"
    cat pyproject.toml setup.py scripts/_setup.sh
    for package in shared/*/__init__.py services/*/__init__.py plugins/*/__init__.py; do
      if [ -e "$package" ]; then echo "$package"; fi
    done
  ) | cksum
}

# The native kernels want a C++ compiler and Python's headers. As root on Debian they are installed; without them plugmesh
# works as well, torch doing the computing.
_plugmesh_compiler() {
  local missing=()
  if ! command -v g++ >/dev/null && ! command -v c++ >/dev/null && ! command -v clang++ >/dev/null; then missing+=(g++); fi
  if ! "$plugmesh_python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
    missing+=("$("$plugmesh_python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')")
  fi
  if [ "${#missing[@]}" = 0 ]; then return 0; fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    _plugmesh_say "installing ${missing[*]} for the native kernels"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } </dev/null >&2 && return 0
  fi
  _plugmesh_say "without ${missing[*]} the native kernels are not compiled; torch computes instead, more slowly"
}

# The kernels of the sources as they are now, beside their package. A start never fails by it: `plugmesh doctor` says what is in use.
_plugmesh_kernels() {
  if ! "$plugmesh_python" "$plugmesh_root/shared/plugmesh_kernels/build.py" --if-needed >/dev/null 2>"$plugmesh_root/.venv/kernels.log"; then
    _plugmesh_say "the native kernels were not compiled, torch computes instead; .venv/kernels.log says why"
  fi
}

_plugmesh_install() {
  local extra="$1" key="$2" pip torch
  if [ ! -x "$plugmesh_python" ]; then
    local python
    python="$(_plugmesh_find_python)"
    _plugmesh_say "making .venv with $python"
    "$python" -m venv "$plugmesh_root/.venv"
  fi
  pip=("$plugmesh_python" -m pip --disable-pip-version-check --no-input install --quiet)
  # torch first and alone, at the version that pyproject.toml pins: no other requirement can then choose another build.
  torch="$(sed -n 's/^engine = \["\(torch==[^"]*\)".*/\1/p' "$plugmesh_root/pyproject.toml")"
  if ! "$plugmesh_python" -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch').split('+')[0] != '$torch')" 2>/dev/null; then
    _plugmesh_say "installing $torch (the largest part, about a minute)"
    "${pip[@]}" "$torch" >&2
  fi
  _plugmesh_compiler
  _plugmesh_say "installing plugmesh[$extra] and compiling its kernels"
  "${pip[@]}" --editable "$plugmesh_root[$extra]" >&2
  echo "$key" >"$plugmesh_root/.venv/.plugmesh-$extra"
  _plugmesh_say "done"
}

plugmesh_setup() {
  _plugmesh_packages "$1"
  _plugmesh_kernels
}

_plugmesh_packages() {
  local extra="$1" key
  key="$(_plugmesh_key "$extra")"
  if [ "$(cat "$plugmesh_root/.venv/.plugmesh-$extra" 2>/dev/null)" = "$key" ]; then return 0; fi
  if [ "$extra" = all ] && [ "$(cat "$plugmesh_root/.venv/.plugmesh-dev" 2>/dev/null)" = "$(_plugmesh_key dev)" ]; then return 0; fi
  if command -v flock >/dev/null; then
    # Two first runs at once would build one .venv together; this file is the lock because it is always there.
    exec 9<"$plugmesh_root/scripts/_setup.sh"
    flock 9
    if [ "$(cat "$plugmesh_root/.venv/.plugmesh-$extra" 2>/dev/null)" != "$key" ]; then _plugmesh_install "$extra" "$key" 9<&-; fi
    exec 9<&-
  else
    _plugmesh_install "$extra" "$key"
  fi
}
