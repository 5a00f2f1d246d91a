"""Predicts memory and speed of each way to lay a run out, and chooses one: what 'autodist' means.

Memory follows from what `measure` finds at two sizes of a micro-batch; speed is arithmetic. Sizes are in
bytes unless a name says otherwise.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from errors import UserError
from plan import measure
from plan.devices import Device

GIB = 2**30
MODES = ("none", "selective", "full")
# What a compiled layer keeps for backward, beside an eager one: 0.69 to 0.70 and 0.91 to 0.93 at four widths.
# tests/test_planner.py counts it again.
COMPILED_KEEPS = dict(zip(MODES, (0.69, 0.92, 1.0), strict=True))
# Shares of the device's rate that matrix products and attention reach within a whole step.
PRODUCTS, ATTENTION = 0.55, 0.35
# How often what a layer keeps passes through the device's memory in forward, and in backward.
PASSES = {"eager": (5, 7), "compiled": (2, 3)}
STATE_PASSES = 2.5  # norm, clipping and AdamW read the whole state, and write most of it
NODE_GBPS = 50.0  # what a device sends to other nodes: each has a network adapter of 400 Gbit/s
CONTEXT_GIB, USABLE = 1.5, 0.95  # CUDA's and nccl's own memory; what fragmentation leaves of the rest
NODE_DEVICES, MOST_DEVICES, LONGEST = 8, 1024, 2**20


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be laid out. `pinned` holds the fields of a Plan that are given."""

    model: measure.Model
    device: Device
    on_cpu: bool
    limit_gib: float  # of what tensors may take of a device
    ranks: int
    node_ranks: int  # those that share a node
    global_batch_size: int
    micro_batch_size: int  # the smallest
    pinned: dict
    pretrained: bool
    compiled: bool

    @property
    def layers(self) -> int:
        return measure.facts(self.model)["layers"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A candidate. Its peak is that of the rank with the most; tokens per second are the whole cluster's."""

    dp_shard: int
    dp_replicate: int = 1
    recompute: str | int = "full"
    micro_batch_size: int = 1
    grad_accumulation_steps: int = 1
    reshard_after_forward: bool = True
    state_gib: float = 0.0  # weights, gradients, AdamW's moments
    activations_gib: float = 0.0  # what the layers keep for backward
    work_gib: float = 0.0  # all else at the peak: gathered weights, the loss, a layer at work
    predicted_peak_gib: float = 0.0
    predicted_tokens_per_second: float = 0.0
    fits: bool = False
    why: str = ""


def usable_gib(device: Device) -> float:
    """What tensors may take of a GPU's memory."""
    return USABLE * device.memory_gib - CONTEXT_GIB


def as_json(plans: list[Plan]) -> dict:
    """What --output_path writes of `search`'s result."""
    rows = [asdict(plan) for plan in plans]
    return {"chosen": rows[0] if rows[0]["fits"] else None, "candidates": rows}


# ---------------------------------------------------------------- choose


def search(run: Run) -> list[Plan]:
    """All candidates with their predictions: the chosen one in front, then those that fit, the fastest first.

    Of the plans within a hundredth of the fastest, the one with the least recompute is chosen, then the one
    with the least memory.
    """
    plans = [plan for layout in _layouts(run) for plan in _recomputes(run, layout)]
    speed = max((plan.predicted_tokens_per_second for plan in plans if plan.fits), default=0.0)
    fast = [plan for plan in plans if plan.fits and plan.predicted_tokens_per_second >= 0.99 * speed]
    best = min(fast, key=lambda plan: (_again(run, plan), plan.predicted_peak_gib), default=None)

    def order(plan: Plan) -> tuple:
        too_large = 0.0 if plan.fits else plan.predicted_peak_gib
        return plan is not best, too_large, -plan.predicted_tokens_per_second

    return [replace(plan, why=_why(run, plan, best)) for plan in sorted(plans, key=order)]


def choose(run: Run, measure_now: bool = True) -> Plan:
    """The best plan; if none fits, the smallest. Raises NotMeasured if it may not measure what it needs."""
    return search(replace(run, model=replace(run.model, now=measure_now)))[0]


def check_state(run: Run, name: str) -> None:
    """Raises UserError if weights, gradients and optimizer alone exceed a device."""
    shards = run.ranks // run.pinned.get("dp_replicate", 1)
    needed, has = state(run, shards) / GIB, run.device.memory_gib
    if needed > has:
        raise UserError(
            f"{name} does not fit: weights, gradients and AdamW take {needed:.1f} GiB on each of {run.ranks} "
            f"devices, which have {has:.1f} GiB",
            f"Use {what_would_fit(run)}",
        )


def refuse(run: Run, plan: Plan) -> None:
    """Raises UserError, as the plan with the least memory does not fit."""
    raise UserError(
        f"no plan fits: the smallest needs {plan.predicted_peak_gib:.1f} GiB, and {run.limit_gib:.1f} GiB "
        "are allowed (--mem_constraint)",
        f"Use {what_would_fit(run)}",
    )


def _why(run: Run, plan: Plan, best: Plan | None) -> str:
    if not plan.fits:
        return f"needs {plan.predicted_peak_gib:.1f} of {run.limit_gib:.1f} GiB"
    if plan is best:
        return "the fastest that fits"
    slower = 1 - plan.predicted_tokens_per_second / best.predicted_tokens_per_second
    if slower >= 0.01:
        return f"{slower:.0%} slower"
    more = plan.predicted_peak_gib - best.predicted_peak_gib
    if more <= 0 and _again(run, plan) > _again(run, best):
        return "as fast with more recompute"
    return f"as fast with {abs(more):.1f} GiB {'more' if more > 0 else 'less'}"


def _layouts(run: Run) -> Iterator[Plan]:
    """Every layout, without its recompute. All have the same global batch."""
    rows, free = run.global_batch_size // run.ranks, {}
    nodes, rest = divmod(run.ranks, run.node_ranks)
    free["dp_replicate"] = [1, nodes] if not rest and 1 < nodes < run.ranks else [1]
    free["micro_batch_size"] = [run.micro_batch_size * 2**n for n in range(12)]
    free["reshard_after_forward"] = [True, False]
    choices = [[run.pinned[name]] if name in run.pinned else values for name, values in free.items()]
    for replicas, size, reshard in itertools.product(*choices):
        if rows % size == 0:
            shape = dict(dp_shard=run.ranks // replicas, dp_replicate=replicas, reshard_after_forward=reshard)
            yield Plan(**shape, micro_batch_size=size, grad_accumulation_steps=rows // size)


def _recomputes(run: Run, layout: Plan) -> list[Plan]:
    """The layout with each recompute: none, the fewest layers that make it fit, selective, full."""
    if "recompute" in run.pinned:
        return [predict(run, replace(layout, recompute=run.pinned["recompute"]))]
    none, selective, full = (predict(run, replace(layout, recompute=mode)) for mode in MODES)
    counts = range(1, run.layers) if full.fits and not none.fits else ()
    some = (predict(run, replace(layout, recompute=count)) for count in counts)
    return [none, *[plan for plan in some if plan.fits][:1], selective, full]


def longest_sequence(run: Run) -> int:
    """The most tokens in a row, in steps of 1,024, that fit with one row in a micro-batch."""
    fitting, beyond = 0, LONGEST // 1024 + 1
    while beyond - fitting > 1:  # the memory grows with the row
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if _fits(run, run.ranks, middle * 1024) else (fitting, middle)
    return fitting * 1024


def fewest_devices(run: Run) -> int | None:
    """The fewest devices that fit with one row in a micro-batch, up to the most that we plan for."""
    return next((n for n in range(1, MOST_DEVICES + 1) if _fits(run, n, run.model.tokens)), None)


def _fits(run: Run, ranks: int, tokens: int) -> bool:
    """Does the smallest plan fit, with so many tokens in a micro-batch?"""
    shards = ranks // run.pinned.get("dp_replicate", 1) or 1
    plan = Plan(dp_shard=shards, recompute=run.pinned.get("recompute", "full"))
    return sum(memory(run, plan, tokens)) <= run.limit_gib * GIB


# ---------------------------------------------------------------- predict


def predict(run: Run, plan: Plan) -> Plan:
    """The plan with its memory, its speed, and whether it fits."""
    state_gib, activations_gib, work_gib = (part / GIB for part in memory(run, plan))
    peak_gib = state_gib + activations_gib + work_gib
    return replace(
        plan,
        **dict(state_gib=state_gib, activations_gib=activations_gib, work_gib=work_gib),
        predicted_peak_gib=peak_gib,
        predicted_tokens_per_second=run.global_batch_size * run.model.tokens / step_seconds(run, plan),
        fits=peak_gib <= run.limit_gib,
    )


def memory(run: Run, plan: Plan, tokens: int | None = None) -> tuple[float, float, float]:
    """A rank's state, activations and work; tokens: in a micro-batch, if not the plan's."""
    layers, tokens = run.layers, tokens or plan.micro_batch_size * run.model.tokens
    counts = {"none": 0, "selective": 0, "full": layers}
    full = min(layers, counts.get(plan.recompute, plan.recompute))
    mode = "selective" if plan.recompute == "selective" else "none"
    kept = (layers - full) * _kept(run, mode, tokens) if full < layers else 0.0
    activations = kept + (full * _kept(run, "full", tokens) if full else 0.0)
    # The peak is at the loss, or in backward: of the last layer that does not recompute, when all is still
    # kept, or of the last that does, when what the others kept is free again.
    works = [_work(run, mode, tokens)] if full < layers else []
    works += [_work(run, "full", tokens) - kept] if full else []
    gathered = 0 if plan.reshard_after_forward else (layers - 1) * _gathered(run, "layer", plan.dp_shard)
    return state(run, plan.dp_shard), activations, max(works) + gathered


def state(run: Run, shards: int) -> float:
    """Weights, gradients and two moments in fp32 of what trains; frozen weights. A shard has whole rows."""
    found, width = measure.facts(run.model), _width(run)
    sizes = dict.fromkeys(("layer", "others"), 0.0)
    for group in sizes:
        for rows, elements, trained in found[group]:
            sizes[group] += math.ceil(rows / shards) * elements / rows * (16 if trained else width)
    return run.layers * sizes["layer"] + sizes["others"]


def _gathered(run: Run, group: str, shards: int) -> int:
    """A layer's weights, or the others, as computation needs them. One shard never copies frozen ones."""
    parts = measure.facts(run.model)[group]
    return _width(run) * sum(elements for _, elements, trained in parts if trained or shards > 1)


def trained(run: Run) -> int:
    """The number of parameters that train."""
    return measure.parameters(run.model)[1]


def _width(run: Run) -> int:
    """The bytes of a number in computation."""
    return 2 if run.model.precision == "bf16" else 4


def _kept(run: Run, mode: str, tokens: int) -> float:
    """What a layer keeps for backward."""
    return _at(run, mode, tokens, "layer") * (COMPILED_KEEPS[mode] if run.compiled else 1.0)


def _work(run: Run, mode: str, tokens: int) -> float:
    """All at the peak that is neither state nor what the layers keep."""
    backward = _at(run, mode, tokens, "backward")
    if mode == "full" and run.compiled:  # a layer's activations are there again
        backward -= (1.0 - COMPILED_KEEPS["none"]) * _at(run, "none", tokens, "layer")
    return max(_at(run, mode, tokens, "forward"), _at(run, mode, tokens, "end"), backward)


def _at(run: Run, mode: str, tokens: int, part: str) -> float:
    """A part at a number of tokens: on the line through the smallest micro-batch, and twice that."""
    rows, ranks = run.micro_batch_size, min(run.ranks, run.node_ranks)  # more ranks change only the state
    first, here = rows * run.model.tokens, measure.point(run.model, mode, rows, ranks)[part]
    if tokens == first:
        return here
    slope = (measure.point(run.model, mode, 2 * rows, ranks)[part] - here) / first
    return max(0.0, here + slope * (tokens - first))


def _again(run: Run, plan: Plan) -> float:
    """The share of the layers' forward that recompute repeats; a little for selective."""
    shares = {"none": 0.0, "selective": 0.01, "full": 1.0}
    return shares[plan.recompute] if plan.recompute in shares else min(1.0, plan.recompute / run.layers)


def step_seconds(run: Run, plan: Plan) -> float:
    """Accumulated micro-batches, then the optimizer. A GPU computes while it sends, a CPU does not."""
    computing, sending = _computing_seconds(run, plan), _sending_seconds(run, plan)
    both = computing + sending if run.on_cpu else max(computing, sending)
    micro_batch = both + sending / run.layers  # nothing hides the first layer's
    updating = STATE_PASSES * 16 * trained(run) / plan.dp_shard / (run.device.memory_gbps * 1e9)
    return plan.grad_accumulation_steps * micro_batch + _exchanging_seconds(run, plan) + updating


def _computing_seconds(run: Run, plan: Plan) -> float:
    """Matrix products, attention, and all that only moves data, in a micro-batch."""
    tokens, flops = plan.micro_batch_size * run.model.tokens, measure.facts(run.model)["flops"]
    selective = plan.recompute == "selective"
    again = 0.0 if selective else _again(run, plan)
    products = flops["layers"] * (1 + again / 3) + flops["head"]
    # The causal mask needs half of PaLM's attention, whose backward is 2.5 times forward, not twice.
    attention = flops["attention"] / 2 * (1 + again + 2.5) / 3
    forward, backward = PASSES["compiled" if run.compiled else "eager"]
    passes = forward * (2 if selective else 1 + again) + backward
    moved = passes * run.layers * _kept(run, "none", tokens)
    moved += _gathers(plan) * (4 + _width(run)) * trained(run) / plan.dp_shard  # casts of the master weights
    multiplying = tokens * (products / PRODUCTS + attention / ATTENTION) / (run.device.tflops * 1e12)
    return multiplying + moved / (run.device.memory_gbps * 1e9)


def _gathers(plan: Plan) -> float:
    """How often a layer's weights are cast and gathered in a micro-batch."""
    return 2 if plan.reshard_after_forward else 1 / plan.grad_accumulation_steps


def _sending_seconds(run: Run, plan: Plan) -> float:
    """Weights are gathered for forward and backward, gradients reduced in fp32, in a micro-batch."""
    shards, gradients = plan.dp_shard, 4 * trained(run)
    layer, others = (_gathered(run, group, shards) for group in ("layer", "others"))
    link, network = run.device.link_gbps * 1e9, min(run.device.link_gbps, NODE_GBPS) * 1e9
    gathered = _gathers(plan) * run.layers * layer + others
    sent = (gathered + gradients) * (shards - 1) / shards
    return sent / (link if shards <= run.node_ranks else network)


def _exchanging_seconds(run: Run, plan: Plan) -> float:
    """Return the time in which replicas exchange their gradients, once a step."""
    gradients = 4 * trained(run) / plan.dp_shard
    sent = 2 * gradients * (plan.dp_replicate - 1) / plan.dp_replicate
    return sent / (min(run.device.link_gbps, NODE_GBPS) * 1e9)


# ---------------------------------------------------------------- explain


def table(run: Run, plans: list[Plan], steps: int, shown: int = 8) -> str:
    """The first plans, a line each; hours are those of so many steps."""
    lines = ["shards  recompute     batch  reshard  state  layers  rest   GiB  tokens/s  hours"]
    for p in plans[:shown]:
        shards, batch = f"{p.dp_shard}x{p.dp_replicate}", f"{p.micro_batch_size}x{p.grad_accumulation_steps}"
        hours = steps * run.global_batch_size * run.model.tokens / p.predicted_tokens_per_second / 3600
        layout = f"{shards:>6} {p.recompute!s:>10} {batch:>9} {'yes' if p.reshard_after_forward else 'no':>8}"
        parts = f"{p.state_gib:6.1f} {p.activations_gib:7.1f} {p.work_gib:5.1f} {p.predicted_peak_gib:5.1f}"
        lines.append(f"{layout} {parts} {p.predicted_tokens_per_second:9.0f} {hours:6.1f}  {p.why}")
    units = f"GiB of a rank at its peak; hours of {steps} steps"
    return "\n".join([*lines, f"shards x replicas, micro-batch x accumulation; {units}"])


def explain(run: Run, plan: Plan) -> tuple[str, str]:
    """The plan in two lines: what it is, and what it takes."""
    batch = f"micro-batch {plan.micro_batch_size} x {plan.grad_accumulation_steps} accumulated"
    shape = f"{plan.dp_shard} shards x {plan.dp_replicate} replicas, {batch}"
    reshard = "" if plan.reshard_after_forward else ", weights gathered once"
    parts = f"state {plan.state_gib:.2f}, layers {plan.activations_gib:.2f}, rest {plan.work_gib:.2f}"
    peak = f"predicted peak {plan.predicted_peak_gib:.2f} of {run.limit_gib:.2f} GiB ({parts})"
    speed = "" if run.on_cpu else f", {plan.predicted_tokens_per_second:.0f} tokens/s"
    return f"recompute {plan.recompute}, {shape}{reshard} ({plan.why})", peak + speed


def what_would_fit(run: Run) -> str:
    """The fix where nothing fits, with numbers."""
    fewest, longest = fewest_devices(run), longest_sequence(run)
    fixes = [f"{fewest} such devices"] if fewest and fewest > run.ranks else []
    fixes += [f"--max_seq_len={longest}"] if 0 < longest < run.model.tokens else []
    if all(trained for _, _, trained in measure.facts(run.model)["layer"]):
        fixes += ["adapters only (--lora_rank)" if run.pretrained else "fewer layers (--num_hidden_layers)"]
    return ", ".join(fixes) or "devices with more memory"
