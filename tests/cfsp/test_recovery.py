"""Recovery's parts: ranks, labels, packing, losses, adapters, settings, the run's state and its work folder."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward, model_shape
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.surgery import cut_channels
from cfsp.pruning.vocabulary import count_alike, cut_vocabulary, plan_vocabulary
from cfsp.records import read_record
from cfsp.recovery.data import (
    IGNORED,
    INSIDE,
    Sequences,
    TrainingMix,
    labelled_chat,
    load_recovery_data,
    respelled,
)
from cfsp.recovery.losses import CHUNK_TOKENS, distillation_loss, head_loss, next_token_loss
from cfsp.recovery.recover import respelling_of
from cfsp.recovery.recovery_record import ValidationPoint
from cfsp.recovery.settings import RecoverySettings, check_settings, learning_rate, training_as_read
from cfsp.recovery.student import Student, Teacher, add_adapter, importance_ranks, merge_adapter
from cfsp.recovery.trainer import RunInputs, RunState, WorkFolder, learning_rate_share
from cfsp.text import self_sampling
from cfsp.text.respelling import Respelling
from cfsp.text.self_sampling import chat_frame, text_origin
from cfsp.text.tokens import encode

TinyModel = Callable[..., tuple[Any, Any]]

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And a fruit?"},
    {"role": "assistant", "content": "An apple."},
)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), st.integers(1, 64))
def test_ranks_have_the_exact_mean_and_the_order_of_importance(
    importance: list[float], mean_rank: int
) -> None:
    ranks = importance_ranks(importance, mean_rank)
    assert sum(ranks) == mean_rank * len(importance)
    assert min(ranks) >= 1
    order = sorted(range(len(ranks)), key=lambda i: importance[i])
    assert all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order) if importance[a] < importance[b])


def test_ranks_are_proportional() -> None:
    assert importance_ranks([1, 2, 5], 8) == (3, 6, 15)
    assert importance_ranks([0, 0], 3) == (3, 3)
    for importance, rank in (([], 4), ([-1.0, 1.0], 4), ([float("nan")], 4), ([1.0], 0)):
        with pytest.raises(InputError):
            importance_ranks(importance, rank)


def learnt_text(messages: Any, tokenizer: Any) -> str:
    ids, learnt = labelled_chat(messages, tokenizer)
    return str(tokenizer.decode([token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt]))


def test_labels_are_the_answers_and_the_end_of_their_turn(tiny_tokenizer: Any) -> None:
    text = tiny_tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learnt_text(CHAT, tiny_tokenizer) == "The capital of France is Paris.<|im_end|>An apple.<|im_end|>"
    assert tiny_tokenizer.decode(labelled_chat(CHAT, tiny_tokenizer)[0]) == text
    # The last answer gets an empty thought before it, as in Qwen 3; answers are trimmed, as in Llama 3.
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    spaced = [m | {"content": f"  {m['content']}\n"} for m in CHAT]
    thought = "<think>\n\n</think>\n\nAn apple.<|im_end|>"
    assert learnt_text(spaced, tokenizer) == "The capital of France is Paris.<|im_end|>" + thought
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="cannot be split"):
        labelled_chat(CHAT, tokenizer)


def write_chats(path: Path, chats: list[Any]) -> str:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return str(path)


def chat_of(index: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Say {index}."},
        {"role": "assistant", "content": " ".join(["number", str(index)] * (1 + index % 5))},
    ]


def test_packed_chats_keep_every_answer_whole(tmp_path: Path, tiny_tokenizer: Any) -> None:
    chats = [chat_of(i) for i in range(30)]
    file = write_chats(tmp_path / "c.jsonl", chats)
    settings = RecoverySettings(seqlen=128, loss="next-token")
    training, validation = load_recovery_data([file], [], tiny_tokenizer, settings)
    answers = []
    for part in (*training, *validation):
        for ids, targets in zip(part.input_ids, part.targets, strict=True):
            where = targets != IGNORED
            assert torch.equal(ids[1:][where[:-1]], targets[:-1][where[:-1]])
            assert not where[-1]
            answers += tiny_tokenizer.decode(targets[where]).split("<|im_end|>")[:-1]
    assert sorted(answers) == sorted(chat[1]["content"] for chat in chats)
    for loss, whole in (("both", False), ("distill", True)):
        training, _ = load_recovery_data([file], [], tiny_tokenizer, replace(settings, loss=loss))
        learnt = [tiny_tokenizer.decode(t[t != IGNORED]) for part in training for t in part.targets]
        assert all(("Say" in text) == whole for text in learnt)


def test_text_is_learnt_everywhere_and_sources_mix_equally(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = tmp_path / "t.txt"
    text.write_text(" ".join(f"Fox {i} jumps over dog {i * i}." for i in range(400)), encoding="utf-8")
    chats = write_chats(tmp_path / "c.jsonl", [chat_of(i) for i in range(30)])
    settings = RecoverySettings(seqlen=64, max_tokens=64 * 200, validation_windows=4)
    training, _ = load_recovery_data([str(text), chats], [], tiny_tokenizer, settings)
    assert bool((training[0].targets[:, :-1] == training[0].input_ids[:, 1:]).all())
    mix = TrainingMix(training, 200, seed=3)
    assert len(mix) == 200
    for source, part in enumerate(training):
        taken = [tuple(mix[i]["input_ids"].tolist()) for i in range(source, 200, 2)]
        rows = {tuple(row.tolist()) for row in part.input_ids}
        assert len(taken) == 100
        assert set(taken) <= rows
        assert len(set(taken[: len(rows)])) == min(len(rows), 100)
    again, other = (TrainingMix(training, 200, seed=seed) for seed in (3, 4))
    assert all(torch.equal(mix[i]["labels"], again[i]["labels"]) for i in (0, 77, 199))
    assert any(not torch.equal(mix[i]["labels"], other[i]["labels"]) for i in range(9))


def test_data_without_answers_or_too_little(tmp_path: Path, tiny_tokenizer: Any) -> None:
    question, empty = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " "}
    for chats, message in (
        ([[question]] * 3, "no chat in .* has an answer"),
        ([[question, empty]], "has an answer"),
        ([chat_of(1)], "one sequence only"),
    ):
        reference = write_chats(tmp_path / "c.jsonl", chats)
        with pytest.raises(InputError, match=message):
            load_recovery_data([reference], [], tiny_tokenizer, RecoverySettings(seqlen=128))


def test_what_the_dense_model_wrote(
    tiny_loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded("llama")
    tokenizer = loaded.tokenizer
    before, between = chat_frame(tokenizer) or ([], [])
    good, loop = (
        [*before, *encode(tokenizer, said), *between, *encode(tokenizer, answer), tokenizer.eos_token_id]
        for said, answer in (("Name a fruit.", "A pear."), ("Go on.", "the pears are ripe and " * 12))
    )
    monkeypatch.setattr(self_sampling, "FOLDER", tmp_path)
    settings = RecoverySettings(seqlen=32, self_tokens=256, max_tokens=128)

    def read(text: list[int]) -> tuple[list[Sequences], list[Sequences]]:
        self_sampling.write_written(text_origin(loaded, 0), torch.tensor(text * 20), {"model": "tiny"})
        return load_recovery_data(["self"], [], tokenizer, settings, dense=loaded)

    training, held = read(good * 3 + loop + good * 30)
    assert [part.record.n_loops for part in (*training, *held)] == [1, 0]
    learnt = torch.cat([part.input_ids.flatten() for part in (*training, *held)])
    assert torch.equal(learnt, torch.tensor(good * 30)[: len(learnt)])
    with pytest.raises(InputError, match=r"texts that tiny wrote are loops.*'self'"):
        read(good + loop * 2)
    # What validates is neither trained on nor what a release or `phoneready eval` judges with, the seed after.
    for seed in (3, 2, 1, 0):
        said = encode(tokenizer, f"Of seed {seed} it wrote that {seed} is {seed * seed}. ")
        text = torch.tensor([*said, tokenizer.eos_token_id] * 60)
        self_sampling.write_written(text_origin(loaded, seed), text, {"model": "tiny"})
    training, held = load_recovery_data(["self"], ["self"], tokenizer, settings, dense=loaded)
    texts = [tokenizer.decode(part[0].input_ids.flatten()) for part in (training, held)]
    assert ["Of seed 0" in texts[0], "Of seed 2" in texts[1]] == [True, True]
    assert not any(f"Of seed {seed}" in texts[1] for seed in (0, 1))


def test_the_gradients_of_losses_are_their_derivatives() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11, requires_grad=True)
    teacher, targets = torch.randn(5, 11), torch.randint(0, 11, (5,))
    log_p, log_q = (z.log_softmax(-1) for z in (logits, teacher))
    reference = {
        F.cross_entropy(logits, targets, reduction="sum"): next_token_loss(logits, targets),
        F.kl_div(log_p, log_q, reduction="sum", log_target=True): distillation_loss(logits, teacher),
    }
    for expected, (loss, gradient) in reference.items():
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("frozen", [True, False])
def test_the_head_in_chunks_is_the_head_in_one_piece(frozen: bool) -> None:
    torch.manual_seed(0)
    count = 2 * CHUNK_TOKENS + 7
    hidden = torch.randn(count, 8, requires_grad=True)
    weight = torch.randn(13, 8, requires_grad=not frozen)
    targets = torch.randint(0, 13, (count,))
    whole = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / count
    whole.backward()
    wanted = [hidden.grad.clone(), None if frozen else weight.grad.clone()]  # type: ignore[union-attr]
    hidden.grad = weight.grad = None
    chunked = head_loss(hidden, weight, lambda z, chunk: next_token_loss(z, targets[chunk])) / count
    chunked.backward()
    assert float(chunked) == pytest.approx(float(whole), rel=1e-5)
    torch.testing.assert_close(hidden.grad, wanted[0])
    if not frozen:
        torch.testing.assert_close(weight.grad, wanted[1])


def test_a_merged_adapter_computes_the_same_with_unchanged_modules(tiny_model: TinyModel) -> None:
    pytest.importorskip("peft", reason="the recover extra is not installed")
    model, _ = tiny_model()
    for index, layer in enumerate(decoder_layers(model)):
        cut_channels(feed_forward(model, layer), torch.arange(128 - 16 * index))
    widths, names = model_shape(model).ffn_widths, [(n, type(m)) for n, m in model.named_modules()]
    ids = torch.arange(3, 60)[None]
    before = model(ids).logits
    adapted = add_adapter(model, (1, 2, 3, 6), 2.0)
    rank_of = {n: p.shape[0] for n, p in adapted.named_parameters() if "lora_A" in n}
    assert len(rank_of) == 4 * 7
    assert all(rank == (1, 2, 3, 6)[int(name.partition("layers.")[2][0])] for name, rank in rank_of.items())
    assert all(p.requires_grad == ("lora_" in n) for n, p in adapted.named_parameters())
    scales = {m.scaling["default"] for m in adapted.modules() if hasattr(m, "lora_A")}
    assert scales == {2.0}
    torch.testing.assert_close(adapted(ids).logits, before)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    trained = adapted(ids).logits
    assert float((trained - before).abs().max()) > 0.01
    merged = merge_adapter(adapted)
    torch.testing.assert_close(merged(ids).logits, trained, atol=1e-4, rtol=1e-4)
    assert model_shape(merged).ffn_widths == widths
    assert [(n, type(m)) for n, m in merged.named_modules()] == names
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_distilling_a_model_from_itself_costs_nothing(tiny_model: TinyModel) -> None:
    model, _ = tiny_model()
    student = Student(model, "distill", torch.float32, Teacher(model))
    ids = torch.arange(4, 68).view(2, 32)
    targets = torch.full_like(ids, IGNORED)
    targets[:, 3:20] = ids[:, 4:21]
    loss = student(input_ids=ids, labels=targets)
    assert float(loss) == pytest.approx(0.0, abs=1e-4)
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    assert largest < 1e-4
    _, next_token, count = student.sums({"input_ids": ids, "labels": targets}).tolist()
    logits = model(ids).logits
    assert count == 34
    assert next_token == pytest.approx(
        float(F.cross_entropy(logits[targets != IGNORED], targets[targets != IGNORED], reduction="sum")),
        rel=1e-4,
    )


def trimmed_pair(tiny_model: TinyModel) -> tuple[LoadedModel, LoadedModel, Respelling]:
    """A dense model, one that lost all but 300 of its tokens, and how that spells."""
    dense, student = (LoadedModel(*tiny_model(), ModelSource("tiny", "folder", "tiny")) for _ in range(2))
    counts = count_alike([[dense.tokenizer("The quick brown fox.")["input_ids"]]], len(dense.tokenizer))
    student = cut_vocabulary(student, plan_vocabulary(student, counts, 300, sources=()))
    spelling = respelling_of(student, dense)
    assert spelling is not None
    return dense, student, spelling


@pytest.mark.parametrize("rows", [300, 320])
def test_a_teacher_of_more_tokens_teaches_what_the_student_can_say(tiny_model: TinyModel, rows: int) -> None:
    dense, student, spelling = trimmed_pair(tiny_model)
    student.model.resize_token_embeddings(rows, mean_resizing=False)
    text = "The quick brown fox jumps over the lazy dog; it was never seen again."
    sequences = load_sequences(text, dense, spelling)
    found = Student(student.model, "distill", torch.float32, Teacher(dense.model, spelling))
    batch = {name: ids[None] for name, ids in sequences[0].items()}
    objective, _, count = found.sums(batch).tolist()

    theirs = dense.model(sequences.teacher_ids[:1]).logits[0].double().softmax(-1)
    ours = student.model(sequences.input_ids[:1]).logits[0].double().log_softmax(-1)
    expected, inside = 0.0, 0
    for position, label in enumerate(sequences.targets[0].tolist()):
        place = int(sequences.teacher_places[0, position])
        if label == IGNORED:
            continue
        if place == INSIDE:
            inside += 1
            expected -= float(ours[position, label])
            continue
        p = torch.zeros(300, dtype=torch.float64)
        for old, parts in spelling.spellings.items():
            p[parts[0]] += theirs[place, old]
        expected += float((p * (p.log() - ours[position, :300])).sum())
    assert inside > 5
    assert count == len(sequences.targets[0]) - 1
    assert objective == pytest.approx(expected, rel=1e-4)


def test_rows_whose_answer_a_longer_spelling_cuts_off_are_left_out(tiny_model: TinyModel) -> None:
    dense, _, spelling = trimmed_pair(tiny_model)
    ids = torch.tensor([dense.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]] * 2)
    targets = torch.full_like(ids, IGNORED)
    targets[0, :-1] = ids[0, 1:]
    targets[1, -2] = ids[1, -1]  # its end alone, which has no room any more
    found = respelled(Sequences(ids, targets, "text", ""), spelling)
    assert len(found.input_ids) == len(found.targets) == 1
    assert found.teacher_ids is not None
    assert found.teacher_places is not None
    assert (len(found.teacher_ids), len(found.teacher_places)) == (1, 1)
    with pytest.raises(InputError, match=r"no answer of text has room .*allowed: longer ones"):
        respelled(Sequences(ids[1:], targets[1:], "text", ""), spelling)


def load_sequences(text: str, dense: LoadedModel, spelling: Respelling) -> Sequences:
    """One sequence of a text in the student's tokens."""
    ids = torch.tensor([dense.tokenizer(text)["input_ids"]])
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    return respelled(Sequences(ids, targets, "text", ""), spelling)


@pytest.mark.parametrize(
    "change",
    [{"method": "qlora"}, {"dtype": "float16"}, {"learning_rate": math.nan}, {"rank": 10**9}, {"seed": None}],
)
def test_settings_name_the_field(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(change))}: "):
        check_settings(replace(RecoverySettings(), **change))


@pytest.mark.parametrize(
    ("made", "idle", "references", "where"),
    [
        ({"method": "full"}, {"rank": 4}, (), "--method ig-lora or lora"),
        ({"for_quant": "Q4_0"}, {"alpha": 1.0}, (), "--method ig-lora or lora"),
        ({}, {"self_tokens": 64}, ("a.txt",), "the reference self"),
    ],
)
def test_what_training_does_not_read_has_no_effect(
    made: dict[str, Any], idle: dict[str, Any], references: tuple[str, ...], where: str
) -> None:
    settings = RecoverySettings(**made)
    read, (warning,) = training_as_read(replace(settings, **idle), references)
    assert read == settings
    assert warning == f"--set {next(iter(idle))} has no effect without {where}"
    assert training_as_read(settings, references) == (settings, ())


@given(st.floats(0.0, 1.0, exclude_max=True), st.integers(1, 300))
def test_the_learning_rate_rises_to_its_peak_and_falls(ratio: float, steps: int) -> None:
    shares = [learning_rate_share(ratio, steps, step) for step in range(steps)]
    peak = int(ratio * steps)
    assert shares[peak] == max(shares) == 1
    assert min(shares) > 0
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


def test_the_learning_rate_is_the_methods_for_the_loss() -> None:
    wanted = {("ig-lora", "distill"): 1e-3, ("full", "distill"): 5e-5, ("full", "both"): 2e-4}
    for (method, loss), rate in wanted.items():
        assert learning_rate(RecoverySettings(method=method, loss=loss)) == rate
    assert learning_rate(RecoverySettings(method="full", learning_rate=3e-4)) == 3e-4


@pytest.mark.parametrize(
    ("losses", "patience", "best", "stopped"),
    [
        ((3.0, 2.0, 2.1), 5, 1, None),
        ((3.0, 2.0, 2.1, 2.2), 2, 1, "patience"),
        ((3.0, 2.0, 2.8), 5, 1, "diverged"),
        ((3.0, 2.0, float("nan")), 5, 1, "diverged"),
        ((3.0, 3.1, 3.2), 0, 0, None),
    ],
)
def test_when_a_run_stops(losses: tuple[float, ...], patience: int, best: int, stopped: str | None) -> None:
    state = RunState()
    for step, loss in enumerate(losses):
        state.add_validation(ValidationPoint(step, step, loss, math.exp(loss)), patience)
    assert (state.best_step, state.stopped_by) == (best, stopped)


def inputs(**settings: Any) -> RunInputs:
    return RunInputs({"rank": 4} | settings, {"data": "abc"}, 1)


def test_a_checkpoint_counts_once_it_is_complete(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "w")
    work.open(inputs(), force=False)
    for step in (1, 2, 3):
        folder = work.path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        work.best_file(step).write_text(str(step))
        if step < 3:
            work.complete(folder, RunState(best_step=step))
    assert sorted(p.name for p in work.path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert sorted(p.name for p in work.path.glob("best-*")) == ["best-2.safetensors", "best-3.safetensors"]
    work.open(inputs(), force=False)
    last = work.last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-2"
    assert read_record(RunState, last / "recovery_state.json").best_step == 2
    assert not (work.path / "checkpoint-3").exists()
    assert work.best_file(2).read_text() == "2"


def test_a_work_folder_belongs_to_one_run(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "w")
    work.open(inputs(), force=False)
    folder = work.path / "checkpoint-1"
    folder.mkdir()
    work.complete(folder, RunState())
    with pytest.raises(InputError, match=r"different: rank.*--force.*--set work"):
        work.open(inputs(rank=8), force=False)
    with pytest.raises(InputError, match=r"different: rank.*--force.*--set work"):
        work.refuse_other(replace(inputs(rank=8), hashes={}), force=False)
    assert not work.refuse_other(replace(inputs(), hashes={}), force=False)
    assert work.refuse_other(inputs(rank=8), force=True)
    work.open(inputs(), force=True)
    assert work.last_checkpoint() is not None
    work.open(inputs(rank=8), force=True)
    assert work.last_checkpoint() is None
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_text("")
    with pytest.raises(InputError, match="no work folder"):
        WorkFolder(other).open(inputs(), force=True)
    assert (other / "cat.png").exists()
