"""Report of an export: a table, JSON, and the model card beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from moe2edge.commands.export_stages import Extent
from moe2edge.commands.source_check import SourceProof, describe_window
from moe2edge.commands.source_format import list_format_lines
from moe2edge.commands.write_target import WrittenTarget
from moe2edge.errors import InputError
from moe2edge.evaluation.comparison import RESULT_HEADINGS, ResultRow
from moe2edge.evaluation.folder_record import REFERENCE, FolderRecord
from moe2edge.model.model import Model
from moe2edge.pipeline.stages import Step
from moe2edge.pipeline.target import Loader, Target
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.manifest import CARD, FILES, MANIFEST, build_manifest, describe_file
from moe2edge.storage.text_files import read_json, write_bytes, write_json
from moe2edge.storage.written_files import hash_written

RECIPE_FILE = "recipe.resolved.yaml"
# The only file of an output that holds times and peak memory, so that all others are equal if the
# same export is run again.
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Report:
    """All results of an export.

    Attributes:
        source: name of the source; its path only if that was asked for.
        license: license keys of the source's card.
        notes: what there is to know about the files of the source.
        source_format: what becomes of the numbers of a quantized source, by target.
        remarks: what a user should know of the outputs, by target.
        verification: how much of each output was compared with the model in memory.
    """

    source: str
    family: str
    recipe: str
    steps: tuple[Step, ...]
    before: ResultRow
    after: ResultRow
    results: tuple[ResultRow, ...]
    skip_rate: float | None
    loaders: Mapping[str, tuple[Loader, ...]]
    target_options: Mapping[str, Mapping[str, Any]]
    calibration: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    seconds: float
    peak_bytes: int
    training: Mapping[str, Any] | None = None
    default_texts: tuple[str, ...] = ()
    materialized: str | None = None
    license: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source_check: Mapping[str, Any] | None = None
    source_format: Mapping[str, Mapping[str, Any]] | None = None
    remarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    verification: Extent = "full"

    @property
    def rows(self) -> tuple[ResultRow, ...]:
        """All lines of the table."""
        return (self.before, self.after, *self.results)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        data = asdict(self)
        return {"schema_version": 1, "kind": "moe2edge.export", **data}

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Read the report of an output.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / REPORT_FILE
        data = read_json(path)
        try:
            del data["schema_version"], data["kind"]
            steps = [
                Step(**{**step, "changed": tuple(step["changed"]), "notes": tuple(step["notes"])})
                for step in data["steps"]
            ]
            rows = {key: ResultRow.from_json(data[key]) for key in ("before", "after")}
            results = tuple(map(ResultRow.from_json, data["results"]))
            loaders = {
                target: tuple(Loader(**loader) for loader in found)
                for target, found in data["loaders"].items()
            }
            return cls(
                **{**data, **rows, "steps": tuple(steps), "results": results, "loaders": loaders}
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); export again") from error

    def table(self) -> Table:
        """Build a table for the terminal."""
        table = Table(title=f"{self.source} ({self.family})", title_justify="left")
        for n, heading in enumerate(RESULT_HEADINGS):
            table.add_column(heading, justify="right" if n else "left")
        for row in self.rows:
            table.add_row(*row.cells())
        table.caption = (
            f"{self.caption()}. export: {self.seconds:.1f} s, "
            f"peak memory {self.peak_bytes / 1e6:.0f} MB"
        )
        table.caption_justify = "left"
        return table

    def caption(self) -> str:
        """Explain the columns of the table."""
        figures = self.before.quality
        held_out = (
            "no held-out text"
            if figures is None
            else "perplexity, KL to the source (nats/token) and top-1 agreement on "
            f"{figures.tokens:,} held-out tokens"
        )
        return (
            f"{held_out}. logit error: largest difference to PyTorch with float32 activations; as "
            "shipped: median relative error"
        )

    def lines(self) -> list[str]:
        """Describe the work of each pass, and the programs that can load the result."""
        said = []
        for step in self.steps:
            said.append(
                f"{step.name}: {len(step.changed)} changes, {step.parameters / 1e6:.2f} M "
                f"parameters, {step.nbytes / 1e6:.2f} MB, {step.seconds:.1f} s"
            )
            said += [f"  {note}" for note in step.notes]
        said.append(self._describe_texts())
        check = self.source_check
        if check is not None and check["status"] != "passed":
            said.append(f"source check {check['status']}: {check['reason']}")
        elif check is not None and check.get("window"):
            said.append(f"source check: {describe_window(check['window'])}")
        said += list_format_lines(self.source_format or {})
        said += [f"{name}: {line}" for name, line in self._describe_verification().items()]
        said += [
            *self._describe_skipping(),
            *self._describe_cache(),
            *self._describe_materialized().splitlines()[:1],
        ]
        for target, loaders in self.loaders.items():
            for loader in loaders:
                said.append(f"{target} in {loader.program}: {loader.text}")
        return said

    def _describe_texts(self) -> str:
        """Describe the texts in a sentence each, by purpose."""
        said = []
        for purpose in ("calibration", "training", "evaluation"):
            text = getattr(self, purpose)
            measured = purpose != "evaluation" or self.before.quality is not None
            if text is not None and measured:
                default = ", the default" if purpose in self.default_texts else ""
                said.append(
                    f"{purpose.capitalize()} text: {text['text']}{default}, {text['samples']} "
                    f"samples of {text['length']} tokens."
                )
        return " ".join(said)

    def _describe_verification(self) -> dict[str, str]:
        """Describe by target what of an output was compared with the model in memory."""
        said = {}
        for row in self.results:
            ran = row.parity is not None and row.parity.shipped is not None
            how = "in its runtime" if ran else "block by block in PyTorch, as memory was too small"
            what = f"every file, every tensor, and logits {how}"
            if self.verification == "quick":
                what = f"every file, and logits of one prompt {how}; for all: moe2edge verify"
            said[row.form.partition(",")[0]] = f"{self.verification} verification ({what})"
        return said

    def _describe_materialized(self) -> str:
        """Describe the cost of materializing in a paragraph; empty if nothing was materialized."""
        if self.materialized is None:
            return ""
        return f"Materialized: tied experts are stored with full matrices, {self.materialized}.\n\n"

    def _describe_source_format(self, target: str) -> str:
        """Describe what became of the numbers of a quantized source; empty if it was not."""
        found = (self.source_format or {}).get(target)
        if found is None:
            return ""
        return "".join(f"{line}.\n\n" for line in list_format_lines({target: found}))

    def _describe_skipping(self) -> list[str]:
        """Describe what dynamic skipping left out on the evaluation text, and the time it saved."""
        if self.skip_rate is None:
            return []
        said = [
            f"dynamic skipping: {self.skip_rate:.1%} of routed experts left out (held-out text)"
        ]
        for row in self.results:
            if row.skip_times is not None:
                t = row.skip_times
                said.append(
                    f"  {row.form}: {t.decode:.3f} ms per token ({t.decode_without:.3f} without "
                    f"skipping); prompt of {t.prompt} tokens: {t.prefill:.2f} ms "
                    f"({t.prefill_without:.2f} without); medians of {t.runs} runs"
                )
        return said

    def _describe_cache(self) -> list[str]:
        """Describe what rounding the cache of keys and values costs, where one is rounded."""
        said = []
        for row in self.results:
            parity = row.parity
            if parity is not None and parity.whole_cache is not None:
                said.append(
                    f"{row.form}: median relative error of logits {parity.shipped:.2%} as shipped, "
                    f"with rounded keys and values in the cache; {parity.whole_cache:.2%} without "
                    "rounding them"
                )
        return said

    def write(
        self,
        folder: Path,
        target: Target,
        checkpoint: Checkpoint,
        model: Model,
        versions: Mapping[str, str],
        written: WrittenTarget,
    ) -> None:
        """Write recipe, report, model card, reference and manifest into a finished folder.

        Raises:
            DiskFailed: the disk gives back something else than was written.
        """
        name = target.name
        card = self._render_card(target, model, checkpoint)
        digests = {
            **written.digests,
            RECIPE_FILE: write_bytes(folder / RECIPE_FILE, self.recipe.encode()),
            REPORT_FILE: write_json(folder / REPORT_FILE, self.to_json()),
            CARD: write_bytes(folder / CARD, card.encode()),
        }
        manifest = build_manifest(
            folder,
            name,
            digests,
            target_options=dict(self.target_options[name]),
            model={
                "family": model.family.model_type,
                "parameters": model.parameters,
                "active_parameters": model.active_parameters,
                "expert_counts": list(model.expert_counts),
                "members": [
                    len(layer.routed) if layer.is_tied else 0 for _, layer in model.moe_blocks
                ],
                "substitutes": [len(layer.replaced) for _, layer in model.moe_blocks],
                "materialized": self.materialized is not None,
                "origins": [block.origin for block in model.blocks],
            },
            source={
                "model": self.source,
                "revision": checkpoint.revision,
                "sha256": checkpoint.sha256,
            },
            source_check=SourceProof(**self.source_check).to_record() if self.source_check else {},
            texts={
                "calibration": self.calibration,
                "evaluation": self.evaluation,
                **({"training": self.training} if self.training else {}),
            },
            versions=dict(versions),
        )
        # The reference holds the digests of the other files, and the manifest that of both.
        reference = replace(written.reference, record=FolderRecord.make(folder, manifest))
        manifest[FILES][REFERENCE] = describe_file(folder / REFERENCE, reference.save(folder))
        hash_written(folder / MANIFEST, write_json(folder / MANIFEST, manifest))

    def _name_library(self, target: Target) -> str | None:
        """Return the library of a target's card; None if the verdicts say that it is none."""
        denied = {one.program for one in self.loaders[target.name] if one.verdict == "no"}
        program = target.card_program or target.card_library
        return None if program in denied else target.card_library

    def _render_card(self, target: Target, model: Model, checkpoint: Checkpoint) -> str:
        """Write the text of README.md, with the metadata that the hub reads."""
        from huggingface_hub import ModelCardData

        name = target.name
        data = ModelCardData(
            base_model=checkpoint.hub_id,
            **self.license,
            library_name=self._name_library(target),
            pipeline_tag="text-generation",
            tags=["moe2edge", "mixture-of-experts", name],
        )
        mine = [r for r in self.rows if r.parity is None or r.form.startswith(f"{name},")]
        table = "\n".join(
            f"| {' | '.join(cells)} |"
            for cells in (
                RESULT_HEADINGS,
                ["---"] * len(RESULT_HEADINGS),
                *(row.cells() for row in mine),
            )
        )
        options = "".join(f", {k} {v}" for k, v in self.target_options[name].items())
        loaders = "\n".join(f"- {loader.program}: {loader.text}" for loader in self.loaders[name])
        verified = self._describe_verification().get(name, "")
        verified = f"{verified[:1].upper()}{verified[1:]}.\n\n" if verified else ""
        cache = "".join(f"{s}.\n\n" for s in self._describe_cache() if s.startswith(f"{name},"))
        limits = f"{target.limits}\n\n" if target.limits else ""
        limits += "".join(
            f"{line[:1].upper()}{line[1:]}.\n\n" for line in self.remarks.get(name, ())
        )
        run = [one for one in self.loaders[name] if one.verdict != "no"]
        commands = "".join(f"{one.command}\n" for one in run if one.command)
        python = "".join(
            f"In {one.program}:\n\n```python\n{one.snippet}\n```\n\n" for one in run if one.snippet
        )
        script = target.describe_use(model)
        script = f"```js\n{script}```\n\n" if script else ""
        return (
            f"---\n{data.to_yaml()}\n---\n\n# {self.source}, compressed with moe2edge\n\n"
            f"{self.family}, written for the target `{name}`{options}.\n\n"
            f"{table}\n\n{self.caption()}.\n\n{self._describe_texts()}\n\n{verified}{cache}"
            f"{self._describe_materialized()}{self._describe_source_format(name)}"
            f"## Who can load it\n\n{loaders}\n\n{limits}## Run it\n\n"
            f'```sh\nmoe2edge generate . "Once upon a time"\nmoe2edge verify .\n{commands}```\n\n'
            f"{script}{python}## Recipe\n\n```yaml\n{self.recipe}```\n"
        )
