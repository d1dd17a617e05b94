"""What a linear layer on a grid sends: closed formulas, and the choice between its two variants.

Elements that one rank receives, for a weight of ``W`` elements (stored rows of padding included), an input of ``X`` and
an output of ``Y`` elements over all ranks, g ranks in the gather and r in the reduce group:

===========  ====================================================  ==========================================
variant      forward                                               backward
===========  ====================================================  ==========================================
weights      ``(W (g-1) + Y (r-1)) / (g r)``                       ``(2 W (g-1) + Y (r-1)) / (g r)``
activations  ``(X (g-1) + Y (r-1) + Y a) / (g r)``                 ``(2 X (g-1) + Y (r-1) + Y a) / (g r)``
===========  ====================================================  ==========================================

``a`` is the share of a rank's result that it does not keep itself when results are sent home. Gradients of biases are
summed over the gather group besides, ``2 (g-1)/g`` of their local part.

Where activations travel there is a message more in each direction, the way home and back. A message takes time however
short it is: as much as so many bytes (`MESSAGE`) that bytes do not decide for small layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.sharding.linear import Plan, Variant

MESSAGE = 1 << 18
"""Elements that could travel in the time that one more message costs: 1 MiB of float32. gloo needs about 0.5 to 1 ms
a message and moves 1 to 2 GB/s; for NCCL, some 10 us at 25 to 200 GB/s, it is of that order too, but not measured."""


@dataclass(frozen=True)
class Shapes:
    """Elements of one layer over all ranks of an instance.

    Attributes:
        weight: Of the weight, stored padding included.
        x: Of the input.
        y: Of the output.
        bias: Of the bias, 0 without.
        needs_x: Whether the input wants a gradient.
    """

    weight: int
    x: int
    y: int
    bias: int = 0
    needs_x: bool = True


def can_move_activations(plan: Plan) -> bool:
    """Whether output features can be cut into equal parts over all ranks of the grid."""
    g, r = plan.gather_size, plan.reduce_size
    return (plan.features * r) % (g * r) == 0 and plan.rows * g == plan.features * r


def received(plan: Plan, shapes: Shapes, variant: Variant) -> tuple[float, float]:
    """Elements that this rank receives, (forward, backward)."""
    g, r = plan.gather_size, plan.reduce_size
    if g * r == 1:
        return 0.0, 0.0
    output = shapes.y * (r - 1) / (g * r)
    bias = 2 * (g - 1) / g * shapes.bias / r
    if variant == "weights":
        weight = shapes.weight * (g - 1) / (g * r)
        return weight + output, (1 + shapes.needs_x) * weight + output + bias
    x, away = shapes.x * (g - 1) / (g * r), shapes.y / (g * r) * sent_away(plan)
    return x + output + away, (1 + shapes.needs_x) * x + output + away + bias


def sent_away(plan: Plan) -> float:
    """Share of its own output block that a rank gets from others where activations travel."""
    me = plan.gather_index, plan.reduce_index
    kept = [divmod(plan.reduce_index * plan.gather_size + part, plan.reduce_size) for part in range(plan.gather_size)]
    return sum(place != me for place in kept) / plan.gather_size


def cheaper(plan: Plan, shapes: Shapes, training: bool = True, message: int = MESSAGE) -> Variant:
    """The variant for which the busiest rank waits less for others; weights where both are equal.

    Args:
        plan: Of the layer.
        shapes: Its sizes, which depend on the batch.
        training: Count the backward pass too.
        message: What a message costs, in elements; 0: only what is received counts.
    """
    if not can_move_activations(plan):
        return "weights"
    g, r = plan.gather_size, plan.reduce_size
    passes, away = 2 + shapes.needs_x if training else 1, _most_sent_away(g, r)
    weights = passes * shapes.weight * (g - 1) / (g * r)
    activations = passes * shapes.x * (g - 1) / (g * r)
    activations += (1 + training) * (shapes.y / (g * r) * away + message * (away > 0))
    return "activations" if activations < weights else "weights"


def _most_sent_away(g: int, r: int) -> float:
    """`sent_away` of the rank for which it is largest."""
    shares = []
    for gather_index in range(g):
        for reduce_index in range(r):
            sources = [divmod(reduce_index * g + part, r) for part in range(g)]
            shares.append(sum(place != (gather_index, reduce_index) for place in sources) / g)
    return max(shares)
