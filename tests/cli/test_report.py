import builtins
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from hf_ext.cli.picture import draw
from hf_ext.cli.report import (
    NUM_COLOURS,
    Bars,
    Figures,
    Prose,
    Section,
    Steps,
    Table,
    print_section,
    render_page,
    rich_table,
    split_into_steps,
    token_texts,
)


_VOID = {"meta", "link", "br", "img", "hr", "input"}
NASTY = ["<b>", " & ", "</span>", '"q"', "\n", "é", "{{ x }}", " $a_1$", "[red]"]


class Page(HTMLParser):
    """Checks that tags nest, and keeps text by the class of the element that it stands in."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.text_of, self.steps = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in _VOID:
            self.stack.append((tag, attributes.get("class", "") or ""))
        if "step" in (attributes.get("class") or "").split():
            self.steps.append((attributes["class"], attributes["title"], ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, _ = self.stack.pop()
        assert opened == tag

    def handle_data(self, data):
        tag, kind = self.stack[-1] if self.stack else ("", "")
        self.text_of.setdefault(kind or tag, []).append(data)
        if kind == "t":
            name, title, text = self.steps[-1]
            self.steps[-1] = (name, title, text + data)


def section(blocks, terminal=()):
    return Section("name", "A <title> & more", list(blocks), list(terminal))


@pytest.fixture
def everything():
    return section(
        [
            Prose("Some `code` and <text>."),
            Figures([("2.5x", "faster")]),
            Table(["method", "a & b"], [["<plain>", "1"], ["other", "2"]], "cap<tion", best=1),
            Bars("Speed", [("plain", 1.0, "1.00x"), ("<other>", 2.0, "2.00x")], reference=1.0),
            Bars("More", [("plain", 0.0, "0")]),
            Steps("One", "Prompt <p> ", [[token] for token in NASTY]),
            Steps("Two", "Once", [[" upon", " a"], [" time"], [",", " there", " was"]]),
        ]
    )


@pytest.fixture
def page(everything):
    return render_page("Title & <co>", [everything], {"device": "cpu <x>"})


class TestPage:
    def test_nothing_is_fetched_from_elsewhere(self, page):
        assert "<script" not in page
        assert "@import" not in page
        assert "url(" not in page
        for tag, attributes in Page(page).tags:
            assert tag not in {"link", "iframe", "object", "embed", "base"}
            for name in ("src", "href", "srcset", "data", "action", "poster"):
                assert not re.match(r"(https?:)?//", attributes.get(name) or ""), (tag, attributes)

    def test_every_token_stands_there_once_and_in_order(self, page):
        tokens = [text for _, _, text in Page(page).steps]
        assert tokens == [*NASTY, " upon a", " time", ", there was"]
        assert page.count('class="t"') == len(NASTY) + 6

    def test_tags_nest_and_text_is_escaped(self, page):
        assert "<b>" not in page
        assert "&lt;plain&gt;" in page
        assert "cap&lt;tion" in page
        assert "{{ x }}" in page
        assert Page(page).text_of["title"] == ["Title & <co>"]

    def test_each_step_says_its_number_and_length(self, page):
        assert [title for _, title, _ in Page(page).steps][-3:] == [
            "step 1: 2 tokens",
            "step 2: 1 token",
            "step 3: 3 tokens",
        ]

    def test_neighbouring_steps_have_different_colours(self, page):
        colours = [name.split()[1] for name, _, _ in Page(page).steps[: len(NASTY)]]
        assert colours == [f"s{i % NUM_COLOURS}" for i in range(len(NASTY))]
        for i in range(NUM_COLOURS):
            assert page.count(f"--step-{i}:") == 2, "one for light, one for dark"

    def test_table_has_its_columns_and_rows(self, page):
        parsed = Page(page)
        assert parsed.text_of["th"] == ["method", "a & b", "<plain>", "other"]
        assert parsed.text_of["td"] == ["1", "2"]
        scopes = [attributes["scope"] for tag, attributes in parsed.tags if tag == "th"]
        assert scopes == ["col", "col", "row", "row"]

    def test_charts_are_described_in_words(self, page):
        labels = [attributes["aria-label"] for tag, attributes in Page(page).tags if tag == "svg"]
        assert labels == ["Speed: plain 1.00x, <other> 2.00x", "More: plain 0"]

    def test_follows_the_readers_choice_of_light_or_dark(self, page):
        assert "prefers-color-scheme: dark" in page
        assert ("html", {"lang": "en"}) in Page(page).tags

    def test_backticks_are_code(self, page):
        assert "<code>code</code>" in page

    def test_sections_stand_in_order(self):
        page = render_page("T", [Section("one", "One", [], []), Section("two", "Two", [], [])], {})
        assert page.index('id="one"') < page.index('id="two"')


class TestBlocks:
    def test_a_table_with_a_short_row_is_refused(self):
        with pytest.raises(ValueError, match="1 cells under 2 columns"):
            Table(["a", "b"], [["x"]], "")

    def test_bars_are_as_long_as_their_values_say(self):
        bars = Bars("x", [("a", 1.0, ""), ("b", 4.0, "")])
        assert bars.length(4.0) == bars.plot_width
        assert bars.length(1.0) == pytest.approx(bars.plot_width / 4, abs=0.1)

    def test_a_reference_beyond_all_bars_stays_within_the_plot(self):
        bars = Bars("x", [("a", 1.0, "")], reference=2.0)
        assert bars.length(2.0) == bars.plot_width

    def test_bars_of_nothing_have_no_length(self):
        assert Bars("x", [("a", 0.0, "")]).length(0.0) == 0.0

    def test_summary_of_steps(self):
        assert (
            Steps("", "", [["a", "b", "c"], ["d"]]).summary == "4 tokens in 2 steps (2.00 per step, at most 3 in one)"
        )
        assert Steps("", "", []).summary.startswith("0 tokens in 0 steps")


class TestTokens:
    @pytest.mark.parametrize("text", ["plain words", "naïve ☃ 🎈 end", "  two  spaces\n\nlines", "🎈"])
    def test_joined_they_are_the_text_that_follows_the_prompt(self, tokenizer, text):
        ids = tokenizer(text)["input_ids"]
        for cut in range(len(ids)):
            texts = token_texts(tokenizer, ids[:cut], ids[cut:])
            assert len(texts) == len(ids) - cut
            if not tokenizer.decode(ids[:cut]).endswith("\N{REPLACEMENT CHARACTER}"):
                assert tokenizer.decode(ids[:cut]) + "".join(texts) == text

    def test_the_last_token_of_a_character_carries_it(self, tokenizer):
        assert token_texts(tokenizer, [], tokenizer("a☃b")["input_ids"]) == ["a", "", "", "☃", "b"]

    def test_half_a_character_at_the_end_is_shown(self, tokenizer):
        ids = tokenizer("a☃")["input_ids"][:-1]
        assert token_texts(tokenizer, [], ids) == ["a", "", "\N{REPLACEMENT CHARACTER}"]

    def test_special_tokens_are_shown(self, tokenizer):
        assert token_texts(tokenizer, [], [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]) == ["a", "</s>"]

    def test_steps_get_as_many_tokens_as_they_emitted(self):
        assert split_into_steps(["a", "b", "c"], [1, 2]) == [["a"], ["b", "c"]]

    @pytest.mark.parametrize("lengths", [[1, 1], [2, 2], []])
    def test_steps_that_do_not_add_up_are_refused(self, lengths):
        with pytest.raises(ValueError, match="for 3 tokens"):
            split_into_steps(["a", "b", "c"], lengths)


class TestTerminal:
    def printed(self, block, **kwargs):
        file = io.StringIO()
        print_section(section([], [block]), Console(file=file, width=80, **kwargs))
        return file.getvalue()

    def test_without_colours_bars_part_the_steps(self):
        output = self.printed(Steps("One", "Once", [[" upon", " a"], [" time"]]))
        assert "Once| upon a| time" in output

    def test_with_colours_the_text_is_untouched_and_steps_differ(self):
        output = self.printed(
            Steps("One", "Once", [[" upon", " a"], [" time"]]), force_terminal=True, color_system="standard"
        )
        assert "Once upon a time" in re.sub(r"\x1b\[[0-9;]*m", "", output)
        before_upon, before_time = re.findall(r"(\x1b\[[0-9;]*m) (?:upon|time)", output)
        assert before_upon != before_time
        # The prompt is dim (code 2), what the model wrote is not.
        assert "\x1b[2mOnce" in output
        assert not before_upon.startswith("\x1b[2;")

    def test_markup_in_a_generated_text_is_text(self):
        assert "[red]x[/red]" in self.printed(Steps("[red]", "", [["[red]x[/red]"]]))
        assert "[red]" in self.printed(Prose("[red]"))
        assert "[red]" in self.printed(Table(["[red]"], [["[red]"]], "[red]"))

    def test_the_demo_table_fits_80_columns_uncut(self):
        columns = [
            "method",
            "tokens per step",
            "seconds",
            "tokens/s",
            "speed-up",
            "identical output",
            "distinct 4-grams",
        ]
        row = ["multi-token quadratic, k=8", "3.62", "123.45", "12345", "12.34x", "48 of 48", "100%"]
        file = io.StringIO()
        Console(file=file, width=80).print(rich_table(Table(columns, [row], "caption")))
        output = file.getvalue()
        assert "…" not in output
        for cell in row:
            assert cell in output
        assert max(map(len, output.splitlines())) <= 80

    def test_a_chart_is_not_for_the_terminal(self):
        with pytest.raises(TypeError, match="Bars"):
            self.printed(Bars("x", [("a", 1.0, "1")]))


class TestPicture:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_a_png_is_written(self, everything, tmp_path):
        draw(everything, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("kinds", [(), (Bars,), (Steps,)])
    def test_a_section_may_lack_charts_or_texts(self, everything, kinds, tmp_path):
        blocks = [block for block in everything.blocks if isinstance(block, kinds)]
        draw(section(blocks), tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 0

    def test_long_words_and_long_texts_fit(self, tmp_path):
        draw(section([Steps("x", "y" * 250, [["ab", "c" * 300], ["word "] * 900])]), tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 0


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    really_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return really_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ModuleNotFoundError, match=r"hf-ext\[demo\]"):
        draw(section([]), tmp_path / "x.png")
