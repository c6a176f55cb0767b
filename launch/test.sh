#!/usr/bin/env bash
# Installs what tests need, checks style, runs the tests.
#
#   bash launch/test.sh [--fast | --slow] [--parity] [--plan] [--release] [--docs]
#                       [-- PYTEST ARGUMENTS]
#
#   --fast     only the tests marked fast: a few of every folder, in about two minutes
#   --slow     also the tests marked slow
#   --parity   also against PyTorch and diffusers (installs both, CPU builds where pip finds them)
#   --plan     also what compiles for TPUs (installs libtpu; no TPU is needed)
#   --release  also the archives of a release (installs build and twine)
#   --docs     also the documentation site, without a warning (installs Sphinx)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

extras=(test)
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --parity | --plan | --release | --docs) extras+=("${1#--}") ;;
    --fast) options+=(-m "fast and not slow") ;;
    --slow) options+=(-m "") ;;
    --)
      shift
      options+=("$@")
      break
      ;;
    *)
      die "unknown argument $1:" "launch/test.sh [--fast | --slow] [--parity] [--plan]" \
        "[--release] [--docs] [-- PYTEST ARGUMENTS]"
      ;;
  esac
  shift
done

prepare_environment "${extras[@]}"
[ "$install_seconds" = 0 ] || printf 'installed in %d s\n' "$install_seconds"

# Only Python: some releases of ruff also format code inside Markdown, others do not.
python_only='extend-exclude = ["*.md"]'
"$venv_python" -m ruff check --quiet --config "$python_only" . \
  || die "ruff check failed; no test was run"
"$venv_python" -m ruff format --check --quiet --config "$python_only" . \
  || die "ruff format --check failed; no test was run ('ruff format' mends it)"

# Two workers on two cores: libraries with thread pools of their own get one thread in each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
# A worker takes whole files, so that what a file's tests share is made once; tests/conftest.py
# sorts them.
exec "$venv_python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25 \
  ${options[@]+"${options[@]}"} < /dev/null
