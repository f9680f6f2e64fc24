"""Tables of `serving`: fills the blocks of docs/results/serving.md, one for each model that was served."""

from pathlib import Path

from benchmarks.mode_selection_tables import replace_block

HEAD = (
    "| request | answered | modes obeyed % | same tokens % | asked at once: same % "
    "| transformers, other batch: same % | think % | tokens | ms (quartiles) |"
)


def table(result: dict) -> str:
    """Markdown of one model's numbers."""
    lines = [HEAD, "|---" * 9 + "|"]
    for kind, numbers in result["requests"].items():
        low, middle, high = numbers["milliseconds"]
        rounding = result["transformers_at_two_batch_sizes"][kind]
        shares = [
            numbers["obeyed"],
            numbers["same_as_transformers"],
            numbers["mixed_same_as_transformers"],
            rounding,
            numbers["last_mode"],
        ]
        percent = " | ".join(f"{100 * share:.1f}" for share in shares)
        lines.append(
            f"| {kind} | {numbers['answered']} of {numbers['requests']} | {percent} | {numbers['tokens']:.1f} "
            f"| {middle:.0f} ({low:.0f}-{high:.0f}) |"
        )
    return "\n".join(lines)


def around(result: dict) -> str:
    """What stands below the table."""
    bad, crowd, machine = result["bad"], result["at_once"], result["machine"]
    codes = ", ".join(f"{count} with HTTP {code}" for code, count in bad["status"].items())
    versions = ", ".join(f"{name} {found}" for name, found in machine.items() if name != "device")
    return (
        f"{result['items']} items; prompts are the training's, id for id, in {100 * result['same_prompts']:.0f} % of "
        f"requests. Of {bad['requests']} bad requests were answered: {codes}. All at once: {crowd['requests']} "
        f"requests, {crowd['in_flight']} in flight, {crowd['seconds']:.1f} s. "
        f"{result['near_threshold']} items lie within 0.01 of the threshold. {machine['device']}; {versions}."
    )


def write_page(file: Path, result: dict) -> None:
    """The block of `file`'s name on the page beside its folder: docs/results/serving/NAME.json, .../serving.md."""
    page = file.parent.with_suffix(".md")
    text = page.read_text(encoding="utf-8") if page.exists() else "# Serving results\n"
    page.write_text(replace_block(text, file.stem, f"{table(result)}\n\n{around(result)}"), encoding="utf-8")
