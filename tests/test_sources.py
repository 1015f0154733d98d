"""What the sources of streams give, by measures that are not their own."""

import re
import zlib
from collections import Counter
from random import Random

import numpy as np
import pytest

from titans_lm.tasks import make_task
from titans_lm.tasks.streams import SOURCES, WEIGHTS, Streams
from titans_lm.tasks.streams.chains import Automaton, Chain
from titans_lm.tasks.streams.languages import Language
from titans_lm.tasks.streams.logs import Log
from titans_lm.tasks.streams.slots import Slots
from titans_lm.tasks.streams.tables import Records

VOCABULARY = re.split(
    " ", "quick Brown foxes jump over 13 lazy dogs; while Seven WIZARDS (quietly) box 40 jugs of 'ale', no?"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("texts") / "text.txt", np.random.default_rng(0)
    lines = (" ".join(VOCABULARY[i] for i in rng.integers(len(VOCABULARY), size=9)) for _ in range(200))
    path.write_text("\n".join(lines) + "\n")
    return path


def stream(file, sources, seed=0, length=1 << 13, **options) -> bytes:
    task = make_task({"name": "streams", "files": str(file), "sources": sources, **options})
    assert isinstance(task, Streams)
    return bytes(task.stream(np.random.default_rng(seed), length))


def bits(text: bytes) -> float:
    """Per byte, by a compressor."""
    return 8 * len(zlib.compress(text)) / len(text)


def disguise(shown, text) -> dict:
    """What each character of the text is shown as, wherever in the text that was: at the beginning of a line."""
    for begin in [0, *(m.end() for m in re.finditer("\n" if isinstance(text, str) else b"\n", text))]:
        table = {}
        if all(table.setdefault(a, b) == b for a, b in zip((text * 2)[begin:], shown, strict=False)):
            return table
    raise AssertionError("no part of the text has this form")


def entropy(counts) -> float:
    shares = np.array(list(counts), float) / sum(counts)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def test_the_default_weights_are_of_all_sources():
    assert WEIGHTS.keys() == SOURCES.keys()


# ------------------------------------------------------------------------------------------------ texts


def test_text_is_as_it_is_in_the_file(file):
    whole = file.read_bytes() * 3
    for seed in range(5):
        assert stream(file, "text", seed, 2 * file.stat().st_size) in whole


def test_a_cipher_is_a_bijection_that_is_new_for_each_stream(file):
    text, tables = file.read_bytes(), []
    for seed in range(12):
        table = disguise(stream(file, "cipher", seed, 1500), text)
        assert len(set(table.values())) == len(table) > 30
        assert table[ord("\n")] == ord("\n")
        tables.append(tuple(table.get(letter) for letter in b"abdegijklnoquwxz"))
        if table[ord(" ")] == ord(" "):  # letters alone
            assert all(chr(b).isalpha() == chr(a).isalpha() for a, b in table.items())
            assert table[ord("W")] == table[ord("w")] - 32
    assert len(set(tables)) == 12
    spaces = {disguise(stream(file, "cipher", seed, 1500), text)[32] == 32 for seed in range(12)}
    assert spaces == {False, True}


def test_alphabets_are_texts_in_letters_of_others(file):
    text, sizes = file.read_text(), Counter()
    for seed in range(30):
        shown = stream(file, "alphabets", seed, 4000)
        try:
            letters = shown.decode("utf-8", "ignore")
            table = disguise(letters[:-1], text)
            sizes[len(table["q"].encode())] += 1
            assert all(table[sign] == sign for sign in " \n();,'")
            assert all(ord(table[letter]) > 127 for letter in "abdegijklnoquwxz")
        except AssertionError:
            sizes["bytes"] += 1
    assert sizes[2] > 2
    assert sizes[3] + sizes[4] > 2
    assert sizes["bytes"] > 2


def test_a_language_has_words_of_its_own_that_are_frequent_as_words_are():
    lexicons = []
    for seed in range(4):
        made = Language(np.random.default_rng(seed))
        said = re.findall(r"[^\W\d_]+", made.text(4000).lower())
        lexicons.append(set(made.words))
        assert set(said) <= {word.lower() for word in made.words}
        ranked = [count for _, count in Counter(said).most_common()]
        assert ranked[0] > 5 * ranked[len(ranked) // 4]
    assert len({word for word in lexicons[0] if len(word) > 3} & lexicons[1]) < len(lexicons[0]) / 50


# ------------------------------------------------------------------------------------------------ machines


@pytest.mark.parametrize(("order", "count", "concentration"), [(1, 2, 0.5), (1, 20, 0.1), (2, 5, 1.0), (3, 3, 0.3)])
def test_what_a_chain_says_is_as_uncertain_as_its_transitions(order, count, concentration):
    chain = Chain(np.random.default_rng(1), order, count, concentration)
    walked = chain.walk(40_000).tolist()
    assert set(walked) <= set(range(count))
    pairs = Counter((tuple(walked[i - order : i]), walked[i]) for i in range(order, len(walked)))
    visits = Counter()
    for (context, _), times in pairs.items():
        visits[context] += times
    measured = entropy(pairs.values()) - entropy(visits.values())
    exact = 0.0
    for context, times in visits.items():
        number = sum(symbol * count ** (order - 1 - i) for i, symbol in enumerate(context))
        exact += times / visits.total() * entropy(np.diff([0, *chain.follows[number]]))
    assert measured == pytest.approx(exact, abs=0.03)
    assert 0 < exact < np.log2(count)


def test_a_markov_stream_has_few_symbols_and_they_differ(file):
    alphabets = [frozenset(stream(file, "markov", seed, 2000)) for seed in range(8)]
    assert all(1 <= len(alphabet) <= 24 for alphabet in alphabets)
    assert len(set(alphabets)) == 8


def test_an_automaton_goes_along_its_edges_and_comes_everywhere():
    for seed in range(5):
        automaton = Automaton(np.random.default_rng(seed))
        state, seen, information = automaton.state, Counter(), 0.0
        assert 4 <= len(automaton.edges) <= 12
        for symbol in automaton.walk(5000).tolist():
            edges = dict(automaton.edges[state])
            assert 1 <= len(edges) == len(automaton.edges[state]) <= 4
            seen[state] += 1
            information += np.log2(len(edges))
            state = edges[symbol]
        assert state == automaton.state
        assert len(seen) == len(automaton.edges)
        assert information / 5000 < 2


def test_letters_are_few_in_lines_of_one_width_and_some_passages_come_again(file):
    widths, saved = set(), []
    for seed in range(16):
        text = stream(file, "letters", seed, 1 << 14)
        letters = text.replace(b"\n", b"")
        assert 2 <= len(set(letters)) <= 6
        lines = text.split(b"\n")
        if len(lines) > 50:
            assert len(set(map(len, lines[:-1]))) == 1
            widths.add(len(lines[0]))
        mixed = bytes(np.random.default_rng(0).permutation(np.frombuffer(letters, np.uint8)))
        saved.append(bits(mixed) - bits(letters))
    assert len(widths) > 1
    assert max(saved) > 0.3


def test_noise_is_of_eight_bits_or_of_some_symbols(file):
    found = [stream(file, "noise", seed, 1 << 14) for seed in range(10)]
    even = [entropy(Counter(text).values()) / np.log2(len(set(text))) for text in found]
    assert min(even) > 0.99
    assert sum(len(set(text)) == 256 for text in found) >= 3  # so every byte is trained on
    assert any(len(set(text)) < 96 for text in found)


def test_passages_come_again_after_gaps_of_all_sizes(file):
    lags = Counter()
    for seed in range(6):
        text = stream(file, {"repeat": 1, "noise": 1e-9}, seed, 1 << 14)
        last: dict[bytes, int] = {}
        for at in range(len(text) - 12):
            gram = text[at : at + 12]
            if len(set(gram)) > 8:  # no chance of noise
                if gram in last:
                    lags[round(np.log2(at - last[gram]))] += 1
                last[gram] = at
    assert lags.total() > 0.15 * 6 * (1 << 14)
    assert min(lags) <= 7
    assert max(lags) >= 12
    assert len(lags) > 5


# ------------------------------------------------------------------------------------------------ lines

NAMES = ["disk", "Node", "failed", "request", "socket", "user", "queue", "open", "retry", "cache", "block", "state"]


def test_a_log_has_few_templates_unlike_those_of_others_and_its_time_goes_on():
    beginnings, counts = set(), []
    for seed in range(40):
        log = Log(Random(seed), NAMES)
        counts.append(len(log.templates))
        before = log.clock.now
        text = log.lines(120)
        assert log.clock.now >= before
        assert text.endswith(log.end)
        assert bits(text.encode()) < 4.5
        beginnings.add(re.sub(r"\w+", "x", text.split(log.end)[0])[:12])
    assert min(counts) == 3
    assert 20 < max(counts) <= 30
    assert len(beginnings) > 25


def test_identifiers_of_a_log_come_again_within_it_only():
    """Some slots give values that came before, and another log has none of them."""
    again = []
    for seed in range(20):
        value = Slots(Random(seed), NAMES).reused()
        found = [value() for _ in range(200)]
        other = Slots(Random(seed + 100), NAMES).reused()
        again.append(1 - len(set(found)) / len(found))
        if len(found[0]) > 8:
            assert not set(found) & {other() for _ in range(200)}
    assert min(again) > 0.2
    assert np.mean(again) < 0.99


@pytest.mark.parametrize("seed", range(8))
def test_the_lines_of_a_table_have_one_form(seed):
    random = Random(seed)
    records = Records(random, Slots(random, NAMES))
    lines = records.lines(50).removesuffix("\n").split("\n")
    assert len(lines) == 50
    assert all((line + "\n").startswith(records.before) and (line + "\n").endswith(records.after) for line in lines)
    assert len(set(lines)) > 10


# ------------------------------------------------------------------------------------------------ the mixture


def test_sources_and_files_come_as_often_as_they_weigh(file, tmp_path):
    whole = file.read_bytes() * 2
    task = make_task({"name": "streams", "files": str(file), "sources": {"text": 3, "noise": 1}, "length": 32})
    rows = task.batch(np.random.default_rng(0), 400).input_ids.astype(np.uint8)
    assert sum(bytes(row) in whole for row in rows) == pytest.approx(300, abs=30)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 1000 if name == "a" else name * 5000)
    files = {str(tmp_path / "a.txt"): 3, str(tmp_path / "b.txt"): 1}
    task = make_task({"name": "streams", "files": files, "sources": "text", "length": 8})
    rows = task.batch(np.random.default_rng(0), 400).input_ids
    assert (rows == ord("a")).all(1).sum() == pytest.approx(300, abs=30)


def test_streams_change_as_often_as_is_said(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 9000)
    options = {"name": "streams", "files": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "sources": "text"}
    for switch, changes in ((200, 164), (1000, 33), (0, 0)):
        task = make_task({**options, "switch": switch})
        found = np.count_nonzero(np.diff(task.stream(np.random.default_rng(0), 1 << 16)))
        assert found == pytest.approx(changes, rel=0.3)  # half of the changes are to another of the same letter


OPTIONS = {"name": "streams", "sources": ["text", "noise"]}


def test_a_source_that_comes_back_goes_on_where_it_was(file):
    """Of parts that are left and come back nothing is lost."""
    task = make_task({**OPTIONS, "sources": "text", "files": str(file), "switch": 50})
    parts, rng = [], np.random.default_rng(0)
    taken: dict[int, bytes] = {}
    visits = Counter()
    for _ in range(300):
        part = task._next(rng, parts, 1000)
        taken[id(part)] = taken.get(id(part), b"") + bytes(part.take(20))
        visits[id(part)] += 1
    whole = file.read_bytes() * 3
    assert all(text in whole for text in taken.values())
    assert len(parts) == len(visits) == pytest.approx(200, abs=30)


def test_tasks_are_sources_too(file):
    needle = {"name": "needle", "length": 128, "style": "short", "haystack": "noise", "weight": 1}
    text = stream(file, {"noise": 1}, 3, 512, tasks=[needle])
    assert {stream(file, {"noise": 1}, seed, 128, tasks=[needle])[-8:-7] == b"=" for seed in range(8)} == {False, True}
    assert len(text) == 512
    for wrong, message in [
        ([{"name": "parity", "length": 8}], "tasks: parity has tokens that are not bytes"),
        ([{"name": "needle", "weight": "x"}], r"the weight of tasks\[0\] must be a number"),
        ("needle", "tasks must be a list"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_task({**OPTIONS, "files": str(file), "tasks": wrong})
