"""Base of quantizing passes: schemes of tensors, and the proof that each tensor has its scheme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.block import Block, is_low_rank, is_quantizable
from moe2edge.model.model import Model
from moe2edge.model.weights import plan_weight
from moe2edge.numerics.scheme import LOW_RANK, Scheme, find_largest_group_size
from moe2edge.options import Options
from moe2edge.passes._ends import (
    END_SCHEME,
    EndBits,
    advise_on_ends,
    check_ends,
    choose_end_bits,
    describe_ends,
    fits_end,
    is_tied,
    list_ends,
)
from moe2edge.pipeline.contract import PlannedStep, Slim
from moe2edge.storage.patterns import compile_pattern

if TYPE_CHECKING:
    from moe2edge.numerics.grid import Quantized
    from moe2edge.numerics.rounding import Range

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[-1, 16, 32, 64, 128]
# Those that have to divide the inputs.
GROUPS = (128, 64, 32, 16)
# Option of passes that chooses scales.
Scales = Annotated[
    Literal["absmax", "mse", "signed"],
    Field(
        description="range that a scale covers: the whole range of the group (absmax), or the "
        "range with the least squared error (mse), where symmetric scales may be negative (signed)"
    ),
]


class Rule(Options):
    """Another scheme for some tensors. If several rules match a tensor, the first one applies."""

    match: Annotated[
        str,
        Field(description="regular expression to search for in names on disk; default: every name"),
    ] = ""
    blocks: Annotated[
        tuple[int, ...] | None,
        Field(
            min_length=1,
            description="indices of blocks, from 0; negative ones count from the end; default: all",
        ),
    ] = None
    bits: Annotated[
        Literal[2, 3, 4, 8, 16], Field(description="bits per weight; 16: do not quantize")
    ]
    group_size: Annotated[
        GroupSize | None, Field(description="inputs per scale; default: as in the pass")
    ] = None
    symmetric: Annotated[
        bool | None, Field(description="true: the middle integer is zero; default: as in the pass")
    ] = None

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            compile_pattern(value)
        except ValueError as error:
            raise ValueError(f"a regular expression; {value!r} is not one: {error}") from error
        return value

    def applies(self, name: str, block: int, count: int) -> bool:
        """Return whether it matches the tensor ``name`` of a block of a model of ``count``."""
        in_blocks = self.blocks is None or block in {n % count for n in self.blocks}
        return in_blocks and compile_pattern(self.match).search(name) is not None


class Quantize(Slim):
    """Base of passes that round matrices to few bits.

    Attributes:
        bits: bits per weight.
        group_size: number of inputs that share a scale.
        symmetric: whether the middle integer stands for zero.
        rules: other schemes for some tensors.
        factors: bits of factors and linear maps.
        head: bits of the head.
        embedding: bits of the embedding.
    """

    bits: Annotated[Bits, Field(description="bits per weight")] = 4
    group_size: Annotated[
        GroupSize | None,
        Field(
            description="inputs that share a scale; -1: a whole row (per-channel); default: the "
            "largest of 128, 64, 32 that divides every width"
        ),
    ] = None
    symmetric: Annotated[
        bool,
        Field(description="true: the middle integer is zero; false: each group has a zero point"),
    ] = True
    rules: Annotated[
        tuple[Rule, ...],
        Field(
            description="other schemes for some tensors; the first rule that matches a tensor "
            "applies"
        ),
    ] = ()
    factors: Annotated[
        Literal[8, 16],
        Field(
            description="bits of factors and linear maps of replaced experts, with one scale per "
            "row; 16: do not quantize them"
        ),
    ] = 16
    head: Annotated[
        EndBits | None,
        Field(
            description="bits of the head, symmetric in groups of 32; 16: do not quantize it; "
            "default: 8 in an export of which every target holds such a head, otherwise 16. Where "
            "one tensor is head and embedding, one of the two is enough"
        ),
    ] = None
    embedding: Annotated[
        EndBits | None, Field(description="bits of the embedding, likewise; default: 16")
    ] = None

    def schemes(self, model: Model) -> dict[str, Scheme]:
        """Return the scheme of each tensor to quantize, by name on disk."""
        ends = chain.from_iterable(self.list_ends(model))
        names = (model.names.get_rest_name(name) for name in ends)
        return self._list_schemes(model) | dict.fromkeys(names, END_SCHEME)

    def list_ends(self, model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """List the tensors outside of blocks to quantize, as `moe2edge.passes._ends.list_ends`."""
        return list_ends(model, self.head, self.embedding)

    def _list_schemes(self, model: Model) -> dict[str, Scheme]:
        """Return the scheme of each tensor of a block to quantize, by name on disk."""
        group = self._resolve_group_size(model)
        usual = Scheme(self.bits, group, self.symmetric)
        schemes = {}
        for name, block, _ in model.matrices:
            rule = self._find_rule(name, block, model) if self.rules else None
            if rule is None:
                schemes[name] = usual
            elif rule.bits != 16:
                symmetric = self.symmetric if rule.symmetric is None else rule.symmetric
                schemes[name] = Scheme(rule.bits, rule.group_size or group, symmetric)
        return schemes | dict.fromkeys(self._list_low_rank(model), LOW_RANK)

    def _list_low_rank(self, model: Model) -> Iterator[str]:
        """List the names on disk of the factors and linear maps to quantize."""
        if self.factors != 16:
            yield from (name for name, role, _ in model.tensors() if is_low_rank(role))

    def solve_alone(self, block: Block, how: Range) -> dict[str, Quantized]:
        """Round factors and linear maps of a block to nearest, by role; none if they stay as is.

        Args:
            block: the block.
            how: choice of scales.
        """
        from moe2edge.numerics.rounding import round_to_nearest
        from moe2edge.runtime.decoder_blocks import load_finite

        if self.factors == 16:
            return {}
        low = {role: weight for role, weight in block.weights() if is_low_rank(role)}
        return {role: round_to_nearest(load_finite(w), LOW_RANK, how) for role, w in low.items()}

    def _resolve_group_size(self, model: Model) -> GroupSize:
        """Return the group size of tensors to which no rule gives another one."""
        if self.group_size is not None:
            return self.group_size
        widths = []
        for name, block, weight in model.matrices:
            rule = self._find_rule(name, block, model)
            if rule is None or (rule.bits != 16 and rule.group_size is None):
                widths.append(weight.shape[1])
        return find_largest_group_size(widths) if widths else 128

    def _find_rule(self, name: str, block: Block, model: Model) -> Rule | None:
        """Return the first rule that matches a tensor; None: none does."""
        count = len(model.blocks)
        return next((r for r in self.rules if r.applies(name, block.index, count)), None)

    def narrow_head(self, model: Model) -> Self:
        """Return the pass with a head of 8 bits, if its options leave it open and groups fit."""
        name = model.head
        given = self.head or (self.embedding if is_tied(model) else None)
        if given or name is None or model.rest[name].scheme is not None:
            return self
        if not fits_end(model, name):
            return self
        return self.model_copy(update={"head": END_SCHEME.bits})

    def resolve(self, model: Model) -> Self:
        """Return the pass with the group size of the whole source, whichever blocks stay."""
        head, embedding = choose_end_bits(model, self.head, self.embedding)
        group = self._resolve_group_size(model)
        return self.model_copy(update={"group_size": group, "head": head, "embedding": embedding})

    def check(self, model: Model) -> None:
        """Refuse quantized models, and group sizes and rules that do not fit the model."""
        schemes = self.schemes(model)
        check_ends(model, list(chain.from_iterable(self.list_ends(model))))
        if any(weight.scheme is not None for _, _, weight in model.tensors()):
            raise InputError("the recipe quantizes twice; keep one of its quantizing passes")
        widths = {n: w.shape[1] for n, _, w in model.matrices if n in schemes}
        for name, width in widths.items():
            if width % (group := schemes[name].width(width)):
                fits = [str(n) for n in GROUPS if not any(each % n for each in widths.values())]
                raise InputError(
                    f"group_size {group} does not divide the {width} inputs of {name}; choose "
                    f"{' or '.join([*fits, '-1 (one scale per row)'])}"
                )
        if not schemes:
            raise InputError(
                "the rules leave nothing to quantize; take out a rule with bits: 16, or this pass"
            )
        # Planned linear maps may all have become constants, for lack of tokens or bytes.
        if self.factors != 16 and not (model.replaced_count or any(self._list_low_rank(model))):
            raise InputError(
                f"factors: {self.factors} applies to factors and linear maps of replaced experts, "
                "and the model has none; put expert_replace before it, or leave factors out"
            )
        self._check_rules(model)
        for block, tensors in zip(model.blocks, model.named_blocks, strict=True):
            experts = (one for one in tensors if one[1].startswith("experts."))
            _check_layer(
                block, [name for name, role, _ in experts if is_quantizable(role)], schemes
            )

    def _check_rules(self, model: Model) -> None:
        """Refuse rules that apply to no tensor."""
        count = len(model.blocks)
        for rule in self.rules:
            outside = [n for n in rule.blocks or () if not -count <= n < count]
            if outside:
                raise InputError(
                    f"rule {_describe_rule(rule)}: there is no block {outside[0]}; the model has "
                    f"{count} blocks: choose from {-count} to {count - 1}"
                )
            if not any(self._find_rule(n, b, model) is rule for n, b, _ in model.matrices):
                raise InputError(
                    f"rule {_describe_rule(rule)} applies to no tensor: it matches none, or only "
                    "tensors that rules before it match; a name is, for example, "
                    f"{next(name for name, _, _ in model.matrices)}"
                    f"{self._advise(rule, model)}"
                )

    def _advise(self, rule: Rule, model: Model) -> str:
        """Return what to give for head or embedding where a rule means them; empty: it does not."""
        pattern = compile_pattern(rule.match)
        if rule.bits == 16 or any(pattern.search(name) for name, _, _ in model.matrices):
            return ""
        return advise_on_ends(model, pattern)

    def plan(self, model: Model) -> Model:
        """Return the model with a scheme on every tensor to quantize."""
        schemes = self.schemes(model)
        for block, tensors in zip(model.blocks, model.named_blocks, strict=True):
            new = {
                role: plan_weight(weight, scheme=schemes[name])
                for name, role, weight in tensors
                if name in schemes
            }
            model = model.replace_block(block.with_weights(new))
        ends = chain.from_iterable(self.list_ends(model))
        return model.replace_rest(
            {name: plan_weight(model.rest[name], scheme=END_SCHEME) for name in ends}
        )

    def check_result(self, before: Model, after: Model) -> None:
        """Prove that every tensor has the scheme that the options give it.

        Raises:
            Moe2EdgeError: one does not.
        """
        schemes = self.schemes(before)
        for name, _, weight in after.tensors():
            if weight.scheme != schemes.get(name):
                raise Moe2EdgeError(
                    f"{name} is {weight.scheme or weight.dtype}, expected "
                    f"{schemes.get(name) or weight.dtype}"
                )

    def describe(self, planned: PlannedStep) -> str:
        """Describe the schemes, the number of matrices of each, and the mean bits per weight."""
        model = planned.before
        schemes = self._list_schemes(model)
        parts = [f"{scheme}: {n} matrices" for scheme, n in Counter(schemes.values()).items()]
        unquantized = sum(name not in schemes for name, _, _ in model.matrices)
        if unquantized:
            parts.append(f"not quantized, by rule: {unquantized}")
        parts += describe_ends(model, *self.list_ends(model))
        weights = [w for _, _, w in planned.after.tensors() if w.scheme]
        bits = 8 * sum(w.nbytes for w in weights) / sum(w.count for w in weights)
        return f"{'; '.join(parts)}; {bits:.3f} bits/weight"


def _describe_rule(rule: Rule) -> str:
    """Describe a rule by the options that a user gave it."""
    return str(rule.model_dump(exclude_defaults=True))


def _check_layer(block: Block, experts: Sequence[str], schemes: Mapping[str, Scheme]) -> None:
    """Refuse several schemes in one MoE layer, which no runtime supports.

    Args:
        block: the block.
        experts: names of the matrices of its experts.
        schemes: schemes by name.
    """
    # Most are one object.
    given = set({id(s): s for s in map(schemes.get, experts)}.values())
    if len(given) > 1:
        raise InputError(
            f"the rules give the experts of block {block.index} several schemes "
            f"({', '.join(sorted(str(s or 'none') for s in given))}); runtimes need one scheme for "
            "all experts of a layer: give them the same"
        )
