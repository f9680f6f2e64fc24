"""The small hybrid of the Rule 110 benchmark: attention and gated delta layers in turn, trained from nothing.

Sleep reads a context of 4 rows of bits, a window each, in N passes (Algorithm 1 of arXiv 2605.26099): the hidden
states of a window loop through all blocks (`carry_h` of `siesta.rl.sleep.latent`), the recurrent states S go on from
pass to pass and from window to window, keys and values are dropped after each pass. What is left is S alone. `wake`
reads one more window from S, and its two uses are the two modes:

- `short`: a token for each row in one window, and each says the bit asked for;
- `think`: a window recalls the row, then a window a step writes the row after one more step of Rule 110.

A window is one chunk of the delta rule in plain torch, so nothing here needs a kernel that is not in torch. Products
of matrices are bf16 on a GPU; the residual stream, S and the delta rule are float32.

Departures from the paper: learned places, query tokens that are not fed the labels, slow decay at the start; rows are
cyclic. t is told to the context (a vector a depth), as in `siesta.data.tasks.rule110`, and not to the query.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from siesta.data.tasks.rule110 import DEPTHS, QUERIES

States = list[torch.Tensor]  # S of each gated delta layer, (B, heads, d_head, d_head)
OUTPUTS = 4  # what the head tells apart: the bits 0 and 1, the control tokens of `short` and `think`
EPS = 1e-6
TAPS = 4  # of the short convolution


@dataclass(frozen=True)
class Shape:
    """Sizes. The default has 2.79M parameters, the paper's for 24 bits."""

    bits: int = 24
    width: int = 256
    heads: int = 4
    inner: int = 512
    pairs: int = 2  # of an attention and a gated delta layer

    @property
    def state_bytes(self) -> int:
        """Of S of one context, kept in float32."""
        return 4 * self.pairs * self.width**2 // self.heads

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of one context in bf16, which the state stands in for."""
        return 2 * 2 * self.pairs * self.width * QUERIES * self.bits


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t, a window at once.

    With c_t the sum of log a up to t, what token t writes solves u_t + sum_{s<t} b_t exp(c_t - c_s) (k_t k_s) u_s =
    b_t (v_t - exp(c_t) S_0 k_t): one unit triangular system a window.

    Args:
        q, k, v: (B, heads, T, d_head); q and k get length 1 here.
        decay, beta: log a_t <= 0 and b_t, (B, heads, T).
        state: S_0 laid out keys by values, (B, heads, d_head, d_head); its type is the type of the computation.

    Returns:
        o (B, heads, T, d_head) and S after the window.
    """
    q, k, v, decay, beta = (part.to(state.dtype) for part in (q, k, v, decay, beta))
    q, k = (part * (part.square().sum(-1, keepdim=True) + EPS).rsqrt() for part in (q, k))
    q = q * q.shape[-1] ** -0.5
    total = decay.cumsum(-1)
    earlier = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    # Masked before exp: what lies ahead would overflow, and its gradient would be 0 * inf.
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~earlier, -math.inf).exp()
    since = total.exp()[..., None]
    coupled = ((k @ k.mT) * between * beta[..., None]).tril(-1)
    right = beta[..., None] * (v - since * (k @ state))
    unit = torch.eye(q.shape[2], dtype=state.dtype, device=q.device)
    written = torch.linalg.solve_triangular(coupled + unit, right, upper=False, unitriangular=True)
    output = since * (q @ state) + ((q @ k.mT) * between) @ written
    left = (total[..., -1:] - total).exp()[..., None]
    return output, state * total[..., -1, None, None].exp() + (k * left).mT @ written


def project(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A product of matrices, in bf16 on a GPU."""
    dtype = torch.bfloat16 if x.is_cuda else x.dtype
    return F.linear(x.to(dtype), layer.weight.to(dtype))


def norm(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """RMS norm over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary places within a window, (B, heads, T, d_head)."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * speed
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def pick(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index] for index (B,), as a product: its gradient is one too, where that of an index is a slow scatter."""
    chosen = index[:, None] == torch.arange(len(table), device=table.device)
    return torch.tensordot(chosen.to(table.dtype), table, 1)


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """A layer without bias, its weights drawn with deviation scale / sqrt(3 inputs)."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(3 * inputs))
    return layer


class Block(nn.Module):
    """A mixer of tokens, then SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.before_mixer = nn.Parameter(torch.ones(shape.width))
        self.before_mlp = nn.Parameter(torch.ones(shape.width))
        self.q, self.k, self.v = (linear(shape.width, shape.width) for _ in range(3))
        self.out = linear(shape.width, shape.width, 0.35)
        self.gate, self.up = (linear(shape.width, shape.inner) for _ in range(2))
        self.down = linear(shape.inner, shape.width, 0.35)

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, heads, T, d_head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def finish(self, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Add what the mixer found (B, heads, T, d_head) under an optional gate, then the MLP."""
        hidden = hidden + project(mixed.transpose(1, 2).flatten(2), self.out)
        x = norm(hidden, self.before_mlp)
        return hidden + project(F.silu(project(x, self.gate)) * project(x, self.up), self.down)


class Attention(Block):
    """Causal attention within the window."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = norm(hidden, self.before_mixer)
        q, k, v = (self.by_head(project(x, layer)) for layer in (self.q, self.k, self.v))
        q, k = (rotate(norm(part.to(hidden.dtype))).to(v.dtype) for part in (q, k))
        return self.finish(hidden, F.scaled_dot_product_attention(q, k, v, is_causal=True))


class GatedDelta(Block):
    """Gated DeltaNet: a short convolution that starts anew in each pass, the delta rule, a gated norm."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.z = linear(shape.width, shape.width)
        self.rates = nn.Parameter(torch.randn(2 * shape.heads, shape.width) * 0.2 / math.sqrt(3 * shape.width))
        taps = torch.randn(TAPS, 3 * shape.width) * 0.2
        self.taps = nn.Parameter(taps + torch.eye(TAPS)[-1][:, None])  # the last tap is the token itself
        self.log_decay = nn.Parameter(torch.zeros(shape.heads))
        # Softplus of these is 0.001 to 0.064: heads forget at different speeds, all slowly.
        self.decay_bias = nn.Parameter(torch.expm1(torch.logspace(-3, -1.2, shape.heads)).log())
        self.after = nn.Parameter(torch.ones(shape.width // shape.heads))

    def forward(self, hidden: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, d) and S -> (B, T, d) and S after the window."""
        x = norm(hidden, self.before_mixer)
        qkv = torch.cat([project(x, layer) for layer in (self.q, self.k, self.v)], -1).to(hidden.dtype)
        padded = F.pad(qkv, (0, 0, TAPS - 1, 0))
        length = hidden.shape[1]
        mixed = torch.stack([padded[:, i : i + length] * self.taps[i] for i in range(TAPS)]).sum(0)
        q, k, v = (self.by_head(part) for part in F.silu(mixed).chunk(3, -1))
        decay, beta = F.linear(x, self.rates).transpose(1, 2).chunk(2, 1)  # (B, heads, T) each
        decay = -(self.log_decay.exp() * F.softplus(decay.mT + self.decay_bias)).mT
        output, state = delta_rule(q, k, v, decay, beta.sigmoid(), state)
        gate = F.silu(self.by_head(project(x, self.z)).to(hidden.dtype))
        return self.finish(hidden, norm(output, self.after) * gate), state


class Hybrid(nn.Module):
    """The model. `seed` alone decides its weights."""

    def __init__(self, shape: Shape, seed: int):
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)

            def vectors(*sizes: int) -> nn.Parameter:
                return nn.Parameter(torch.randn(*sizes, shape.width) * 0.5)

            self.bit, self.depth, self.place = vectors(2), vectors(len(DEPTHS)), vectors(QUERIES, shape.bits)
            self.ask, self.recall, self.write = vectors(QUERIES), vectors(1), vectors(1)
            self.attention = nn.ModuleList(Attention(shape) for _ in range(shape.pairs))
            self.delta = nn.ModuleList(GatedDelta(shape) for _ in range(shape.pairs))
            self.last = nn.Parameter(torch.ones(shape.width))
            self.head = nn.Parameter(torch.randn(OUTPUTS, shape.width) / math.sqrt(3 * shape.width))

    def compile(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compile the blocks, each once a length of window. Two passes of a block are one piece of code."""
        torch._dynamo.config.recompile_limit = 64
        for block in (*self.attention, *self.delta):
            block.compile(dynamic=False, fullgraph=True)

    def empty(self, batch: int) -> States:
        """S before anything was read."""
        side = self.shape.width // self.shape.heads
        return [self.last.new_zeros(batch, self.shape.heads, side, side) for _ in self.delta]

    def embed(self, bits: torch.Tensor) -> torch.Tensor:
        """Vectors of bits, (...) -> (..., d)."""
        return self.bit[0] + bits[..., None] * (self.bit[1] - self.bit[0])

    def one_pass(self, hidden: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        """All blocks once over a window (B, T, d): what leaves the last one, and S after it."""
        after = []
        hidden = hidden.contiguous()  # compiled code is made anew for each layout
        for attention, delta, state in zip(self.attention, self.delta, states, strict=True):
            hidden, state = delta(attention(hidden), state)
            after.append(state)
        return hidden, after

    def sleep(self, bits: torch.Tensor, depth: torch.Tensor, passes: int) -> States:
        """S of contexts.

        Args:
            bits: Of the rows, (B, 4, bits), long.
            depth: Place of t in `DEPTHS`, (B,), long.
            passes: N, over each window.
        """
        embedded = self.embed(bits) + pick(self.depth, depth)[:, None, None] + self.place
        states = self.empty(len(bits))
        for window in embedded.unbind(1):
            hidden = window
            for _ in range(passes):
                hidden, states = self.one_pass(hidden, states)
        return states

    def wake(self, states: States, window: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, OUTPUTS) of one pass over a window (B, T, d) from S. S itself stays as it was."""
        hidden, _ = self.one_pass(window, states)
        return F.linear(norm(hidden, self.last), self.head)

    def answer(self, states: States) -> torch.Tensor:
        """Logits (B, 4, OUTPUTS) of `short`: all rows asked in one window. The last two are those of the modes."""
        return self.wake(states, self.ask.expand(len(states[0]), -1, -1))

    def recalled(self, states: States, which: torch.Tensor) -> torch.Tensor:
        """Logits (B, bits, OUTPUTS) of the first window of `think`: row `which` (B,) as it was read."""
        return self.wake(states, pick(self.place, which) + self.recall)

    def written(self, states: States, which: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Logits (B, bits, OUTPUTS) of one more window of `think`: `row` (B, bits) after one more step.

        Each place reads the bit to its right, so that it and the two places before it know all it needs. The first two
        places lack their left neighbours, and what they get wrong moves in by a place a step.
        """
        return self.wake(states, self.embed(row.roll(-1, 1)) + pick(self.place, which) + self.write)
