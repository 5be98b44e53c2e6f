"""The target ``gguf``, run by llama.cpp and read by the library ``gguf``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import every_family
from moe2edge.cli.main import main
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.evaluation.far_end import choose_positions
from moe2edge.evaluation.verify import audit
from moe2edge.model.block import is_quantizable
from moe2edge.model.model import Model
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.pipeline.registry import find_target, make_target
from moe2edge.runtime.generation import generate
from moe2edge.runtime.load import build_transformers_model
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.targets import _gguf_library, _gguf_runtime
from moe2edge.targets._gguf_file import read_gguf
from moe2edge.targets._gguf_layouts import LAYOUTS_BY_FAMILY
from moe2edge.targets._gguf_tokenizer import build_tokenizer, check_outline, find_pre
from moe2edge.testing import Make, make_tokenizer, quantize, quantize_ends
from source_files import quantize_folder

library = pytest.importorskip("gguf", reason="pip install 'moe2edge[gguf]'")
pytest.importorskip("xllamacpp", reason="pip install 'moe2edge[gguf]'")

TARGET = find_target("gguf")
BUILTIN = Path("moe2edge/builtin/tiny-moe").resolve()
WORKING: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
}
# What llama.cpp has of these families; other forms are refused below.
GENERIC: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 32,
        }
    },
    "dots1": {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "use_qk_norm": True, "attention_bias": True},
    # Not truncate: false, with which numbers are compared in PyTorch.
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1.5e5}},
    "granitemoe": {},
    "lfm2_moe": {"routed_scaling_factor": 1.0},
    "qwen3_5_moe_text": {"shared_expert_intermediate_size": 32},
    "qwen3_next": {"shared_expert_intermediate_size": 32},
}  # fmt: skip
# Targets of the same export, but for mlx, which is not everywhere.
BESIDE = ("onnx", "gptq", "compressed-tensors")
# Blocks that stay, in families whose files say which block is of which kind.
FEWER = {"glm4_moe": [0, 2, 3], "lfm2_moe": [0, 1, 3], "qwen3_next": [2, 3]}
IDS = every_family.IDS[:1]


def written(model: Model, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    target = make_target("gguf", options)
    target.accepts(model)
    target.write(model, folder)
    audit(target, folder, target.stored(model))
    target.check_derived(folder)
    return folder


def check_logits(model: Model, folder: Path) -> None:
    """Compare llama.cpp with a walk, whole and step by step, in float32 and as shipped."""
    expected = every_family.walk_over(model)[:1]
    exact = TARGET.reopen(folder, exact=True)
    assert (exact.logits(IDS) - expected).abs().max() <= 1e-4
    ids = IDS[0].tolist()
    steps = [exact.start(ids[:9]), *(exact.step(token) for token in ids[9:])]
    assert (torch.stack(steps) - expected[0, 8:]).abs().max() <= 1e-4
    runs_anywhere = isinstance(exact, _gguf_runtime.PlacedGgufRuntime)
    assert runs_anywhere == (model.family.model_type != "gpt_oss")  # which has windows
    if isinstance(exact, _gguf_runtime.PlacedGgufRuntime):
        positions = choose_positions(model, 8)
        assert positions is not None
        wide = build_transformers_model(TARGET.stored(model), torch.float32, packed=False)
        there = IDS[0].repeat(2)[: len(positions)]
        placed = TorchRuntime(wide).logits_at(there, positions)
        assert (exact.logits_at(there, positions) - placed).abs().max() <= 1e-4
    shipped = TARGET.reopen(folder).logits(IDS)
    errors = (shipped - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() <= 0.15  # activations of tiny models, in int8


def test_every_claimed_family_is_tested() -> None:
    assert LAYOUTS_BY_FAMILY.keys() == WORKING.keys() | GENERIC.keys()


@pytest.mark.parametrize("family", WORKING)
def test_logits_of_families_with_a_row(family: str, tiny: Make, tmp_path: Path) -> None:
    source = tiny(family, **WORKING[family], tie_word_embeddings=family in ("olmoe", "mixtral"))
    model = open_checkpoint(str(source)).model
    model = quantize(model, Scheme(4, 32), lambda role: ".down" not in role)
    model = quantize(model, Scheme(8, 32), lambda role: ".down" in role)
    check_logits(model, written(model, tmp_path / "out"))


@pytest.mark.parametrize("family", GENERIC)
def test_logits_of_families_without_a_row(family: str, tmp_path: Path) -> None:
    every_family.make_folder(tmp_path / "source", family, **GENERIC[family])
    model = every_family.keep_six(open_checkpoint(str(tmp_path / "source")).model)
    model = model.keep_blocks(FEWER.get(family, range(len(model.blocks))))
    model = quantize(model, Scheme(4, 32), lambda role: role.startswith("experts"))
    check_logits(model, written(model, tmp_path / "out"))


@pytest.mark.parametrize(
    ("family", "tied"),
    [("qwen2_moe", False), ("qwen2_moe", True), ("olmoe", True), ("granitemoe", False)],
)
def test_head_and_embedding_in_8_bits(family: str, tied: bool, tmp_path: Path) -> None:
    changes = {"num_key_value_heads": 4} if family == "olmoe" else {}
    settings = {"tie_word_embeddings": tied, **changes}
    every_family.make_folder(tmp_path / "source", family, **settings)
    model = open_checkpoint(str(tmp_path / "source")).model
    model = quantize_ends(model, Scheme(8, 32))
    folder = written(model, tmp_path / "out")
    check_logits(model, folder)
    tensors = {one.name: one for one in library.GGUFReader(folder / "model.gguf").tensors}
    held = {"token_embd.weight", "output.weight"} & tensors.keys()
    assert {tensors[name].tensor_type.name for name in held} == {"Q8_0"}


@pytest.mark.parametrize(
    "scheme",
    [Scheme(4, 64), Scheme(4, WHOLE_ROW), Scheme(8, 32), Scheme(2, 64), Scheme(4, 32, False)],
)
def test_integers_stay(scheme: Scheme, tmp_path: Path, tiny: Make) -> None:
    source = tiny("olmoe", num_key_value_heads=4, intermediate_size=64)
    model = quantize(open_checkpoint(str(source)).model, scheme)
    folder = written(model, tmp_path / "out")
    found = dict(TARGET.tensors(folder))
    for name, role, weight in model.tensors():
        if is_quantizable(role):
            back: Any = found[name]
            assert torch.equal(back.q, weight.quantized().q)
            # The numbers themselves; groups are smaller, with the same scales.
            assert torch.equal(back.dequantize(), weight.load())


def test_the_library_reads_the_same_numbers(tiny: Make, tmp_path: Path) -> None:
    model = quantize(open_checkpoint(str(tiny("mixtral"))).model, Scheme(4, 32))
    reader = library.GGUFReader(written(model, tmp_path / "out") / "model.gguf")
    tensors = {one.name: one for one in reader.tensors}
    assert {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"} <= tensors.keys()
    stack = tensors["blk.1.ffn_down_exps.weight"]
    assert stack.tensor_type.name == "Q4_0"
    numbers = library.dequantize(stack.data, stack.tensor_type)
    _, layer = model.moe_blocks[1]
    expected = np.stack([expert.down.load().numpy() for expert in layer.experts])
    np.testing.assert_array_equal(numbers, expected)
    # Rows of queries: pairs of neighbours are rotated, where the source has halves.
    rows = tensors["blk.1.attn_q.weight"]
    queries = model.blocks[1].attention["q_proj.weight"].load().numpy()
    found = library.dequantize(rows.data, rows.tensor_type)
    np.testing.assert_array_equal(found[1], queries[8])  # heads of 16


def test_float_blocks_of_a_source_stay(tmp_path: Path) -> None:
    stock = every_family.make_model("gpt_oss", intermediate_size=64)
    draw, tensors = torch.Generator().manual_seed(1), dict(stock.state_dict())
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, ins, outs = tensors.pop(name).shape
        shape = (experts, outs, ins // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(
            119, 124, shape[:3], dtype=torch.uint8, generator=draw
        )
    stock.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    model = every_family.keep_six(open_checkpoint(str(tmp_path)).model)
    folder = written(model, tmp_path / "out")
    reader = library.GGUFReader(folder / "model.gguf")
    found = {one.name: one for one in reader.tensors}["blk.1.ffn_up_exps.weight"]
    assert found.tensor_type.name == "MXFP4"
    numbers = library.dequantize(found.data, found.tensor_type)
    _, layer = model.moe_blocks[1]
    expected = np.stack([expert.up.load().float().numpy() for expert in layer.experts])
    np.testing.assert_array_equal(numbers, expected)
    check_logits(model, folder)


def test_integers_of_a_gptq_source_stay(tmp_path: Path, tiny: Make) -> None:
    source = tiny("qwen3_moe", norm_topk_prob=True, num_hidden_layers=2)
    quantize_folder(source, tmp_path / "gptq", "gptq")
    model = open_checkpoint(str(tmp_path / "gptq")).model
    found = dict(TARGET.tensors(written(model, tmp_path / "out")))
    kept = [(name, weight.quantized()) for name, _, weight in model.tensors() if weight.kept]
    assert len(kept) == 2 * (4 + 6 * 3)
    for name, numbers in kept:
        back: Any = found[name]
        assert torch.equal(back.q, numbers.q)
        assert torch.equal(back.scales, numbers.scales)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        (
            "qwen3_moe",
            {"norm_topk_prob": False},
            "norm_topk_prob false.*hf, mlx or onnx",
        ),
        ("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": True}, "norm_topk_prob true"),
        ("olmoe", {}, "fewer heads of keys"),
        ("mixtral", {"sliding_window": 16}, "sliding window of 16 tokens; export to hf or onnx"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "blocks that all have a router.*hf or onnx"),
    ],
)
def test_configs_that_it_computes_otherwise(
    family: str, changes: dict[str, Any], match: str, tiny: Make
) -> None:
    with pytest.raises(Unsupported, match=match):
        TARGET.accepts(open_checkpoint(str(tiny(family, **changes))).model)


def test_layers_that_it_does_not_hold(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    first, layer = model.moe_blocks[0]
    forms = {
        "4 experts": first.keep_experts(range(4)),
        "no MLP": first.without_mlp(),
        "top-1": replace(first, mlp=replace(layer, router=replace(layer.router, top_k=1))),
        "skipping": replace(
            first, mlp=replace(layer, router=replace(layer.router, skip_below=(0.5,)))
        ),
    }
    for said, block in forms.items():
        with pytest.raises(Unsupported, match=f"{said}.*export to .*hf:layout=natural"):
            TARGET.accepts(model.replace_block(block))
    trimmed = model.keep_blocks([0, 2])
    for block, _ in trimmed.moe_blocks:
        trimmed = trimmed.replace_block(block.keep_experts(range(4)))
    TARGET.accepts(trimmed)


def test_schemes_without_a_type(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(Unsupported, match=r"choose 4 bits.*gguf:dequantize=true"):
        TARGET.accepts(quantize(model, Scheme(3, 32)))
    make_target("gguf", {"dequantize": True}).accepts(quantize(model, Scheme(3, 32)))
    with pytest.raises(Unsupported, match="set group_size to 32"):
        TARGET.accepts(quantize(model, Scheme(4, 16)))
    with pytest.raises(Unsupported, match="a multiple of 64; leave it in 16 bits"):
        TARGET.accepts(quantize(model, Scheme(2, 32), lambda role: "down" in role))
    mixed = quantize(model, Scheme(4, 32), lambda role: "experts.0" not in role)
    with pytest.raises(Unsupported, match="give them one width and one scheme"):
        TARGET.accepts(mixed)


def test_blocks_that_it_cannot_tell_apart(tmp_path: Path) -> None:
    every_family.make_folder(tmp_path / "source", "qwen3_next")
    model = open_checkpoint(str(tmp_path / "source")).model
    for kept in ([1, 3], [1, 2, 3], [0, 2]):
        with pytest.raises(Unsupported, match="full attention that are not every n-th one"):
            TARGET.accepts(model.keep_blocks(kept))
    latent = {**GENERIC["deepseek_v2"], "q_lora_rank": None}
    every_family.make_folder(tmp_path / "latent", "deepseek_v2", **latent)
    with pytest.raises(Unsupported, match=r"4 blocks and plain queries.*drop experts instead"):
        TARGET.accepts(open_checkpoint(str(tmp_path / "latent")).model)


def test_unknown_families_are_refused_by_name(tmp_path: Path) -> None:
    every_family.make_folder(tmp_path / "source", "phimoe")
    with pytest.raises(Unsupported, match=r"does not support phimoe yet.*export to hf"):
        TARGET.accepts(open_checkpoint(str(tmp_path / "source")).model)


def test_what_llama_cpp_refuses_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_family.make_folder(tmp_path / "source", "granitemoe")
    model = open_checkpoint(str(tmp_path / "source")).model
    (said,) = TARGET.check_companions(tmp_path, model)
    assert "there is no tokenizer" in said
    changed = replace(LAYOUTS_BY_FAMILY["granitemoe"], name="qwen3moe")
    monkeypatch.setitem(LAYOUTS_BY_FAMILY, "granitemoe", changed)
    with pytest.raises(Unsupported, match=r"attn_k_norm.*nothing was computed yet"):
        TARGET.check_companions(tmp_path, model)


# ---- tokenizer -----------------------------------------------------------------------------------


def test_tokenizers_are_compared(tmp_path: Path) -> None:
    config = json.loads((BUILTIN / "config.json").read_text())
    metadata = {
        "general.architecture": "olmoe",
        "olmoe.vocab_size": 4096,
        **build_tokenizer(BUILTIN, 4096, config),
    }
    text = (BUILTIN / "evaluation.txt").read_text()[:100_000]
    assert check_outline(BUILTIN, metadata, {0}, texts=[text]) == []
    with pytest.raises(Unsupported, match=r"encodes .* otherwise than transformers, with gpt2"):
        check_outline(BUILTIN, {**metadata, "tokenizer.ggml.pre": "gpt-2"}, {0})
    make_tokenizer(tmp_path)
    with pytest.raises(Unsupported, match="not WordLevel"):
        build_tokenizer(tmp_path, 96, {})
    with pytest.raises(Unsupported, match=r"knows no tokenizer.ggml.pre"):
        find_pre({"model": {}, "pre_tokenizer": {"type": "Whitespace"}})


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizers_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    text = (BUILTIN / "evaluation.txt").read_text()[:20_000]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "\u2581")
    made.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=first, max_token_length=9)
    made.train_from_iterator([text], trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # bytes are plain tokens
    made = Tokenizer.from_str(json.dumps(data))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(tmp_path)
    metadata: dict[str, Any] = {"general.architecture": "llama", "llama.vocab_size": 512}
    metadata |= build_tokenizer(tmp_path, 512, {"eos_token_id": 2})
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][511] == "[PAD511]"
    assert check_outline(tmp_path, metadata, {2, 5}, texts=[text]) == [5]


CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|endoftext|>system\\n' + messages[0].content + '\\n' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles alternate') }}
    {%- endif %}
    {{- message.role + ': ' + message.content | trim + ('<|endoftext|>' if not loop.last else '') }}
{% endfor -%}
{% if add_generation_prompt %}assistant: {% endif %}
"""


def test_chats_through_the_template_in_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    model = open_checkpoint(str(BUILTIN)).model
    TARGET.write(model.keep_blocks([0, 5]), folder)
    command = [sys.executable, "-m", "benchmarks.readers.llama_cpp.chat", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("ids equal, answer equal") == 3


# ---- the whole way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output of the built-in model, beside those of other targets."""
    folder = tmp_path_factory.mktemp("gguf") / "out"
    short = ["--set", "evaluation.samples=1", "--set", "evaluation.length=64", "--no-source-check"]
    targets = ",".join(("gguf", *BESIDE))
    command = ["export", "builtin:tiny-moe", "-r", "w4-rtn", "-t", targets, "-o", str(folder)]
    done = CliRunner().invoke(main, [*command, *short])
    assert done.exit_code == 0, done.output
    assert "groups of 128 take as many bytes" in done.output
    return folder / "gguf"


def test_folders_of_one_export_hold_one_model(exported: Path) -> None:
    """Integers are equal, and greedy text without rounding of activations."""
    prompt = load_tokenizer(exported)("def read_json(path):")["input_ids"]
    expected = list(generate(TARGET.reopen(exported, exact=True), prompt, max_tokens=64))
    assert len(expected) == 64
    held = dict(TARGET.tensors(exported))
    for name in BESIDE:
        target, folder = find_target(name), exported.parent / name
        found = {k: v for k, v in target.tensors(folder) if isinstance(v, Quantized)}
        assert len(found) == 6 * (4 + 16 * 3)
        for key, numbers in found.items():
            own: Any = held[key]
            assert torch.equal(own.q, numbers.q)
            assert torch.equal(own.dequantize(), numbers.dequantize())
        runtime = target.reopen(folder, exact=True)
        assert list(generate(runtime, prompt, max_tokens=64)) == expected, name


def test_an_export_is_run_and_verified(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "llama-server -m model.gguf" in card
    assert "library_name: gguf" in card
    file = read_gguf(exported / "model.gguf")
    assert file.metadata["general.file_type"] == 2
    assert file.metadata["general.name"] == "builtin:tiny-moe"
    config = json.loads((exported / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    prompt = ["generate", str(exported), "Once upon a time", "--max-tokens", "4"]
    for command in (["verify", str(exported)], prompt):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("damage", ["cut", "header", "type", "metadata"])
def test_damaged_files(exported: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = bytearray((folder / "model.gguf").read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "header":
        data[8:16] = b"\xff" * 8
    elif damage == "metadata":
        at = data.index(b"olmoe.expert_used_count") + len("olmoe.expert_used_count") + 4
        data[at] = 3
    else:
        at = data.index(b"output_norm.weight") + len("output_norm.weight") + 12
        data[at] = 99
    (folder / "model.gguf").write_bytes(data)
    done = CliRunner().invoke(main, ["verify", str(folder)])
    assert done.exit_code == 7, done.output
    with pytest.raises(VerificationFailed, match="export"):
        TARGET.check_derived(folder)


def test_llama_cpp_that_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF no model")
    with pytest.raises(VerificationFailed, match=r"llama.cpp refuses model\.gguf"):
        _gguf_runtime.GgufRuntime(tmp_path / "model.gguf", 8)
    with pytest.raises(VerificationFailed, match=r"llama.cpp ended.*exit code|SIG"):
        # A request that the process does not know ends it, as some files do.
        _gguf_runtime.LlamaProcess(
            BUILTIN / "config.json", exact=False, threads=1, part="vocabulary", odd=1
        )


def test_a_missing_or_unknown_runtime_says_what_to_install(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise _gguf_library.LibraryError(f"not installed: {_gguf_library.INSTALL_LLAMA}")

    monkeypatch.setattr(_gguf_runtime, "find_version", missing)
    with pytest.raises(Unsupported, match=r"pip install 'xllamacpp>=2026\.10'"):
        TARGET.reopen(exported)
    odd = (*_gguf_library._CONTEXT_DEFAULTS, ("I", 0, 513))
    monkeypatch.setattr(_gguf_library, "_CONTEXT_DEFAULTS", odd)
    with pytest.raises(_gguf_library.LibraryError, match="pip install xllamacpp=="):
        _gguf_library.Library()
