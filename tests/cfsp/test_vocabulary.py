"""The vocabulary as an axis: what is kept, what texts become, and what the model then computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from cfsp.errors import InputError
from cfsp.evaluation.loss import respelled_divergence
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_tokenizer import tokenizer_from_gguf
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.models.token_trees import TokenTrees, token_trees
from cfsp.pruning.prune import prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.spelling import teach_spellings
from cfsp.pruning.vocabulary import (
    VocabularyPlan,
    count_alike,
    cut_vocabulary,
    expected_counts,
    plan_vocabulary,
    script_of,
)
from cfsp.text.calibration import Calibration
from cfsp.text.respelling import respelling
from cfsp.text.tokens import TokenWindows

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b  # the sum of 12 and 30 is 42\n",
    "Stra\u00dfe, caf\u00e9, \u4f60\u597d \u4e16\u754c, \u0440\u0443\u0441\u0441\u043a\u0438\u0439, \U0001f600!",
    "  two spaces, a tab\tand\r\n\r\nlines   ",
    "1969, 3.14159, 0x1F and antidisestablishmentarianism",
]


def loaded(model: Any, tokenizer: Any) -> LoadedModel:
    return LoadedModel(model, tokenizer, ModelSource(reference="tiny", kind="folder", name="tiny"))


def of_tokenizer(tokenizer: Any) -> LoadedModel:
    """A model that has the tokenizer's size and little else."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return loaded(transformers.LlamaForCausalLM(config), tokenizer)


def counted(tokenizer: Any, texts: list[str]) -> Any:
    return count_alike([[ids(tokenizer, text) for text in texts]], len(tokenizer))


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


Trimmed = tuple[LoadedModel, LoadedModel, VocabularyPlan]


@pytest.fixture(scope="module")
def trimmed(tiny_model: Any) -> Trimmed:
    """(dense, trimmed, plan); the fox is counted, the rest is not."""
    dense = loaded(*tiny_model())
    small = loaded(*tiny_model())
    plan = plan_vocabulary(small, counted(small.tokenizer, TEXTS[:1] * 50), 300, sources=("fox",))
    return dense, cut_vocabulary(small, plan), plan


def test_counted_tokens_stay_and_compute_what_they_did(trimmed: Trimmed) -> None:
    dense, small, plan = trimmed
    assert len(plan.kept) == len(small.tokenizer) == small.model.config.vocab_size == 300
    assert set(ids(dense.tokenizer, TEXTS[0])) <= set(plan.kept)
    assert plan.growth == 1
    assert len(ids(small.tokenizer, TEXTS[1])) > len(ids(dense.tokenizer, TEXTS[1]))
    new = torch.tensor([ids(small.tokenizer, TEXTS[0])])
    old = torch.tensor(plan.kept)[new]
    assert old.tolist() == [ids(dense.tokenizer, TEXTS[0])]
    with torch.inference_mode():
        expected, actual = dense.model(old).logits, small.model(new).logits
    assert torch.allclose(expected[..., list(plan.kept)], actual, atol=1e-5)
    assert small.model.get_input_embeddings().weight is small.model.get_output_embeddings().weight

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    texts = [one.tokenizer.apply_chat_template(chat, tokenize=False) for one in (dense, small)]
    assert texts[0] == texts[1]
    for name in ("bos_token", "eos_token", "pad_token"):
        text = getattr(dense.tokenizer, name)
        assert getattr(small.tokenizer, name) == text
        index = small.tokenizer.convert_tokens_to_ids(text)
        assert getattr(small.tokenizer, f"{name}_id") == getattr(small.model.config, f"{name}_id") == index
    assert small.model.generation_config.eos_token_id == small.tokenizer.eos_token_id

    kinds = {kind.name: kind for kind in plan.by_script}
    assert sum(kind.tokens for kind in kinds.values()) == len(dense.tokenizer)
    assert sum(kind.kept for kind in kinds.values()) == len(plan.kept)
    assert sum(kind.share for kind in kinds.values()) == pytest.approx(1)
    assert kinds["special"].kept == kinds["special"].tokens == 3
    assert kinds["Latin"].tokens > 100
    with pytest.raises(InputError, match="another vocabulary"):
        cut_vocabulary(small, plan)


@given(st.text())
def test_every_text_comes_back(trimmed: Trimmed, text: str) -> None:
    dense, small, _ = trimmed
    assert small.tokenizer.decode(ids(small.tokenizer, text)) == dense.tokenizer.decode(
        ids(dense.tokenizer, text)
    )


def test_windows_are_respelled_and_cut_where_their_text_takes_more_tokens(trimmed: Trimmed) -> None:
    dense, small, _ = trimmed
    spelling = respelling(dense.tokenizer, small.tokenizer)
    windows = torch.tensor([ids(dense.tokenizer, text)[:18] for text in TEXTS[:2]])
    again = spelling.windows(windows)
    assert again.shape == windows.shape
    for before, after in zip(windows, again, strict=True):
        text = small.tokenizer.decode(after)
        assert dense.tokenizer.decode(before).startswith(text)
        assert len(text) > 8
    with pytest.raises(InputError, match="no part of the other"):
        respelling(small.tokenizer, dense.tokenizer)


def test_a_spelling_says_where_both_have_read_the_same(
    trimmed: Trimmed,
) -> None:
    dense, small, _ = trimmed
    spelling = respelling(dense.tokenizer, small.tokenizer)
    for text in TEXTS:
        before = ids(dense.tokenizer, text)
        after = spelling.spell(before)
        assert after.ids.tolist() == ids(small.tokenizer, text)
        assert int(after.ends.sum()) == len(before)
        for end in after.ends.nonzero()[:, 0].tolist():
            read = before[: int(after.owners[end]) + 1]
            assert dense.tokenizer.decode(read) == small.tokenizer.decode(after.ids[: end + 1])


def test_a_model_of_fewer_tokens_is_held_against_the_one_that_has_them_all(
    trimmed: Trimmed,
) -> None:
    dense, small, _ = trimmed
    spelling = respelling(dense.tokenizer, small.tokenizer)
    window = torch.tensor(ids(dense.tokenizer, TEXTS[1]))
    text = spelling.spell(window.tolist())
    assert not text.ends.all()
    windows = TokenWindows(window[None], "text", "")
    found = respelled_divergence(TorchLanguageModel(dense), TorchLanguageModel(small), windows, spelling)
    with torch.inference_mode():
        theirs = dense.model(window[None]).logits[0].double().log_softmax(-1)
        ours = small.model(text.ids[None]).logits[0].double().log_softmax(-1)
    begins, n = int((text.owners == 0).sum()), len(window) - 1
    nats = -float(sum(ours[i, text.ids[i + 1]] for i in range(begins - 1, len(text.ids) - 1)))
    dense_nats = -float(sum(theirs[i, t] for i, t in enumerate(window[1:])))
    assert found.perplexity == pytest.approx(math.exp(nats / n), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(dense_nats / n), rel=1e-5)
    kl, same = [], []
    for end in text.ends.nonzero()[:-1, 0].tolist():
        p = torch.zeros(len(spelling.kept), dtype=torch.float64)
        for old, parts in spelling.spellings.items():
            p[parts[0]] += theirs[text.owners[end], old].exp()
        kl.append(float((p * (p.log() - ours[end])).sum()))
        same.append(int(p.argmax()) == int(ours[end].argmax()))
    assert (len(kl), found.n_tokens) == (n, (n,))
    assert found.kl_mean == pytest.approx(sum(kl) / n, rel=1e-4)
    assert found.same_top1 == pytest.approx(sum(same) / n)


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2"])
def test_real_vocabularies(llama_cpp_vocabularies: Path, name: str) -> None:
    dense = of_tokenizer(tokenizer_from_gguf(read_gguf(llama_cpp_vocabularies / f"ggml-vocab-{name}.gguf")))
    tokenizer = dense.tokenizer
    counts = counted(tokenizer, TEXTS)
    plan = plan_vocabulary(dense, counts, len(tokenizer) // 4, sources=())
    small = cut_vocabulary(dense, plan).tokenizer
    assert len(small) == len(plan.kept) == len(tokenizer) // 4
    assert set(np.flatnonzero(counts).tolist()) <= set(plan.kept), "what the text has stays"
    for text in TEXTS:
        assert [plan.kept[index] for index in ids(small, text)] == ids(tokenizer, text)
    for text in (
        "Pneumonoultramicroscopic \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        "SELECT * FROM t WHERE x<=5;",
    ):
        assert small.decode(ids(small, text)) == tokenizer.decode(ids(tokenizer, text))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"] for token in state["added_tokens"]}
    alone = 0
    for new, old in list(enumerate(plan.kept))[:: len(plan.kept) // 500]:
        text = tokenizer.convert_ids_to_tokens(old)
        model = tokenizer.backend_tokenizer.model
        if old not in added and [token.id for token in model.tokenize(text)] == [old]:
            assert [token.id for token in small.backend_tokenizer.model.tokenize(text)] == [new], text
            alone += 1
    assert alone > 300


def test_llama_cpp_reads_a_trimmed_vocabulary_alike(
    llama_cpp_vocabularies: Path, vocabulary_file: Callable[[Path, Any], Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from exporters.gguf.writer import check_tokenizer

    file = read_gguf(llama_cpp_vocabularies / "ggml-vocab-llama-spm.gguf")
    dense = of_tokenizer(tokenizer_from_gguf(file))
    plan = plan_vocabulary(dense, counted(dense.tokenizer, TEXTS), 9000, sources=())
    small = cut_vocabulary(dense, plan).tokenizer
    assert check_tokenizer(vocabulary_file(tmp_path / "small.gguf", small), small) > 250


def test_channels_are_judged_by_the_tokens_that_stay(tiny_model: Any) -> None:
    dense = loaded(*tiny_model())
    window = ids(dense.tokenizer, " ".join(TEXTS))[:64]
    drawn = Calibration(torch.tensor([window] * 4), ("texts",), 0, "0" * 64)
    settings = PruneSettings(prune_ratio=0.25, align=1, vocabulary=320)
    result = prune_model(dense, drawn, settings)
    assert result.plan.shape.vocab_size == 320
    assert result.plan.vocabulary is not None
    assert result.plan.vocabulary.sources == ("texts",)
    assert int(result.calibration.input_ids.max()) < 320
    fresh = loaded(*tiny_model())
    again = prune_model(fresh, drawn, settings, plan=result.plan)
    for name, value in result.loaded.model.state_dict().items():
        assert torch.equal(value, again.loaded.model.state_dict()[name]), name


def test_what_text_does_not_have_is_expected_as_often_as_it_has_rare_tokens_of_its_script() -> None:
    """Of four tokens a script one of Latin's is seen once and two never; of the other script none is."""
    trees = TokenTrees(8, {}, {}, {index: index for index in range(8)})
    scripts = {index: "Latin" if index < 4 else "Bengali" for index in range(8)}
    counts = np.array([90.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    more = expected_counts(trees, counts, scripts) - counts
    assert more[:4].sum() == pytest.approx(3.0)
    assert (np.diff(more[:4]) < 0).all()
    assert 0 < more[4:].sum() < 1e-3
    short = expected_counts(trees, counts / 10, scripts) - counts / 10
    assert short.sum() == pytest.approx(2.0)
    assert (np.diff(short) < 0).all()


def test_texts_count_alike_however_long() -> None:
    short, long = [[0, 0], [1, 1]], [[2] * 8, [3] * 4]
    assert count_alike([short, long], 5).tolist() == pytest.approx([4.0, 4.0, 16 / 3, 8 / 3, 0.0])
    assert count_alike([short, [[]]], 2).tolist() == pytest.approx([1.0, 1.0])


def test_scripts() -> None:
    texts = (" the", "\u0417\u0434", "1\u4e2d", "\u306e", " 42", "!\n ", "\ufffd", "\uff21")
    scripts = (
        "Latin",
        "Cyrillic",
        "Han",
        "Hiragana",
        "digits",
        "signs and spaces",
        "parts of characters",
        "Latin",
    )
    assert tuple(map(script_of, texts)) == scripts


def test_sizes_that_cannot_be(tiny_model: Any) -> None:
    dense = loaded(*tiny_model())
    for size, message in (
        (10, "has to stay.*at least"),
        (385, "out of range.*1 to 384"),
        (-1, "out of range"),
    ):
        with pytest.raises(InputError, match=message):
            plan_vocabulary(dense, counted(dense.tokenizer, TEXTS), size, sources=())


def test_rows_that_no_token_has_are_kept_where_more_are_asked_for_than_there_are_tokens(
    tiny_model: Any,
) -> None:
    dense = loaded(*tiny_model(vocab_size=450))
    counts = count_alike([[ids(dense.tokenizer, text) for text in TEXTS]], 450)
    plan = plan_vocabulary(dense, counts, 390, sources=())
    assert plan.kept == tuple(range(390))
    before = {name: weight.clone() for name, weight in dense.model.state_dict().items()}
    teach_spellings(dense, plan, torch.zeros(0, 8, dtype=torch.int64))
    small = cut_vocabulary(dense, plan)
    assert small.tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    for name, weight in small.model.state_dict().items():
        assert torch.equal(weight, before[name][:390] if len(before[name]) == 450 else before[name]), name
    with pytest.raises(InputError, match=r"out of range.*1 to 450"):
        plan_vocabulary(loaded(*tiny_model(vocab_size=450)), counts, 451, sources=())


def test_other_kinds_of_tokenizer_are_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))
    with pytest.raises(InputError, match=r"cannot be trimmed.*WordPiece.*allowed: BPE"):
        token_trees(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
