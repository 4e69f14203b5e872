"""Tokenizing by segment gives the ids of tokenizing the whole, for every kind of tokenizer."""

import ast
import inspect
import random
import textwrap
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm.engine.arg_utils import EngineArgs
from vllm.renderers import renderer_from_config
from vllm.renderers.base import BaseRenderer

from sink_vllm.server import segments as module
from sink_vllm.server.lengths import front_view
from sink_vllm.server.renderer import _wrap_tokenize_prompt
from sink_vllm.server.segments import SegmentTokenizer
from tests.support.chat_templates import CHATML, tokenizer
from tests.support.paths import MODEL

WORDS = [
    "self",
    " return",
    "  value ",
    "\n\n",
    "é",
    "İ",
    "Self",
    "<",
    "|>",
    "im_end",
    "<|im_",
    "▁a",
    "\n",
    "\r\n",
    ".\n",
    "12",
    "# a",
]


def trained(
    pre_tokenizer: Any, normalizer: Any = None, special: tuple[AddedToken, ...] = ()
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with merges, and special tokens."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.decoder = decoders.BPEDecoder()
    inner.train_from_iterator(
        ["self return value Self a▁ é i̇ < | > im end _"] * 20,
        trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"]),
    )
    built = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    plain = [
        AddedToken(name, normalized=False, special=True) for name in ("<|im_start|>", "<|im|>")
    ]
    built.add_tokens([*plain, *special])
    return built


def byte_level(pattern: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits words by ``pattern``."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _with_all_bytes(inner, pre_tokenizers.ByteLevel.alphabet())


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: no words, spaces are ▁, unknown characters are bytes."""
    inner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _with_all_bytes(inner, ["▁"], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])


def _with_all_bytes(
    inner: Tokenizer, alphabet: list[str], special: list[str] | None = None
) -> PreTrainedTokenizerFast:
    inner.train_from_iterator(
        ["self return value 12 .. # a a▁\n"] * 20,
        trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=alphabet, special_tokens=special or [], min_frequency=2
        ),
    )
    built = PreTrainedTokenizerFast(tokenizer_object=inner)
    built.add_tokens([AddedToken("<|im_start|>", normalized=False, special=True)])
    return built


LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAKERS: dict[str, Callable[[], Any]] = {
    "byte level": lambda: tokenizer(CHATML),
    "pattern of Llama 3": lambda: byte_level(LLAMA_3_PATTERN),
    "byte fallback": byte_fallback,
    "repository's model": lambda: AutoTokenizer.from_pretrained(MODEL),
    "space before the first word only": lambda: trained(
        pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "space before every segment": lambda: trained(
        pre_tokenizers.Metaspace(prepend_scheme="always"), normalizers.Prepend("▁")
    ),
    "lower case, accents": lambda: trained(
        pre_tokenizers.Whitespace(),
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.Strip()]),
    ),
    "special tokens that take spaces along, and overlap": lambda: trained(
        pre_tokenizers.Metaspace(),
        special=(
            AddedToken("<|im_start|>self", normalized=False, special=True),
            AddedToken("<mask>", normalized=False, special=True, lstrip=True, rstrip=True),
            AddedToken("value", normalized=True),
        ),
    ),
}


def texts(names: list[str], seed: int) -> list[str]:
    """Conversations that grow, branch and repeat themselves."""
    rng = random.Random(seed)
    pieces = [*WORDS, *names, *names]
    found, text = [], ""
    for _ in range(12):
        text += "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))
        found += [text, text[rng.randint(0, len(text)) :]]
    return [*found, "", *names]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_ids_are_those_of_the_whole_text(
    maker: Callable[[], Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COMPARED", 0)  # nothing may be put right behind the scenes
    monkeypatch.setattr(module, "_LONG", 3)
    plain = maker()
    names = [token.content for token in plain.added_tokens_decoder.values()]
    by_segment = SegmentTokenizer(plain)

    for text in texts(names, seed):
        assert by_segment.encode(text) == plain(text, add_special_tokens=False)["input_ids"], text


def test_only_what_is_new_is_encoded() -> None:
    plain = AutoTokenizer.from_pretrained(MODEL)
    special = plain.all_special_tokens[-1]
    history = special.join(f"message {i}" for i in range(500))
    seen: list[str] = []

    class Counting:
        is_fast = True
        added_tokens_decoder = plain.added_tokens_decoder

        def __call__(self, given: list[str], **options: Any) -> Any:
            seen.extend(given)
            return plain(given, **options)

    by_segment = SegmentTokenizer(Counting())
    for _ in range(module._COMPARED):
        by_segment.encode(history)
    seen.clear()

    ids = by_segment.encode(f"{history}{special}and one more")

    assert len(seen) == 1
    assert seen[0].endswith("and one more")
    assert ids == plain(f"{history}{special}and one more", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_cuts_between_lines(maker: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken where they are safe, and nowhere else."""
    monkeypatch.setattr(module, "_COMPARED", 0)
    plain = maker()
    by_segment = SegmentTokenizer(plain)
    text = "\n".join(f"# line {i}" for i in range(400))

    assert by_segment.encode(text) == plain(text, add_special_tokens=False)["input_ids"]

    # The other tokenizers do not know the line feed, or take white space along.
    kinds = ("byte level", "pattern of Llama 3", "byte fallback", "repository's model")
    cut = maker in [MAKERS[kind] for kind in kinds]
    assert (len(by_segment._remembered) > 1) == cut


def test_a_token_across_lines_forbids_cutting_there() -> None:
    plain = tokenizer(CHATML)
    plain.add_tokens(["\nself"])
    text = "value\nself" * 300

    by_segment = SegmentTokenizer(plain)

    assert by_segment.encode(text) == plain(text, add_special_tokens=False)["input_ids"]
    assert len(by_segment._remembered) == 1


def test_a_line_more_costs_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template without special tokens: what is encoded does not grow with the history."""
    plain = AutoTokenizer.from_pretrained(MODEL)
    by_segment = SegmentTokenizer(plain)
    history = "".join(f"# user: {i} is not {i + 1}\n# assistant: no\n" for i in range(1000))
    for _ in range(module._COMPARED):
        by_segment.encode(history)
    seen: list[str] = []
    encode = by_segment._encode

    def watched(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return encode(texts)

    monkeypatch.setattr(by_segment, "_encode", watched)

    ids = by_segment.encode(history + "# user: and now\n")

    assert ids == plain(history + "# user: and now\n", add_special_tokens=False)["input_ids"]
    assert sum(map(len, seen)) < 2 * module._LONG


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 400)
    plain = AutoTokenizer.from_pretrained(MODEL)
    special = plain.all_special_tokens[-1]
    by_segment = SegmentTokenizer(plain)

    for i in range(100):
        text = f"first{special}{'long ' * 5 * i}{special}message {i}"
        assert by_segment.encode(text) == plain(text, add_special_tokens=False)["input_ids"]

    assert by_segment._remembered.currsize <= 400


def test_a_tokenizer_that_looks_across_special_tokens_is_found_out() -> None:
    plain = AutoTokenizer.from_pretrained(MODEL)
    special = plain.all_special_tokens[-1]

    class Wide:
        """Its last id counts the characters of the whole text."""

        is_fast = True
        added_tokens_decoder = plain.added_tokens_decoder

        def __call__(self, given: list[str], **options: Any) -> Any:
            ids = plain(given, **options)["input_ids"]
            return {"input_ids": [[*one, len(text)] for one, text in zip(ids, given, strict=True)]}

    by_segment = SegmentTokenizer(Wide())
    text = f"a{special}b{special}c"

    for _ in range(3):
        assert by_segment.encode(text) == Wide()([text], add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    ("kind", "why"),
    [("slow", "fast"), ("words", "words around"), ("none", "no special tokens")],
)
def test_tokenizers_without_separators(kind: str, why: str) -> None:
    word = AddedToken("<w>", normalized=False, special=True, single_word=True)
    tokens = {"slow": {}, "words": {7: word}, "none": {}}[kind]
    plain: Any = SimpleNamespace(is_fast=kind != "slow", added_tokens_decoder=tokens)

    with pytest.raises(ValueError, match=why):
        SegmentTokenizer(plain)


@pytest.mark.parametrize("policy", ["sink", "full"])
def test_the_renderer_of_a_server(policy: str) -> None:
    """Long chat prompts by segment under the policy; everything else is vLLM's."""
    options = {"kv_policy": policy} | ({"sink_window": 188} if policy == "sink" else {})
    config = EngineArgs(model=str(MODEL), block_size=32, additional_config=options)
    renderer = renderer_from_config(front_view(config.create_engine_config()))
    plain = renderer.get_tokenizer()
    special = plain.all_special_tokens[-1]
    chat, completion = renderer.default_chat_tok_params, renderer.default_cmpl_tok_params
    text = special.join(f"message {i}" for i in range(400))

    # What front ends ask for: the lengths that the policy shows them, or what a client cuts off.
    assert chat.get_encode_kwargs()["truncation"]
    for params in (chat, completion):
        if policy == "full":  # this text is longer than the model's context
            params = replace(params, max_total_tokens=None)
        prompt = renderer._tokenize_prompt({"prompt": text}, params)
        expected = plain(text, add_special_tokens=params.add_special_tokens)["input_ids"]
        assert prompt["prompt_token_ids"] == expected
        assert prompt["prompt"] == text
    cut = renderer._tokenize_prompt({"prompt": text}, replace(chat, truncate_prompt_tokens=7))
    assert len(cut["prompt_token_ids"]) == 7
    _, by_segment = getattr(renderer, "_sink_vllm_segments", (None, None))
    assert (by_segment is not None) == (policy == "sink")
    if by_segment is not None:
        assert len(by_segment._remembered) == 400
    renderer.shutdown()


def test_guard_the_renderer_calls_what_is_wrapped() -> None:
    """Both ways of rendering end in ``_tokenize_prompt(prompt, params)``, bound at construction."""
    assert list(inspect.signature(BaseRenderer._tokenize_prompt).parameters) == [
        "self",
        "prompt",
        "params",
    ]
    assert inspect.signature(_wrap_tokenize_prompt(lambda *_: None)).parameters.keys() == (
        inspect.signature(BaseRenderer._tokenize_prompt).parameters.keys()
    )
    init = textwrap.dedent(inspect.getsource(BaseRenderer.__init__))
    assert "make_async(\n        self._tokenize_prompt" in init
    tree = ast.parse(textwrap.dedent(inspect.getsource(BaseRenderer._tokenize_prompt)))
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert called == {
        "get_tokenizer",
        "_wants_offsets",
        "get_encode_kwargs",
        "_build_tokens_prompt",
    }
