"""Rows of the output matrix that learn to spell what was removed.

A model trained on a tokenizer's own segmentation has never read a removed token's parts side by side: " cath" and
"edral" were always one token. So it expects neither the first part in its place, nor the second after the first. Both
follow without any training from how often each token stands in the text, the states h in which the dense model decides
(the final norm's outputs), and its old rows. A kept row w_b changes by the d_b that minimizes

    sum over e of n_e (d_b . h_e - g_e)^2 + c n_b (E[(d_b . h)^2] + ridge mean(h^2) |d_b|^2)

over the events e in which b has to say more than it does: at state h_e, n_e times in the text, by g_e nats. n_b is how
often b has to be said anyway, so that what is common hardly moves; rows with no events stay bit for bit.

- b continues a token after the parts before it: h_e is a state after these, behind some beginning of the
  calibration text, and g_e = a max(0, ln share - ln q), with the share of all times that the parts stand there in which
  b comes next, and the probability q that the dense model, without the removed rows, gives it.
- b begins a token t: the mass of t is now b's. For normal states of mean m and covariance C, those in which t comes
  next have the mean m + C (w_t - w), w being the mean row; there g_e = ln(1 + p(t) / p(b)).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from cfsp.devices import exact, exact_device, exact_zeros
from cfsp.errors import InputError
from cfsp.models.architectures import capped, logit_cap, spec_for
from cfsp.models.source import LoadedModel
from cfsp.models.token_trees import token_trees
from cfsp.progress import Progress, no_progress
from cfsp.pruning.vocabulary import VocabularyPlan, expected_counts, scripts_of, spelled

_CAUTION = 20.0
"""c: what moves elsewhere costs more than what is gained, as the events are a model of the text."""
_RIDGE = 0.01
_SHARE = 0.8
"""a: text says more about what comes next than the beginnings do."""
_MOST_FOLDED = 2.0
"""Most nats that a first part gains."""
_RARE = 0.01
"""Times in the text up to which a removed token, such as another language's, is not spelled."""
_EVENTS = 512
"""Most events of a row, the frequent ones."""
PREFIXES = 16384
"""Most beginnings of removed tokens that are tried, the frequent ones."""
BEGINNINGS, _BEGINNING_TOKENS = 2, 16
_STATE_TOKENS = 512
RUN_TOKENS = 512

Prefix = tuple[int, ...]


def teach_spellings(
    loaded: LoadedModel, plan: VocabularyPlan, windows: torch.Tensor, *, progress: Progress = no_progress
) -> None:
    """Change rows of the dense model's output matrix (and of a tied embedding) in place.

    A plan without counts changes nothing. Windows (n_windows, seqlen) are in the dense model's ids. Raises
    InputError: the plan's counts are not one a row.
    """
    if not plan.counts or len(plan.kept) == plan.dense_size:
        return
    if len(plan.counts) != plan.dense_size:
        n_counts, wanted = len(plan.counts), str(plan.dense_size)
        raise InputError("not one count a row", field="vocabulary.counts", value=n_counts, allowed=wanted)
    trees = token_trees(loaded.tokenizer)
    expected = expected_counts(trees, np.asarray(plan.counts, dtype=np.float64), scripts_of(loaded.tokenizer))
    kept, gone = set(plan.kept), set(trees.parts) - set(plan.kept)
    firsts: dict[int, list[int]] = defaultdict(list)  # kept id -> removed ids that it begins
    stands: dict[Prefix, float] = defaultdict(float)  # parts -> how often they stand side by side
    follows: dict[tuple[int, Prefix], float] = defaultdict(
        float
    )  # (kept id, parts before it inside a removed token)
    for index in kept:
        stands[index,] += expected[index]
    for index in sorted(index for index in gone if expected[index] > _RARE):
        parts = spelled(index, gone, trees)
        firsts[parts[0]].append(index)
        for end in range(1, len(parts)):
            follows[parts[end], tuple(parts[:end])] += expected[index]
        for end in range(1, len(parts) + 1):
            stands[tuple(parts[:end])] += expected[index]
    if not firsts:
        return
    continued: dict[int, list[tuple[Prefix, float]]] = defaultdict(list)
    often: dict[Prefix, float] = defaultdict(float)
    for (row, prefix), n in follows.items():
        continued[row].append((prefix, n))
    for each in continued.values():
        for prefix, n in each:
            often[prefix] += n
    prefixes = sorted(sorted(often, key=lambda prefix: -often[prefix])[:PREFIXES], key=lambda p: (len(p), p))
    states = _read_states(loaded.model, plan, windows, prefixes, progress)
    places, cap = {prefix: place for place, prefix in enumerate(prefixes)}, logit_cap(loaded.model.config)
    counts = torch.from_numpy(expected).to(exact_device(loaded.model.device))
    weight = loaded.model.get_output_embeddings().weight
    with torch.no_grad():
        covariance = states.square - torch.outer(states.mean, states.mean)
        mean_row = exact(weight[: len(counts)].T @ (counts / counts.sum()).to(weight))
        basis, axes = torch.linalg.eigh(states.square)
        penalty = basis.clamp_min(0) + _RIDGE * basis.mean()
        rows = sorted(firsts.keys() | continued.keys())
        for done, row in enumerate(rows, 1):
            # States (events, hidden_size), nats to gain and times in the text, (events,).
            events: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
            if known := [(p, n) for p, n in continued.get(row, ()) if p in places]:
                at = [places[prefix] for prefix, _ in known]
                times = states.mean.new_tensor([n for _, n in known])
                share = times / states.mean.new_tensor([stands[prefix] for prefix, _ in known])
                h = states.after[:, at]
                now = capped(h @ exact(weight[row]), cap) - states.normalizers[:, at]
                gain = (_SHARE * (share.log() - now)).clamp_min(0)
                events += [(one, its, times / len(h)) for one, its in zip(h, gain, strict=True)]
            if begun := firsts.get(row):
                theirs = exact(weight[torch.tensor(begun)])
                h = states.mean + (theirs - mean_row) @ covariance
                folded = F.softplus((h * (theirs - exact(weight[row]))).sum(dim=1))
                events.append((h, folded.clamp_max(_MOST_FOLDED), counts[torch.tensor(begun)]))
            if events:
                h, gain, times = (torch.cat(each) for each in zip(*events, strict=True))
                most = times.topk(min(len(times), _EVENTS)).indices
                often_said = _CAUTION * max(float(counts[row]), 1.0)
                change = _least_squares(h[most] @ axes, gain[most], times[most], often_said * penalty)
                weight[row] += (axes @ change).to(weight)
            if done % 256 == 0 or done == len(rows):
                progress("teaching spellings", done, len(rows))


def _least_squares(
    h: torch.Tensor, gain: torch.Tensor, times: torch.Tensor, penalty: torch.Tensor
) -> torch.Tensor:
    """The d with the least sum of times (d . h - gain)^2 + penalty d^2, (hidden_size,); solved event by event."""
    reach = h / penalty
    result: torch.Tensor = reach.T @ torch.linalg.solve(reach @ h.T + torch.diag(1 / times), gain)
    return result


class _States(NamedTuple):
    """Where the dense model decides what comes next, float64."""

    mean: torch.Tensor  # m, (hidden_size,)
    square: torch.Tensor  # E[h h^T], (hidden_size, hidden_size)
    after: torch.Tensor  # states after each beginning and prefix, (beginnings, prefixes, hidden_size)
    normalizers: torch.Tensor  # log of the kept rows' softmax denominator there, (beginnings, prefixes)


def _read_states(
    model: Any, plan: VocabularyPlan, windows: torch.Tensor, prefixes: Sequence[Prefix], progress: Progress
) -> _States:
    """Run the dense model over windows, and over every prefix after the beginnings of some."""
    decoder, width, cap = model.get_decoder(), model.config.hidden_size, logit_cap(model.config)
    last_states = _last_states_apart if spec_for(model.config).sees_neighbours else _last_states
    kept = model.get_output_embeddings().weight[torch.tensor(plan.kept)].float()
    zeros, tokens = partial(exact_zeros, device=model.device), 0
    total, square, after, normalizers = zeros(width), zeros(width, width), [zeros(0, width)], [zeros(0)]
    with torch.inference_mode():
        for window in windows[:, :_STATE_TOKENS].to(model.device):
            h = decoder(input_ids=window[None], use_cache=False).last_hidden_state[0].float()
            total += h.sum(dim=0).to(total.device)
            square += (h.T @ h).to(square.device)
            tokens += len(h)
        beginnings = windows[:: max(1, len(windows) // BEGINNINGS)][:BEGINNINGS, :_BEGINNING_TOKENS]
        for done, beginning in enumerate(beginnings.tolist(), 1):
            for run in _runs(prefixes):
                h = last_states(decoder, beginning, run)
                after.append(exact(h))
                normalizers.append(exact(capped(h @ kept.T, cap).logsumexp(dim=1)))
            progress("reading spellings", done, len(beginnings))
        shape = (len(beginnings), len(prefixes))
        states, lse = torch.cat(after).view(*shape, width), torch.cat(normalizers).view(shape)
    return _States(total / tokens, square / tokens, states, lse)


def _runs(prefixes: Sequence[Prefix]) -> Iterator[Sequence[Prefix]]:
    """Prefixes that are run together."""
    start = tokens = 0
    for end, prefix in enumerate(prefixes):
        if tokens + len(prefix) > RUN_TOKENS and end > start:
            yield prefixes[start:end]
            start, tokens = end, 0
        tokens += len(prefix)
    if prefixes:
        yield prefixes[start:]


def _last_states(decoder: Any, beginning: Sequence[int], prefixes: Sequence[Prefix]) -> torch.Tensor:
    """States after the beginning and each prefix, (prefixes, hidden_size); no prefix sees another."""
    alone, start = [-1] * len(beginning), len(beginning)
    owner = torch.tensor(alone + [n for n, prefix in enumerate(prefixes) for _ in prefix])
    places = [*range(start), *(start + n for prefix in prefixes for n in range(len(prefix)))]
    seen = ((owner == -1) | (owner == owner[:, None])).tril()
    lowest = torch.finfo(torch.float32).min
    ids = [[*beginning, *(token for prefix in prefixes for token in prefix)]]
    device = decoder.device
    h = decoder(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.where(seen, 0.0, lowest)[None, None].to(device),
        position_ids=torch.tensor([places], device=device),
        use_cache=False,
    ).last_hidden_state[0]
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    last: torch.Tensor = h[start + lengths.cumsum(0) - 1].float()
    return last


def _last_states_apart(decoder: Any, beginning: Sequence[int], prefixes: Sequence[Prefix]) -> torch.Tensor:
    """The same with a row for each prefix, for models that see their neighbours; equally long rows run together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, prefix in enumerate(prefixes):
        by_length[len(prefix)].append(place)
    states: dict[int, torch.Tensor] = {}
    for places in by_length.values():
        ids = torch.tensor([[*beginning, *prefixes[place]] for place in places], device=decoder.device)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1].float()
        states |= dict(zip(places, hidden, strict=True))
    return torch.stack([states[place] for place in range(len(prefixes))])
