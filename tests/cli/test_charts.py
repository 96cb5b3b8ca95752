import io
import re

import pytest
from rich.console import Console

from cli.test_report import Page
from hf_ext.cli.charts import Curve, HeatMap, Shades, ticks
from hf_ext.cli.picture import draw
from hf_ext.cli.report import Bars, Section, Steps, print_section, render_page


@pytest.fixture
def curve():
    routed = [(0.5, 1.9, "θ <0.5>"), (0.75, 1.8, "θ 0.7")]
    return Curve("Quality", "active", "perplexity", [("routers", routed), ("fixed & all", [(1.0, 1.7, "dense")])])


@pytest.fixture
def heat_map():
    return HeatMap("Experts", "expert", "layer", ["25%", "100%"], ["1", "2", "3"], [[0.1, 0.9], [0.5, 0.5], [1, 0]])


@pytest.fixture
def shades():
    return Shades("Text", [("Once", 0.25, "25% & <more>"), (" <b>", 1.0, "100%"), ("\n$x_1$", 0.5, "50%")], "the MLPs")


@pytest.fixture
def page(curve, heat_map, shades):
    return render_page("T", [Section("s", "S", [curve, heat_map, shades], [])], {}, "hf-ext dynamoe eval")


class TestTicks:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            ([1.72, 2.34], [1.6, 1.8, 2.0, 2.2, 2.4]),
            ([480e3, 812e3], [400e3, 500e3, 600e3, 700e3, 800e3, 900e3]),
        ],
    )
    def test_they_are_round_and_enclose_the_values(self, values, expected):
        assert ticks(values) == pytest.approx(expected)

    @pytest.mark.parametrize("values", [[3.0], [0.0], [-1.0, -1.0], [1e-9, 1e9], [0.7, 0.70001]])
    def test_there_are_at_least_two_and_few(self, values):
        found = ticks(values)
        assert found[0] <= min(values) <= max(values) <= found[-1]
        assert 2 <= len(found) <= 7


class TestCurve:
    def test_points_stand_within_the_plot_and_up_is_more(self, curve):
        assert curve.left <= curve.x(0.5) < curve.x(0.75) < curve.x(1.0) <= curve.width - curve.right
        assert curve.top <= curve.y(1.9) < curve.y(1.7) <= curve.height - curve.bottom

    def test_the_page_draws_a_line_each_and_says_what_a_point_is(self, page):
        parsed = Page(page)
        assert [a["class"] for t, a in parsed.tags if t == "polyline"] == ["line-0", "line-1"]
        assert sum(t == "circle" for t, _ in parsed.tags) == 3
        assert "routers: θ &lt;0.5&gt;" in page
        labels = [a["aria-label"] for t, a in parsed.tags if t == "svg"]
        assert labels == ["Quality, perplexity by active. routers: θ <0.5>, θ 0.7; fixed & all: dense"]

    def test_places_of_its_own_bound_the_plot(self):
        marks = [(-2.0, "2 %"), (0.0, "50 %"), (1.0, "84 %")]
        chart = Curve("C", "x", "y", [("one", [(-1.0, 3.0, "a"), (0.5, 4.0, "b")])], x_marks=marks, dots=False)
        assert (chart.x(-2.0), chart.x(1.0)) == (chart.left, chart.width - chart.right)
        page = render_page("T", [Section("s", "S", [chart], [])], {})
        assert all(f">{name}</text>" in page for _, name in marks)
        assert "<circle" not in page


class TestHeatMap:
    def test_the_page_shows_every_share(self, page):
        cells = re.findall(r'<td style="--level: ([\d.]+)">(\d+)%</td>', page)
        assert [(float(level), int(said)) for level, said in cells] == [
            (0.1, 10), (0.9, 90), (0.5, 50), (0.5, 50), (1, 100), (0, 0),
        ]  # fmt: skip

    def test_values_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="for 2 rows of 1 columns"):
            HeatMap("", "", "", ["a"], ["b", "c"], [[1.0]])


class TestShades:
    def test_levels_span_the_text(self, shades):
        assert [shades.level(value) for _, value, _ in shades.tokens] == [0.0, 1.0, 0.33]
        assert "from 25% (palest) to 100% (darkest) of the MLPs, 58% on average" in shades.summary

    def test_a_text_of_one_shade_and_none_at_all(self):
        assert Shades("", [("a", 0.5, "")], "x").level(0.5) == 0.0
        assert Shades("", [], "x").summary.startswith("0 tokens")

    def test_the_page_has_every_token_with_its_note(self, page):
        parsed = Page(page)
        assert [a["title"] for t, a in parsed.tags if a.get("class") == "shade"] == ["25% & <more>", "100%", "50%"]
        assert "".join(parsed.text_of["shade"]) == "Once <b>\n$x_1$"

    @pytest.mark.parametrize("colours", [{}, {"force_terminal": True, "color_system": "truecolor"}])
    def test_the_terminal_keeps_the_text(self, shades, colours):
        file = io.StringIO()
        print_section(Section("s", "S", [], [shades]), Console(file=file, width=100, **colours))
        output = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
        assert "Once <b>" in output
        assert "darkest" in output


class TestPage:
    def test_nothing_is_fetched_and_the_command_is_named(self, page):
        assert "<script" not in page
        assert "url(" not in page
        assert "<code>hf-ext dynamoe eval</code>" in page

    def test_neighbouring_charts_of_any_kind_stand_side_by_side(self, curve, heat_map):
        blocks = [Bars("x", [("a", 1.0, "1")]), curve, heat_map]
        assert render_page("T", [Section("s", "S", blocks, [])], {}).count('class="charts"') == 1


class TestPicture:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    @pytest.mark.filterwarnings("error")
    def test_every_block_is_drawn(self, curve, heat_map, shades, tmp_path):
        blocks = [curve, heat_map, Bars("x", [("a", 1.0, "1")]), Steps("x", "", [["a", "b"]]), shades]
        draw(Section("s", "S", blocks, []), tmp_path / "all.png")
        assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
        for block in blocks:
            draw(Section("s", "S", [block], []), tmp_path / "one.png")
