"""The measurements of `bench` as a table for reading."""

from collections.abc import Iterator, Mapping
from typing import Any

Result = Mapping[str, Any]


def format_table(result: Result) -> str:
    """What `run_bench` returned, in lines of at most 120 characters."""
    against = [block for other in result["against"] for block in (_against(other, result["config"]), _operations(other))]
    blocks = [
        _heading(result),
        _step(result),
        _peer(result),
        _loader(result),
        _operations(result),
        *against,
        _memory(result),
    ]
    return "\n\n".join("\n".join(block) for block in map(list, blocks) if block)


def _heading(result: Result) -> Iterator[str]:
    devices = f"{result['num_devices']} × {result['device']}" if result["num_devices"] > 1 else result["device"]
    rows = "random rows" if result["rows"] == "random" else f"rows of {result['rows']}"
    yield f"{result['config']}, stage {result['stage']}: {_shape(result)}"
    yield f"{devices} ({result['platform']}, {result['threads']} threads on the host), {rows}"
    if result["load"] > 0.75 * result["threads"]:
        # Threads that wait for each other suffer most, so a loaded machine distorts the ratio to a peer, too.
        yield f"the machine was busy before this began (load {result['load']:.1f}): do not trust these times"


def _shape(result: Result) -> str:
    micro_batches = f" in {result['accumulation']} micro-batches" if result["accumulation"] > 1 else ""
    rows = f"{result['batch_size']} rows of {result['seq_len']} tokens{micro_batches}"
    return f"{rows}, {result['parameters']:,} parameters, {result['dtype']}"


def _step(result: Result) -> Iterator[str]:
    step = result["step"]
    title = f"step: {step['rounds']} rounds of {step['steps']}"
    yield f"{title:28}{'median':>12}{'min':>12}{'max':>12}"
    yield _spread("  milliseconds", step["milliseconds"], ",.2f")
    yield _spread("  tokens/s", step["tokens_per_second"], ",.0f")
    mfu = "MFU unknown, as the device's peak is" if step["mfu"] is None else f"MFU {step['mfu']:.1%}"
    yield (f"  {step['flops_per_second'] / 1e9:,.1f} GFLOP/s at {step['flops_per_token'] / 1e6:,.2f} MFLOP a token; {mfu}")
    cached = ", read from the compilation cache" if step["compiled_from_cache"] else ""
    yield f"  compiled in {step['compile_seconds']:.1f} s{cached}"


def _peer(result: Result) -> Iterator[str]:
    peer = result["peer"]
    if peer is None:
        return
    versions = ", ".join(f"{name} {version}" for name, version in peer["versions"].items())
    yield f"peer: {peer['name']}"
    extra = peer["extra_parameters"]
    also = f", of which {extra} are a token-type table that ours does without" if extra else ""
    yield f"  {versions}; {peer['parameters']:,} parameters{also}"
    yield _spread("  milliseconds", peer["milliseconds"], ",.2f")
    yield _spread("  tokens/s", peer["tokens_per_second"], ",.0f")
    yield _spread("  ours / peer, by round", peer["ratio"], ".3f")
    yield "  rounds: " + " ".join(f"{ratio:.3f}" for ratio in peer["ratios"])


def _against(other: Result, config: str) -> Iterator[str]:
    step = other["step"]
    yield f"against {other['config']}: {_shape(other)}"
    yield _spread("  milliseconds", step["milliseconds"], ",.2f")
    yield _spread("  tokens/s", step["tokens_per_second"], ",.0f")
    yield _spread(f"  as a share of {config}"[:28], other["ratio"], ".3f")
    yield f"  by arithmetic alone, at {step['flops_per_token'] / 1e6:,.2f} MFLOP a token: {other['ratio_by_flops']:.3f}"


def _loader(result: Result) -> Iterator[str]:
    loader = result["loader"]
    if loader is None:
        yield "loader: not measured; give a prepared corpus with --data"
        return
    yield f"loader alone, {loader['rows']:,} rows{'':>8}{'all threads':>14}{'one core':>14}"
    for unit in ("rows", "tokens"):
        whole, core = loader[f"{unit}_per_second"], loader[f"{unit}_per_core_second"]
        yield f"  {f'{unit}/s':34}{whole:14,.0f}{core:14,.0f}"


def _operations(result: Result) -> Iterator[str]:
    traced = result["operations"]
    total = traced["milliseconds"]
    yield f"{'time by operation':28}{'ms/step':>12}{'share':>12}{'backward':>12}{'in matrix products':>22}"
    for name, group in traced["groups"].items():
        own = group["milliseconds"]
        yield f"  {name:26}{own:12,.2f}{own / total:12.1%}{group['backward']:12,.2f}{group['matrix_products']:22,.2f}"
    yield f"  {'no operation':26}{total * (1 - traced['covered']):12,.2f}{1 - traced['covered']:12.1%}"
    phases = ", ".join(f"{name} {value:,.2f}" for name, value in traced["phases"].items())
    yield f"  {phases} ms"
    yield f"  {traced['steps']} traced steps of {total:,.2f} ms; a fusion counts where its matrix product or result is"


def _memory(result: Result) -> Iterator[str]:
    memory = result["memory"]
    planned = {name: memory[name] / 2**20 for name in ("arguments", "outputs", "outputs_in_arguments", "temporaries")}
    yield (
        f"memory planned a device: {planned['arguments']:,.1f} MiB of arguments, {planned['outputs']:,.1f} of outputs "
        f"({planned['outputs_in_arguments']:,.1f} in their place), {planned['temporaries']:,.1f} of temporaries"
    )
    device = "" if memory["device_peak"] is None else f"; of the device {memory['device_peak'] / 2**20:,.0f}"
    yield f"  peak of the process, compilation included: {memory['process_peak'] / 2**20:,.0f} MiB{device}"


def _spread(label: str, values: Mapping[str, float], style: str) -> str:
    return f"{label:28}" + "".join(f"{format(values[name], style):>12}" for name in ("median", "min", "max"))
