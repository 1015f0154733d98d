"""Command lines that cannot be obeyed: each ends with status 2 and one line that says why, before any work begins; no
file is made and none is changed."""

import shlex

import pytest
import yaml

from titans_lm.cli import main

MODEL = {
    "variant": "mag", "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "window_size": 8, "num_persistent_tokens": 2, "memory_head_dim": 16, "memory_dim": 16,
}  # fmt: skip
TEXTS = {"files": ["texts"], "sequence_length": 32}
TASK = {"task": {"name": "mqar", "length": 32, "pairs": 2}}
TRAINING = {"max_steps": 1, "batch_size": 2}

TRAIN = """
run model.hidden_size=abc | model.hidden_size must be a whole number, got 'abc'
size model.hidden_size=abc | model.hidden_size must be a whole number, got 'abc'
mamba model.hidden_size=abc | model.hidden_size must be a whole number, got 'abc'
mamba model.vocab_size=abc | model.vocab_size must be a whole number
mamba model.hidden_size=0 | hidden_size must be at least 1, got 0
mamba model.hidden_size=65 | hidden_size
mamba model.parameters=.nan | model.parameters must be a number, got nan
size model.parameters=abc | model.parameters must be a number, got 'abc'
size model.parameters=[1] | model.parameters must be a number, got [1]
size model.parameters=0 | model.parameters must be a finite number of at least 1, got 0
size model.parameters=.inf | model.parameters must be a finite number
size model.parameters=1e3 | no MLP brings this model to 1,000 parameters
run model.memory_lr=abc | model.memory_lr must be a number, got 'abc'
run model.memory_lr=2e0 | memory_lr must be in (0, 1], got 2.0
run model.memory_lr=.nan | model.memory_lr must be a number, got nan
run model.memory_alpha_bias=.inf | model.memory_alpha_bias must be a finite number
run model.rope_theta=.inf | model.rope_theta must be a finite number
run model.surprise_threshold=.nan | model.surprise_threshold must be a number, got nan
run model.memory_dim=abc | model.memory_dim must be a whole number
run model.memory_layers=1.5 | model.memory_layers must be a whole number, got 1.5
run model.hidden_size=1e2 | model.hidden_size must be a whole number, got 100.0
run model.hidden_size=null | model.hidden_size must be a whole number, got None
run "model.hidden_size={a: 1}" | model.hidden_size must be a whole number
run model.hidden_dim=abc | model.hidden_dim must be a whole number
run model.hidden_size=10000000 | its weights take
run model.hidden_size=1000000000000000000000 | its weights take
run model.vocab_size=100000000000 | its weights take
run model.vocab_size=100 | model.vocab_size=100 is below the tokenizer's 259
run model.num_attention_heads=0 | num_attention_heads must be at least 1
run model.variant=3 | variant
run model.size=[1] | model.size=[1] is not one of tiny
run "model.size={a: 1}" | model.size={'a': 1} is not one of tiny
run model.baseline=[1] | baseline [1] is not one of
run model.window_size=null | window_size must be a number for variant 'mag'
run model.eos_token_id=abc | eos_token_id
run model.bos_token_id=-1 | model.bos_token_id=-1 is not the tokenizer's, 257
run model.gate=abc | gate
run model.3=4 | unknown key '3' in model
run model.=4 | must be section.key=value
run =4 | must be section.key=value
run model | must be section.key=value
run "model.hidden_size=[" | the value is not YAML
run "model.hidden_size=!!python/name:os.system" | the value is not YAML
run model.hidden_size=2001-99-99 | the value is not YAML
word model.size=tiny | model must be a section of keys and values, got 'tiny'
run data=3 | must be section.key=value
run data.files=null | data.files must be a list of texts
run data.files=[1] | data.files must be a list of texts
run data.files=[] | give one of data.files, data.dataset, data.task and data.sources
run data.files=[empty.txt,texts/0.txt] | empty.txt is empty
run data.files=[texts/0.txt,binary.bin] | binary.bin is not text
run data.suffixes=[] | has no file that ends in
run data.suffixes=5 | data.suffixes must be a list of texts
run data.text_column=words | data.text_column='words' has an effect only with data.dataset
run data.shortest=8 | data.shortest=8 is for data.task
task data.suffixes=[.py] | data.suffixes=['.py'] has an effect only with data.files
run data.held_out=-1 | data.held_out must be at least 0
run data.sequence_length=1 | data.sequence_length must be at least 2
run data.sequence_length=100000000000000000000000000 | fewer than one block
run data.tokenizer=5 | data.tokenizer must be a text
run data.tokenizer=/dev/null | tokenizer '/dev/null' cannot be loaded
run data.dataset=json | give one of data.files, data.dataset, data.task and data.sources
task data.task=mqar | data.task must be keys and values
task "data.task={name: [1]}" | task '[1]' is not one of
task "data.task={name: mqar, length: 1e3}" | length must be a whole number of at least 16, got 1000.0
task "data.task={name: mqar, pairs: .nan}" | pairs must be a whole number of at least 1, got nan
task "data.task={name: parity, length: 100000000000000000000}" | length must be at most
task "data.task={name: mixed, length: 64, tasks: 5}" | an option has a value of the wrong type
task "data.task={name: babilong, babi: 5, task: 5}" | data.task: task babilong
task data.shortest=1000 | data.shortest must be from 1 to the task's length=32
run training.output_dir=null | training.output_dir must be a text
run training.output_dir=/dev/null | training.output_dir=/dev/null is not empty
run training.output_dir=/dev/null/x | Not a directory
run training.output_dir=texts | training.output_dir=texts is not empty
run training.max_steps=1e3 | training.max_steps must be a whole number, got 1000.0
run training.max_minutes=.nan | training.max_minutes must be a number, got nan
run training.max_minutes=.inf | training.max_minutes must be a finite number
run training.learning_rate=nan | training.learning_rate must be a number, got 'nan'
run training.learning_rate=inf | training.learning_rate must be a finite number
run training.learning_rate=1e400 | training.learning_rate must be a finite number
run training.weight_decay=.nan | training.weight_decay must be a number, got nan
run training.weight_decay=.inf | training.weight_decay must be a finite number
run training.warmup=2 | training.warmup must be in [0, 1]
run training.seed=-1 | training.seed must be from 0 to 2**32 - 1
run training.seed=4294967296 | training.seed must be from 0 to 2**32 - 1
run training.batch_size=100000 | too few for 100000 rows
run training.tbptt_steps=null | training.tbptt_steps must be a whole number, or a list of them
task training.tbptt_steps=3 | training.tbptt_steps above 1 needs data.files
run training.resume=yes | out has no checkpoint to resume from
run training.resume=maybe | training.resume must be true or false
"""
"""`titans train FILE.yaml --set CHANGE`, and words of what it says."""

OTHERS = """
train nope.yaml | nope.yaml does not exist
train texts | texts does not exist or is not a file
train texts/0.txt | must have the sections model, data and training
train deep.yaml | is not YAML: it is nested too deeply
train run.yaml --sett x | unrecognized arguments
evaluate | the following arguments are required
evaluate nope | invalid choice
evaluate needle --model nope | nope is not a model
evaluate needle --model needle --kind nope | kind='nope' is not one of
evaluate needle --model needle --kind passkey passkey | --kind has a value twice
evaluate needle --model needle --lengths -5 | length
evaluate needle --model needle --lengths 100000000000000000000000 | length must be at most
evaluate needle --model needle --depths 0 | --depths must be at least 1
evaluate needle --model needle --seed -1 | --seed must be at least 0
evaluate needle --model needle --digits 400 | digits must be at most 18
evaluate needle --model needle --haystack empty.txt | empty.txt
evaluate needle --model needle --out texts | --out texts is not a file
evaluate needle --model needle --out x.png | is the name of the picture
evaluate needle --model needle --out nope/x.jsonl | the folder nope does not exist
evaluate needle --model needle --out texts/0.txt/x.jsonl | the folder texts/0.txt does not exist
evaluate needle --model needle --out mine.jsonl | mine.png is not a picture of this command
evaluate babilong --model needle --babi nope | nope does not exist
evaluate babilong --model needle --babi texts --samples 0 | --samples must be at least 1
evaluate babilong --model needle --babi texts --out nope/x | the folder nope does not exist
evaluate perplexity nope --model books | nope does not exist
evaluate perplexity empty.txt --model books | empty.txt is empty
evaluate perplexity binary.bin --model books | binary.bin is not text
evaluate perplexity texts/0.txt --model nope | nope is not a model
evaluate perplexity texts/0.txt --model books --tokens 1 | --tokens must be at least 2
evaluate perplexity texts/0.txt --model books --out x.png | is the name of the picture
evaluate perplexity texts/0.txt --model books --out texts/0.txt | texts/0.txt is not a result file of this command
evaluate harness --model needle --tasks nope --limit 0 | --limit must be at least 1
evaluate harness --model needle --tasks nope --metadata nope | --metadata is not JSON
evaluate harness --model needle --tasks nope --seed -1 | --seed must be from 0
evaluate harness --model needle --tasks nope --out nope/x | the folder nope does not exist
evaluate synthetic nope | invalid choice
evaluate synthetic parity --lengths 0 | length must be a whole number of at least 2
evaluate synthetic parity --samples 0 | --samples must be at least 1
evaluate synthetic parity --seed 4294967296 | training.seed must be from 0
evaluate synthetic parity --out texts | --out texts is not a file
evaluate synthetic parity --out texts/0.txt | texts/0.txt is not a result file of this command
evaluate synthetic parity --set data.task=5 | data.task must be options
evaluate synthetic parity --set model.hidden_size=abc | model.hidden_size must be a whole number
evaluate synthetic parity --set training.output_dir=x | the folder is temporary
evaluate synthetic parity --set training.seed=4 | --seed sets the seed
evaluate probes --width 3 | --width must be at least 4
evaluate probes --out texts/0.txt | texts/0.txt is not a result file of this command
evaluate probes --out mine.json | mine.png is not a picture of this command
bench | the following arguments are required
bench op --runs 0 | --runs must be at least 1
bench op --threads 1000 | --threads must be from 1
bench op --memory-limit nan | --memory-limit must be a number of GiB
bench op --memory-limit -1 | --memory-limit must be a number of GiB
bench op --tokens 0 | must be at least 1
bench op --out nope/x | the folder nope does not exist
bench op --out texts | --out texts is not a file
bench op --out texts/0.txt | texts/0.txt is not a result file of this command
bench op --out /dev/null | --out /dev/null is not a file
bench op --peers --depth 3 | --peers are measured at --depth 2
bench model --lengths 1 | --lengths must be at least 2
bench model --patience nan | --patience must be a number of seconds
bench decode --positions 0 | must be at least 1
bench write --model nope --thresholds 1 | nope is not a model
bench write --model needle --thresholds nan | --thresholds must be numbers
bench write --model needle --thresholds 1 --texts empty.txt | empty.txt is empty
bench read --piece 0 | must be at least 1
bench read --model nope | nope is not a model
bench read --model needle --variants mac | leave them out with --model
bench read --model needle --operation | leave out --model
study nope.yaml | nope.yaml does not exist
study texts/0.txt | must have the keys name
study study.yaml --processes 0 | --processes must be at least 1
study study.yaml --results nope | this folder does not exist
study study.yaml --search 3 | the study has no search section
study study.yaml --set model.parameters=8e5x | model.parameters must be a number
study study.yaml --set training.seed=5 | training.seed is set by the study
study study.yaml --set training.output_dir=x | training.output_dir is set by the study
study study.yaml --set shared.x=1 | unknown key 'shared' in shared
study models.yaml | models.a must be keys and values, got 5
study shared.yaml | shared.model must be keys and values, got 5
study name.yaml | name must be a text that names files
study dots.yaml | the name '..' cannot have a slash
study key.yaml | 5 must be section.key
study seeds.yaml | seeds must be a list of whole numbers
study figure.yaml | figure: ['x'] must be an option of the tests
study search.yaml --search 2 | search: 5 must be model.KEY
stability --output texts | --output texts is not a file
stability --output texts/0.txt | texts/0.txt is not a result file of this command
learn --minutes nan | --minutes must be above 0
"""


def rows(table):
    return [tuple(part.strip() for part in line.split(" | ")) for line in table.strip().splitlines()]


def changed_run(line):
    name, change = line.split(" ", 1)
    return f"train {name}.yaml --set {change}"


ROWS = [(changed_run(line), words) for line, words in rows(TRAIN)] + rows(OTHERS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Texts, configurations and studies, and files that are none of these."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(2):
        (tmp_path / "texts" / f"{i}.txt").write_text("some text of a line\n" * 60)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "mine.png").write_bytes(b"a photograph")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    training = {**TRAINING, "output_dir": "out"}
    study = {"shared": {"model": MODEL, "data": TASK, "training": TRAINING}, "models": {"mag": {}}}
    files = {
        "run": {"model": MODEL, "data": TEXTS, "training": training},
        "size": {"model": {"size": "tiny"}, "data": TEXTS, "training": training},
        "mamba": {"model": {"size": "tiny", "baseline": "mamba2"}, "data": TEXTS, "training": training},
        "task": {"model": MODEL, "data": TASK, "training": training},
        "word": {"model": "tiny", "data": TEXTS, "training": training},
        "study": study,
        "models": {**study, "models": {"a": 5}},
        "shared": {**study, "shared": {"model": 5}},
        "name": {**study, "name": "a/b"},
        "dots": {**study, "models": {"..": {}}},
        "key": {**study, "models": {"a": {5: 6}}},
        "seeds": {**study, "seeds": [1e30]},
        "figure": {**study, "figure": ["x"]},
        "search": {**study, "search": {5: [1, 2]}},
    }
    for name, tree in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def content(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def refused(line, words, capsys):
    """What is wrong with how a command line was refused, if anything."""
    try:
        status = main(shlex.split(line))
    except SystemExit as end:  # argparse
        status = end.code
    said = capsys.readouterr().err.strip().splitlines()
    last = said[-1] if said else ""
    if status != 2 or words not in last or not last.startswith(f"titans {line.split()[0]}") or "Traceback" in said:
        return f"{line}: {status}: {last}"
    return None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("verb", ["train", "evaluate", "bench", "study", "stability", "learn"])
def test_what_cannot_be_is_one_line(folder, capsys, verb):
    before = content(folder)
    mine = [row for row in ROWS if row[0].split()[0] == verb]
    assert mine
    wrong = [found for line, words in mine if (found := refused(line, words, capsys))]
    assert not wrong, "\n".join(wrong)
    assert content(folder) == before


def test_there_are_many_rows():
    assert len(ROWS) > 150
    assert len({line for line, _ in ROWS}) == len(ROWS)
