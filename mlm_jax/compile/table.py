"""What `compile` found as a table for reading."""

from collections.abc import Iterator, Mapping
from typing import Any

Result = Mapping[str, Any]
GiB = 2**30


def format_result(result: Result) -> str:
    """What `run_compile` returned, in lines of at most 120 characters."""
    blocks = [_heading(result), _memory(result), _estimate(result), _groups(result), _collectives(result)]
    return "\n\n".join("\n".join(block) for block in map(list, blocks) if block)


def _heading(result: Result) -> Iterator[str]:
    mesh = " × ".join(f"{name}={size}" for name, size in result["mesh"].items()) + (", ZeRO" if result["zero"] else "")
    micro = f" in {result['accumulation']} micro-batches" if result["accumulation"] > 1 else ""
    yield (
        f"{result['config']}, stage {result['stage']}: {result['batch_size']} rows of {result['seq_len']} tokens{micro}, "
        f"{result['parameters']:,} parameters"
    )
    yield (
        f"compiled in {result['compile_seconds']:.0f} s for {result['topology']}: {result['num_devices']} × "
        f"{result['device']}, {mesh}"
    )
    yield (
        f"{result['dtype']}, layers {result['layers']}, remat {result['remat']}, attention {result['attention']}; "
        "no device was used"
    )


def _memory(result: Result) -> Iterator[str]:
    memory = result["memory"]
    yield f"{'memory of a device':30}{'GiB':>10}{'share':>10}"
    for kind, size in memory["kinds"].items():
        if size:
            yield f"  {kind:28}{size / GiB:10.2f}{size / memory['limit']:10.1%}"
    yield f"  {'together':28}{memory['total'] / GiB:10.2f}{memory['total'] / memory['limit']:10.1%}"
    yield f"  {'of':28}{memory['limit'] / GiB:10.2f}"


def _estimate(result: Result) -> Iterator[str]:
    estimate = result["estimate"]
    mfu = "unknown" if estimate["mfu"] is None else f"{estimate['mfu']:.1%}"
    arithmetic = f"{estimate['roofline_milliseconds']:,.2f} ms"
    if estimate["method"] == "roofline":
        yield f"ROOFLINE, as no compiler estimates a GPU's time: at least {estimate['milliseconds']:,.2f} ms a step"
        speed, how = "at most", f"{arithmetic} of all else, by its products or its memory traffic"
    else:
        yield f"ESTIMATE by the compiler's cost model, nothing was measured: {estimate['milliseconds']:,.2f} ms a step"
        speed, how = "about", f"{arithmetic} of what the model leaves out, by its memory traffic"
    yield (
        f"  {speed} {estimate['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, at {result['flops_per_token'] / 1e6:,.1f} "
        f"MFLOP a token and {result['tokens']:,} tokens a step"
    )
    kernels = f"{estimate['kernel_milliseconds']:,.2f} ms of attention kernels"
    yield f"  by arithmetic: {kernels}, by their matrix products{_fill(result)};"
    yield f"  {how}; and the collectives"
    for what, count in estimate["unknown"].items():
        yield f"  {count} {what}: the step is longer than this"


def _fill(result: Result) -> str:
    fill = result["estimate"]["kernel_fill"]
    return "" if fill == 1 else f" at {fill:.0%} of the peak, as much as a head fills"


def _groups(result: Result) -> Iterator[str]:
    total = result["estimate"]["milliseconds"]
    title = f"{result['estimate']['method']} by operation"
    yield f"{title:30}{'ms':>10}{'share':>10}{'backward':>12}{'products':>12}"
    for name, group in result["estimate"]["groups"].items():
        own = group["milliseconds"]
        yield f"  {name:28}{own:10,.2f}{own / total:10.1%}{group['backward']:12,.2f}{group['matrix_products']:12,.2f}"


def _collectives(result: Result) -> Iterator[str]:
    if not result["collectives"]:
        return
    yield f"{'collectives of a step':30}{'count':>10}{'MB':>10}{'ms':>12}  on the links alone"
    for found in result["collectives"]:
        name = f"{found['kind']} over {found['axes']}"
        yield f"  {name:28}{found['count']:10}{found['bytes'] / 1e6:10,.2f}{found['milliseconds']:12,.3f}"


def format_plan(plan: Result) -> str:
    """What `run_plan` returned."""
    lines = [f"{plan['config']}, stage {plan['stage']}, on {plan['topology']}: the estimate of each way that was compiled"]
    lines.append(f"{'ms':>12}{'MFU':>8}{'GiB':>8}")
    for one in plan["candidates"]:
        how = " ".join(one["overrides"]) or "the config as it is"
        if not one["fits"]:
            lines.append(f"{'failed':>28}  {how}: {one['reason']}")
            continue
        mfu = "" if one["mfu"] is None else f"{one['mfu']:.1%}"
        lines.append(f"{one['milliseconds']:12,.2f}{mfu:>8}{one['memory'] / GiB:8.2f}  {how}")
    best = " ".join(plan["overrides"]) or "nothing: the config as it is comes out first"
    return "\n".join([*lines, "", format_result(plan["best"]), "", f"best: {best}"])


TABLE_HEAD = (
    "| Recipe | Rows × length | Topology | Execution | GiB of a chip | Estimated ms | Collectives | Tokens/s | MFU |\n"
    "|--|--|--|--|--|--|--|--|--|"
)


def format_row(result: Result) -> str:
    """A stage on a topology as a line of a Markdown table."""
    if "reason" in result:
        return f"| {result['config']} | stage {result['stage']} | {result['topology']} | {result['reason']} ||||||"
    estimate, memory = result["estimate"], result["memory"]
    axes = " ".join(f"{name} {size}" for name, size in result["mesh"].items() if size > 1) or "one device"
    mesh = axes + (" ZeRO" if result["zero"] else "")
    micro = f" / {result['accumulation']}" if result["accumulation"] > 1 else ""
    least, most = {"estimate": ("", ""), "roofline": ("≥ ", "≤ ")}[estimate["method"]]
    collectives = estimate["groups"].get("collectives", {"milliseconds": 0.0})["milliseconds"]
    mfu = "" if estimate["mfu"] is None else f"{most}{estimate['mfu']:.1%}"
    return (
        f"| {result['config']} | {result['batch_size']:,}{micro} × {result['seq_len']} | {result['topology']} "
        f"| {mesh}, {result['layers']}, remat {result['remat']}, {result['attention']} "
        f"| {memory['total'] / GiB:.2f} of {memory['limit'] / GiB:.2f} | {least}{estimate['milliseconds']:,.1f} "
        f"| {collectives:,.1f} | {most}{estimate['tokens_per_second']:,.0f} | {mfu} |"
    )
