"""Generating on the device from caches that do not move: a step as a CUDA graph, compiled, and caches sent away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from lizardzoo.testing.conformance.case import greedy
from tests.adapters.students import LAYERS, distance, past, student, tokens

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
STEPS = 12


@torch.no_grad()
def stepped(model: Any, ids: torch.Tensor, as_graph: bool) -> torch.Tensor:
    """Logits of the last tokens, read one by one behind the others; the graph is captured once and replayed."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)
    start = ids.shape[1] - STEPS
    model(ids[:, :start], **past(cache))
    token, out = ids[:, start : start + 1].clone(), {}

    def step() -> None:
        out["logits"] = model(token, **past(cache)).logits

    run: Any = step
    if as_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    found = []
    for t in range(start, ids.shape[1]):
        token.copy_(ids[:, t : t + 1])
        run()
        found.append(out["logits"].clone())
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("beyond", [False, True], ids=["", "beyond the positions"])
def test_a_step_replayed_from_a_graph_is_the_step(tiny_llama: Any, name: str, dtype: torch.dtype, beyond: bool) -> None:
    """Also where kept tokens are turned: told that its teacher knew 24 positions, it turns them from there on."""
    model = student(tiny_llama.to(dtype), LAYERS[name]).cuda()
    if beyond:
        model.config.max_position_embeddings = 24
    ids = tokens(2, 40).cuda()
    eager = stepped(model, ids, as_graph=False)  # the kernels it needs are compiled here
    graph = stepped(model, ids, as_graph=True)
    assert distance(graph.float(), eager.float()) <= TOLERANCE[dtype]
    with torch.no_grad():
        full = model(ids, use_cache=False).logits[:, -STEPS:]
    assert distance(graph.float(), full.float()) <= 2 * TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # its advice, which is not what is tested
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # inductor's own first graph, made to have a memory pool
@pytest.mark.parametrize("name", ["hybrid", "mixed"])
def test_generate_compiles_a_static_cache_and_gives_the_same_tokens(tiny_llama: Any, name: str) -> None:
    """On CUDA, `generate` compiles the steps with inductor and CUDA graphs by itself."""
    model, ids = student(tiny_llama, LAYERS[name]).cuda(), tokens(2, 30).cuda()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = greedy(model, ids, 12, attention_mask=mask)
    torch._dynamo.reset()
    assert torch.equal(greedy(model, ids, 12, attention_mask=mask, cache_implementation="static"), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["hybrid", "mixed", "mixed windows", "softmax"])
def test_an_offloaded_cache_gives_the_same_tokens(tiny_llama: Any, name: str) -> None:
    model, ids = student(tiny_llama, LAYERS[name]).cuda(), tokens(2, 30).cuda()
    expected = greedy(model, ids, 12)
    assert torch.equal(greedy(model, ids, 12, cache_implementation="offloaded"), expected)
