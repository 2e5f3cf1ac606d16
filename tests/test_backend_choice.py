"""The choice of the backend, and the warning if it is not the fastest."""

from __future__ import annotations

import numpy as np
import pytest
from support import NATIVE, need_backend, python, run_python

import fastloss as fl
from fastloss.backends import current_backend

X, Y = np.zeros((1, 2, 9), np.float32), np.zeros((1, 9), int)
CALL = (
    "import warnings\n"
    "import numpy as np, fastloss as fl\n"
    "from fastloss.backends import current_backend\n"
    "with warnings.catch_warnings(record=True) as caught:\n"
    "    warnings.simplefilter('always')\n"
    "    for _ in range(3):\n"
    "        fl.Dice()(np.zeros((1, 2, 9), 'f4'), np.zeros((1, 9), int))\n"
    "    fl.CrossEntropy()(np.zeros((1, 2, 9), 'f4'), np.zeros((1, 9), int))\n"
    "print(current_backend().name, len(caught), *[w.message for w in caught])\n"
)


def without(*modules: str) -> str:
    return "import sys\n" + "".join(f"sys.modules[{m!r}] = None\n" for m in modules)


def test_use_backend(backend: str) -> None:
    assert current_backend().name == backend
    with fl.use_backend("reference"):
        assert current_backend().name == "reference"
        with fl.use_backend(backend):
            assert current_backend().name == backend
        assert current_backend().name == "reference"
    assert current_backend().name == backend


def test_use_backend_ends_with_an_error() -> None:
    before = current_backend().name
    with pytest.raises(ZeroDivisionError), fl.use_backend("reference"):
        1 / 0  # noqa: B018
    assert current_backend().name == before


@pytest.mark.parametrize("name", ["cuda", "", "CPU", None, 3])
def test_use_of_an_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=r"^backend: .*'cpu', 'numba', 'reference'"):  # noqa: SIM117
        with fl.use_backend(name):
            pass


@pytest.mark.parametrize("name", NATIVE)
def test_environment_chooses(name: str) -> None:
    need_backend(name)
    out = run_python(CALL, FASTLOSS_BACKEND=name)
    assert out.split() == [name, "0"]  # chosen on purpose: no warning


def test_environment_names_no_backend() -> None:
    result = python(CALL, FASTLOSS_BACKEND="cuda")
    assert result.returncode == 1
    assert "'cuda'" in result.stderr
    assert "'reference'" in result.stderr


def test_environment_names_one_that_is_absent() -> None:
    result = python(without("numba") + CALL, FASTLOSS_BACKEND="numba")
    assert result.returncode == 1
    assert "ImportError" in result.stderr or "ModuleNotFoundError" in result.stderr


def test_the_fastest_is_the_default() -> None:
    need_backend("cpu")
    assert run_python(CALL, FASTLOSS_BACKEND=None).split() == ["cpu", "0"]


def test_use_backend_wins_over_the_environment() -> None:
    out = run_python(
        "import fastloss as fl\nfrom fastloss.backends import current_backend\n"
        "with fl.use_backend('reference'): print(current_backend().name)\n",
        FASTLOSS_BACKEND="cuda",
    )
    assert out.strip() == "reference"


def test_one_warning_names_the_remedy_without_the_extension() -> None:
    need_backend("numba")
    name, count, *message = run_python(
        without("fastloss._cpu") + CALL, FASTLOSS_BACKEND=None, timeout=300
    ).split()
    assert (name, count) == ("numba", "1")
    assert "compiler" in message
    assert "'numba'" in message


def test_one_warning_names_both_remedies_without_numba_either() -> None:
    name, count, *message = run_python(
        without("fastloss._cpu", "numba") + CALL, FASTLOSS_BACKEND=None
    ).split()
    assert (name, count) == ("reference", "1")
    text = " ".join(message)
    assert "compiler" in text
    assert "pip install 'fastloss[numba]'" in text


def test_the_warning_can_be_silenced() -> None:
    run_python(
        without("fastloss._cpu", "numba") + "import warnings; warnings.simplefilter('error')\n"
        "import numpy as np, fastloss as fl\n"
        "with fl.use_backend('reference'):\n"
        "    fl.Dice()(np.zeros((1, 2, 9), 'f4'), np.zeros((1, 9), int))\n",
        FASTLOSS_BACKEND=None,
    )


def test_use_of_an_absent_backend_says_why() -> None:
    out = run_python(
        without("numba") + "import fastloss as fl\n"
        "try:\n    with fl.use_backend('numba'): pass\n"
        "except ImportError as error: print(error)\n"
    )
    assert "numba" in out


def test_import_brings_no_optional_package() -> None:
    optional = (
        "torch",
        "jax",
        "jaxlib",
        "numba",
        "tensorflow",
        "optax",
        "dask",
        "cupy",
        "monai",
        "scipy",
        "ml_dtypes",
        "matplotlib",
        "nibabel",
        "nilearn",
        "keras",
        "hypothesis",
        "pytest",
        "threadpoolctl",
        "multiprocessing",
        "argparse",
    )
    out = run_python(
        "import sys, numpy\nbefore = set(sys.modules)\nimport fastloss\n"
        f"print([m for m in {optional!r} if m in set(sys.modules) - before])\n"
    )
    assert out.strip() == "[]"


def test_a_loss_of_numpy_arrays_brings_none_either() -> None:
    out = run_python(
        "import sys, numpy as np, fastloss as fl\n"
        "fl.Dice().value_and_grad(np.zeros((1, 2, 9), 'f4'), np.zeros((1, 9), int))\n"
        "print([m for m in ('torch', 'jax', 'numba', 'scipy', 'ml_dtypes') if m in sys.modules])\n",
        FASTLOSS_BACKEND="reference",
    )
    assert out.strip() == "[]"


def test_public_names() -> None:
    assert set(fl.__all__) <= set(dir(fl))
    assert list(fl.__all__) == sorted(fl.__all__)
    for name in fl.__all__:
        thing = getattr(fl, name)
        assert isinstance(thing, str) or thing.__doc__
