"""Neuron alignment: the order of an expert's hidden neurons in which it is closest to a reference expert.

An expert computes the same function whatever the order of its hidden neurons, so two experts can only be averaged
neuron by neuron once the neurons correspond (section 3.1 of the paper; Git Re-Basin, arXiv 2209.04836). Per expert the
best order is a linear assignment on an F x F matrix of neuron similarities.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId, Role

_BLOCK_BYTES = 16 * 2**20  # of matrices that are made at once


@dataclass(frozen=True)
class Alignment:
    """For each expert of a layer the order of its neurons that matches its reference."""

    permutation_EF: Tensor  # int64: new neuron i is old neuron permutation_EF[e, i]
    reference_E: Tensor  # int64: the expert that e is aligned to, itself for a reference
    gain_E: Tensor  # float64: objective gained over the identity, per unit of the reference's squared norm


def align_by_weight(
    weights: ExpertWeights,
    reference_E: Tensor,
    include_output: bool = True,
    workers: int = 1,
    layer: LayerId = "",
) -> Alignment:
    """Align every expert to its reference by its weights.

    A neuron is its row in every input projection, joined with its input biases and, if ``include_output``, its column
    in the output projection. The permutation maximises the sum over neurons of the inner products with the reference's
    neurons, which minimises the squared distance of the two experts.

    Args:
        weights: the E stacked experts of one layer.
        reference_E: int64 [E], for each expert the one it is aligned to; a reference must refer to itself.
        include_output: whether the output projection takes part.
        workers: threads that solve assignments side by side.
        layer: named in errors.

    Raises:
        ValueError: non-finite weights, or a reference that is no expert or not its own reference.
    """
    require_finite(weights, layer)
    references = _check_reference(reference_E, weights.num_experts, layer)
    matched = weights.names(Role.INPUT, Role.INPUT_BIAS, *((Role.OUTPUT,) if include_output else ()))
    squares_E = torch.zeros(weights.num_experts, dtype=torch.float64)
    for name in matched:
        tensor = weights.tensors[name].flatten(1)
        norms_E = torch.linalg.vector_norm(tensor, dim=1, dtype=torch.promote_types(tensor.dtype, torch.float32))
        squares_E += norms_E.cpu().double().square()

    def product(reference: int, experts: Tensor) -> Tensor:
        """[len(experts), F, F]: inner products of the reference's neurons (rows) with the experts' (columns)."""
        total_CFF: Tensor | None = None
        for name in matched:
            stack = weights.tensors[name].index_select(0, experts.to(weights.tensors[name].device))
            one = weights.tensors[name][reference]
            # Half precision is stored, not computed with: assignments are decided by small differences.
            wide = torch.promote_types(one.dtype, torch.float32)
            one, stack = one.to(wide), stack.to(wide)
            if weights.roles[name] is Role.INPUT:
                rows_FP, columns_CPF = one, stack.transpose(1, 2)
            elif weights.roles[name] is Role.OUTPUT:
                rows_FP, columns_CPF = one.t(), stack
            else:
                rows_FP, columns_CPF = one[:, None], stack[:, None, :]
            rows_CFP = rows_FP.expand(len(experts), *rows_FP.shape)
            if total_CFF is None:
                total_CFF = torch.bmm(rows_CFP, columns_CPF)
            else:
                total_CFF.baddbmm_(rows_CFP, columns_CPF)
        assert total_CFF is not None
        return total_CFF

    blocks = _blocks(references, weights.width, product)
    return _assign(blocks, references, weights.width, squares_E[reference_E.cpu()], workers)


def align_by_activation(
    correlation_EFF: Tensor, reference_E: Tensor, workers: int = 1, layer: LayerId = ""
) -> Alignment:
    """Align every expert to its reference by given correlations of their hidden activations.

    ``correlation_EFF[e, i, j]`` correlates neuron i of expert e's reference with neuron j of expert e
    (``activation_correlation`` computes it). The gain is per neuron: where every correlation rises from zero to one it
    is one.

    Raises:
        ValueError: correlations that are not finite, not square, or not one per expert; a bad reference.
    """
    experts, width = correlation_EFF.shape[0], correlation_EFF.shape[-1]
    references = _check_reference(reference_E, experts, layer)
    if correlation_EFF.shape != (experts, width, width):
        raise ValueError(f"layer {layer!r}: correlations have shape {tuple(correlation_EFF.shape)}, not (E, F, F)")
    bad_E = ~torch.isfinite(correlation_EFF).flatten(1).all(dim=1)
    if bad_E.any():
        raise ValueError(f"layer {layer!r}: correlations of expert {int(bad_E.nonzero()[0])} are not finite")
    blocks = _blocks(references, width, lambda _, experts: correlation_EFF[experts.to(correlation_EFF.device)].float())
    return _assign(blocks, references, width, torch.full((experts,), float(width), dtype=torch.float64), workers)


def align_by_tokens(
    weights: ExpertWeights,
    tokens: Sequence[Tensor],
    activation: ExpertActivation,
    reference_E: Tensor,
    pool_E: Tensor | None = None,
    workers: int = 1,
    layer: LayerId = "",
) -> Alignment:
    """``align_by_activation`` on correlations computed block by block, never E of them at a time.

    Arguments as in ``activation_correlation``.
    """
    require_finite(weights, layer)
    references = _check_reference(reference_E, weights.num_experts, layer)

    def product(reference: int, experts: Tensor) -> Tensor:
        return torch.stack([_pair(weights, tokens, activation, reference, int(e), pool_E) for e in experts])

    blocks = _blocks(references, weights.width, product)
    scale_E = torch.full((weights.num_experts,), float(weights.width), dtype=torch.float64)
    return _assign(blocks, references, weights.width, scale_E, workers)


@torch.no_grad()
def activation_correlation(
    weights: ExpertWeights,
    tokens: Sequence[Tensor],
    activation: ExpertActivation,
    reference_E: Tensor,
    pool_E: Tensor | None = None,
) -> Tensor:
    """[E, F, F] correlations of hidden activations: neuron i of e's reference (row) with neuron j of e (column).

    Args:
        weights: the E stacked experts.
        tokens: for each expert the inputs [T_e, D] routed to it (a reservoir of them).
        activation: from the outputs of the input projections to the hidden activation.
        reference_E: int64 [E].
        pool_E: int64 [E]; expert e and its reference are compared on the tokens of all experts with e's label (group).
            None: on the tokens of the two.

    A neuron that never changes has no correlation: its row or column is zero. So are all where there are fewer than two
    tokens. The pairs of a reference with itself are computed too.
    """
    return torch.stack(
        [
            _pair(weights, tokens, activation, int(reference), expert, pool_E)
            for expert, reference in enumerate(reference_E)
        ]
    )


def correlation(first_TF: Tensor, second_TF: Tensor) -> Tensor:
    """[F, F] Pearson correlation of the columns of two activations over the same tokens; zero where one is constant."""
    if first_TF.shape[0] < 2:
        return first_TF.new_zeros(first_TF.shape[1], second_TF.shape[1], dtype=torch.float32)
    return _standard(first_TF).t() @ _standard(second_TF)


def _standard(hidden_TF: Tensor) -> Tensor:
    centred = hidden_TF.to(torch.promote_types(hidden_TF.dtype, torch.float32))
    centred = centred - centred.mean(dim=0, keepdim=True)
    norm_F = torch.linalg.vector_norm(centred, dim=0)
    # Rounding leaves a constant column with a norm of about eps times its size: that is no variation to correlate.
    constant_F = norm_F <= 1e-6 * torch.linalg.vector_norm(hidden_TF.to(centred.dtype), dim=0)
    return centred * torch.where(constant_F, 0.0, 1.0 / norm_F.clamp(min=torch.finfo(norm_F.dtype).tiny))


@torch.no_grad()
def _pair(
    weights: ExpertWeights,
    tokens: Sequence[Tensor],
    activation: ExpertActivation,
    reference: int,
    expert: int,
    pool_E: Tensor | None,
) -> Tensor:
    if pool_E is None:
        pooled = [reference, expert] if reference != expert else [expert]
    else:
        pooled = (pool_E == pool_E[expert]).nonzero()[:, 0].tolist()
    inputs_TD = torch.cat([tokens[member] for member in pooled])
    first = weights.hidden(reference, inputs_TD, activation)
    return correlation(first, first if expert == reference else weights.hidden(expert, inputs_TD, activation))


def require_finite(weights: ExpertWeights, layer: LayerId) -> None:
    """``ExpertWeights.require_finite`` at the speed of reading, for weights that are used whole anyway."""
    if not all(is_finite(expert) for tensor in weights.tensors.values() for expert in tensor):
        weights.require_finite(layer)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    # Extremes carry every NaN and infinity, and make no mask of the tensor's size on the way.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def apply_permutation(weights: ExpertWeights, permutation_EF: Tensor, layer: LayerId = "") -> ExpertWeights:
    """New weights in which neuron i of expert e is old neuron ``permutation_EF[e, i]``; the function stays the same.

    Also permutes what is shaped like weights and goes with them, such as Fisher information.

    Raises:
        ValueError: not one permutation of the F neurons per expert; names layer, expert and value.
    """
    _check_permutation(weights, permutation_EF, layer)

    def permuted(name: str, tensor: Tensor) -> Tensor:
        axis = weights.neuron_axis(name)
        return tensor.clone() if axis is None else _ordered(tensor, permutation_EF, axis)

    return weights.map(permuted)


@torch.no_grad()
def permute_(weights: ExpertWeights, permutation_EF: Tensor, layer: LayerId = "") -> None:
    """``apply_permutation`` in the memory of ``weights``, some experts at a time: no second copy of a layer.

    Raises:
        ValueError: as ``apply_permutation``.
    """
    _check_permutation(weights, permutation_EF, layer)
    for name, tensor in weights.tensors.items():
        axis = weights.neuron_axis(name)
        if axis is None:
            continue
        count = max(1, _BLOCK_BYTES // max(1, tensor[0].numel() * tensor.element_size()))
        for start in range(0, len(tensor), count):
            block = slice(start, start + count)
            tensor[block] = _ordered(tensor[block], permutation_EF[block], axis)


def _check_permutation(weights: ExpertWeights, permutation_EF: Tensor, layer: LayerId) -> None:
    experts, width = weights.num_experts, weights.width
    if permutation_EF.shape != (experts, width):
        raise ValueError(
            f"layer {layer!r}: permutations have shape {tuple(permutation_EF.shape)}, "
            f"the experts need ({experts}, {width})"
        )
    bad_E = (permutation_EF.sort(dim=1).values != torch.arange(width, device=permutation_EF.device)).any(dim=1)
    if bad_E.any():
        expert = int(bad_E.nonzero()[0])
        raise ValueError(
            f"layer {layer!r}: what is given for expert {expert} is no permutation of 0..{width - 1}: "
            f"{_wrong(permutation_EF[expert].tolist(), width)}"
        )


def _ordered(tensor: Tensor, permutation_EF: Tensor, axis: int) -> Tensor:
    """A copy with the neurons along ``axis``, 1 or 2, in the order of each expert."""
    index_EF = permutation_EF.to(tensor.device)
    if axis == 1:
        return tensor[torch.arange(len(index_EF), device=tensor.device)[:, None], index_EF]
    return tensor.gather(2, index_EF[:, None, :].expand_as(tensor))


def _wrong(order: list[int], width: int) -> str:
    for neuron in order:
        if not 0 <= neuron < width:
            return f"it names neuron {neuron}"
        if order.count(neuron) > 1:
            return f"it names neuron {neuron} {order.count(neuron)} times"
    raise AssertionError("a permutation after all")


def _check_reference(reference_E: Tensor, experts: int, layer: LayerId) -> list[int]:
    if reference_E.shape != (experts,):
        raise ValueError(f"layer {layer!r}: references have shape {tuple(reference_E.shape)}, not ({experts},)")
    references: list[int] = reference_E.tolist()
    for expert, reference in enumerate(references):
        if not 0 <= reference < experts:
            raise ValueError(f"layer {layer!r}: expert {expert} refers to expert {reference} of {experts}")
        if references[reference] != reference:
            raise ValueError(
                f"layer {layer!r}: expert {expert} refers to expert {reference}, which refers on to expert "
                f"{references[reference]}; a reference must refer to itself"
            )
    return references


Block = tuple[list[int], Tensor]


def _blocks(references: list[int], width: int, product: Callable[[int, Tensor], Tensor]) -> Iterator[Block]:
    """Experts that need an assignment with their matrices, a bounded number of bytes at a time."""
    size = max(1, _BLOCK_BYTES // (4 * width * width))
    for reference in sorted(set(references)):
        members = [e for e, its in enumerate(references) if its == reference and e != reference]
        for start in range(0, len(members), size):
            block = members[start : start + size]
            yield block, product(reference, torch.tensor(block))


def _assign(blocks: Iterator[Block], references: list[int], width: int, scale_E: Tensor, workers: int) -> Alignment:
    """Solve the assignments of all blocks, up to ``workers`` at a time, while the next block is computed."""
    permutation_EF = torch.arange(width).repeat(len(references), 1)
    gain_E = torch.zeros(len(references), dtype=torch.float64)
    waiting: deque[tuple[int, Future[tuple[NDArray[np.int64], float]]]] = deque()

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            expert, future = waiting.popleft()
            order_F, gained = future.result()
            permutation_EF[expert] = torch.from_numpy(order_F)
            scale = float(scale_E[expert])
            gain_E[expert] = gained / scale if scale > 0 else 0.0

    # The solver and numpy's large loops release the interpreter lock, so threads share the matrices without copies.
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for experts, matrix_CFF in blocks:
            for expert, matrix in zip(experts, matrix_CFF.cpu().numpy(), strict=True):
                waiting.append((expert, pool.submit(_solve, matrix)))
            # Enough is left to solve while the next block is made; more would only fill memory.
            collect(max(workers, len(experts)))
        collect(0)
    return Alignment(permutation_EF, torch.tensor(references), gain_E)


def _solve(similarity_FF: NDArray[np.floating]) -> tuple[NDArray[np.int64], float]:
    """The assignment of columns to rows with the largest sum, and what it gains over the diagonal."""
    # Measured from the best row of each column, a column whose best row is free costs nothing: where experts correspond
    # the solver's search for a shortest path stops at once. The optimum is the same, the type the solver's own.
    cost_FF = np.subtract(similarity_FF.max(axis=0), similarity_FF, dtype=np.float64)
    # Not at the top: stages that only read an alignment would wait for it a third of a second each.
    from scipy.optimize import linear_sum_assignment

    rows_F, order_F = linear_sum_assignment(cost_FF)
    gained = float(cost_FF.trace() - cost_FF[rows_F, order_F].sum())
    if gained <= 0.0:
        # Ties keep the order they have: aligning twice changes nothing, nor does aligning what carries no signal.
        return rows_F.astype(np.int64), 0.0
    return order_F.astype(np.int64), gained
