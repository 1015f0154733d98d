"""The examples do what they say."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import titans_lm

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stream():
    return example("stream")


def test_a_stream_read_online_is_the_stream_nats_at_once(stream):
    torch.manual_seed(0)
    x = stream.make_series(hours=300)
    model = stream.Forecaster(7)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        at_once = (model(x[None, :-1])[0][0] - x[1:]).square().mean(-1)
    online = stream.read_online(model, x)
    assert torch.allclose(online, at_once, rtol=1e-3)
    assert not torch.allclose(stream.read_online(model, x, forget=24)[30:], at_once[30:], rtol=1e-3)


def test_the_example_trains_and_reads_a_table(stream, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.csv"
    rows = [f"2020-01-01 {i},{i % 24},{i % 7}" for i in range(2700)]
    table.write_text("date,a,b\n" + "\n".join(rows))
    monkeypatch.setattr(sys, "argv", ["stream.py", "--csv", str(table), "--steps", "2"])
    stream.main()
    assert capsys.readouterr().out.count("mean squared error") == 5
    table.write_text("date,a\n2020,x")
    with pytest.raises(ValueError, match="is not a table"):
        stream.read_csv(table)


@pytest.mark.usefixtures("unchecked")
def test_the_lines_that_are_new_in_a_log_are_found(folder, tmp_path, monkeypatch, capsys):
    log = tmp_path / "labelled.log"
    lines = [f"- unit {n} is up" for n in range(30)]
    lines[20] = "FATAL machine check, processor halted"
    log.write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["new_in_a_log.py", str(log), "--model", str(folder)])
    module = example("new_in_a_log")
    module.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["alerts"], found["of_lines"]) == (1, 30)
    assert found["new_template"] == {"lines": 2, "precision": 0.5, "recall": 1.0}
    assert found["model_as_many_as_the_rule"]["lines"] == 2
    bits = module.bits_per_byte(str(folder), module.labelled_lines(log))
    assert (bits > 0).all()
    assert module.highest(np.array([1.0, 3.0, 2.0]), 2).tolist() == [False, True, True]


def test_the_layer_learns_to_recall_and_an_lstm_is_trained_beside_it(monkeypatch, capsys):
    layer = example("layer")
    batch = layer.make_batch(3, 4, torch.Generator().manual_seed(0))
    first, again = batch.x[:, :8].unflatten(1, (4, 2)), batch.x[:, 8:].unflatten(1, (4, 2))
    for row in range(3):  # the same pairs, key and value together
        assert {tuple(pair) for pair in first[row].flatten(1).tolist()} == {
            tuple(pair) for pair in again[row].flatten(1).tolist()
        }
    assert torch.equal(batch.targets[batch.asked], again[:, :, 1].flatten(0, 1))
    torch.manual_seed(0)
    model = layer.Recall(titans_lm.NeuralMemory(64, num_heads=2, chunk_size=2, lr=1.0))
    test = layer.make_batch(64, 2, torch.Generator().manual_seed(1))
    before = layer.accuracy(model, test)
    layer.train(model, steps=15, pairs=2)
    assert layer.accuracy(model, test) > before + 0.05
    monkeypatch.setattr(sys, "argv", ["layer.py", "--steps", "1", "--pairs", "2"])
    layer.main()
    assert capsys.readouterr().out.count("right: 0.") == 2


@pytest.mark.usefixtures("unchecked")
def test_fine_tuning_lowers_the_bits_of_what_was_held_out(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(60)))
    options = [str(text), "--steps", "4", "--carried", "2", "--output", str(tmp_path / "tuned")]
    finetune = example("finetune")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    finetune.main()
    before, after = map(float, re.findall(r"([\d.]+)(?: bits per token)? (?:before|after)", capsys.readouterr().out))
    assert after < before
    model, _ = titans_lm.load(tmp_path / "tuned")
    original, _ = titans_lm.load("streams")
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True)]
    assert all(changed)
    text.write_text("too short")
    sys.argv[-1] = str(tmp_path / "other")
    with pytest.raises(SystemExit):
        finetune.main()
    assert "at least 513 tokens" in capsys.readouterr().err


@pytest.mark.usefixtures("unchecked")
def test_a_memory_is_asked_by_a_later_process(tmp_path, monkeypatch, capsys):
    text, memory = tmp_path / "text.txt", tmp_path / "text.memory"
    text.write_text("".join(f"door {n} is locked; " for n in range(40)))
    ask = example("ask")

    def said(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["ask.py", *map(str, arguments)])
        ask.main()
        return capsys.readouterr().out

    assert f"{len(text.read_text())} tokens read" in said("learn", memory, text)
    written = memory.read_bytes()
    assert said("ask", memory, "door 40 is").startswith("door 40 is")
    known, unknown = map(float, re.findall(r"([\d.]+) with", said("compare", memory, text)))
    assert known < 0.9 * unknown
    assert memory.read_bytes() == written


def test_the_example_forecasts_a_table(tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.csv"
    rows = [f"2020-01-{1 + i // 24:02} {i % 24:02}:00,{i % 24},{(i % 24) ** 2}" for i in range(400)]
    table.write_text("date,a,b\n" + "\n".join(rows))
    flags = ["--horizon", "4", "--look-back", "24", "--epochs", "1", "--output", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["forecast.py", str(table), *flags])
    example("forecast").main()
    out = capsys.readouterr().out.splitlines()
    assert out[-5] == "step\ta\tb"
    assert [line.split("\t")[0] for line in out[-4:]] == ["1", "2", "3", "4"]
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["finetune", "graft", "classify", "forecast"])
def test_no_example_trains_over_a_folder_that_is_there(name, tmp_path, monkeypatch, capsys):
    needed = {"finetune": ["text.txt"], "graft": ["base", "text.txt"], "forecast": ["table.csv"]}
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *needed.get(name, []), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as status:
        example(name).main()
    assert status.value.code == 2
    assert f"--output {tmp_path} is there already" in capsys.readouterr().err


@pytest.mark.usefixtures("unchecked")
def test_the_example_classifies(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["classify.py", "--steps", "1", "--length", "16", "--output", str(folder)])
    example("classify").main()
    assert re.search(r"accuracy 0\.\d+, MCC -?0\.\d+; ", capsys.readouterr().out)
    assert titans_lm.TitansForSequenceClassification.from_pretrained(folder).config.num_labels == 2
