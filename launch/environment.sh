# shellcheck shell=bash disable=SC2034
# The environment that demo.sh and test.sh share; source it in the root of the repository.
#
#   prepare_environment [EXTRA ...]   creates .venv if it is absent, and installs the package with
#                                     the extras that it lacks. Sets `venv_python` to its
#                                     interpreter and `install_seconds` (0: nothing to do).
#
# PYTHON  the interpreter that creates .venv (default: the first of python3, python3.12, python3.11
#         that runs and is new enough)
# VENV    another folder than .venv, for example one for each Python version

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_new_enough() {
  # Run it: a version manager may put names on the path that only fail.
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1
}

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" || die "PYTHON=$PYTHON does not run as Python 3.11 or newer"
    printf '%s\n' "$PYTHON"
    return
  fi
  for name in python3 python3.12 python3.11; do
    if is_new_enough "$name"; then
      printf '%s\n' "$name"
      return
    fi
  done
  die "Python 3.11 or newer is needed: none of python3, python3.12, python3.11 on the path runs as" \
    "one; name it with PYTHON=/path/to/python3"
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

make_venv() {
  local base
  base=$(find_python) || exit 1
  printf 'creating %s with %s\n' "$venv" "$("$base" -c 'import sys; print(sys.executable)')"
  # On Debian without python3-venv there is no ensurepip; pip then installs itself.
  if "$base" -c 'import ensurepip, venv' > /dev/null 2>&1 && "$base" -m venv "$venv"; then
    return
  fi
  "$base" -m venv --without-pip "$venv" || die "$base -m venv $venv failed"
  "$base" -m pip --python "$venv/bin/python" install --quiet pip \
    || die "pip could not be installed into $venv; on Debian and Ubuntu: apt install python3-venv"
}

# Print a key of everything that an installation depends on. The environment has a stamp for each
# extra: a file with the key of its last complete installation.
installation_key() {
  "$venv_python" - << 'END'
import hashlib, pathlib, platform
for name in ("pyproject.toml", "setup.py"):
    print(hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest())
print(platform.python_version(), pathlib.Path.cwd())
END
}

prepare_environment() {
  local key stamps missing extra start=$SECONDS
  venv=${VENV:-.venv}
  venv_python=$venv/bin/python
  unset PYTHONHOME PYTHONPATH
  export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
  if ! "$venv_python" -m pip --version > /dev/null 2>&1; then
    make_venv
  elif [ -n "${PYTHON:-}" ]; then
    find_python > /dev/null || exit 1
    [ "$(version_of "$PYTHON")" = "$(version_of "$venv_python")" ] \
      || die "$venv has Python $(version_of "$venv_python"), PYTHON=$PYTHON is" \
        "$(version_of "$PYTHON"): remove $venv, or name another folder with VENV"
  fi
  is_new_enough "$venv_python" || die "$venv has a Python older than 3.11: remove it"
  stamps=$venv/.starflow2_jax
  key=$(installation_key)
  missing=
  for extra in core "$@"; do
    if [ "$(cat "$stamps/$extra" 2> /dev/null)" != "$key" ]; then
      missing=$missing${missing:+,}$extra
    fi
  done
  install_seconds=0
  if [ -n "$missing" ]; then
    # `core` is not an extra of pyproject.toml: it stands for the dependencies without extras.
    extra=$(printf '%s' "$missing" | sed -e 's/^core//' -e 's/^,//')
    printf 'installing the package%s into %s\n' "${extra:+ with [$extra]}" "$venv"
    "$venv_python" -m pip install --quiet --editable ".${extra:+[$extra]}" < /dev/null \
      || die "pip could not install into $venv (see above); run the same command to try again"
    mkdir -p "$stamps"
    for extra in $(printf '%s' "$missing" | tr , ' '); do
      printf '%s\n' "$key" > "$stamps/$extra"
    done
    install_seconds=$((SECONDS - start))
  fi
}
