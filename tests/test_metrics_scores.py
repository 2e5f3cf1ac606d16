"""Tables of scores, and what metrics are where masks are empty."""

from __future__ import annotations

import csv
import json
import pickle
from math import inf, isnan, nan

import numpy as np
import pytest
from support import need

from fastloss.metrics import METRICS, Scores, evaluate

FULL, EMPTY = np.array([[0, 1, 1, 0]]), np.zeros((1, 4), int)
OVERLAP = tuple(name for name, metric in METRICS.items() if metric.family == "overlap")


def table():
    values = {"dice": [[0.5, nan], [1.0, nan], [0.0, 0.25]], "hd95": [[3, nan], [inf, nan], [1, 8]]}
    return Scores(
        values,
        samples=["a", "b", "c"],
        classes=["liver", "tumour, small"],
        about={"spacing": [1, 2]},
    )


def test_means_leave_nan_out_and_keep_infinity():
    scores = table()
    assert scores.by_class()["dice"].tolist() == [0.5, 0.25]
    assert scores.by_class()["hd95"].tolist() == [inf, 8]
    assert scores.by_sample()["dice"].tolist() == [0.5, 1.0, 0.125]
    assert scores.mean() == {"dice": 0.375, "hd95": inf}
    assert scores["dice"].shape == (3, 2)
    assert len(scores) == 3
    assert list(scores) == ["dice", "hd95"]
    with pytest.raises(KeyError, match="no metric 'nsd'; there are 'dice', 'hd95'"):
        scores["nsd"]


def test_tables_of_nothing():
    for samples, classes in ((0, 2), (2, 0)):
        scores = Scores(
            {"dice": np.zeros((samples, classes))},
            samples=map(str, range(samples)),
            classes=map(str, range(classes)),
        )
        assert isnan(scores.mean()["dice"])
        assert scores.rows() == []
        assert scores.to_csv() == "sample,class,dice\n"
        assert f"{samples} samples" in repr(scores)


def test_rows_go_to_other_formats(tmp_path):
    scores = table()
    rows = scores.rows()
    assert len(rows) == 6
    assert rows[4] == {"sample": "c", "class": "liver", "dice": 0.0, "hd95": 1.0}
    text = scores.to_csv(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == text
    read = list(csv.DictReader(text.splitlines()))
    assert [(row["sample"], row["class"]) for row in read] == [
        (r["sample"], r["class"]) for r in rows
    ]
    for name in scores:
        np.testing.assert_array_equal([float(r[name]) for r in read], [r[name] for r in rows])
    plain = json.loads(json.dumps(scores.to_dict()))
    np.testing.assert_array_equal(plain["values"]["hd95"], scores["hd95"])
    assert plain["mean"]["dice"] == 0.375
    assert plain["about"] == {"spacing": [1, 2]}
    copied = pickle.loads(pickle.dumps(scores))
    np.testing.assert_array_equal(copied["dice"], scores["dice"])


def test_a_frame_of_pandas():
    need("pandas")
    frame = table().to_pandas()
    assert frame.loc[("c", "tumour, small"), "hd95"] == 8
    assert frame["dice"].groupby("class").mean().tolist() == [0.5, 0.25]


def test_the_text_has_means_by_class():
    assert repr(table()).splitlines() == [
        "Scores of 3 samples",
        "                 dice    hd95",
        "liver          0.5000     inf",
        "tumour, small  0.2500  8.0000",
        "mean           0.3750     inf",
    ]
    assert repr(evaluate(EMPTY, EMPTY, metrics="dice")).splitlines()[2:] == [
        "1        –",
        "mean     –",
    ]


def test_tables_follow_each_other():
    first = evaluate(FULL, FULL, metrics="dice", spacing=2, samples=["a"])
    second = evaluate(FULL, 1 - FULL, metrics="dice", spacing=3, samples=["b"])
    both = Scores.concatenate([first, second])
    assert both["dice"].tolist() == [[1], [0]]
    assert both.samples == ("a", "b")
    assert "spacing" not in both.about  # which they do not share
    assert Scores.concatenate([first, first]).about == first.about
    with pytest.raises(ValueError, match="parts: expected tables of"):
        Scores.concatenate([first, evaluate(FULL, FULL, metrics="iou")])
    with pytest.raises(ValueError, match="parts: expected at least one"):
        Scores.concatenate([])


def test_a_table_of_another_shape():
    with pytest.raises(
        ValueError, match=r"values\['dice'\]: expected shape \(1, 2\), got \(2, 1\)"
    ):
        Scores({"dice": [[1], [2]]}, samples=["a"], classes=["x", "y"])


# ------------------------------------------------------------------ empty masks


def pairs(metrics, **options):
    """The values where both masks are empty, only the prediction, and only the reference."""
    arrays = (EMPTY, EMPTY), (EMPTY, FULL), (FULL, EMPTY)
    found = [evaluate(*each, metrics=metrics, **options) for each in arrays]
    return {name: [scores[name].item() for scores in found] for name in found[0]}


def test_the_defaults_are_those_of_the_table():
    found = pairs(OVERLAP)
    for name in ("dice", "iou", "precision", "recall", "mcc"):
        np.testing.assert_array_equal(found[name], [nan, 0, 0], name)
    np.testing.assert_array_equal(found["specificity"], [1, 1, 0.5])
    np.testing.assert_array_equal(found["balanced_accuracy"], [nan, 0.5, nan])
    np.testing.assert_array_equal(found["volume_difference"], [nan, -1, nan])
    np.testing.assert_array_equal(found["volume_similarity"], [nan, 0, 0])


def test_a_pair_for_all_metrics_or_some():
    for name, values in pairs(("dice", "iou"), empty=(1, nan)).items():
        np.testing.assert_array_equal(values, [1, nan, nan], name)
    found = pairs(("dice", "recall", "iou"), empty={"dice": (1, inf), "recall": (None, None)})
    np.testing.assert_array_equal(found["dice"], [1, inf, inf])
    np.testing.assert_array_equal(found["recall"], [nan, 0, nan])
    np.testing.assert_array_equal(found["iou"], [nan, 0, 0])


def test_an_empty_mask_can_be_an_error():
    where = r"dice of class '1', sample 'x': no voxel in the "
    options = {"metrics": "dice", "samples": ["x"]}
    with pytest.raises(ValueError, match=where + "prediction and reference"):
        evaluate(EMPTY, EMPTY, empty=("error", 0), **options)
    for arrays, mask in (((EMPTY, FULL), "prediction"), ((FULL, EMPTY), "reference")):
        with pytest.raises(ValueError, match=where + mask + ","):
            evaluate(*arrays, empty=("error", "error"), **options)
    assert evaluate(EMPTY, FULL, empty=("error", 0.5), **options)["dice"].item() == 0.5
    assert evaluate(FULL, FULL, empty=("error", "error"), **options)["dice"].item() == 1


@pytest.mark.parametrize(
    ("empty", "kind", "message"),
    [
        (0, TypeError, "empty: expected a pair"),
        ("error", TypeError, "empty: expected a pair"),
        ((1, 2, 3), TypeError, "empty: expected a pair"),
        ((1, "nan"), ValueError, "empty: expected a number, None or 'error', got 'nan'"),
        ((1, [2]), TypeError, "empty: expected a number"),
        ({"iou": (0, 0)}, ValueError, "empty: expected metrics among 'dice', got 'iou'"),
        ({"dice": 0}, TypeError, r"empty\['dice'\]: expected a pair"),
    ],
)
def test_what_empty_masks_give_is_checked(empty, kind, message):
    with pytest.raises(kind, match=message):
        evaluate(FULL, FULL, metrics="dice", empty=empty)
