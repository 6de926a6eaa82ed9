"""What one HLO instruction costs by arithmetic: its matrix products, its memory traffic, and attention kernels.

All are lower bounds, for the instructions that no cost model covers.
"""

import math
import re
from collections.abc import Iterator

from mlm_jax.compile.hlo import Instruction, Module, array_bytes, array_shapes

# Matrix products of [L, K] by [K, M], or of that size, that each attention kernel runs for a head: scores and mixture in the
# forward pass. The backward pass computes the scores again; from them dV, dP, dK and dQ, in two kernels of which each has
# its own scores and dP (splash), or in one.
KERNEL_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 4,
    "splash_mha_dq": 3,
    "row_attention_forward": 2,
    "row_attention_backward": 5,
    "__cudnn$fmhaScaleBiasSoftmaxBackward": 5,
    "__cudnn$fmhaScaleBiasSoftmax": 2,
    "__cudnn$fmhaSoftmaxBackward": 5,
    "__cudnn$fmhaSoftmax": 2,
}
_SLICES = ("dynamic-slice", "gather", "slice")
_RENAMES = ("bitcast", "copy", "reshape", "convert")


def is_kernel(one: Instruction) -> bool:
    """Whether it is a hand-written kernel: Pallas for TPU, cuDNN for GPU."""
    return one.opcode == "custom-call" and ('"tpu_custom_call"' in one.attributes or '"__cudnn$fmha' in one.attributes)


def kernel_flops(one: Instruction, module: Module) -> tuple[float, int] | None:
    """An attention kernel's floating-point operations and its head dimension, or None for a kernel that is not known."""
    name = one.attribute("custom_call_target") if "__cudnn$" in one.attributes else one.name
    products = next((count for part, count in KERNEL_PRODUCTS.items() if part in name), None)
    row = re.search(r"row_attention_\w+?_(\d+)", name)
    if products and row:
        # [B, L, F] of all heads together: F numbers a token, each in a product with L others.
        batch, length, width = next(shape for kind, shape in array_shapes(one.result) if kind in ("bf16", "f32"))
        return products * 2.0 * batch * length * length * width, int(row[1])
    arrays = [array for operand in one.operands for array in array_shapes(module.result_of(operand))]
    floats = [shape for kind, shape in arrays if kind in ("bf16", "f16", "f32")]
    rank = max(map(len, floats), default=0)  # 4, but for a row alone, which has lost its first dimension
    heads = [shape for shape in floats if len(shape) == rank]
    if products is None or len(heads) < 2 or rank < 3:
        return None
    if name.startswith("splash_mha_dkv") and any(len(shape) > rank for _, shape in array_shapes(one.result)):
        products += 1  # dQ as well, once for each block of keys
    if name.startswith("splash"):
        # [B, H, L, K], or [B, H, K, L]: Splash's lengths are multiples of 128, and no head here is longer than that.
        head_dim, keys = min(heads[0][-2:]), max(heads[1][-2:])
    else:
        head_dim, keys = heads[0][-1], heads[1][1]  # cuDNN's are [B, L, H, K]
    # Splash is told which blocks of keys each block of queries visits: of a local layer [1, blocks, a few].
    grids = [shape[1:] for kind, shape in arrays if kind == "s8" and len(shape) == 3]
    visited = math.prod(grids[0]) / max(grids[0]) ** 2 if name.startswith("splash") and grids else 1.0
    return products * 2.0 * math.prod(heads[0]) * keys * visited, head_dim


def product_flops(one: Instruction, module: Module) -> float:
    """Floating-point operations of the matrix products in an instruction or in what it is fused of."""
    return sum(_dot_flops(member, module) for member in _members(one, module) if member.opcode == "dot")


def _members(one: Instruction, module: Module) -> Iterator[Instruction]:
    yield one
    if one.opcode == "fusion":
        for member in module.computations.get(one.attribute("calls"), []):
            yield from _members(member, module)


def _dot_flops(one: Instruction, module: Module) -> float:
    (_, left), *_ = array_shapes(module.result_of(one.operands[0]))
    (_, result), *_ = array_shapes(one.result)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in axes)


def traffic(one: Instruction, module: Module) -> int:
    """Bytes that an instruction reads from and writes to the device's main memory, each once.

    Of an operand that is only sliced or looked up, what is taken counts; of one that is updated in place, the update.
    """
    body = module.computations.get(one.attribute("calls"), []) if one.opcode == "fusion" else []
    if not body:
        return _simple_traffic(one, module)
    named = {member.name: member for member in body}
    root = next(member for member in body if member.is_root)
    results = root.operands if root.opcode == "tuple" else [root.name]
    in_main_memory = array_bytes(one.result, of_main_memory=True) > 0
    written = sum(_written(named[name], named) for name in results) if in_main_memory else 0
    parameters = {int(member.arguments): member.name for member in body if member.opcode == "parameter"}
    read = 0
    for index, operand in enumerate(one.operands):
        whole = array_bytes(module.result_of(operand), of_main_memory=True)
        read += min(whole, _read(parameters.get(index, ""), body, whole))
    return written + read


def _simple_traffic(one: Instruction, module: Module) -> int:
    written = array_bytes(one.result, of_main_memory=True)
    if one.opcode in _SLICES:
        return 2 * written
    if one.opcode == "dynamic-update-slice":
        return 2 * array_bytes(module.result_of(one.operands[1]), of_main_memory=True)
    return written + sum(array_bytes(module.result_of(name), of_main_memory=True) for name in one.operands)


def _written(result: Instruction, named: dict[str, Instruction]) -> int:
    source = result
    while source.opcode in _RENAMES and source.operands and source.operands[0] in named:
        source = named[source.operands[0]]
    if source.opcode == "dynamic-update-slice" and source.operands[1] in named:
        return array_bytes(named[source.operands[1]].result)
    return array_bytes(result.result)


def _read(parameter: str, body: list[Instruction], whole: int) -> int:
    users = [member for member in body if parameter in member.operands]
    total = 0
    for user in users:
        if user.opcode in _SLICES and user.operands[0] == parameter:
            total += array_bytes(user.result)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter:
            continue
        elif user.opcode == "bitcast":
            total += _read(user.name, body, whole)
        else:
            return whole
    return total
