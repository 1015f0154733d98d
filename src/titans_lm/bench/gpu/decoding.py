"""Decoding a token by a CUDA graph: a model's step, captured once and replayed, against the same step run eagerly."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titans_lm.bench import lm
from titans_lm.bench.measure import Action, Contender, Setting
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM

WARM_UPS = 3
CHECKED = 8
"""Tokens by which graph and eager steps are compared."""
TOLERANCE = 1e-2


class StaticStep:
    """A step of one token from buffers into the same buffers: the token, the state, the logits. Captured where there
    is a GPU and `graph`; else run as it is."""

    def __init__(self, model: TitansForCausalLM, state: TitansState, setting: Setting, *, graph: bool):
        self.model, self.state, self.setting = model, state.clone(), setting
        self.token = torch.zeros(state.batch_size, 1, dtype=torch.long, device=setting.device)
        self.logits = torch.zeros(0)
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph and setting.device == "cuda":
            self._capture()

    def _capture(self) -> None:
        before = [x.clone() for x in _tensors(self.state)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph
        for x, value in zip(_tensors(self.state), before, strict=True):
            x.copy_(value)

    @torch.no_grad()
    def _step(self) -> None:
        after = self.state.shallow_copy()
        with self.setting.autocast():
            self.logits = self.model(self.token, past_key_values=after, logits_to_keep=1).logits
        fresh = [x.clone() for x in _tensors(after)]  # some may be the buffers themselves
        for old, new in zip(_tensors(self.state), fresh, strict=True):
            old.copy_(new)

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.logits


def _tensors(state: TitansState) -> list[Tensor]:
    """All tensors of a state, in order."""
    return [x for x in tree_leaves([tuple(state.layer_caches), state.position]) if isinstance(x, Tensor)]


def decoder(options: dict[str, Any], setting: Setting) -> Contender:
    """The action decodes `tokens` tokens at `position`. `about` has the largest difference to eager steps."""
    model: Any = lm.build(options["kind"], options["size"], setting).eval()
    state = _state(model, options["position"], setting)
    step = StaticStep(model, state, setting, graph=options["graph"])
    tokens = lm.ids(max(options["tokens"], CHECKED), model)
    about = {"difference": _difference(model, state, step, tokens[:, :CHECKED], setting)}
    about["right"] = about["difference"] <= TOLERANCE

    def run(_: Any) -> None:
        for i in range(options["tokens"]):
            step(tokens[:, i : i + 1])

    return Contender({"decode": Action(run)}, {"parameters": lm.parameters(model), **about})


@torch.no_grad()
def _state(model: Any, position: int, setting: Setting) -> TitansState:
    state: TitansState = model.initial_state(1)
    with setting.autocast():
        model(lm.ids(position, model), past_key_values=state, logits_to_keep=1)
    return state


@torch.no_grad()
def _difference(model: Any, state: TitansState, step: StaticStep, tokens: Tensor, setting: Setting) -> float:
    """The largest relative difference of logits over some tokens."""
    eager, largest = state.clone(), 0.0
    for i in range(tokens.shape[1]):
        token = tokens[:, i : i + 1]
        actual = step(token).float()
        with setting.autocast():
            expected = model(token, past_key_values=eager, logits_to_keep=1).logits.float()
        difference = float((actual - expected).norm() / expected.norm())
        largest = difference if difference != difference else max(largest, difference)
    return largest


BUILD = {"decoder": decoder}
