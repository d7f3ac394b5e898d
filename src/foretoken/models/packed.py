"""Linear layers whose rows do not depend on how many rows share the pass.

Torch's own matrix product picks another kernel, and so another order of summation, for other row
counts. Weights that oneDNN has packed once are multiplied by one kernel at (nearly) every count,
and several times faster at small ones. For which counts this holds is measured on the machine,
never assumed, and no other count is used: see `RowRule`.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PACKABLE_DTYPES = (torch.float32, torch.bfloat16)
# Rows that the layout is chosen for. Any layout takes any count; this one suits decoding.
TYPICAL_ROWS = 16
# Row counts that the kernel may be called with; others are filled up to the next. Not all counts:
# each costs half a millisecond and some memory when a matrix first meets it, and is measured. Not
# one row: its kernel is another one, and in bfloat16 the difference may hide from a measurement.
COUNTS = (*range(2, 16, 2), *range(16, 32, 4), *range(32, 64, 8), 64, 256)
# More rows than these are split up rather than filled up: several calls are as fast as one.
SPLIT_FROM = 64
# Where the kernel is not the same for many counts, it is called with this one only.
FIXED_COUNT = 8
# Outputs held at once while measuring; matrices with many columns get smaller counts.
MAX_MEASURED_VALUES = 1 << 22
MIN_LARGEST_COUNT = 64
# A count is compared on at least so many outputs: in bfloat16 few of them show a difference.
MIN_COMPARED_VALUES = 1 << 15

Kernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RowRule:
    """Row counts at which a kernel gives every row the same bits.

    Args:
        counts: At least one, ascending. Few rows are filled up to the next of them, many are
            taken in pieces.
    """

    counts: tuple[int, ...]

    def apply(self, kernel: Kernel, rows: Tensor) -> Tensor:
        """Call a kernel on rows, [R, in], in permitted counts only; return [R, out]."""
        pieces = []
        while (size := self._next_piece(len(rows))) < len(rows):
            pieces.append(kernel(rows[:size]))
            rows = rows[size:]
        filling = size - len(rows)
        if filling:
            rows = torch.cat((rows, rows.new_zeros(filling, rows.shape[1])))
        output = kernel(rows)
        if filling:
            output = output[:-filling]
        return torch.cat((*pieces, output)) if pieces else output

    def _next_piece(self, count: int) -> int:
        """Return how many rows the next call takes: fewer than there are, all, or more."""
        index = bisect_left(self.counts, count)
        if index == len(self.counts):
            return self.counts[-1]
        enough = self.counts[index]
        # A count that nearly fits is missing where it did not agree with the others.
        is_near = count <= SPLIT_FROM and enough <= 2 * count
        return enough if is_near or enough == count or index == 0 else self.counts[index - 1]


def measure_rule(
    kernel: Kernel, in_features: int, out_features: int, dtype: torch.dtype
) -> RowRule | None:
    """Find the row counts at which a kernel gives every row the same bits, wherever it stands.

    Args:
        kernel: Takes rows, [R, in], and gives rows, [R, out].
        in_features: Columns of its input.
        out_features: Columns of its output.
        dtype: Of its input.

    Returns:
        The counts of `COUNTS` that agree; one count for all where the small ones do not; None
        where even then a row's place matters.
    """
    limit = max(MIN_LARGEST_COUNT, MAX_MEASURED_VALUES // out_features)
    counts = [count for count in COUNTS if count <= limit]
    generator = torch.Generator().manual_seed(in_features)
    rows = torch.randn(counts[-1], in_features, generator=generator).to(dtype)
    expected = kernel(rows)
    agreeing = tuple(count for count in counts if _agrees(kernel, rows, expected, count))
    if agreeing[0] <= FIXED_COUNT:
        return RowRule(agreeing)
    expected = torch.cat([kernel(piece) for piece in rows.split(FIXED_COUNT)])
    return RowRule((FIXED_COUNT,)) if _agrees(kernel, rows, expected, FIXED_COUNT) else None


def _agrees(kernel: Kernel, rows: Tensor, expected: Tensor, count: int) -> bool:
    """Whether so many rows at once, from several places, give the expected bits."""
    num_places = min(16, -(-MIN_COMPARED_VALUES // (count * expected.shape[1])))
    last = len(rows) - count
    starts = {(3 + 7 * place) % (last + 1) for place in range(num_places)}
    return all(
        torch.equal(kernel(rows[start : start + count]), expected[start : start + count])
        for start in starts
    )


@dataclass(frozen=True, slots=True)
class _PackedKernel:
    """One call of oneDNN, whatever the number of rows; a `RowRule` says which counts are safe."""

    packed: Tensor  # [out, in], opaque
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.packed, self.bias, "none", [], ""
        )
        return output


class PackedMatrix:
    """A weight in oneDNN's layout, with its bias: y = x W^T + b. Made by `pack_matrix`.

    Every row's result has the same bits, whatever other rows share the call.

    Args:
        kernel: The product as a function of rows.
        rule: How rows are handed to it.

    Attributes:
        dtype: Of the weight; of what is multiplied and of the result.
    """

    def __init__(self, kernel: _PackedKernel, rule: RowRule) -> None:
        self.out_features, self.in_features = kernel.packed.shape
        self.dtype: torch.dtype = kernel.packed.dtype
        self.bias = kernel.bias
        self.rule = rule
        self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T + b for x of [..., in]."""
        rows = x.reshape(-1, self.in_features)
        output = self.rule.apply(self._kernel, rows)
        return output.view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """Return a copy of the weight, [out, in], bit for bit the one that was packed."""
        weight: Tensor = self._kernel.packed.to_dense()
        return weight

    def with_bias(self, bias: Tensor | None) -> PackedMatrix | None:
        """Return the same product with another bias; the weight is shared."""
        return self if bias is self.bias else _measured(_PackedKernel(self._kernel.packed, bias))


def pack_matrix(
    weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> PackedMatrix | None:
    """Pack a weight for invariant and fast products.

    Args:
        weight: [out, in], any strides; may be freed afterwards.
        bias: [out], or None; copied.
        dtype: Convert both to it; None leaves them as they are.

    Returns:
        None where oneDNN has no kernel for it on this machine, or none that is invariant.
    """
    dtype = dtype or weight.dtype
    if weight.device.type != "cpu" or dtype not in PACKABLE_DTYPES or not weight.numel():
        return None
    try:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        packed = reorder(_converted(weight.detach(), dtype), TYPICAL_ROWS)
    except (AttributeError, RuntimeError):  # torch was built without oneDNN, or it refuses
        return None
    bias = None if bias is None else bias.detach().to(dtype, copy=True)
    return _measured(_PackedKernel(packed, bias))


def _converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another dtype, in memory that goes back to the system when it is freed.

    Ordinary memory of this size would leave holes between the packed weights.
    """
    if weight.dtype == dtype:
        return weight
    memory = mmap.mmap(-1, weight.numel() * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(weight.shape).copy_(weight)


def _measured(kernel: _PackedKernel) -> PackedMatrix | None:
    """Give a kernel its rule, measured once a process for each kind of matrix."""
    out_features, in_features = kernel.packed.shape
    dtype = kernel.packed.dtype
    # Threads change how the work is split, and so perhaps the rule.
    key = (in_features, out_features, dtype, kernel.bias is None, torch.get_num_threads())
    if key not in _RULES:
        try:
            _RULES[key] = measure_rule(kernel, in_features, out_features, dtype)
        except RuntimeError:
            _RULES[key] = None
    rule = _RULES[key]
    return None if rule is None else PackedMatrix(kernel, rule)


class PackedLinear(nn.Module):
    """Stands in for `nn.Linear` and GPT-2's `Conv1D`, and holds nothing but the packed weight.

    Args:
        matrix: The weight and bias.
    """

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.matrix = matrix

    @property
    def weight(self) -> Tensor:
        """The weight, for code that reads it instead of calling the layer."""
        matrix = self.matrix.with_bias(None)
        return self.matrix.dense() if matrix is None else PackedWeight(matrix)

    @property
    def bias(self) -> Tensor | None:
        """The bias, [out]."""
        return self.matrix.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return self.matrix(x)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedWeight(Tensor):
    """A packed weight that looks like a tensor; `F.linear` with it is the packed product.

    For modules that keep a weight and multiply by it in their own forward, as the routers of
    mixture-of-experts models do. Any other use works on a dense copy.

    Args:
        matrix: The weight, without a bias.
    """

    matrix: PackedMatrix
    converted: dict[Any, Any]

    @staticmethod
    def __new__(cls: type[PackedWeight], matrix: PackedMatrix) -> PackedWeight:
        """Make a tensor with the weight's shape and dtype, and no memory of its own."""
        # One element seen at every index: what bypasses this class reads NaN, not nonsense.
        stub = torch.full((1, 1), torch.nan, dtype=matrix.dtype)
        weight = stub.expand(matrix.out_features, matrix.in_features).as_subclass(cls)
        weight.matrix, weight.converted = matrix, {}
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer a call of torch that has such a weight among its arguments."""
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            product = _packed_product(*args, **kwargs)
            if product is not None:
                return product
        if func in _READS_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _CONVERTS:
            return args[0]._convert(func, args[1:], kwargs)
        args = [arg.matrix.dense() if isinstance(arg, PackedWeight) else arg for arg in args]
        return func(*args, **kwargs)

    def _convert(
        self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Convert to another dtype once: some routers do it in every pass."""
        key = (func, *args, *kwargs.items())
        if key not in self.converted:
            dense = func(self.matrix.dense(), *args, **kwargs)
            matrix = pack_matrix(dense) if isinstance(dense, Tensor) else None
            self.converted[key] = dense if matrix is None else PackedWeight(matrix)
        return self.converted[key]


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return x W^T + b, or None where W is not packed in x's dtype."""
    if not isinstance(weight, PackedWeight) or x.dtype != weight.matrix.dtype:
        return None
    matrix = weight.matrix.with_bias(bias)
    return None if matrix is None else matrix(x)


_RULES: dict[tuple[int, int, torch.dtype, bool, int], RowRule | None] = {}
_CONVERTS = frozenset({Tensor.to, Tensor.type, Tensor.float})
_READS_SHAPE = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    }
)
