"""The examples do what they say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stream():
    return example("stream")


def test_a_stream_read_online_is_the_stream_read_at_once(stream):
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
