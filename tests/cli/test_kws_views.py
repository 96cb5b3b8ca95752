"""What `hf-ext kws eval` makes of scores: figures, tables and pictures."""

import numpy as np
import pytest

from hf_ext.cli.charts import Raster
from hf_ext.cli.kws_scores import Scored, duration_only_scores, figures_of
from hf_ext.cli.kws_views import (
    alignment,
    det_curve,
    figures_table,
    gate_activity,
    mistakes_table,
    score_histograms,
    spectrogram,
    verdict,
)
from hf_ext.cli.picture import draw
from hf_ext.cli.report import Section, render_page


@pytest.fixture
def scored():
    draw = np.random.default_rng(0)
    labels = np.array([1] * 60 + [0] * 120)
    kinds = np.array(["positive"] * 60 + ["random"] * 60 + ["hard"] * 60)
    scores = draw.normal(size=180) + 3 * labels - 2 * (kinds == "random")
    phonemes = draw.integers(3, 12, 180)
    seconds = 0.1 * phonemes + 0.2
    seconds[60:] = seconds[60:][::-1]
    texts = ["a"] * 180
    return Scored(scores, labels, kinds, seconds, phonemes, [str(i % 20) for i in range(180)], texts, texts)


class TestFigures:
    def test_negatives_are_told_apart_and_intervals_hold_the_figures(self, scored):
        every, random, hard = figures_of(scored, resamples=50)
        assert (every.num_negatives, random.num_negatives, hard.num_negatives) == (120, 60, 60)
        assert random.auc > every.auc > hard.auc and random.eer < hard.eer
        for own in (every, random, hard):
            assert own.auc_interval[0] <= own.auc <= own.auc_interval[1]
            assert own.eer_interval[0] <= own.eer <= own.eer_interval[1]
        assert random.miss_rate_at_1_percent_false_alarms < hard.miss_rate_at_1_percent_false_alarms
        assert "hard" in str(figures_table([hard], "caption").rows)

    def test_intervals_are_spoken_of_where_there_are_some(self, scored):
        assert "bootstrap that draws whole speakers" in " ".join(verdict(figures_of(scored, resamples=9), "speakers"))
        assert "bootstrap" not in " ".join(verdict(figures_of(scored, resamples=0), "speakers"))

    def test_the_baseline_hears_nothing_but_the_duration(self, scored):
        duration = duration_only_scores(scored)
        # Positives have exactly the usual length; the others have the length of another phrase.
        assert np.abs(duration[scored.labels == 1]).max() < 1e-6
        assert (duration[scored.labels == 0] < -1e-3).mean() > 0.8
        scored.seconds[:] = 1.0
        assert np.ptp(duration_only_scores(scored)) < 1e-6


class TestPictures:
    def test_plain_arrays_are_drawn(self, scored, tmp_path):
        pytest.importorskip("matplotlib")
        draw_from = np.random.default_rng(0)
        blocks = [
            det_curve(scored, ["random", "hard"]),
            score_histograms(scored),
            spectrogram("clip", draw_from.normal(size=(98, 40)), 1.0),
            gate_activity("gates", draw_from.integers(0, 2, (50, 6)), (0.0, 2.0)),
            alignment(
                "path", draw_from.normal(size=(20, 3)), np.repeat([0, 1, 2], [5, 5, 10]), ["K", "AE1", "T"], 1.0
            ),
        ]
        section = Section("s", "S", blocks, [])
        draw(section, tmp_path / "all.png")
        assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
        page = render_page("T", [section], {})
        assert page.count("data:image/png;base64,") == 3 and "url(" not in page
        assert 'aria-label="path: K 0.25 s, AE1 0.25 s, T 0.50 s"' in page

    def test_a_phrase_that_can_not_be_there_is_no_mistake(self, scored):
        scored.scores[0], scored.scores[-1] = -np.inf, np.inf
        with np.errstate(all="raise"):
            shown = mistakes_table(scored, 1).rows
        assert [row[-1] for row in shown] == ["100.0%", "0.0%"]

    def test_the_trade_off_falls_and_stays_on_its_scale(self, scored):
        curve = det_curve(scored, ["random", "hard"])
        for _, points in curve.series:
            x, y, _ = zip(*points, strict=True)
            assert list(x) == sorted(x) and list(y) == sorted(y, reverse=True)
            assert curve.x_ticks[0] <= x[0] and x[-1] <= curve.x_ticks[-1]

    def test_histograms_are_shares(self, scored):
        # A phrase that no frames are left for.
        scored.scores[-1] = -np.inf
        assert [name for name, _ in score_histograms(scored).series] == ["positive", "random", "hard"]
        for _, points in score_histograms(scored).series:
            assert sum(y for _, y, _ in points) == pytest.approx(1)

    def test_a_line_runs_through_the_middle_of_its_rows(self):
        image = Raster("t", "x", "y", np.zeros((2, 4)), (0.0, 4.0), ["a", "b"], [(0.0, 0), (4.0, 1)])
        (left, top), (right, bottom) = (map(float, point.split(",")) for point in image.path.split())
        assert (left, right) == (image.left, image.width - image.right)
        assert top - image.top == pytest.approx(image.height - image.bottom - bottom)
        with pytest.raises(ValueError, match="1 names for 2 rows"):
            Raster("t", "x", "y", np.zeros((2, 4)), (0.0, 1.0), ["a"])
