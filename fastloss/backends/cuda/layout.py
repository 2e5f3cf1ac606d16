"""How softmax with a label map is spread over the threads of a GPU, tuned on an H100.

Percentages are shares of the limit (logits read twice, gradient written once, at the bandwidth of a
copy) that Dice + cross-entropy reached on 128³ voxels, batch 2, forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

WIDEST = 53
"""The most classes that a thread holds."""
_FEW = 16
_SUMS_HELD = 72
_RESIDENT_WARPS = 12  # per multiprocessor, where several warps share a voxel's classes
_APPLY_BLOCKS = 32


class Layout(NamedTuple):
    """The layout of a pass over threads.

    Attributes:
        warps: the number of warps that share the classes of a voxel.
        groups: the number of such groups of warps in a block.
        held: registers for the logits of a thread that holds adjacent voxels.
        all_held: registers for these and their sums.
        least_blocks: resident blocks per multiprocessor; 0: as many as the registers allow.
        blocks: blocks per multiprocessor in a launch.
        stages: tile buffers in shared memory, channels last: others are prefetched meanwhile.
    """

    warps: int
    groups: int
    held: int = 72
    all_held: int = 160
    least_blocks: int = 0
    blocks: int = 12
    stages: int = 1


def layout_of(
    classes: int, item: int, sums: int, last: bool, reduces: bool, most_rows: int
) -> Layout:
    """The layout of a pass.

    Args:
        item: the bytes of a logit, 4 or 2.
        sums: how many sums per class a thread accumulates; 0 in the apply pass.
        last: whether the layout in memory is channels-last.
        reduces: whether it is the reduce pass.
        most_rows: the most blocks per multiprocessor whose sums fit the memory for them.
    """
    if not reduces:
        # Many blocks: 87 → 90 % (14 classes, float32), 75 → 77 % (bfloat16). Two warps of 53
        # classes took a third longer than three of 35.
        warps = _shared_by(classes, 35 if classes <= 105 else WIDEST)
        held = 2 * WIDEST if classes > 105 and not last else 72
        stages = 3 if last else 1  # 2: 65 → 68 % (14 classes, bfloat16)
        return Layout(warps, max(1, 4 // warps), held, blocks=_APPLY_BLOCKS, stages=stages)
    # All blocks are resident, with equal shares: further blocks would start as others end, and the
    # last ones would run alone.
    stages = 2 if last else 1  # 1: 64 → 58 % (14 classes, bfloat16), 53 → 39 % (105); 3: the same
    if classes <= _FEW:
        if last:
            least, blocks = 0, 6  # 64 → 65 % (14 classes, bfloat16)
        elif classes <= 2:
            least = blocks = 12  # 67 → 72 % (float32), 48 → 52 % (bfloat16)
        elif classes <= 7:
            least = blocks = 6 if item == 4 else 5  # 72 → 76 %, 48 → 51 % (4 classes)
        else:
            least, blocks = 0, 4  # 87 → 90 %, 75 → 79 % (14 classes)
        return Layout(1, 4, least_blocks=least, blocks=blocks, stages=stages)
    # The fewer warps share a voxel, the less they exchange: 57 → 81 % (105 classes,
    # bfloat16), 58 → 82 % (48), 44 → 78 % (200); but one warp of 48 reaches 56 %.
    each = 35 if classes <= 128 or last else WIDEST
    warps = _shared_by(classes, min(each, _SUMS_HELD // max(sums, 1)))
    held = 72 if classes <= 128 or last else 2 * WIDEST
    resident = _RESIDENT_WARPS if classes <= 128 else 8
    if classes <= 24 or 36 <= classes <= 52:
        resident = 16  # 3 blocks → 4: 76 → 80 % (24 classes, bfloat16), 75 → 82 % (48)
    # A block writes one row of sums, however many groups it has.
    groups = max(1, 4 // warps)
    while (groups + 1) * warps <= resident and resident // (groups * warps) > most_rows:
        groups += 1
    blocks = max(1, resident // (groups * warps))
    least = blocks if classes > 70 and sums == 1 else 0
    return Layout(warps, groups, held, 160, least, blocks, stages)


def _shared_by(classes: int, each: int) -> int:
    """How many warps share this many classes."""
    return -(-classes // each)
