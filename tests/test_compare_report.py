"""The report of compared losses: records, the table, and the page that stands alone."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
from math import inf, isnan, nan
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support import ROOT, need

import fastloss as fl
from fastloss.compare.command import add_options
from fastloss.compare.losses import LOSSES as LOSSES_OF_COMPARE
from fastloss.compare.records import (
    Cost,
    CurvePoint,
    Failure,
    LesionScore,
    Picture,
    Score,
    Study,
)
from fastloss.compare.report_page import page
from fastloss.compare.report_svg import svg
from fastloss.compare.report_table import table
from fastloss.evaluation.overlay import draw

LOSSES = ["dice_ce", "dice_ce_again", "<better>"]


def study_of(*, seeds: int = 3, cases: int = 12, gain: float = 0.04) -> Study:
    """Two copies of a loss, and one that is better; a failed run, a missed class, a picture."""
    rng = np.random.default_rng(0)
    case = 0.8 + 0.05 * rng.normal(size=cases)
    sizes = np.exp(rng.normal(6, 1.5, (cases, 2)))
    scores, lesions, curves, costs = [], [], [], []
    for k, loss in enumerate(LOSSES):
        better = gain if k == 2 else 0.0
        for seed in range(seeds):
            run = (loss, seed, 0)
            noise = 0.003 * rng.normal()
            for i in range(cases):
                name = f"case {i}"
                for label in ("liver", "tumour"):
                    dice = case[i] + better + noise + 0.005 * rng.normal()
                    missed = label == "tumour" and i == 3
                    hd95 = inf if missed and k == 0 else 50 * (1 - dice)
                    scores.append(Score(*run, name, "dice", label, 0.0 if missed else dice, 900.0))
                    scores.append(Score(*run, name, "hd95", label, hd95, 900.0))
                for size in sizes[i]:
                    lesions.append(LesionScore(*run, name, "tumour", size, rng.uniform()))
            for step in range(10, 101, 10):
                measured = 0.9 - 1 / step + noise if step % 20 == 0 else nan
                curves.append(CurvePoint(*run, step, 1 / step, measured, 0.1 * step))
        costs.append(Cost(loss, 2.0 + k, 100.0 + k, 2**20))
    failures = []
    if seeds > 1:
        gone = (LOSSES[1], seeds - 1)
        scores = [each for each in scores if (each.loss, each.seed) != gone]
        failures = [Failure(*gone, 0, "the loss became NaN")]
    mask = np.zeros((20, 24), bool)
    mask[5:12, 6:14] = True
    image = draw(np.full(mask.shape, 0.3), np.roll(mask, 2, 0), mask, (1, 1))
    pictures = [Picture(loss, "case 3", "worst <case>", image) for loss in LOSSES]
    return Study("Twelve livers & tumours", LOSSES[0], list(LOSSES), {"steps": 100, "lr": (1, 2)},
                 scores, lesions, curves, costs, failures, pictures)  # fmt: skip


def test_records_as_json_and_csv() -> None:
    """What was written is read again, the odd numbers and the pictures too."""
    study = study_of()
    text = study.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = Study.from_json(text)
    assert again.to_json() == text
    assert again.scores == study.scores
    assert again.failures == study.failures
    assert again.options == {"steps": 100, "lr": [1, 2]}
    assert sum(isnan(each.metric) for each in again.curves) == 3 * 3 * 5
    for one, other in zip(again.pictures, study.pictures, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    assert not Study.from_json(study.to_json(pictures=False)).pictures
    rows = list(csv.DictReader(io.StringIO(study.to_csv())))
    assert len(rows) == len(study.scores)
    assert rows[0]["metric"] == "dice"
    assert float(rows[0]["value"]) == study.scores[0].value
    assert "tumour" in study.lesions_csv()
    for bad in ("{", "[1]", '{"format": "other"}', '{"format": "fastloss.compare 1"}'):
        with pytest.raises(ValueError, match="text: expected"):
            Study.from_json(bad)
    with pytest.raises(ValueError, match="costs: expected losses of"):
        Study("x", "a", ["a"], costs=[Cost("b", 1.0, 1.0, 1)])


def test_the_table_names_winner_and_tie() -> None:
    text = " ".join(table(study_of()).split())
    verdict = text.partition(" Verdict ")[2]
    winner = re.search(
        r"<better> is better than dice_ce: its mean dice is 0\.0(\d+) higher", verdict
    )
    assert winner
    assert 30 <= int(winner[1]) <= 50
    assert re.search(r"dice_ce_again and dice_ce are not distinguishable with 12 cases", verdict)
    assert re.search(r"some [0-9,]+ (cases|seeds)|no study that could be made", verdict)
    assert "Take <better>, which is shown to be better than all others" in verdict
    assert "<better> takes 4 ms of a step's 102" in verdict
    assert "dice_ce_again failed in seed 2 (the loss became NaN)" in text
    assert "Infinite values count as the worst finite value" in text
    for row in ("dice, liver", "hd95, tumour", "lesion dice, tumour, small, up to"):
        assert row in text
    # The data cannot tell with one training of each, however large the difference.
    once = table(study_of(seeds=1, gain=0.3))
    assert "Each loss was trained once" in once
    assert "is better than" not in once
    copies = study_of(gain=0.0)
    text = " ".join(table(copies).split())
    found = re.search(r"(\S+), (\S+) and (\S+) may each be the best", text)
    assert found
    assert set(found.groups()) == set(LOSSES)
    assert "may each be the best, and dice_ce is the fastest of them." in text
    assert table(copies) == table(copies)


def test_studies_of_little() -> None:
    """No score, one loss, one case, a reference without scores: said, not raised."""
    assert "There are no scores to judge." in table(Study("none", "a", ["a"]))
    assert "<h1>none</h1>" in page(Study("none", "a", ["a"]))
    one = [
        Score("a", 0, 0, "case", "dice", "liver", 0.9),
        Score("b", 0, 0, "case", "dice", "liver", 0.8),
    ]
    assert "Only a has scores" in table(Study("x", "a", ["a", "b"], scores=one[:1]))
    text = table(Study("x", "a", ["a", "b"], scores=one))
    assert "One case has no interval" in text
    assert "is worse than" not in text
    assert "0.900" in page(Study("x", "a", ["a", "b"], scores=one))
    text = table(
        Study("x", "c", ["a", "b", "c"], scores=one, failures=[Failure("c", 0, 0, "no memory")])
    )
    assert "c failed in seed 0 (no memory): it has no scores." in text
    assert "The reference c has no scores: a takes its place." in " ".join(text.split())


def test_the_page_for_choosing_names_what_there_is() -> None:
    """Losses, metrics and options of its commands, and losses of its table of costs."""
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m fastloss compare (.*)", text)
    assert len(commands) >= 5
    parser = argparse.ArgumentParser()
    add_options(parser)
    for command in commands:
        options = parser.parse_args(command.split())
        for loss in options.losses.split(","):
            assert loss in LOSSES_OF_COMPARE or "=" in loss, loss
        fl.metrics.evaluate(
            *np.zeros((2, 1, 4, 4), int), metrics=options.metrics.split(","), classes={"a": 1}
        )
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(LOSSES_OF_COMPARE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(study_of()), encoding="utf-8")
    return path


def test_page_stands_alone(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<script" not in text
    assert "url(" not in text
    assert "<better>" not in text
    assert "&lt;better&gt;" in text
    assert "worst &lt;case&gt;" in text
    assert "Twelve livers &amp; tumours" in text
    assert text.count("data:image/png;base64,") == 3
    # Intervals of three metrics, curves, sizes and cost.
    assert text.count('<svg class="plot"') == 6
    for part in ("Verdict", "Ranking", "Intervals", "Training", "Dice against size", "Cost",
                 "Pictures", "All 18 comparisons", "Settings", "−0.0"):  # fmt: skip
        assert part in text, part
    plots = "".join(re.findall(r'<svg class="plot".*?</svg>', text, re.DOTALL))
    for number in re.findall(r' (?:cx|cy|x|y|width)="([^"]*)"', plots):
        assert np.isfinite(float(number))
    assert "nan" not in "".join(re.findall(r' d="([^"]*)"', plots))


def test_picture_stands_alone() -> None:
    """It is XML without links, and within it are the names, the curves and all the intervals."""
    study = study_of()
    text = svg(study)
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert not re.search(r"href|url\(|<script", text)
    words = [each.text for each in root.iter(f"{space}text")]
    for name in ("dice_ce (reference)", "dice_ce_again", "<better>"):
        assert name in words
    # The mean and two classes have three means and two differences each.
    assert len(list(root.iter(f"{space}circle"))) == 3 * (3 + 2)
    plots = root.findall(f"{space}svg")
    ends = [float(each.attrib["y"]) + float(each.attrib["height"]) for each in plots]
    assert len(plots) == 2
    assert ends[0] <= float(plots[1].attrib["y"])
    assert ends[1] <= float(root.attrib["height"])
    many = [f"loss_of_a_long_name_{i}" for i in range(9)]
    root = ElementTree.fromstring(svg(Study("none", many[0], many)))
    names = [each for each in root.iter(f"{space}text") if (each.text or "") in many]
    assert len({each.attrib["y"] for each in names}) > 1  # in several lines
    assert max(float(each.attrib["x"]) for each in names) < 800


def test_page_in_a_browser(written: Path, tmp_path: Path) -> None:
    """Headless Chromium renders it without an error, with dots in the colours of the losses."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("chromium: not installed")
    shot = tmp_path / "page.png"
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,4600",
         f"--screenshot={shot}", written.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr
    pixels = np.rint(255 * need("matplotlib.image").imread(shot)[..., :3])
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115), (0, 200, 255), (255, 140, 0)):
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 100, colour
