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
    cat pyproject.toml scripts/_setup.sh
    for package in shared/*/__init__.py services/*/__init__.py plugins/*/__init__.py; do
      if [ -e "$package" ]; then echo "$package"; fi
    done
  ) | cksum
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
  _plugmesh_say "installing plugmesh[$extra]"
  "${pip[@]}" --editable "$plugmesh_root[$extra]" >&2
  echo "$key" >"$plugmesh_root/.venv/.plugmesh-$extra"
  _plugmesh_say "done"
}

plugmesh_setup() {
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
