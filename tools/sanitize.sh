#!/usr/bin/env bash
# Runs the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tools/sanitize.sh [--short] [pytest arguments]
#
# Builds a separate copy of the library; the environment's packages are used as they are. --short
# runs the files that exercise the kernels' memory most, with fewer random cases.
set -euo pipefail
cd "$(dirname "$0")/.."

short=0
if [ "${1:-}" = "--short" ]; then short=1; shift; fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r fastloss csrc setup.py pyproject.toml README.md CONTRIBUTING.md LICENSE tests "$folder/"
rm -f "$folder"/fastloss/_cpu*.so
cd "$folder"

export FASTLOSS_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
python -c 'import setuptools, pybind11' 2>/dev/null || pip install -q setuptools pybind11
python setup.py -q build_ext --inplace > build.log 2>&1 || { cat build.log; exit 1; }
ls fastloss/_cpu*.so > /dev/null

cxx=${CXX:-g++}
# CPython and its packages keep memory until process exit: leaks are not checked.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
preload="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libubsan.so)"
if [ "$short" = 1 ]; then
  export HYPOTHESIS_PROFILE=short
  set -- tests/test_textbook.py tests/test_backends.py tests/test_degenerate.py \
    tests/test_bad_input.py tests/test_isa.py tests/test_top_k.py tests/test_distance.py \
    tests/test_fields.py tests/test_regions.py tests/test_per_class.py -m "slow or not slow" "$@"
elif [ $# -eq 0 ]; then
  set -- tests
fi
workers=()
if python -c 'import xdist' 2>/dev/null; then workers=(-n auto --dist worksteal); fi
LD_PRELOAD="$preload" python -m pytest "${workers[@]}" -q -p no:cacheprovider -k "not numba and not emulated" "$@"
