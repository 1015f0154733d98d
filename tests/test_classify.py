"""Classifying DNA: data of every form, the made task, folds, scores against scikit-learn, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef

from titans_lm import cli
from titans_lm.evaluate.classify import MODELS, build
from titans_lm.evaluate.labelled import (
    MOTIF_A,
    MOTIF_B,
    accuracy,
    folds,
    load_labelled,
    matthews,
    planted,
    reverse_complement,
    tokens,
)


def write_folder(folder: Path, parts: tuple[str, ...] = ("train", "test")) -> Path:
    for part in parts:
        for name, text in (("no", "ACGTAC"), ("yes", "ggtta\n")):
            (folder / part / name).mkdir(parents=True)
            for i in range(3):
                (folder / part / name / f"{i}.txt").write_text(text)
    return folder


def test_a_folder_of_genomic_benchmarks_is_read(tmp_path: Path):
    data = load_labelled(str(write_folder(tmp_path / "g")))
    assert data.classes == ["no", "yes"]
    assert data.train.sequences == ["ACGTAC"] * 3 + ["GGTTA"] * 3
    assert data.test is not None
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_labelled(str(write_folder(tmp_path / "h", ("train",)))).test is None


def test_csv_and_fasta_hold_the_same(tmp_path: Path):
    (tmp_path / "a.csv").write_text("label,sequence,split\nb,ACGT,train\na,GG,test\na,NNT,train\n")
    (tmp_path / "a.fa").write_text(">r1 b\nAC\nGT\n>r2 a test\nGG\n>r3 a train\nNN\nT\n")
    a, b = (load_labelled(str(tmp_path / name)) for name in ("a.csv", "a.fa"))
    for data in (a, b):
        assert data.classes == ["a", "b"]
        assert data.train.sequences == ["ACGT", "NNT"]
        assert data.train.labels.tolist() == [1, 0]
        assert data.test is not None
        assert data.test.sequences == ["GG"]


FILES = {
    "letter": ("x.csv", "sequence,label\nACGT,a\nACXT,b\n", r"x.csv, line 3, letter 3: 'X' is no base"),
    "column": ("x.csv", "sequence,class\nACGT,a\n", "has no column 'label'"),
    "split": ("x.csv", "sequence,label,split\nA,a,dev\n", "line 2: split must be train or test, got 'dev'"),
    "short": ("x.csv", "sequence,label\nA\n", "line 2: the row has not as many values"),
    "one class": ("x.csv", "sequence,label\nA,a\nC,a\n", "has 1 classes"),
    "empty": ("x.csv", "sequence,label\n,a\nC,b\n", "line 2: the sequence is empty"),
    "header": ("x.fa", ">only\nACGT\n", "line 1: '>only' is no header"),
    "no header": ("x.fa", "ACGT\n", "line 1: a FASTA file begins with a header"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files_are_refused_with_their_place(case: str, tmp_path: Path):
    name, text, message = FILES[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_labelled(str(tmp_path / name))


def test_a_folder_without_training_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="has no folder train/"):
        load_labelled(str(write_folder(tmp_path / "g", ("test",))))


def cnn_reach() -> int:
    """Bases that one output of the convolutions sees."""
    return 1 + sum(conv.kernel_size[0] - 1 for conv in build("cnn", 2, 8, 1).convs)


def test_classes_differ_in_the_order_of_motifs_alone():
    data, length = planted(400, 96, 0), 96
    motifs = [MOTIF_A, MOTIF_B, reverse_complement(MOTIF_A), reverse_complement(MOTIF_B)]
    once = np.array([sum(s.count(m) for m in motifs) == 2 for s in data.sequences])
    assert once.mean() > 0.97  # random bases hold a motif now and then
    found, labels = np.array([[s.find(m) for m in motifs] for s in data.sequences])[once], data.labels[once]
    places, turned = found[:, :2], found[:, 2:]
    backwards = (places < 0).all(1)
    assert ((places >= 0).all(1) ^ backwards).all()  # both lie one way
    at = np.where(backwards[:, None], turned, places)
    assert (((at[:, 0] < at[:, 1]) ^ backwards) == labels.astype(bool)).all()
    for label in (0, 1):
        assert abs(backwards[labels == label].mean() - 0.5) < 0.1
    gap, ends = abs(at[:, 0] - at[:, 1]) - 8, np.minimum(at.min(1), length - 8 - at.max(1))
    reach = cnn_reach()
    assert gap.min() > reach - 2  # no output of the convolutions sees bases of both motifs
    assert ends.min() >= reach // 2  # nor a motif and an end
    assert {len(s) for s in data.sequences} == {length}
    with pytest.raises(ValueError, match="give --length 16 or more"):
        planted(2, 15, 0)


def test_reverse_complements():
    assert reverse_complement("AACGTN") == "NACGTT"


def test_folds_are_disjoint_whole_and_even():
    labels = np.array([0] * 20 + [1] * 10)
    parts = folds(labels, 5, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(30))
    assert [labels[part].sum() for part in parts] == [2] * 5
    with pytest.raises(ValueError, match="--folds must be from 2 to 10"):
        folds(labels, 11, 0)


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_are_scikit_learn_s(classes: int):
    rng = np.random.default_rng(0)
    true, other = rng.integers(0, classes, 200), rng.integers(0, classes, 200)
    predicted = np.where(rng.random(200) < 0.4, true, other)
    assert accuracy(true, predicted) == pytest.approx(accuracy_score(true, predicted))
    assert matthews(true, predicted) == pytest.approx(matthews_corrcoef(true, predicted))
    assert matthews(true, np.zeros_like(true)) == 0


@pytest.mark.parametrize("name", MODELS)
def test_models_ignore_padding(name: str):
    torch.manual_seed(0)
    model = build(name, 3, 16, 1).eval()
    ids = torch.from_numpy(tokens(["ACGTACGTNACGTTTGACA", "ACG"], 100))
    assert ids.tolist()[1] == [1, 2, 3] + [0] * 16
    logits = model(ids)
    assert logits.shape == (2, 3)
    if name != "cnn":
        assert torch.allclose(logits[1:], model(ids[1:, :3]), atol=1e-5)


def test_the_command_trains_tests_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "c.jsonl"
    flags = ["evaluate", "classify", "--data", "motifs", "--made", "40", "--length", "20", "--epochs", "1", "--hidden",
             "8", "--layers", "1", "--out", str(out)]  # fmt: skip
    assert cli.main([*flags, "--models", "cnn", "--seeds", "0"]) == 0
    assert cli.main([*flags, "--models", "cnn", "lmm", "--seeds", "0"]) == 0
    assert "1 of 2 lines are new" in capsys.readouterr().out
    assert cli.main([*flags, "--models", "cnn", "--seeds", "0", "--folds", "2"]) == 0
    _, *rows = map(json.loads, out.read_text().splitlines())
    assert [(r["model"], r["folds"], r["fold"]) for r in rows] == [
        ("cnn", 0, 0),
        ("lmm", 0, 0),
        ("cnn", 2, 0),
        ("cnn", 2, 1),
    ]
    assert {r["sequences"] for r in rows} == {40}
    assert all(-1 <= r["mcc"] <= 1 for r in rows)
    assert cli.main([*flags, "--hidden", "6"]) == 2
    assert "--hidden must be a multiple of 4, got 6" in capsys.readouterr().err
