"""What a row is worth does not depend on its neighbours: padding, batch composition and order leave no trace.

Two small models in float64: the embedded Llama, whose rotary positions are relative and so forgive a shift, and a
GPT-2 with absolute positions, which does not. Log-probabilities are made in float32 (`scoring.py` casts the logits),
so they are compared to its rounding; the negative controls differ by orders of magnitude more.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from siesta.rl import scoring
from siesta.rl.advantages import kl_weights, token_weights
from siesta.rl.embedded import build_model, build_tokenizer
from siesta.rl.generation import by_length, complete, cut_after_eos, inference, left_pad, mode_policy, positions
from siesta.rl.loss import kl_loss, mode_target_loss, policy_loss
from siesta.rl.modes import Mode, Modes, grow_embeddings, prepare_tokenizer
from siesta.rl.scoring import TokenScores, score_completions

assert_close = partial(torch.testing.assert_close, rtol=0.0, atol=3e-6)  # logps reach -10: a few float32 roundings
TEMPERATURE = 0.7
Rows = list[tuple[list[int], list[int]]]  # prompt, completion


def control_logps(scores: TokenScores) -> torch.Tensor:
    """Log-probability of every control token at position 0 over the whole vocabulary, (B, M)."""
    return scores.mode_logps + scores.log_mass[:, None]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    assert prepare_tokenizer(tokenizer, ["<short>", "<think>"]) == ["<short>", "<think>"]
    return tokenizer


@pytest.fixture(scope="module")
def modes(tokenizer: PreTrainedTokenizerFast) -> Modes:
    ids = tokenizer.get_vocab()
    return Modes([Mode("short", "<short>", ids["<short>"], 2), Mode("think", "<think>", ids["<think>"], 9)])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    if request.param == "llama":
        # Built for the tokenizer before it knew the control tokens, as for a model from a hub.
        model = build_model(build_tokenizer(), seed=0, layers=2, hidden_size=32, heads=2, init=0.3)
        grow_embeddings(model, tokenizer, ["<short>", "<think>"])
        with torch.no_grad():  # two equal rows would make the modes equally likely everywhere
            model.lm_head.weight[-2:] += 0.3 * torch.randn(2, 32)
    else:
        torch.manual_seed(1)
        shape = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, bos_token_id=None, eos_token_id=1))
    return model.double().eval()


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast, modes: Modes) -> Rows:
    """Prompts of 3 to 12 tokens, completions of 1 (the control token alone) to 8."""
    short, think = modes.token_ids
    texts = [
        ("<calc> 3 <q>", "7 <eos>", short),
        ("<calc> 3 +4 *7 -2 <q>", "7 9 7 = 7 <eos>", think),
        ("<calc> 8 +1 *3 -2 +9 *9 -1 +3 *7 ; <q>", "9 7 5 4 6 5 8", think),
        ("<calc> 5 *3 ; ; <q>", "", short),
    ]
    return [
        (tokenizer.encode(prompt, add_special_tokens=False), [token, *tokenizer.encode(text)])
        for prompt, text, token in texts
    ]


def pad(rows: Rows, pad_id: int, *, left: int = 0, right: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids, mask and completion length of a batch, with `left` and `right` more columns of padding than it needs."""
    before = left + max(len(prompt) for prompt, _ in rows)
    length = right + max(len(completion) for _, completion in rows)
    ids = torch.full((len(rows), before + length), pad_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        real = slice(before - len(prompt), before + len(completion))
        ids[i, real], mask[i, real] = torch.tensor(prompt + completion), 1
    return ids, mask, length


def score(model: PreTrainedModel, rows: Rows, modes: Modes, pad_id: int, *, left: int = 0, right: int = 0):
    ids, mask, length = pad(rows, pad_id, left=left, right=right)
    return score_completions(model, ids, mask, length, modes, TEMPERATURE)


def assert_same_rows(found: TokenScores, model: PreTrainedModel, rows: Rows, modes: Modes) -> None:
    """Every row scores as it does alone, without any padding."""
    for i, row in enumerate(rows):
        alone, real = score(model, [row], modes, 0), len(row[1])
        assert_close(found.per_token_logps[i, :real], alone.per_token_logps[0])
        assert_close(found.entropies[i, :real], alone.entropies[0])
        assert_close(found.mode_logps[i], alone.mode_logps[0])
        assert_close(found.log_mass[i], alone.log_mass[0])


# ---- scoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["<pad>", "<eos>", "7"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 6), (4, 3)])
def test_scores_of_a_row_do_not_depend_on_its_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    modes: Modes,
    rows: Rows,
    left: int,
    right: int,
    padding: str,
) -> None:
    """Longer prompts beside it, more padding on either side, and any token as the padding."""
    pad_id = tokenizer.get_vocab()[padding]
    found = score(model, rows, modes, pad_id, left=left, right=right)
    assert found.per_token_logps.isfinite().all()
    assert_same_rows(found, model, rows, modes)
    assert_same_rows(score(model, rows[::-1], modes, pad_id, left=left, right=right), model, rows[::-1], modes)


def test_scores_are_those_of_a_plain_forward_pass(model: PreTrainedModel, modes: Modes, rows: Rows) -> None:
    """Logits before token t predict it, at the temperature; the control token among the control tokens only."""
    for prompt, completion in rows:
        found = score(model, [(prompt, completion)], modes, 0)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logps[range(len(completion)), completion]
        expected[0] -= logps[0, modes.token_ids].logsumexp(0)
        torch.testing.assert_close(found.per_token_logps[0].double(), expected, rtol=0, atol=3e-6)
        torch.testing.assert_close(control_logps(found)[0].double(), logps[0, modes.token_ids], rtol=0, atol=3e-6)
        entropies = torch.distributions.Categorical(logits=logps).entropy()
        torch.testing.assert_close(found.entropies[0].double(), entropies, rtol=0, atol=3e-6)
        assert found.per_token_logps[0, 0] == found.mode_logps[0, modes.token_ids.index(completion[0])]


def test_scores_by_hand(modes: Modes) -> None:
    """Logits of 2 log p at temperature 2; the logits past the last token, and what padding holds, are not read."""
    short, think = modes.token_ids
    first, second = torch.full((think + 1,), -torch.inf), torch.full((think + 1,), -torch.inf)
    first[[short, think, 5]] = 2 * torch.tensor([0.5, 0.25, 0.25]).log()
    second[[5, 6]] = 2 * torch.tensor([0.9, 0.1]).log()
    asked: dict[str, Any] = {}

    def model(**given: Any) -> SimpleNamespace:
        asked.update(given)
        return SimpleNamespace(logits=torch.stack([first, second, torch.full_like(first, torch.nan)])[None])

    ids, mask = torch.tensor([[0, 0, 9, 8, think, 6]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    found = score_completions(cast(torch.nn.Module, model), ids, mask, 2, modes, 2.0)
    assert_close(found.per_token_logps, torch.tensor([[1 / 3, 0.1]]).log())
    assert_close(found.log_mass, torch.tensor([0.75]).log())
    assert_close(control_logps(found), torch.tensor([[0.5, 0.25]]).log())
    assert asked["input_ids"] is ids
    assert asked["attention_mask"] is mask
    assert asked["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3]]
    assert asked["logits_to_keep"] == 3


def test_a_batch_without_its_mask_scores_otherwise(model: PreTrainedModel, modes: Modes, rows: Rows) -> None:
    """Negative control: the comparison above sees attention to padding."""
    ids, mask, length = pad(rows, 0, left=3)
    masked = score_completions(model, ids, mask, length, modes, TEMPERATURE)
    open_wide = score_completions(model, ids, torch.ones_like(mask), length, modes, TEMPERATURE)
    assert (control_logps(masked) - control_logps(open_wide)).abs().max() > 1e-2


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_positions_that_count_padding_score_otherwise(
    model: PreTrainedModel, modes: Modes, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: with absolute positions, the comparison above sees a shift."""
    right = score(model, rows, modes, 0, left=3)
    monkeypatch.setattr(scoring, "positions", lambda mask: torch.arange(mask.shape[1]).expand_as(mask))
    shifted = score(model, rows, modes, 0, left=3)
    assert (control_logps(right) - control_logps(shifted)).abs().max() > 1e-2


def loss_of(model: PreTrainedModel, rows: Rows, modes: Modes, number: int, *, left: int = 0, right: int = 0):
    """The loss of some rows out of `number`, as the trainer puts it together, on policy."""
    ids, mask, length = pad(rows, 0, left=left, right=right)
    scores = score_completions(model, ids, mask, length, modes, TEMPERATURE)
    new, mask, everyone = scores.per_token_logps, mask[:, -length:], torch.ones(len(rows)).bool()
    advantages = torch.tensor([[float(len(prompt)) - 6.0] for prompt, _ in rows]).expand_as(new)
    weights = token_weights(mask, everyone, number, control=torch.full((len(rows),), 0.3), decoupled=True)
    loss = policy_loss(new, new.detach(), advantages, weights, epsilon_low=0.2, epsilon_high=0.2)
    targets = torch.tensor([[0.2, 0.8]]).repeat(len(rows), 1)
    loss = loss + mode_target_loss(scores.mode_logps, targets, torch.full((len(rows),), 1 / number))
    return loss + 0.1 * kl_loss(new, new.detach() - 0.5, kl_weights(mask, everyone, number))


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def test_gradient_of_the_weights_does_not_depend_on_padding_or_split(
    model: PreTrainedModel, modes: Modes, rows: Rows
) -> None:
    """One padded batch, rows one by one, and pairs in another order with more padding: the same step."""
    whole = gradients(model, loss_of(model, rows, modes, 4))
    splits = [[[0], [1], [2], [3]], [[3, 1], [0, 2]]]
    for split, (left, right) in zip(splits, [(0, 0), (5, 4)], strict=True):
        losses = [loss_of(model, [rows[i] for i in part], modes, 4, left=left, right=right) for part in split]
        summed = gradients(model, torch.stack(losses).sum())
        assert summed.isfinite().all()
        assert (summed - whole).norm() < 1e-5 * whole.norm()


# ---- the mode policy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_mode_policy_is_the_renormalised_first_position(
    model: PreTrainedModel, modes: Modes, rows: Rows, batch_size: int, temperature: float
) -> None:
    """The distribution that modes are drawn from is the one that the loss moves; mass is taken at temperature 1."""
    prompts = [prompt for prompt, _ in rows]
    log_policy, mass = mode_policy(
        model, prompts, modes, temperature=temperature, batch_size=batch_size, pad_id=0, device="cpu"
    )
    ids, mask, length = pad(rows, 0)
    scores = score_completions(model, ids, mask, length, modes, temperature)
    assert_close(log_policy, scores.mode_logps.detach())
    plain = score_completions(model, ids, mask, length, modes, 1.0)
    assert_close(mass, plain.log_mass.detach().exp())
    assert (log_policy.exp().sum(1) - 1).abs().max() < 1e-6
    assert log_policy[:, 0].std() > 1e-2  # the prompts differ, so a mix-up of rows would show


# ---- completions -------------------------------------------------------------------------------------------------


def greedy(model: PreTrainedModel, prompts: list[list[int]], mode: Mode, **settings) -> list[list[int]]:
    return complete(model, prompts, mode, temperature=None, **{"batch_size": 1, "pad_id": 0, "eos_id": 1} | settings)


@pytest.mark.parametrize("column", [0, 1])
def test_greedy_completions_do_not_depend_on_the_batch(
    model: PreTrainedModel, modes: Modes, rows: Rows, column: int
) -> None:
    """Alone, together, in another order, beside a longer prompt, with the end of sequence as padding."""
    mode, prompts = modes[column], [prompt for prompt, _ in rows]
    alone = greedy(model, prompts, mode)
    assert len({tuple(response) for response in alone}) > 1
    assert all(0 < len(response) <= mode.max_tokens for response in alone)
    for batch_size in (2, 3, 4):
        assert greedy(model, prompts, mode, batch_size=batch_size) == alone
    assert greedy(model, prompts[::-1], mode, batch_size=4) == alone[::-1]
    assert greedy(model, [*prompts, 3 * prompts[2]], mode, batch_size=8)[:4] == alone
    assert greedy(model, prompts, mode, batch_size=4, pad_id=1) == alone


def test_greedy_completions_follow_the_argmax(model: PreTrainedModel, modes: Modes, rows: Rows) -> None:
    """The control token comes right behind the prompt, and each token is the likeliest after what stands before."""
    think = modes[1]
    for prompt, response in zip([p for p, _ in rows], greedy(model, [p for p, _ in rows], think), strict=True):
        ids = [*prompt, think.token_id]
        for token in response:
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


@pytest.mark.parametrize("same", [True, False])
def test_a_row_that_ends_early_does_not_touch_the_others(
    model: PreTrainedModel, modes: Modes, rows: Rows, same: bool
) -> None:
    """A token that some rows write midway is made the end of sequence, and perhaps the padding too."""
    think, prompts = modes[1], [prompt for prompt, _ in rows]
    whole = greedy(model, prompts, think, eos_id=10_000)  # never written
    ends = {token for response in whole for token in response[1:-1]}
    partly = [token for token in sorted(ends) if sum(token in response for response in whole) < len(whole)]
    assert partly
    for eos_id in partly[:3]:
        expected = [cut_after_eos(response, [eos_id]) for response in whole]
        assert len({len(response) for response in expected}) > 1
        pad_id = eos_id if same else 0
        assert greedy(model, prompts, think, batch_size=4, eos_id=eos_id, pad_id=pad_id) == expected


def test_sampled_completions_respect_the_cap(model: PreTrainedModel, modes: Modes, rows: Rows) -> None:
    torch.manual_seed(0)
    prompts = [prompt for prompt, _ in rows] * 5
    settings = {"temperature": 1.0, "batch_size": 7, "pad_id": 0, "eos_id": 1}
    for mode in modes:
        responses = complete(model, prompts, mode, **settings)
        assert all(len(response) == mode.max_tokens or response[-1] == 1 for response in responses)
        assert all(1 not in response[:-1] for response in responses)
        assert len({tuple(response) for response in responses}) > 4


def test_sampled_completions_come_from_the_whole_distribution(
    model: PreTrainedModel, modes: Modes, rows: Rows
) -> None:
    """softmax(logits / temperature), the least likely tokens included: no top-k, no top-p."""
    torch.manual_seed(0)
    prompt, draws, temperature = rows[1][0], 4000, 1.5
    mode = replace(modes[1], max_tokens=1)
    settings = {"temperature": temperature, "batch_size": draws, "pad_id": 0, "eos_id": 1}
    drawn = torch.tensor(complete(model, [prompt] * draws, mode, **settings)).flatten()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, mode.token_id]])).logits[0, -1]
    probs = torch.softmax(logits / temperature, 0)
    shares = torch.bincount(drawn, minlength=len(probs)) / draws
    assert ((shares - probs).abs() < 6 * (probs / draws).sqrt() + 3 / draws).all()
    order = probs.argsort()
    for mass in (0.02, 0.2):  # the least likely tokens that make up this much
        rare = order[probs[order].cumsum(0) <= mass]
        assert len(rare) > 1
        assert (shares[rare].sum() - probs[rare].sum()).abs() < 5 * (probs[rare].sum() / draws).sqrt()


@pytest.mark.parametrize(
    ("name", "value"), [("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("num_beams", 3), ("min_p", 0.99)]
)
def test_completions_ignore_the_generation_config_of_the_model(
    model: PreTrainedModel, modes: Modes, rows: Rows, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    """Published models ship one (Qwen2.5 a repetition penalty); the policy that is evaluated is the plain one."""
    prompts = [prompt for prompt, _ in rows]

    def responses() -> list[list[list[int]]]:
        torch.manual_seed(0)
        settings = {"batch_size": 4, "pad_id": 0, "eos_id": 1}
        return [complete(model, prompts * 5, modes[1], temperature=heat, **settings) for heat in (None, 1.0)]

    plain = responses()
    monkeypatch.setattr(model.generation_config, name, value)
    assert responses() == plain


def test_inference_gives_the_training_mode_back(model: PreTrainedModel) -> None:
    model.train()
    try:
        with inference(model):
            assert not model.training
            assert not torch.is_grad_enabled()
        assert model.training
        assert torch.is_grad_enabled()
    finally:
        model.eval()


# ---- hand cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [0, 5, 9])
def test_left_pad_by_hand(pad_id: int) -> None:
    """The mask comes from lengths: real tokens that equal the padding stay real."""
    ids, mask = left_pad([[5, 6, 5], [7], [9, 5]], pad_id)
    assert ids.tolist() == [[5, 6, 5], [pad_id, pad_id, 7], [pad_id, 9, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert ids.dtype == mask.dtype == torch.long


def test_left_pad_of_equal_lengths_adds_nothing() -> None:
    ids, mask = left_pad([[1, 2], [3, 4]], 0)
    assert ids.tolist() == [[1, 2], [3, 4]]
    assert mask.all()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [0, 0, 0, 1]),
        ([1, 1, 0, 0], [0, 1, 1, 1]),
        ([0, 1, 1, 0], [0, 0, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_positions_by_hand(mask: list[int], expected: list[int]) -> None:
    assert positions(torch.tensor([mask])).tolist() == [expected]


@pytest.mark.parametrize(
    ("ids", "eos_ids", "expected"),
    [
        ([4, 5, 1, 0, 0], [1], [4, 5, 1]),
        ([4, 5, 1, 1, 1], [1], [4, 5, 1]),  # padded with the end of sequence itself
        ([1, 1, 1], [1], [1]),
        ([4, 5, 6], [1], [4, 5, 6]),  # cut by the cap: nothing to cut
        ([4, 0, 5, 1], [1], [4, 0, 5, 1]),  # a padding id inside is a token like any other
        ([4, 2, 5, 1], [1, 2], [4, 2]),
        ([], [1], []),
    ],
)
def test_cut_after_eos_by_hand(ids: list[int], eos_ids: list[int], expected: list[int]) -> None:
    assert cut_after_eos(ids, eos_ids) == expected


def test_by_length_gives_every_row_once_next_to_rows_of_its_length() -> None:
    rows = [[0] * n for n in (5, 1, 4, 1, 3)]
    assert list(by_length(rows, 2)) == [[1, 3], [4, 2], [0]]
    assert list(by_length([], 2)) == []
