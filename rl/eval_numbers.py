"""From the measurements of `siesta eval` to what evaluation.json holds. Pure numpy; fields are explained in the guide.

All numbers of a checkpoint come from the same rollouts and the same bootstrap samples; those over checkpoints resample
checkpoints and items.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from siesta.rl import frontier, voting
from siesta.rl.calibration import bins_table, calibration
from siesta.rl.latency import Latency, with_milliseconds
from siesta.rl.policies import Measurement, choices, per_item, scorable_items, table
from siesta.rl.resampling import Estimate, estimate, over_runs, resample_weights, weighted_mean


@dataclass(frozen=True)
class Setting:
    """How numbers are made.

    Args:
        resamples, seed: Of the bootstrap.
        thresholds: On p of the last mode; None: at every tenth of the think share.
        keep: Also the highest threshold that keeps this share of the last mode's accuracy.
    """

    resamples: int
    seed: int
    thresholds: Sequence[float] | None = None
    keep: float | None = None


def priced(measured: Measurement, setting: Setting) -> tuple[Measurement, np.ndarray, np.ndarray]:
    """The items that can be priced, their clusters, and bootstrap weights that are the same for every checkpoint,
    whichever items it loses.
    """
    places = np.arange(len(measured.levels))
    clusters = places if measured.contexts is None else measured.contexts
    weights = resample_weights(clusters, resamples=setting.resamples, seed=setting.seed)
    usable = scorable_items(replace(measured, contexts=places)).contexts
    assert usable is not None
    arrays = {f.name: getattr(measured, f.name) for f in fields(measured)}
    kept = replace(measured, **{k: v[usable] for k, v in arrays.items() if isinstance(v, np.ndarray)})
    return kept, clusters[usable], weights[:, usable]


def policy_estimates(measured: Measurement, weights: np.ndarray) -> dict[str, Estimate]:
    """Accuracy, tokens, share of the last mode and regret of every policy: `greedy/free/accuracy` and so on."""
    found = {}
    for decoding in ("greedy", "sampled"):
        greedy = decoding == "greedy"
        for policy, choice in choices(measured, greedy=greedy).items():
            values = per_item(measured, choice, greedy=greedy) | {"share": choice[:, -1]}
            for name in ("accuracy", "tokens", "share", "regret"):
                column = values[name]
                own = estimate(lambda w, column=column: weighted_mean(column, w), weights)
                found[f"{decoding}/{policy}/{name}"] = own
    return found


def voting_numbers(
    measured: Measurement, clusters: np.ndarray, weights: np.ndarray, setting: Setting
) -> tuple[dict, dict[str, Estimate]]:
    """The section `voting` of a checkpoint, and its estimates by name."""
    free = choices(measured, greedy=False)["free"]
    values = per_item(measured, free, greedy=False)
    accuracy = estimate(lambda w: weighted_mean(values["accuracy"], w), weights)
    named, section = {}, {}
    for kind, rows in voting.equal_tokens(measured, clusters, weights, seed=setting.seed).items():
        section[kind] = {}
        for name, own in rows.items():
            ahead = accuracy - own
            section[kind][name] = {"accuracy": own.numbers(), "free_ahead": ahead.numbers()}
            named[f"voting/{kind}/{name}/free_ahead"] = ahead
    budget = {"tokens": float(values["tokens"].mean()), "accuracy": accuracy.numbers()}
    bins = "level" if len(np.unique(measured.levels)) > 1 else "p(think)"
    return {
        "curves": voting.curves(measured, seed=setting.seed),
        "equal_tokens": {"free": budget, "difficulty": bins, **section},
    }, named


def checkpoint_numbers(
    measured: Measurement, latency: Latency | None, setting: Setting
) -> tuple[dict, dict[str, Estimate]]:
    """What evaluation.json says of one checkpoint, and the estimates that are compared over checkpoints.

    Raises:
        DataError: No item could be scored.
    """
    bootstrap = {"resamples": setting.resamples, "seed": setting.seed}
    result = table(measured, **bootstrap)
    measured, clusters, weights = priced(measured, setting)
    named = policy_estimates(measured, weights)
    if len(measured.modes) > 1:
        p = measured.mode_probs[:, -1]
        result["frontier"] = {}
        for decoding in ("greedy", "sampled"):
            greedy = decoding == "greedy"
            own = frontier.areas(measured, weights, greedy=greedy)
            named |= {f"frontier/{decoding}/{name}": value for name, value in own.items()}
            section = {name: value.numbers() for name, value in own.items()}
            thresholds = set(setting.thresholds or frontier.thresholds_by_share(p))
            if setting.keep is not None:
                kept = frontier.highest_keeping(measured, setting.keep, greedy=greedy)
                section["keeps"] = {"share": setting.keep, "threshold": kept}
                thresholds.add(kept)
            rows = frontier.points(measured, sorted(thresholds, reverse=True), greedy=greedy, **bootstrap)
            result["frontier"][decoding] = section | {"points": rows}
        own = calibration(measured, weights)
        named |= {f"calibration/{name}": value for name, value in own.items()}
        numbers = {name: value.numbers() for name, value in own.items()}
        result["calibration"] = numbers | {"bins": bins_table(measured, weights)}
    if measured.drawn_scores is not None and measured.drawn_scores.shape[2] > 1:
        result["voting"], own = voting_numbers(measured, clusters, weights, setting)
        named |= own
    result["latency"] = None if latency is None else vars(latency)
    return (result if latency is None else with_milliseconds(result, latency)), named


def over_checkpoints(named: Sequence[dict[str, Estimate]], seed: int) -> dict[str, dict]:
    """Each number over checkpoints: mean, interval over checkpoints and items, and the value of each."""
    result = {}
    for name in named[0]:
        own = [each[name] for each in named if name in each]
        if len(own) == len(named):
            values = [None if np.isnan(each.value) else each.value for each in own]
            result[name] = over_runs(own, seed=seed).numbers() | {"each": values}
    return result
