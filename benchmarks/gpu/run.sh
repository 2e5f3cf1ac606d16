#!/usr/bin/env bash
# Tests and measures the CUDA backend on this machine's GPU, without a network.
#
#   benchmarks/gpu/run.sh [STEP…] [OPTION…] [OUTPUT FOLDER]
#
# Steps, all of them if none is named, in this order:
#   build      install this checkout, or compile its kernels in place
#   tests      tests/gpu, then the tests of every backend on the device
#   sanitizer  compute-sanitizer's memcheck and racecheck on a few small losses
#   bench      benchmarks/gpu/compile.py, then benchmarks/gpu/bench.py
# Options:
#   --quick       bench within 150 s: three sizes, float32 and bfloat16, peers on float32 alone
#   --keep-going  go on after a step that failed; the exit status still tells
#   --python CMD  the interpreter (default: python3)
# The output folder (default: build/gpu) gets a log of each step, and results.csv.
# All steps together take at most about FASTLOSS_LIMIT seconds (540). Limits of single steps in
# seconds: FASTLOSS_TESTS_LIMIT (130), FASTLOSS_MATRIX_LIMIT (120), FASTLOSS_SANITIZER_LIMIT (45, for
# each tool) and FASTLOSS_BENCH_BUDGET (the rest, up to 240, or 150 with --quick, with compilation).
# FASTLOSS_TEST_PROCESSES: 8.
set -u -o pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
all_steps=(build tests sanitizer bench)
steps=() out='' quick='' keep_going='' python=python3
while (($#)); do
  case $1 in
    build | tests | sanitizer | bench) steps+=("$1") ;;
    --quick) quick=1 ;;
    --keep-going) keep_going=1 ;;
    --python)
      shift
      python=${1:?run.sh: --python needs a command}
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*)
      echo "run.sh: unknown option $1; --help lists them" >&2
      exit 2
      ;;
    *)
      if [[ -n $out ]]; then
        echo "run.sh: $1 is no step (${all_steps[*]}), and the output folder is $out already" >&2
        exit 2
      fi
      out=$1
      ;;
  esac
  shift
done
((${#steps[@]})) || steps=("${all_steps[@]}")
out=${out:-$root/build/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Steps share their compiled kernels; those of other runs are not used.
export CUPY_CACHE_DIR="${CUPY_CACHE_DIR:-$out/.kernels}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$out/.inductor}"
clean() {
  [[ $CUPY_CACHE_DIR == "$out/.kernels" ]] && rm -rf "$out/.kernels"
  [[ $TORCHINDUCTOR_CACHE_DIR == "$out/.inductor" ]] && rm -rf "$out/.inductor"
}
trap clean EXIT

notes=() failed=()

have() { "$python" -c "import $1" 2>/dev/null; }

# As `have`, for packages whose import takes seconds.
installed() {
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" 2>/dev/null
}

# Run a command with a time limit in seconds, write its output to a log, and print the last lines.
logged() {
  local log=$out/$1.log seconds=$2 lines=$3 started=$SECONDS status=0
  shift 3
  echo "+ $*" >>"$log"
  timeout --kill-after=15 "$seconds" "$@" >>"$log" 2>&1 || status=$?
  tail -n "$lines" "$log"
  ((status == 124 || status == 137)) && echo "(ended after $seconds s)"
  echo "(took $((SECONDS - started)) s; $log)"
  return "$status"
}

system() {
  : >"$out/system.log"
  {
    date -u
    nvidia-smi || echo 'nvidia-smi: not there'
    nvcc --version || echo 'nvcc: not there'
    compute-sanitizer --version || echo 'compute-sanitizer: not there'
    "$python" - <<'PYTHON'
import sys
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
print("python", sys.version.split()[0], sys.executable)
names = "numpy torch cupy numba pybind11 pytest hypothesis scipy ml_dtypes jax monai nnunetv2 triton xdist"
packages = packages_distributions()
for name in names.split():
    if find_spec(name) is None:
        print(name, "is not there")
    else:
        print(name, *sorted({version(package) for package in packages.get(name, ())}))
import torch
print("torch: CUDA", torch.version.cuda, "devices", torch.cuda.device_count())
for i in range(torch.cuda.device_count()):
    print(" ", torch.cuda.get_device_properties(i))
PYTHON
  } >>"$out/system.log" 2>&1
  local status=$?
  cat "$out/system.log"
  if ((status)); then
    echo "run.sh: $python has no PyTorch that starts" >&2
  fi
  return "$status"
}

build() {
  : >"$out/build.log"
  local status=0
  if ! have pybind11; then
    notes+=("build: pybind11 is not there, so arrays in CPU memory have no C++ kernels")
  fi
  if have pip && have setuptools && have pybind11; then
    logged build 150 3 "$python" -m pip install --quiet --no-deps --no-build-isolation \
      --no-cache-dir . || status=$?
    if ((status)); then
      notes+=("build: pip could not install; the checkout itself is used")
      status=0
    fi
  elif have setuptools; then
    logged build 150 3 "$python" setup.py build_ext --inplace || status=$?
  else
    notes+=("build: neither pip nor setuptools is there; the checkout itself is used")
  fi
  logged build 60 12 "$python" -m fastloss info || status=$?
  return "$status"
}

tests() {
  : >"$out/tests.log"
  local missing=() status=0 parallel=() flags=(-q -rs --tb=short -p no:cacheprovider)
  for module in pytest hypothesis; do
    have "$module" || missing+=("$module")
  done
  if ((${#missing[@]})); then
    notes+=("tests: left out, as ${missing[*]} is not there")
    echo "tests: left out, as ${missing[*]} is not there"
    return 0
  fi
  have pytest_benchmark || flags+=(-o addopts=)
  have xdist && parallel=(-n "${FASTLOSS_TEST_PROCESSES:-8}" --dist worksteal)
  for module in scipy ml_dtypes jax; do
    have "$module" || notes+=("tests: $module is not there; what needs it is skipped")
  done
  echo '--- tests/gpu'
  FASTLOSS_REQUIRE=gpu logged tests "${FASTLOSS_TESTS_LIMIT:-130}" 25 \
    "$python" -m pytest "${flags[@]}" "${parallel[@]}" tests/gpu || status=$?
  echo '--- every backend, on the device'
  : >"$out/matrix.log"
  local limit=${FASTLOSS_MATRIX_LIMIT:-120} matrix=0
  FASTLOSS_TEST_DEVICE=cuda HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-short} \
    logged matrix "$limit" 25 "$python" -m pytest "${flags[@]}" "${parallel[@]}" \
    tests/test_backends.py tests/test_degenerate.py tests/test_textbook.py tests/test_top_k.py \
    tests/test_statistics.py tests/test_gradient_upstream.py tests/test_half.py \
    -k 'cuda and not emulated' || matrix=$?
  if ((matrix == 124 || matrix == 137)); then
    notes+=("tests: those of every backend were ended after $limit s; FASTLOSS_MATRIX_LIMIT gives more")
    # pytest's progress line tells whether any of the tests that ran failed.
    if ! grep -qE '^[.sxFE]*\.[.sxFE]* +\[ *[0-9]+%\]' "$out/matrix.log"; then
      notes+=('tests: of every backend none had passed by then')
    elif ! grep -qE '^[.sxFE]*[FE][.sxFE]* +\[ *[0-9]+%\]' "$out/matrix.log"; then
      matrix=0
    fi
  fi
  ((status)) || status=$matrix
  return "$status"
}

sanitizer() {
  : >"$out/sanitizer.log"
  local tool=compute-sanitizer through=cupy status=0
  command -v "$tool" >/dev/null || tool=$(compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | tail -1)
  if [[ -z $tool ]]; then
    notes+=("sanitizer: left out, as compute-sanitizer is not there")
    echo 'sanitizer: left out, as compute-sanitizer is not there'
    return 0
  fi
  echo '--- without a sanitizer'
  # Also compiles the kernels.
  logged sanitizer 90 20 "$python" tests/gpu/small_cases.py "$through" || return 1
  for check in memcheck racecheck; do
    echo "--- $check"
    # CuPy's probing calls to the driver may fail, which is harmless.
    local extra=() one=0
    [[ $check == memcheck ]] && extra=(--report-api-errors no)
    logged sanitizer "${FASTLOSS_SANITIZER_LIMIT:-45}" 6 "$tool" --tool "$check" "${extra[@]}" \
      --error-exitcode 1 "$python" tests/gpu/small_cases.py "$through" || one=$?
    if ((one == 124 || one == 137)); then
      notes+=("sanitizer: $check was ended; FASTLOSS_SANITIZER_LIMIT=SECONDS gives more")
    elif grep -q 'Device not supported' "$out/sanitizer.log"; then
      notes+=("sanitizer: $check cannot work on this machine: device not supported")
    elif ((one)); then
      status=$one
    fi
  done
  return "$status"
}

bench() {
  : >"$out/bench.log"
  : >"$out/compile.log"
  # The rest of the total limit, as a started case is finished.
  local left=$((${FASTLOSS_LIMIT:-540} - SECONDS - 40)) most=240 limit=90
  local sizes=(B2C2-128 B2C4-128 B2C14-128 B2C105-128 B1C14-256)
  local peers=(nnunet-compile monai-compile) chosen=() dtypes=float32,float16,bfloat16
  if [[ -n $quick ]]; then
    # Minus the time for probing, and for imports and a case that has started.
    most=$((150 - started - 20)) limit=35
    sizes=(B2C2-128 B2C14-128 B2C105-128) dtypes=float32,bfloat16
    chosen=(--peers plain --parts host,times,train)
  fi
  installed monai || notes+=("bench: MONAI is not there; targets against it, and the training step, are not measured")
  local budget=${FASTLOSS_BENCH_BUDGET:-$((left < 60 ? 60 : left > most ? most : left))}
  local begun=$SECONDS
  if ! logged compile "$((limit + 30))" 12 "$python" benchmarks/gpu/compile.py --limit "$limit" \
    --dtypes "$dtypes" --peers "$(IFS=, && echo "${peers[*]}")" "${sizes[@]}"; then
    notes+=("bench: not all could be compiled beforehand; see $out/compile.log")
  fi
  budget=$((budget - (SECONDS - begun)))
  ((budget < 30)) && budget=30
  logged bench "$((budget + 90))" 60 "$python" benchmarks/gpu/bench.py --out "$out/results.csv" \
    --budget "$budget" --dtypes "$dtypes" \
    --sizes "$(IFS=, && echo "${sizes[*]}")" "${chosen[@]+"${chosen[@]}"}"
}

failed_step() {
  echo "run.sh: $1 FAILED (status $2); see $out/$1.log" >&2
  failed+=("$1")
}

echo "=== what is there"
system || exit 1
started=$SECONDS
for step in "${steps[@]}"; do
  echo
  echo "=== $step ($SECONDS s)"
  status=0
  "$step" || status=$?
  if ((status)); then
    failed_step "$step" "$status"
    [[ -n $keep_going ]] || break
  fi
done
echo
echo "=== after $SECONDS s"
for note in "${notes[@]+"${notes[@]}"}"; do echo "note: $note"; done
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "done: ${steps[*]}; logs and results are in $out"
