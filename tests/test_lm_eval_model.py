"""Our class for lm-evaluation-harness gives the numbers of a plain forward pass, and of lm-eval's own class."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from test_likelihood import greedily, plainly
from titans_lm import TitansForCausalLM
from titans_lm.evaluate.likelihood import Request
from titans_lm.evaluate.lm_eval_model import TitansLM
from titans_lm.models.tokenizer import byte_tokenizer

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. "
pytestmark = pytest.mark.usefixtures("unchecked")  # shapes are checked where these parts are tested
EOS = 258  # of the byte tokenizer
PIECE = 11


@pytest.fixture(scope="module")
def model() -> TitansForCausalLM:
    model = tiny_model("mag", vocab_size=260, num_hidden_layers=1)
    model.generation_config.eos_token_id = EOS  # lm-eval's own class ends an answer where the model says that it ends
    return model


@pytest.fixture(scope="module")
def lm(model) -> TitansLM:
    return TitansLM(model, byte_tokenizer(), batch_size=3, piece=PIECE)


@pytest.fixture(scope="module")
def theirs(model) -> HFLM:
    """lm-eval's own class, which reads everything in one call without a state."""
    return HFLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=10**6, prefix_token_id=EOS, batch_size=2)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


QUESTION = TEXT * 3 + "Question:"
PAIRS = [
    (QUESTION, " yes"), ("", "a beginning"), (TEXT, "no"), (TEXT + "   ", "spaces go to what follows"), (TEXT, "yes"),
    ("naïve — ", "façade"), (QUESTION, " no"), ("a", "b"),
]  # fmt: skip


def test_log_likelihoods_are_those_of_lm_eval_s_own_class(lm, theirs):
    found = lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert len({total for total, _ in found}) == len(PAIRS)  # so an order that is wrong would be seen


def test_a_document_is_one_stream_without_windows(lm, theirs, model):
    documents = [("short",), (TEXT * 4,), ("é" * 30,)]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *documents, ("",)), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *documents), disable_tqdm=True)
    assert found == pytest.approx([*expected, 0.0], rel=1e-9)
    assert found[1] == pytest.approx(plainly(model, Request([EOS], list((TEXT * 4).encode())))[0], rel=1e-9)


def test_answers_are_those_of_generate(lm, model, theirs):
    contexts = [TEXT, "It", "naïve", "x"]
    options = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    found = lm.generate_until(instances("generate_until", *((c, options) for c in contexts)), disable_tqdm=True)
    for context, answer in zip(contexts, found, strict=True):
        ids = torch.tensor([list(context.encode())])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=256)
        assert answer == byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(found)) == len(contexts)
    stops = [next(c for c in answer[3:] if 32 < ord(c) < 127) for answer in (found[0], found[2])]
    until = {**options, "until": [*stops, "\n\n"]}
    again = [(contexts[0], options), *((c, until) for c in contexts)]
    expected = theirs.generate_until(instances("generate_until", *again), disable_tqdm=True)
    assert lm.generate_until(instances("generate_until", *again), disable_tqdm=True) == expected
    assert expected[1] == found[0][: min(found[0].index(s) for s in stops if s in found[0])]
    assert ask(lm, "", **options) == [byte_tokenizer().decode(greedily(model, [EOS], 12), skip_special_tokens=True)]


def test_an_answer_ends_at_its_strings_and_at_the_end_token_not_in_the_prompt(lm, model):
    (whole,) = ask(lm, "It was", until=[], max_gen_toks=30)
    half = "s" + whole[0]  # begins in the prompt, ends in the answer
    assert ask(lm, "It was", until=[half], max_gen_toks=30) == [whole.split(half)[0]]
    assert len(ask(lm, "It was", until=[half], max_gen_toks=30)[0]) > 1
    ids, steps = greedily(model, list(b"It was"), 30), []
    stop = next(byte for byte in ids[5:] if 32 < byte < 127)
    hook = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    assert ask(lm, "It was", until=[chr(stop)], max_gen_toks=30) == [whole.split(chr(stop))[0]]
    hook.remove()
    assert len(steps) == ids.index(stop) + 1  # and nothing is generated after it
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = chr(stop)
    alone = TitansLM(model, tokenizer, piece=PIECE)
    assert ask(alone, "It was", until=[], max_gen_toks=30) == [whole.split(chr(stop))[0]]


def test_a_special_token_ends_an_answer_only_where_a_task_names_it(model):
    ids = greedily(model, list(b"It was"), 8)
    tokenizer = byte_tokenizer()
    name = tokenizer.bos_token = tokenizer.convert_ids_to_tokens(ids[3])
    lm = TitansLM(model, tokenizer, piece=PIECE)
    assert ask(lm, "It was", until=[name], max_gen_toks=8) == [byte_tokenizer().decode(ids[: ids.index(ids[3])])]
    assert ask(lm, "It was", until=[], max_gen_toks=8) == [tokenizer.decode(ids, skip_special_tokens=True)]


def ask(lm: TitansLM, *prompts: str, **options) -> list[str]:
    return lm.generate_until(instances("generate_until", *((p, options) for p in prompts)), disable_tqdm=True)


def test_sampling_is_passed_on(lm):
    options = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 5.0}
    torch.manual_seed(0)
    first = ask(lm, "It was", **options)
    assert ask(lm, "It was", **options) != first
    torch.manual_seed(0)
    assert ask(lm, "It was", **options) == first


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Words of two letters are one token, and a beginning token comes before every text."""
    vocabulary = {"<s>": 0, "</s>": 1, " ": 2, "a": 3, "b": 4, "ab": 5, "a ": 6, " b": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), (" ", "b")]))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_tokens_at_the_border_are_those_of_the_whole():
    lm = TitansLM(tiny_model("lmm"), merging_tokenizer())
    assert merging_tokenizer().encode("ab") == [0, 5]
    assert lm.tok_encode("ab b") == [5, 7]
    assert lm._encode_pair("ab ", "b") == ([5], [7])  # the space belongs to the word after it
    pairs = [("ab ", "b"), ("", "ab"), ("  ", "ab")]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    expected = [Request([5], [7]), Request([1], [5]), Request([1], [2, 2, 5])]
    assert found == [pytest.approx(plainly(lm.model, request), rel=1e-9) for request in expected]
    with pytest.raises(ValueError, match="'b' after 'a' has no tokens of its own"):
        lm.loglikelihood(instances("loglikelihood", ("a", "b")), disable_tqdm=True)  # "ab" is one token


def test_the_prefix_is_the_end_token_of_training_unless_told_otherwise(model):
    tokenizer = byte_tokenizer()
    assert TitansLM(model, tokenizer).prefix_token_id == EOS
    assert TitansLM(model, tokenizer, prefix_token_id=7).prefix_token_id == 7
    tokenizer.eos_token = None
    assert TitansLM(model, tokenizer).prefix_token_id == 257
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="give prefix_token_id"):
        _ = TitansLM(model, tokenizer).prefix_token_id


@pytest.mark.parametrize(
    "wrong", [{"batch_size": "auto"}, {"batch_size": 0}, {"piece": 0}, {"tokenizer": None}], ids=str
)
def test_a_model_says_what_is_wrong_with_its_arguments(model, wrong):
    with pytest.raises(ValueError, match=r"at least 1|pass tokenizer"):
        TitansLM(model, **{"tokenizer": byte_tokenizer(), **wrong})


def test_the_name_that_lm_eval_s_own_command_knows(model, lm, tmp_path):
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert get_model("titans") is TitansLM
    pairs = instances("loglikelihood", *PAIRS[:3])
    arguments = f"pretrained={tmp_path},piece=7"
    made = get_model("titans").create_from_arg_string(arguments, {"batch_size": 1, "device": "cuda:0"})
    assert made.piece == 7
    if not torch.cuda.is_available():
        assert made.device == torch.device("cpu")
    found = made.loglikelihood(pairs, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx(
        [total for total, _ in lm.loglikelihood(pairs, disable_tqdm=True)], rel=1e-9
    )
