"""What a row is worth does not depend on its neighbours: padding, batch composition and order leave no trace.

Two small models in float64: the embedded Llama, whose rotary positions are relative and so forgive a shift, and a
GPT-2 with absolute positions, which does not. Three layouts of `packing.py`: one row each, all rows in one, and one
row for each prompt with its completions behind it. TRL's fused head makes log-probabilities in float32, so they are
compared to its rounding; the negative controls differ by orders of magnitude more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import add_fused_lm_head

from siesta.rl.advantages import kl_weights, token_weights
from siesta.rl.attention import BACKENDS
from siesta.rl.embedded import build_model, build_tokenizer
from siesta.rl.generation import (
    by_length,
    complete,
    cut_after_eos,
    inference,
    left_pad,
    mode_policy,
    positions,
    replaced,
)
from siesta.rl.loss import kl_loss, mode_target_loss, policy_loss
from siesta.rl.modes import Mode, Modes, grow_embeddings, prepare_tokenizer
from siesta.rl.packing import Pack
from siesta.rl.scoring import Scorer, TokenScores
from tests.helpers import PACKED_SDPA, Rows, batch_of

assert_close = partial(torch.testing.assert_close, rtol=0.0, atol=3e-6)  # logps reach -10: a few float32 roundings
TEMPERATURE = 0.7
LAYOUTS = {"padded": BACKENDS["sdpa"], "packed": PACKED_SDPA, "trees": BACKENDS["sdpa"]}


def control_logps(scores: TokenScores) -> torch.Tensor:
    """Log-probability of every control token at position 0 over the whole vocabulary, (B, M)."""
    return scores.mode_logps + scores.log_mass[:, None]


@contextmanager
def at_temperature(model: PreTrainedModel, temperature: float) -> Iterator[None]:
    """Inside, the fused head divides its logits by `temperature`."""
    with replaced(model, "forward", model.forward):
        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
        yield


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
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return model.double().eval()


@pytest.fixture(scope="module", params=LAYOUTS)
def scorer(request: pytest.FixtureRequest, model: PreTrainedModel, modes: Modes) -> Scorer:
    scorer = Scorer(modes, LAYOUTS[request.param], share=request.param == "trees")
    scorer.attach(model)
    return scorer


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast, modes: Modes) -> Rows:
    """Prompts of 3 to 12 tokens, completions of 1 (the control token alone) to 8; the last two share a prompt each."""
    short, think = modes.token_ids
    texts = [
        ("<calc> 3 <q>", "7 <eos>", short),
        ("<calc> 3 +4 *7 -2 <q>", "7 9 7 = 7 <eos>", think),
        ("<calc> 8 +1 *3 -2 +9 *9 -1 +3 *7 ; <q>", "9 7 5 4 6 5 8", think),
        ("<calc> 5 *3 ; ; <q>", "", short),
        ("<calc> 3 +4 *7 -2 <q>", "4 <eos>", short),
        ("<calc> 3 <q>", "3 5 = 5 <eos>", think),
    ]
    return [
        (tokenizer.encode(prompt, add_special_tokens=False), [token, *tokenizer.encode(text)])
        for prompt, text, token in texts
    ]


def lay_out(scorer: Scorer, rows: Rows, pad_id: int = 0, *, left: int = 0, right: int = 0) -> Pack:
    return scorer.lay_out(*batch_of(rows, pad_id, left=left, right=right))


def assert_same_rows(found: TokenScores, scorer: Scorer, model: PreTrainedModel, rows: Rows) -> None:
    """Every row scores as it does alone, without any padding; padding scores 0."""
    assert found.entropies is not None
    for i, row in enumerate(rows):
        alone, real = scorer.score(model, lay_out(scorer, [row])), len(row[1])
        assert_close(found.per_token_logps[i, :real], alone.per_token_logps[0])
        assert_close(found.entropies[i, :real], cast(torch.Tensor, alone.entropies)[0])
        assert_close(found.mode_logps[i], alone.mode_logps[0])
        assert_close(found.log_mass[i], alone.log_mass[0])
        assert not found.per_token_logps[i, real:].any()
        assert not found.entropies[i, real:].any()


# ---- scoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["<pad>", "<eos>", "7"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 6), (4, 3)])
def test_scores_of_a_row_do_not_depend_on_its_batch(
    scorer: Scorer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Rows,
    left: int,
    right: int,
    padding: str,
) -> None:
    """Longer prompts beside it, more padding on either side, and any token as the padding."""
    pad_id = tokenizer.get_vocab()[padding]
    found = scorer.score(model, lay_out(scorer, rows, pad_id, left=left, right=right))
    assert found.per_token_logps.isfinite().all()
    assert_same_rows(found, scorer, model, rows)
    turned = scorer.score(model, lay_out(scorer, rows[::-1], pad_id, left=left, right=right))
    assert_same_rows(turned, scorer, model, rows[::-1])


def test_scores_are_those_of_a_plain_forward_pass(
    scorer: Scorer, model: PreTrainedModel, modes: Modes, rows: Rows
) -> None:
    """Logits before token t predict it, at the temperature; the control token among the control tokens only."""
    found = scorer.score(model, lay_out(scorer, rows))
    assert found.entropies is not None
    for i, (prompt, completion) in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logps[range(len(completion)), completion]
        expected[0] -= logps[0, modes.token_ids].logsumexp(0)
        assert_close(found.per_token_logps[i, : len(completion)].double(), expected)
        assert_close(control_logps(found)[i].double(), logps[0, modes.token_ids])
        entropies = torch.distributions.Categorical(logits=logps).entropy()
        assert_close(found.entropies[i, : len(completion)].double(), entropies)
        assert found.per_token_logps[i, 0] == found.mode_logps[i, modes.token_ids.index(completion[0])]


class Bigrams(torch.nn.Module):
    """What comes after a token depends on it alone: `probs[token]` names the next ones and their probabilities.

    Every other token has NaN for a hidden state.
    """

    def __init__(self, size: int, probs: dict[int, dict[int, float]], temperature: float):
        super().__init__()
        self.config = PreTrainedConfig()
        self.base_model = Known(size, set(probs))
        self.head = torch.nn.Linear(size, size, bias=False)
        logits = torch.full((size, size), -1e5)
        for token, after in probs.items():
            logits[list(after), token] = temperature * torch.tensor(list(after.values())).log()
        self.head.weight.data = logits
        add_fused_lm_head(cast(Any, self), temperature=temperature, outputs=("log_probs", "entropy"))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def set_attn_implementation(self, name: str) -> None:
        assert name == "sdpa"

    def forward(self) -> None:
        raise AssertionError("the fused head is in front")


class Known(torch.nn.Module):
    """Backbone of `Bigrams`, one-hot on `tokens`; `asked` is what it was last called with."""

    def __init__(self, size: int, tokens: set[int]):
        super().__init__()
        self.size, self.tokens = size, tokens
        self.asked: dict[str, Any] = {}

    def forward(self, **given: Any) -> BaseModelOutput:
        self.asked, ids = given, given["input_ids"]
        hidden = torch.full((*ids.shape, self.size), torch.nan)
        for token in self.tokens:
            hidden[ids == token] = torch.nn.functional.one_hot(torch.tensor(token), self.size).float()
        return BaseModelOutput(last_hidden_state=cast(Any, hidden))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_by_hand(layout: str) -> None:
    """Logits of 2 log p at temperature 2; hidden states of padding, of last tokens and inside prompts are not read."""
    short, think, size = 10, 11, 12
    modes = Modes([Mode("short", "<short>", short, 2), Mode("think", "<think>", think, 9)])
    after = {8: {short: 0.5, think: 0.25, 5: 0.25}, think: {5: 0.9, 6: 0.1}}
    model, scorer, reached = Bigrams(size, after, 2.0), Scorer(modes, LAYOUTS[layout], share=layout == "trees"), []
    scorer.attach(cast(PreTrainedModel, model))
    model.base_model.register_forward_hook(lambda module, args, output: reached.append(output.last_hidden_state))
    found = scorer.score(model, lay_out(scorer, [([9, 8], [think, 6]), ([8], [short])], left=2))

    assert_close(found.per_token_logps, torch.tensor([[1 / 3, 0.1], [2 / 3, 1.0]]).log())
    assert_close(found.log_mass, torch.tensor([0.75, 0.75]).log())
    assert_close(control_logps(found), torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log())
    # Of 1/2, 1/4, 1/4: 1.5 log 2 = 1.0397. Of 0.9, 0.1: 0.3251.
    torch.testing.assert_close(found.entropies, torch.tensor([[1.0397, 0.3251], [1.0397, 0.0]]), rtol=0, atol=1e-4)
    # Two rollouts times two control tokens, and one response token; no other hidden state reaches the head.
    assert reached[0].shape == (1, 5, size)
    assert reached[0][0].argmax(1).tolist() == [8, 8, 8, 8, think]
    ids, places = {
        "padded": ([[9, 8, think, 6], [8, short, 0, 0]], [[0, 1, 2, 3]] * 2),
        "packed": ([[9, 8, think, 6, 8, short]], [[0, 1, 2, 3, 0, 1]]),
        "trees": ([[8, short, 0, 0], [9, 8, think, 6]], [[0, 1, 2, 3]] * 2),
    }[layout]
    asked = model.base_model.asked
    assert asked["input_ids"].tolist() == ids
    assert asked["position_ids"].tolist() == places
    masks = {"attention_mask"} if layout == "trees" else set()
    assert set(asked) == {"input_ids", "position_ids", "use_cache"} | masks


def test_a_shared_prompt_by_hand() -> None:
    """Three rollouts, two of one prompt: its last hidden state is read for both, and for every control token."""
    short, think, size = 10, 11, 12
    modes = Modes([Mode("short", "<short>", short, 2), Mode("think", "<think>", think, 9)])
    after = {8: {short: 0.5, think: 0.25, 5: 0.25}, 7: {short: 0.1, think: 0.9}, think: {5: 0.9, 6: 0.1}}
    model, scorer, reached = Bigrams(size, after, 2.0), Scorer(modes, BACKENDS["sdpa"], share=True), []
    scorer.attach(cast(PreTrainedModel, model))
    model.base_model.register_forward_hook(lambda module, args, output: reached.append(output.last_hidden_state))
    found = scorer.score(model, lay_out(scorer, [([9, 8], [think, 6]), ([7], [think, 5]), ([9, 8], [short])], left=2))
    assert_close(found.per_token_logps, torch.tensor([[1 / 3, 0.1], [0.9, 0.9], [2 / 3, 1.0]]).log())
    assert_close(found.log_mass, torch.tensor([0.75, 1.0, 0.75]).log())
    assert reached[0][0].argmax(1).tolist() == [8, 8, 7, 7, 8, 8, think, think]
    asked = model.base_model.asked
    assert asked["input_ids"].tolist() == [[7, think, 5, 0, 0], [9, 8, think, 6, short]]
    assert asked["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 2]]
    assert asked["attention_mask"][1, 0].int().tolist()[2:] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


def test_the_hook_leaves_other_forward_passes_alone(scorer: Scorer, model: PreTrainedModel, rows: Rows) -> None:
    """After a score, and after one that failed, a forward pass has logits for every token."""
    ids = torch.tensor([rows[1][0]])
    before = model(ids).logits
    scorer.score(model, lay_out(scorer, rows))
    assert torch.equal(model(ids).logits, before)
    pack = lay_out(scorer, rows)
    with pytest.raises(IndexError):
        scorer.score(model, replace(pack, predicts=pack.predicts + 10_000))
    assert torch.equal(model(ids).logits, before)


# ---- negative controls: the comparisons above would see these ----------------------------------------------------


def test_a_batch_whose_padding_counts_scores_otherwise(scorer: Scorer, model: PreTrainedModel, rows: Rows) -> None:
    ids, mask, length = batch_of(rows, left=3)
    masked = scorer.score(model, scorer.lay_out(ids, mask, length))
    open_wide = scorer.score(model, scorer.lay_out(ids, torch.ones_like(mask), length))
    assert ((control_logps(masked) - control_logps(open_wide)).abs().amax(1) > 1e-2).all()


@pytest.mark.parametrize("shift", [-1, 1])
def test_hidden_states_one_place_off_score_otherwise(
    scorer: Scorer, model: PreTrainedModel, rows: Rows, shift: int
) -> None:
    pack = lay_out(scorer, rows)
    right = scorer.score(model, pack)
    responses = scorer.score(model, replace(pack, predicts=pack.predicts + shift))
    assert torch.equal(responses.mode_logps, right.mode_logps)
    assert ((responses.per_token_logps - right.per_token_logps)[pack.response_mask].abs() > 1e-2).float().mean() > 0.9
    controls = scorer.score(model, replace(pack, first=pack.first + shift))
    assert ((control_logps(controls) - control_logps(right)).abs().amax(1) > 1e-2).all()
    assert torch.equal(controls.per_token_logps[:, 1:], right.per_token_logps[:, 1:])


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_positions_that_count_padding_score_otherwise(scorer: Scorer, model: PreTrainedModel, rows: Rows) -> None:
    """With absolute positions, a shift shows."""
    pack = lay_out(scorer, rows)
    right = scorer.score(model, pack)
    shifted = replace(pack, inputs=pack.inputs | {"position_ids": pack.inputs["position_ids"] + 3})
    assert (control_logps(right) - control_logps(scorer.score(model, shifted))).abs().max() > 1e-2


@pytest.mark.parametrize("scorer", ["trees"], indirect=True)
def test_shared_prompts_without_their_mask_score_otherwise(
    scorer: Scorer, model: PreTrainedModel, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 4 and 5 come behind the completions of rows 1 and 0; their control tokens come from the prompt still."""
    right = scorer.score(model, lay_out(scorer, rows))
    monkeypatch.setattr(scorer, "backend", replace(scorer.backend, arguments=lambda pack: {}))
    lost = scorer.score(model, lay_out(scorer, rows))
    gaps = (lost.per_token_logps - right.per_token_logps).abs()
    assert gaps[:4].max() < 3e-6
    assert gaps[:, 0].max() < 3e-6
    assert (gaps[4:, 1:].amax(1) > 1e-2).all()


@pytest.mark.parametrize("scorer", ["packed"], indirect=True)
def test_a_packed_row_without_boundaries_scores_otherwise(scorer: Scorer, model: PreTrainedModel, rows: Rows) -> None:
    """Positions that run on over the ends of sequences: only the first rollout has nobody before it."""
    pack = lay_out(scorer, rows)
    right = scorer.score(model, pack)
    running = torch.arange(int(pack.lengths.sum()))[None]
    joined = scorer.score(model, replace(pack, inputs=pack.inputs | {"position_ids": running}))
    gaps = (control_logps(right) - control_logps(joined)).abs().amax(1)
    assert gaps[0] < 3e-6
    assert (gaps[1:] > 1e-2).all()


# ---- gradients ---------------------------------------------------------------------------------------------------


def loss_of(scorer: Scorer, model: PreTrainedModel, rows: Rows, number: int, *, left: int = 0, right: int = 0):
    """The loss of some rows out of `number`, as the trainer puts it together, on policy."""
    ids, mask, length = batch_of(rows, left=left, right=right)
    scores = scorer.score(model, scorer.lay_out(ids, mask, length))
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
    scorer: Scorer, model: PreTrainedModel, rows: Rows
) -> None:
    """One batch, rows one by one, and pairs in another order with more padding: the same step."""
    whole = gradients(model, loss_of(scorer, model, rows, 6))
    splits = [[[0], [1], [2], [3], [4], [5]], [[3, 1, 5], [0, 4, 2]], [[5, 2, 0, 3], [4, 1]]]
    for split, (left, right) in zip(splits, [(0, 0), (5, 4), (0, 3)], strict=True):
        losses = [loss_of(scorer, model, [rows[i] for i in part], 6, left=left, right=right) for part in split]
        summed = gradients(model, torch.stack(losses).sum())
        assert summed.isfinite().all()
        assert (summed - whole).norm() < 1e-5 * whole.norm()


def test_gradient_is_that_of_a_plain_forward_pass(
    scorer: Scorer, model: PreTrainedModel, modes: Modes, rows: Rows
) -> None:
    """Mode policy, mass and response tokens, each from full logits of one rollout at a time."""
    found = scorer.score(model, lay_out(scorer, rows))
    ours = gradients(model, found.per_token_logps.sum() + found.mode_logps[:, 0].sum() - 2 * found.log_mass.sum())
    expected = torch.zeros((), dtype=torch.float64)
    for prompt, completion in rows:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logps = logits.log_softmax(-1)
        among = logits[0, modes.token_ids].log_softmax(-1)
        expected = expected + logps[range(1, len(completion)), completion[1:]].sum()
        expected = expected + among[modes.token_ids.index(completion[0])] + among[0]
        expected = expected - 2 * logps[0, modes.token_ids].logsumexp(0)
    plain = gradients(model, expected)
    assert (ours - plain).norm() < 1e-5 * plain.norm()


# ---- the mode policy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_mode_policy_is_the_renormalised_first_position(
    scorer: Scorer, model: PreTrainedModel, modes: Modes, rows: Rows, batch_size: int, temperature: float
) -> None:
    """The distribution that modes are drawn from is the one that the loss moves; mass is taken at temperature 1."""
    prompts = [prompt for prompt, _ in rows]
    log_policy, mass = mode_policy(
        model, prompts, modes, temperature=temperature, batch_size=batch_size, pad_id=0, device="cpu"
    )
    with at_temperature(model, temperature):
        assert_close(log_policy, scorer.score(model, lay_out(scorer, rows)).mode_logps.detach())
    with at_temperature(model, 1.0):
        assert_close(mass, scorer.score(model, lay_out(scorer, rows)).log_mass.detach().exp())
    assert (log_policy.exp().sum(1) - 1).abs().max() < 1e-6
    assert log_policy[:, 0].std() > 1e-2  # the prompts differ, so a mix-up of rows would show


# ---- completions -------------------------------------------------------------------------------------------------


def greedy(model: PreTrainedModel, prompts: list[list[int]], mode: Mode, **settings) -> list[list[int]]:
    defaults: dict[str, Any] = {"batch_size": 1, "pad_id": 0, "eos_id": 1}
    return complete(model, prompts, mode, temperature=None, **defaults | settings)


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
    assert greedy(model, [*prompts, 3 * prompts[2]], mode, batch_size=8)[:-1] == alone
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
        settings: dict[str, Any] = {"batch_size": 4, "pad_id": 0, "eos_id": 1}
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
