"""What a kernel is asked to compute: one small frozen record, and the layout of its sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

ACTIVATIONS = ("softmax", "sigmoid", "none")


@dataclass(frozen=True)
class Request:
    """The sums that one loss needs, for one kind of target.

    The sums over voxels of every sample and class form an array (S, B, C) of float64; ``slots``
    names its first axis. With p the probability, g the target and m the voxel weight:

    ========================  ==============================================================
    slot                      sum over the voxels
    ========================  ==============================================================
    ``reference``             m g
    ``overlap``               m p g
    ``predicted``             m p
    ``predicted_squared``     m p²
    ``reference_squared``     m g²
    ``cross_entropy``         m g (−log p)
    ``cross_entropy_rest``    m (1−g) (−log(1−p)), sigmoid only
    ``uniform``               m (−log p); sigmoid: m (−log p − log(1−p))
    ``focal:γ``               m g (1−p)^γ (−log p)
    ``focal_rest:γ``          m (1−g) p^γ (−log(1−p)), sigmoid only
    ``top_k``                 no sum: see `fastloss.voxel_losses`; softmax of a label map only
    ========================  ==============================================================
    """

    activation: str
    dense: bool
    ignore_index: int | None
    needs: frozenset[str]
    """Families of slots: "region", "squared", "cross_entropy", "uniform", "focal:γ", "top_k"."""

    def ignores_number(self, classes: int) -> bool:
        """Whether the voxels of a dense target that hold ``ignore_index`` are ignored, which
        otherwise names the class that is."""
        ignore = self.ignore_index
        return ignore is not None and not (classes > 1 and 0 <= ignore < classes)

    @cached_property
    def gammas(self) -> tuple[float, ...]:
        return tuple(sorted(float(n.split(":")[1]) for n in self.needs if n.startswith("focal:")))

    @cached_property
    def slots(self) -> tuple[str, ...]:
        names = ["reference"]
        if self.needs & {"region", "squared"}:
            names.append("overlap")
        if "region" in self.needs:
            names.append("predicted")
        if "squared" in self.needs:
            names += ["predicted_squared", "reference_squared"]
        sigmoid = self.activation == "sigmoid"
        if "cross_entropy" in self.needs:
            names += ["cross_entropy"] + ["cross_entropy_rest"] * sigmoid
        if "uniform" in self.needs:
            names.append("uniform")
        if "top_k" in self.needs:
            names.append("top_k")
        for gamma in self.gammas:
            names += [f"focal:{gamma!r}"] + [f"focal_rest:{gamma!r}"] * sigmoid
        return tuple(names)

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.slots)}


@lru_cache(maxsize=1024)
def make_request(
    activation: str, dense: bool, ignore_index: int | None, needs: frozenset[str]
) -> Request:
    """The Request with these fields; the same object each time, so that its layout is made once."""
    return Request(activation, dense, ignore_index, needs)
