"""The GPU benchmark and its tools, tested without a GPU."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, need, python, run_python

import fastloss as fl
from fastloss.backends.cuda import call as cuda_call
from fastloss.backends.cuda.call import Operand, Operands, Work, plan_fast
from fastloss.bench.arguments import device_name
from fastloss.bench.inputs import Spec
from fastloss.bench.report import Row

pytestmark = pytest.mark.slow

FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _torch() -> None:
    need("torch")


def script(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout in a separate process."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[str(path), *arguments]!r}\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return python(code, timeout=300, FASTLOSS_BACKEND=None, OMP_NUM_THREADS="1")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return script(FOLDER / "bench.py", *arguments)


def test_a_smoke_run(tmp_path: Path) -> None:
    """A run on the CPU has every table and figure, with or without an optional peer."""
    kept = (ROOT / "benchmarks" / "results.csv").read_bytes()
    file = tmp_path / "results.csv"
    result = bench("--device", "cpu", "--sizes", "B2C2-128", "--peers", "eager", "--run", "first",
                   "--out", str(file))  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("**CPU smoke run, no figure means anything.**")
    for line in ("≥ 85% of the limit from 0.2 GB |",
                 "≥ 75% of the limit from 0.2 GB, channels-last",
                 "≥ 80% of the limit on B2 C2 128³, float32", "≥ 10× the fastest eager peer",
                 "≥ 4× the fastest compiled peer", "the gradient alone", "no memory with out=",
                 "host: at most the time of F.cross_entropy"):  # fmt: skip
        assert line in result.stdout
    assert "**Problems:**" not in result.stdout
    with file.open(encoding="utf-8", newline="") as lines:
        figures = list(csv.DictReader(lines))
    assert {one["run"] for one in figures} == {"first"}
    assert {one["row"] for one in figures} >= {"a first call, cold", "a first call, cached"}
    values = {(one["row"], one["figure"]): float(one["value"]) for one in figures}
    assert values["1×2×32³", "F.cross_entropy, forward and backward: host"] > 0
    if importlib.util.find_spec("monai"):  # which provides the network
        assert result.stdout.index("## A training step") < result.stdout.index("## Against")
        for classes in (14, 105):
            step = f"training step, B1 C{classes} 32³, bfloat16 autocast"
            for loss in ("none", "fastloss-monai", "monai", "nnunet"):
                assert values[step, f"time {loss}"] > 0
    exact = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
    for dtype in exact:
        for layout in ("", ", channels-last"):
            title = f"B2 C2 8³, {dtype}{layout}"
            assert values[title, "time torch"] > 0
            assert values[title, "value error torch"] < 1e-6
            assert values[title, "gradient error torch"] < exact[dtype]
    # Also for peers: an unscaled float16 gradient would be 20 to 70 % off on 128³.
    assert all(v < 1e-2 for (_, figure), v in values.items() if figure.startswith("gradient error"))
    # The formula of nnU-Net needs no package, and computes the same loss.
    nnunet = [v for (_, figure), v in values.items() if figure == "value error nnunet"]
    assert nnunet
    assert min(nnunet) < 1e-5
    assert (ROOT / "benchmarks" / "results.csv").read_bytes() == kept


def test_jax_is_a_peer() -> None:
    """JAX computes on the same tensors; the report says that it is timed by the wall clock."""
    need("jax")
    code = (
        "from fastloss.bench.implementations import make_call\n"
        "from fastloss.bench.inputs import Spec, device_case\n"
        "from fastloss.bench.truth import find_truth\n"
        "case = device_case(Spec('phantom', (2, 4, 8, 8, 8)))\n"
        "call = make_call('jax', case, 'dice_ce', 1)\n"
        "value, gradient = call.result()\n"
        "truth = find_truth(case, 'dice_ce')\n"
        "print(truth.value_error(value), truth.gradient_error(gradient))\n"
        "case = device_case(Spec('phantom', (2, 4, 8, 8, 8), layout='channels_last'))\n"
        "try:\n    make_call('jax', case, 'dice_ce', 1)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    errors, refused = run_python(code).splitlines()
    assert max(map(float, errors.split())) < 1e-5
    assert refused == "Unavailable JAX's arrays are contiguous"


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report states the worst measurement of each target, and missing sizes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cases
    import report
    from train_step import Step

    found = report.GpuReport({}, copies=[3e12])
    for size, ours in (("B2C2-128", 0.04), ("B2C14-128", 0.27)):
        spec = cases.spec_of(size, "cuda:0")
        for name, ratio in (("torch", 1), ("monai", 11), ("nnunet-compile", 4.5), ("jax", 4.2)):
            if name == "torch" or size == "B2C14-128":
                row = Row(spec, "dice_ce", name, forward_backward=ratio * ours / 1e3)
                found.rows.append(row)
    found.host = {report.SMALL_CALL: {"host": 250e-6}, report.BESIDE: {"host": 200e-6}}
    lines = {line[0]: line[1:] for line in report.targets(found)}
    assert lines["≥ 85% of the limit from 0.2 GB"] == ("87%", "B2 C14 128³, float32", "yes")
    assert lines["≥ 80% of the limit on B2 C2 128³, float32"][::2] == ("84%", "yes")
    assert lines["≥ 75% of the limit from 0.2 GB, channels-last"][1] == "not measured"
    assert lines["≥ 4× the fastest compiled peer"] == (
        "4.20×", "B2 C14 128³, float32: JAX, jit", "so far, on 1 of 2 sizes",
    )  # fmt: skip
    host = lines["host: at most the time of F.cross_entropy, forward and backward on 1×2×32³"]
    assert host == ("1.25×", "250 and 200 µs", "**no**")

    title = "training step, B2 C105 128³, bfloat16 autocast"
    found.steps = [
        Step(title, 105, "none", 0.0811, 5 << 30),
        Step(title, 105, "fastloss-monai", 0.0838, 5 << 30),
        Step(title, 105, "monai", 0.1069, 10 << 30),
        Step(title, 105, "nnunet", note="out of memory"),
    ]
    text = "\n".join(report.training(found.steps))
    assert "`fastloss.monai.DiceCELoss` 2.7 ms and 0.00 GiB, MONAI `DiceCELoss` 25.8 ms" in text
    assert "| nnU-Net `DC_and_CE_loss` | - | - | - | - | out of memory |" in text


def test_a_run_whose_time_is_up() -> None:
    result = bench("--device", "cpu", "--peers", "none", "--parts", "times", "--budget", "1e-9")
    assert result.returncode == 0, result.stderr
    assert "left out: the time was up" in result.stdout


REFUSED = [
    (["--device", "cuda:99"], "argument --device: cuda:99 is not there"),
    (["--device", "tpu"], "argument --device: expected cuda, cuda:N or cpu, got 'tpu'"),
    (["--device", "cpu", "--sizes", "B9"], "argument --sizes: expected some of B2C2-128"),
    (["--device", "cpu", "--out", "no/such/folder/results.csv"], "argument --out: expected a CSV"),
    (["--device", "cpu", "--budget", "0"], "argument --budget: expected more than 0"),
    (
        ["--device", "cpu", "--out", str(ROOT / "benchmarks" / "results.csv")],
        "argument --out: a smoke run on a CPU does not go into benchmarks/results.csv",
    ),
]


def test_arguments_that_are_refused() -> None:
    """Bad arguments are refused by name, before anything is measured."""
    result = python(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\nimport bench\n"
        f"for arguments in {[arguments for arguments, _ in REFUSED]!r}:\n"
        "    sys.argv = ['bench.py', *arguments]\n"
        "    try:\n        bench.main()\n"
        "    except SystemExit as error:\n        print(error.code)\n",
        OMP_NUM_THREADS="1",
    )
    assert result.stdout.split() == ["2"] * len(REFUSED), result.stderr
    for _, message in REFUSED:
        assert message in result.stderr


def test_the_device_has_an_index() -> None:
    """`torch.cuda.set_device` takes no "cuda" without one."""
    assert device_name("cuda", 1) == "cuda:0"
    assert device_name("cuda:1", 2) == "cuda:1"
    assert device_name("cpu", 0) == "cpu"
    for text, count in (("cuda", 0), ("cuda:1", 1), ("tpu", 1), ("meta", 1)):
        with pytest.raises(ArgumentTypeError):
            device_name(text, count)


@pytest.mark.parametrize("name", ["torch", "torch-out", "monai", "nnunet"])
def test_gradients_in_float16_are_scaled(name: str) -> None:
    """As in training: for larger volumes they would be rounded to few bits, or to 0."""
    if name == "monai":
        need("monai")
    code = (
        "from fastloss.bench.implementations import make_call\n"
        "from fastloss.bench.inputs import Spec, device_case\n"
        "from fastloss.bench.truth import find_truth\n"
        "case = device_case(Spec('phantom', (2, 4, 48, 48, 48), dtype='float16'))\n"
        f"call = make_call({name!r}, case, 'dice_ce', 1)\n"
        "value, gradient = call.result()\n"
        "truth = find_truth(case, 'dice_ce')\n"
        "print(call.loss_scale, truth.value_error(value))\n"
        "print(truth.gradient_error(gradient, call.loss_scale))\n"
    )
    scale, value_error, gradient_error = map(float, run_python(code).split())
    assert scale == 65536
    assert value_error < 1e-3
    assert gradient_error < 1e-3


def test_a_wrong_gradient_is_seen() -> None:
    """The formula of the truth detects gradients that are slightly off."""
    out = run_python(
        "import fastloss as fl\n"
        "from fastloss.bench.inputs import Spec, device_case\n"
        "from fastloss.bench.truth import check_formula, formula_truth\n"
        "case = device_case(Spec('phantom', (2, 4, 8, 8, 8)))\n"
        "x, y = case.logits, case.target\n"
        "value, gradient = (fl.Dice() + fl.CrossEntropy()).value_and_grad(x, y)\n"
        "truth, checked = formula_truth(x, y), check_formula(case)\n"
        "print(truth.value_error(float(value)), truth.gradient_error(gradient))\n"
        "print(checked['value_error'], checked['gradient_error'])\n"
        "gradient[0, 1] *= 1.01\n"
        "print(truth.value_error(1.01 * float(value)), truth.gradient_error(gradient))\n"
        "print(formula_truth(x, y.flip(1)).gradient_error(gradient))\n",
        FASTLOSS_BACKEND="reference",
    )
    right, checked, off, other = ([float(v) for v in line.split()] for line in out.splitlines())
    assert max(checked) < 1e-10
    assert max(right) < 1e-6
    assert off[0] == pytest.approx(0.01, rel=0.01)
    assert 1e-4 < off[1] < 0.02
    assert other[0] > 0.1


def test_tiny_volumes_have_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny volumes compile the kernels of the measured ones: all constants agree."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cases

    for spec in cases.all_specs(tuple(cases.SIZES), cases.DTYPES, "cuda:0"):
        wanted = constants(spec)
        assert constants(cases.tiny(spec)) == wanted, spec.title
        assert len(set(wanted)) == len(wanted) == 3


def constants(spec: Spec) -> list[object]:
    """The constants of the kernels that `compile.py` compiles, planned without memory."""
    classes, spatial = spec.shape[1], spec.shape[2:]
    few = np.zeros((1, classes, 2, 2, 2), np.float32)
    labels_of_few = np.zeros((1, 2, 2, 2), np.uint8)
    request = (fl.Dice() + fl.CrossEntropy()).passes(few, labels_of_few, None).request
    item = spec.nbytes // spec.count
    order = (0, 4, 1, 2, 3) if spec.layout == "channels_last" else (0, 1, 2, 3, 4)
    memory = [spec.shape[0], *spatial, classes] if order[1] == 4 else list(spec.shape)
    steps = cuda_call.in_c_order(memory, item)
    logits = Operand(cuda_call.TYPES.index(spec.dtype), tuple(steps[i] for i in order), 0)
    per_voxel = cuda_call.in_c_order([spec.shape[0], *spatial], np.dtype(spec.target).itemsize)
    labels = Operand(cuda_call.TYPES.index(spec.target), (per_voxel[0], 0, *per_voxel[1:]), 0)
    found = []
    for work in (
        Work("reduce"),
        Work("apply", cuda_call.FLOAT32),  # through autograd
        Work("apply"),  # out=
    ):
        out = logits if work.kernel == "apply" else None
        operands = Operands(spec.shape, logits, labels, None, out)
        plan = plan_fast(request, operands, work, 48 << 10, 132)
        assert plan is not None
        found.append((work, plan.constants))
    return found


def test_kernels_are_compiled_by_several_processes() -> None:
    result = script(
        FOLDER / "compile.py", "--device", "cpu", "--processes", "2", "--dtypes", "float32",
        "B2C2-128",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "kernels of 2 inputs: " in result.stdout
    wrong = script(FOLDER / "compile.py", "--device", "cpu", "B9")
    assert wrong.returncode == 2
    assert "argument SIZE: expected some of B2C2-128" in wrong.stderr


def test_small_cases() -> None:
    """The cases for compute-sanitizer pass on NumPy arrays."""
    result = script(ROOT / "tests" / "gpu" / "small_cases.py", "numpy")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("right: ") >= 12


def test_the_shell_script_names_its_steps() -> None:
    run = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "--help"], capture_output=True, text=True, check=True
    )
    for step in ("build", "tests", "sanitizer", "bench"):
        assert f"\n  {step} " in run.stdout
    wrong = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "--fast"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "unknown option --fast" in wrong.stderr


def test_tests_on_a_gpu_say_why_they_are_skipped() -> None:
    """They name the missing package or GPU; where a GPU is required, they fail."""
    code = (
        "import sys\nsys.modules['cupy'] = sys.modules['torch'] = None\nimport pytest\n"
        f"sys.exit(pytest.main(['-q', '-rs', '-p', 'no:cacheprovider', '--rootdir', {str(ROOT)!r},"
        f" {str(ROOT / 'tests' / 'gpu' / 'test_gpu_memory.py')!r}]))\n"
    )
    skipped = python(code, FASTLOSS_REQUIRE=None)
    assert skipped.returncode == 0, skipped.stdout
    assert "no CUDA device: " in skipped.stdout
    failed = python(code, FASTLOSS_REQUIRE="gpu")
    assert failed.returncode == 1
    assert "gpu is required by FASTLOSS_REQUIRE" in failed.stdout
