"""What is assumed of libraries holds: each test of an assumption says where students rely on it. A student that differs
from its teacher is refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from students import RouterSpec, StudentSpec, elasticize, libraries, selfcheck
from students.families import language
from students.kernels import capture
from students.libraries import CACHE_NAMES, cache_of, one_sequence_a_row, with_cache
from tests.pico.language import TINY, make_tiny, make_tokenizer

ROOT = Path(__file__).parents[2]
DROPS = StudentSpec((RouterSpec("layer", kv="drop"),))


@pytest.fixture(autouse=True)
def first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which architectures have been checked, so that every test runs the self-check."""
    monkeypatch.setattr(selfcheck, "_passed", set())


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_takes_a_cache_by_a_known_name(name: str) -> None:
    model = make_tiny(name)
    assert libraries.cache_name(model) == libraries.cache_name(model.base_model)


def test_a_cache_is_handed_on_under_one_name() -> None:
    model = make_tiny("llama")
    name = libraries.cache_name(model)
    kwargs = libraries.with_cache(model, {**dict.fromkeys(CACHE_NAMES), "use_cache": True}, "a cache")
    assert kwargs == {"use_cache": True, name: "a cache"}
    assert libraries.cache_in(kwargs) == "a cache"
    assert libraries.with_cache(model, kwargs, None) == {"use_cache": True}


@torch.no_grad()
def test_decoding_is_handed_over_with_all_that_is_prepared() -> None:
    """For recording/decoding.py: `custom_generate` gets prepared arguments, `_prefill` exists, a cache is returned."""
    seen: list[Any] = []

    def decode(model: Any, input_ids: Any, logits_processor: Any, generation_config: Any, words_to: Any, **rest: Any):
        prompt = model._prefill(
            input_ids, generation_config, {k: v for k, v in rest.items() if k != "stopping_criteria"}
        )
        seen.extend([type(cache_of(prompt)), words_to, generation_config.max_length, callable(logits_processor)])
        return input_ids

    ids = torch.ones(1, 2, dtype=torch.long)
    make_tiny("llama").generate(ids, custom_generate=decode, words_to=1, max_new_tokens=3)
    assert seen == [DynamicCache, 1, 5, True]


def test_caches_are_lists_of_layers_with_known_methods() -> None:
    """For execution/kv_cache.py (DroppedLayer)."""
    layer = DynamicCache(config=make_tiny("llama").config).layers[0]
    calls = {
        "lazy_initialization": ("key_states", "value_states"),
        "update": ("key_states", "value_states"),
        "get_mask_sizes": ("query_length",),
        "get_seq_length": (),
        "crop": ("tokens_to_remove",),
        "reset": (),
        "reorder_cache": ("beam_idx",),
        "batch_repeat_interleave": ("repeats",),
        "batch_select_indices": ("indices",),
    }
    assert type(layer) is DynamicLayer
    assert {
        *calls,
        "get_max_length",
        "offload",
        "prefetch",
        "early_initialization",
    } >= CacheLayerMixin.__abstractmethods__
    for call, names in calls.items():
        assert set(names) <= set(inspect.signature(getattr(layer, call)).parameters)


@torch.no_grad()
def test_a_mask_has_the_length_that_the_first_layer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """For execution/kv_cache.py (DroppedLayer.get_mask_sizes)."""
    model, asked = make_tiny("llama"), []
    cache = DynamicCache(config=model.config)
    sizes = cache.layers[0].get_mask_sizes
    monkeypatch.setattr(cache.layers[0], "get_mask_sizes", lambda length: asked.append(length) or sizes(length))
    mask = torch.tensor([[0, 1, 1]])
    model(torch.zeros_like(mask), attention_mask=mask, **with_cache(model, {}, cache))
    assert asked == [3]


@torch.no_grad()
def test_packed_rows_are_looked_for_in_one_place() -> None:
    """For libraries.py (one_sequence_a_row)."""
    tokens = torch.zeros(1, 3, dtype=torch.long, device="meta")  # reading values of which raises an error
    with one_sequence_a_row():
        assert make_tiny("llama").to("meta").model(tokens, use_cache=False).last_hidden_state.shape == (1, 3, 32)


@torch.no_grad()
def test_attention_is_found_by_name_and_gets_further_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    """For execution/attention.py (route_attention)."""
    model, seen = make_tiny("llama"), []

    def attend(module: nn.Module, query: Tensor, key: Tensor, *given: Any, routed: Any = None, **rest: Any) -> Any:
        seen.append((routed, query.shape, key.shape))
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(module, query, key, *given, **rest)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "elastic_test", attend)
    model.config._attn_implementation = "elastic_test"
    model(torch.zeros(1, 3, dtype=torch.long), routed="further")
    assert seen == [("further", (1, 4, 3, 8), (1, 2, 3, 8))] * 3
    assert callable(inspect.getmodule(type(model)).eager_attention_forward)


@torch.no_grad()
def test_blocks_and_branches_are_called_as_ever() -> None:
    """For execution (RoutedBranch, BlockGather): blocks take hidden states as the first argument and return them;
    attention takes arguments by keyword, an MLP its input by position."""
    model, calls, hidden = make_tiny("llama", num_hidden_layers=1), {}, []
    block = model.model.layers[0]

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[type(module)] = len(args), set(kwargs)

    for branch in (block.self_attn, block.mlp):
        branch.register_forward_pre_hook(note, with_kwargs=True)
    block.register_forward_hook(lambda module, args, out: hidden.append((len(args), type(out))))
    model(torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    asked = {"position_embeddings", "attention_mask", libraries.cache_name(block)}
    assert asked <= calls[type(block.self_attn)][1]
    assert calls[type(block.mlp)] == (1, set()) and hidden == [(1, Tensor)]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA")
def test_workspaces_of_cublas_can_be_freed() -> None:
    """For kernels/capture.py (_own_workspace): the private function that frees them is there."""
    assert callable(torch._C._cuda_clearCublasWorkspaces)


def test_nothing_is_recorded_where_workspaces_cannot_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that function graphs would share a workspace, which torch frees too early: one warning, and no graph."""
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces", raising=False)

    def record(work: Callable[[], Any]) -> Callable[[], Any]:
        with capture._own_workspace():
            return work

    kept = capture.Recordings[None]("decoding without recorded steps")
    with pytest.warns(UserWarning, match=r"recording failed \(torch .* cuBLAS workspaces of their own\)"):
        assert kept.take("key", record, lambda: (None, list)) == (None, None)


def test_self_check_finds_a_cache_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check fails where a cache is ignored, as transformers 5.24 silently did with the argument's old name."""
    monkeypatch.setattr(language, "with_cache", lambda module, kwargs, cache: dict(kwargs))
    for _ in range(2):  # what has failed is checked again
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM cannot be routed with torch .*, transformers .*"
        ) as error:
            elasticize(make_tiny("llama"), DROPS)
        assert "\n" not in str(error.value)


def test_self_check_finds_decoding_without_a_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check fails where a library silently loses the student's cache between two calls."""
    fresh = language.LanguageStudent._cache_for
    without = lambda self, kwargs: fresh(self, {"use_cache": kwargs.get("use_cache")})  # noqa: E731
    monkeypatch.setattr(language.LanguageStudent, "_cache_for", without)
    with pytest.raises(ValueError, match="decoding from the student's own cache differs from the frozen model by"):
        elasticize(make_tiny("llama"), StudentSpec((RouterSpec("head"),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_takes_no_rounding_for_a_fault(dtype: torch.dtype) -> None:
    """The self-check passes for deep models with small random weights, whose close logits suffer most from rounding."""
    kind, settings = TINY["llama"]
    config = getattr(transformers, kind)(**{**settings, "num_hidden_layers": 24, "vocab_size": 2000})
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        elasticize(model, StudentSpec((RouterSpec("channel"), RouterSpec("vocab", rank=8))))


def test_self_check_finds_another_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    from students.execution import branch

    forward = branch.RoutedBranch.forward

    def off(self: branch.RoutedBranch, *args: object, **kwargs: object) -> object:
        out = forward(self, *args, **kwargs)
        return out * 1.001 if isinstance(out, Tensor) else (out[0] * 1.001, *out[1:])

    monkeypatch.setattr(branch.RoutedBranch, "forward", off)
    for name in ("llama", "gpt2"):
        with pytest.raises(ValueError, match="the student as its teacher differs from the frozen model by"):
            elasticize(make_tiny(name), StudentSpec((RouterSpec("token"),)))


def test_self_check_lets_libraries_of_gpus_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, products and attention may differ by rounding with the strides of what is multiplied."""
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, *rest: Any, **more: Any) -> Tensor:
        moved = query.new_tensor(1e-5 if calls else 0.0)
        return plain(query, *rest, **more) + moved

    calls: list[int] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    compare = selfcheck.SelfCheck.compare
    monkeypatch.setattr(selfcheck.SelfCheck, "compare", lambda *args: (calls.append(1), compare(*args)))
    with pytest.raises(ValueError, match="the student as its teacher differs"):
        elasticize(make_tiny("llama"), DROPS)
    calls.clear()
    monkeypatch.setattr(selfcheck.devices, "runs_ahead", lambda device: True)
    elasticize(make_tiny("llama"), DROPS)
    assert calls == [1]


def test_self_check_is_switched_off_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "untested", list)
    compared = []
    monkeypatch.setattr(selfcheck.SelfCheck, "compare", lambda self, student: compared.append(student))
    for _ in range(2):
        elasticize(make_tiny("llama"), DROPS)
    assert len(compared) == 1
    monkeypatch.setattr(selfcheck, "untested", lambda: ["torch"])
    elasticize(make_tiny("llama"), DROPS)
    assert len(compared) == 2
    monkeypatch.setenv(selfcheck.SWITCH, "off")
    elasticize(make_tiny("llama"), DROPS)
    assert len(compared) == 2


def test_self_check_says_that_weights_are_damaged() -> None:
    model = make_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="itself answers NaN to a few tokens"):
        elasticize(model, DROPS)
    model = make_tiny("mistral")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match="answers a few tokens with one and the same number"):
        elasticize(model, DROPS)
    model = make_tiny("deepseek_v3", num_experts_per_tok=100)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM itself cannot read a few tokens: RuntimeError: "):
        selfcheck.SelfCheck(model, model, selfcheck.some_tokens(model), language=True)
    with pytest.raises(ValueError, match="has no blocks: there is nothing to route"):
        elasticize(make_tiny("llama", num_hidden_layers=0), DROPS)


def test_chats_can_be_written() -> None:
    """transformers refuses to with a jinja2 before 3.1.6, which nothing else asks for: all questions were left out."""
    tokenizer = make_tokenizer(template="{{ messages[0]['content'] }}")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False) == "w1 w2"


def requirements() -> dict[str, Requirement]:
    """Return the dependencies in pyproject.toml, by name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S).group(1)
    found = [Requirement(line) for line in re.findall(r'^ *"([^"]+)"', block, re.M)]
    return {each.name: each for each in found}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "tests" / "constraints" / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    return {package: Version(version) for package, version in pairs}


def test_lowest_and_newest_are_the_ends_of_what_pyproject_allows() -> None:
    lowest, newest = pins("lowest.txt"), pins("newest.txt")
    for name, each in requirements().items():
        floor = next(Version(one.version) for one in each.specifier if one.operator == ">=")
        assert lowest[name] == floor, f"tests/constraints/lowest.txt has {name} {lowest[name]}, pyproject {floor}"
    for name in selfcheck.LIBRARIES:
        assert newest[name] in requirements()[name].specifier
        assert any(one.operator == "<" for one in requirements()[name].specifier), f"{name} has no upper bound"


def test_readme_names_the_tested_range() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in selfcheck.LIBRARIES:
        low, high = pins("lowest.txt")[name], pins("newest.txt")[name]
        assert f"{name} {low} to {high}" in readme, f"README does not say {name} {low} to {high}"


def test_installed_versions_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [str(each) for each in requirements().values()]
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    assert selfcheck.untested() == []
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == "transformers" else "2.14.1")
    assert "transformers" in selfcheck.untested()


def test_generation_and_scoring_warn_of_nothing(
    recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """No warning is raised, and transformers' logger is silent, for example about deprecated names."""
    logger = transformers.utils.logging.get_logger("transformers")
    logger.propagate = True
    try:
        student = elasticize(make_tiny("llama"), DROPS)
        ids = torch.arange(3, 11)[None]
        student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
        student(ids)
    finally:
        logger.propagate = False
    assert [str(each.message) for each in recwarn] == []
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []
