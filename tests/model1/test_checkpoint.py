"""Checkpoint directories in every naming, sound and damaged, against what transformers writes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model1.checkpoint import ExpertReader, load_config, load_experts, load_trunk, save_checkpoint
from model1.checkpoint.load import read_trunk
from model1.checkpoint.names import keeps_float32, saved_name, shipped_name
from model1.checkpoint.tensors import CheckpointTensors
from model1.errors import CheckpointError, ConfigError
from tests.model1 import oracle

CASE = oracle.CASES[0]  # every layer kind, one hash layer, 4 experts
ALL_EXPERTS = range(4)
F32, BF16 = torch.float32, torch.bfloat16
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model, saved in each naming, whole and in shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = oracle.random_model(CASE)
    places = {name: root / name for name in ("saved", "saved_shards", "modules", "modules_shards")}
    model.save_pretrained(places["saved"])
    model.save_pretrained(places["saved_shards"], max_shard_size="100KB")
    model.save_pretrained(places["modules"], save_original_format=False)
    model.save_pretrained(
        places["modules_shards"], save_original_format=False, max_shard_size="100KB"
    )
    places["shipped"] = root / "shipped"
    _write(
        places["shipped"], places["saved"], _in_shipped_naming(load_file(_weights(places["saved"])))
    )
    return places


@pytest.mark.parametrize(
    "naming", ["saved", "saved_shards", "modules", "modules_shards", "shipped"]
)
def test_every_naming_gives_the_same_parameters(written: dict[str, Path], naming: str) -> None:
    reference = load_file(_weights(written["shipped"]))
    trunk = load_trunk(written[naming], F32, "cpu").state_dict()
    bank = load_experts(written[naming], ALL_EXPERTS, F32, "cpu").state_dict()
    for name, tensor in trunk.items():
        assert torch.equal(tensor, reference.pop(name)), name
    for layer in range(4):
        for expert in ALL_EXPERTS:
            prefix = f"layers.{layer}.ffn.experts.{expert}"
            w1, w3 = reference.pop(f"{prefix}.w1.weight"), reference.pop(f"{prefix}.w3.weight")
            assert torch.equal(bank[f"layers.{layer}.w13"][expert], torch.cat([w1, w3]))
            w2 = reference.pop(f"{prefix}.w2.weight")
            assert torch.equal(bank[f"layers.{layer}.w2"][expert], w2)
    assert not reference


def test_both_config_spellings_describe_the_same_model(
    written: dict[str, Path], tmp_path: Path
) -> None:
    flat = json.loads((written["saved"] / "config.json").read_text())
    for key in ("layer_types", "compress_rates", "mlp_layer_types", "partial_rotary_factor"):
        del flat[key]
    yarn = flat.pop("rope_parameters")["compress"]
    flat |= {
        "compress_ratios": [0, 4, 128, 4, 0],  # the last one is the draft layer's
        "num_hash_layers": 1,
        "qk_rope_head_dim": 8,
        "rope_scaling": {
            key: yarn[key]
            for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        }
        | {"type": "yarn"},
    }
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert load_config(tmp_path) == load_config(written["saved"])


@pytest.mark.parametrize("naming", ["saved", "saved_shards", "modules"])
def test_experts_are_loaded_by_reading_only_their_own_bytes(
    written: dict[str, Path], naming: str
) -> None:
    config = load_config(written[naming])
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size * 4
    with ExpertReader(written[naming], F32, "cpu") as reader:
        bank = reader.read([3, 1])
        assert reader.bytes_read == 2 * config.num_hidden_layers * one_expert
    whole = load_experts(written[naming], ALL_EXPERTS, F32, "cpu").state_dict()
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor, whole[name][[3, 1]])


@pytest.mark.parametrize("naming", ["saved", "saved_shards", "modules"])
def test_a_reader_gives_further_experts_later(written: dict[str, Path], naming: str) -> None:
    whole = load_experts(written[naming], ALL_EXPERTS, F32, "cpu").state_dict()
    with ExpertReader(written[naming], F32, "cpu") as reader:
        for expert in reversed(ALL_EXPERTS):
            for name, tensor in reader.read([expert]).state_dict().items():
                assert torch.equal(tensor, whole[name][[expert]])
        with pytest.raises(CheckpointError, match="not 99"):
            reader.read([99])


def test_the_trunk_is_loaded_without_reading_any_expert(written: dict[str, Path]) -> None:
    config = load_config(written["modules"])
    with CheckpointTensors(written["modules"]) as tensors:
        trunk = read_trunk(tensors, config, F32, "cpu")
        assert tensors.bytes_read == sum(t.nbytes for t in trunk.state_dict().values())


def test_shards_of_other_roles_may_be_absent(written: dict[str, Path], tmp_path: Path) -> None:
    stored = load_file(_weights(written["shipped"]))
    _write_config(tmp_path, written["shipped"])
    weight_map = {}
    for name in stored:
        match = re.search(r"experts\.(\d)\.", name)
        weight_map[name] = f"experts-{match[1]}.safetensors" if match else "trunk.safetensors"
    for file_name in ("trunk.safetensors", "experts-2.safetensors"):
        save_file(
            {n: t for n, t in stored.items() if weight_map[n] == file_name}, tmp_path / file_name
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    load_trunk(tmp_path, F32, "cpu")
    load_experts(tmp_path, [2], F32, "cpu")
    with pytest.raises(CheckpointError, match=r"has no experts-1\.safetensors"):
        load_experts(tmp_path, [1], F32, "cpu")


def test_parameters_that_need_float32_keep_it(written: dict[str, Path]) -> None:
    exact = load_trunk(written["saved"], F32, "cpu").state_dict()
    rounded = load_trunk(written["saved"], BF16, "cpu").state_dict()
    for name, tensor in rounded.items():
        if keeps_float32(name):
            assert tensor.dtype == F32 and torch.equal(tensor, exact[name]), name
    assert rounded["layers.0.attn.wq_a.weight"].dtype == BF16
    assert (
        load_experts(written["saved"], [0], BF16, "cpu").state_dict()["layers.0.w2"].dtype == BF16
    )


def test_loaded_parameters_do_not_hang_on_the_file(
    written: dict[str, Path], tmp_path: Path
) -> None:
    _write(tmp_path, written["saved"], load_file(_weights(written["saved"])))
    trunk = load_trunk(tmp_path, F32, "cpu")
    before = trunk.embed.weight.clone()
    with _weights(tmp_path).open("r+b") as file:
        file.write(b"\0" * 100_000)
    assert torch.equal(trunk.embed.weight, before)


def test_draft_layers_are_ignored(written: dict[str, Path], tmp_path: Path) -> None:
    stored = load_file(_weights(written["shipped"]))
    extra = {"mtp.0.e_proj.weight": torch.ones(2), "mtp.0.ffn.experts.0.w1.scale": torch.ones(1)}
    _write(tmp_path, written["shipped"], stored | extra)
    load_trunk(tmp_path, F32, "cpu")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("layers.1.attn.wq_a.scale", lambda t: torch.ones(1)),
        ("model.layers.1.self_attn.q_a_proj.weight_scale_inv", lambda t: torch.ones(1)),
        ("layers.1.attn.wq_a.weight", lambda t: t.to(torch.float8_e4m3fn)),
        ("layers.1.attn.wq_a.weight", lambda t: t[:, :32].to(torch.int8)),
        ("layers.3.ffn.experts.2.w1.weight", lambda t: t[:, :32].to(torch.int8)),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(
    written: dict[str, Path], tmp_path: Path, name: str, make: Callable[[Tensor | None], Tensor]
) -> None:
    stored = load_file(_weights(written["shipped"]))
    _write(tmp_path, written["shipped"], stored | {name: make(stored.get(name))})
    with pytest.raises(CheckpointError, match="not supported yet") as caught:
        load_trunk(tmp_path, F32, "cpu")
        load_experts(tmp_path, ALL_EXPERTS, F32, "cpu")
    assert name in str(caught.value)


@pytest.mark.parametrize("role", ["trunk", "experts"])
def test_one_error_lists_all_that_does_not_fit(
    written: dict[str, Path], tmp_path: Path, role: str
) -> None:
    stored = load_file(_weights(written["saved"]))
    del stored["model.layers.2.attn.attn_sink"]
    del stored["model.layers.1.ffn.experts.3.w2.weight"]
    stored["model.layers.0.attn.extra.weight"] = torch.ones(1)
    stored["model.layers.7.attn_norm.weight"] = torch.ones(64)
    stored["layers.1.attn_norm.weight"] = torch.ones(64)  # also there as model.layers.1...
    stored["model.norm.weight"] = torch.ones(63)
    _write(tmp_path, written["saved"], stored)
    with pytest.raises(CheckpointError) as caught:
        if role == "trunk":
            load_trunk(tmp_path, F32, "cpu")
        else:
            load_experts(tmp_path, [0], F32, "cpu")
    message = str(caught.value)
    assert "2 missing, 2 unexpected, 1 stored twice, 1 wrongly shaped" in message
    for line in (
        "missing: layers.2.attn.attn_sink",
        "missing: layers.1.ffn.experts.3.w2.weight",
        "unexpected: model.layers.0.attn.extra.weight",
        "unexpected: model.layers.7.attn_norm.weight",
        "stored twice: layers.1.attn_norm.weight",
        "wrong shape: model.norm.weight is [63], not [64]",
    ):
        assert line in message


def test_a_long_list_of_problems_is_cut_and_counted(
    written: dict[str, Path], tmp_path: Path
) -> None:
    stored = load_file(_weights(written["saved"]))
    _write(tmp_path, written["saved"], {n: t for n, t in stored.items() if "layers.3" not in n})
    with pytest.raises(CheckpointError) as caught:
        load_trunk(tmp_path, F32, "cpu")
    num_gone = len([name for name in stored if "layers.3" in name])
    assert f"and {num_gone - 20} more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 22


def test_experts_that_the_model_does_not_have_are_refused(written: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="experts 0 to 3, not 4"):
        load_experts(written["saved"], [0, 4], F32, "cpu")


def test_a_hash_table_that_names_no_expert_is_refused(
    written: dict[str, Path], tmp_path: Path
) -> None:
    stored = load_file(_weights(written["saved"]))
    stored["model.layers.0.ffn.gate.tid2eid"][5, 1] = 4
    _write(tmp_path, written["saved"], stored)
    with pytest.raises(CheckpointError, match="tid2eid holds expert 4, the model has 4"):
        load_trunk(tmp_path, F32, "cpu")


_SHARD = "model-00002-of-00013.safetensors"
_INDEX = "model.safetensors.index.json"


def _edit_index(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        index = json.loads((directory / _INDEX).read_text())
        change(index)
        (directory / _INDEX).write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("naming", "damage", "says"),
    [
        ("saved", lambda d: (d / "config.json").unlink(), "has no config.json"),
        ("saved", lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        ("saved", lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        ("saved", lambda d: (d / "config.json").write_text("[]"), "a JSON object, not list"),
        ("saved", lambda d: _weights(d).unlink(), "has neither model.safetensors nor"),
        ("saved", lambda d: _weights(d).write_bytes(b""), "model.safetensors is not a whole"),
        ("saved", lambda d: _weights(d).write_bytes(b"garbage!" * 99), "header too large"),
        ("saved", lambda d: _truncate(_weights(d)), "model.safetensors is not a whole"),
        ("saved_shards", lambda d: _truncate(d / _SHARD), f"{_SHARD} is not a whole"),
        ("saved_shards", lambda d: (d / _SHARD).unlink(), f"has no {_SHARD}"),
        ("saved_shards", lambda d: (d / _INDEX).write_text("?"), f"{_INDEX} is not JSON"),
        ("saved_shards", _edit_index(lambda i: i.pop("weight_map")), "has no weight_map"),
        (
            "saved_shards",
            _edit_index(lambda i: i["weight_map"].update({"head.weight": "../x"})),
            "places head.weight in '../x'",
        ),
        (
            "saved_shards",
            _edit_index(lambda i: i["weight_map"].update({"head.weight": _SHARD})),
            f"{_SHARD} has no head.weight, though the index says so",
        ),
    ],
)
def test_damage_is_named_with_its_file(
    written: dict[str, Path],
    tmp_path: Path,
    naming: str,
    damage: Callable[[Path], object],
    says: str,
) -> None:
    for path in written[naming].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        load_trunk(tmp_path, F32, "cpu")
    assert str(tmp_path) in str(caught.value)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_trunk(tmp_path / "nowhere", F32, "cpu")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is not a directory"):
        load_config(tmp_path / "file")


def test_a_config_that_makes_no_sense_is_named_with_its_place(
    written: dict[str, Path], tmp_path: Path
) -> None:
    raw = json.loads((written["saved"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"o_groups": 3}))
    with pytest.raises(ConfigError, match="o_groups 3") as caught:
        load_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_transformers_reads_back_what_we_save(
    written: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    config = load_config(written["saved"])
    trunk = load_trunk(written["saved"], F32, "cpu")
    bank = load_experts(written["saved"], [2, 0, 3, 1], F32, "cpu")
    save_checkpoint(tmp_path, config, trunk, bank, dtype)

    model, problems = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, output_loading_info=True
    )
    assert not any(problems.values())
    original = oracle.random_model(CASE)
    for name, tensor in original.state_dict().items():
        stays = keeps_float32(shipped_name(name) or "") or not tensor.is_floating_point()
        expected = tensor if stays else tensor.to(dtype)
        assert torch.equal(model.state_dict()[name].to(tensor.dtype), expected.to(tensor.dtype)), (
            name
        )
    if dtype == F32:
        ids = oracle.token_ids(CASE, 40)
        assert torch.equal(oracle.logits(model, ids), oracle.logits(original, ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_we_save_under_the_names_that_transformers_saves_under(
    written: dict[str, Path], tmp_path: Path
) -> None:
    config = load_config(written["saved"])
    trunk = load_trunk(written["saved"], F32, "cpu")
    bank = load_experts(written["saved"], ALL_EXPERTS, F32, "cpu")
    save_checkpoint(tmp_path, config, trunk, bank, F32)
    ours, theirs = load_file(_weights(tmp_path)), load_file(_weights(written["saved"]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_config(tmp_path) == config


def test_a_bank_with_some_experts_is_no_checkpoint(
    written: dict[str, Path], tmp_path: Path
) -> None:
    bank = load_experts(written["saved"], [0, 1], F32, "cpu")
    trunk = load_trunk(written["saved"], F32, "cpu")
    with pytest.raises(CheckpointError, match="needs all 4 experts, the bank holds 2"):
        save_checkpoint(tmp_path, trunk.config, trunk, bank, F32)


def test_every_saved_name_reads_back_to_its_shipped_name(written: dict[str, Path]) -> None:
    for name in load_file(_weights(written["shipped"])):
        assert shipped_name(name) == name
        assert shipped_name(saved_name(name)) == name


def test_the_config_is_read_without_loading_torch(written: dict[str, Path]) -> None:
    script = (
        "import sys; from model1.checkpoint import load_config; "
        f"load_config({str(written['saved'])!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def _in_shipped_naming(saved: Tensors) -> Tensors:
    """Spelled out here on its own: the hybrid's departures from DeepSeek's names, undone."""
    renames = (
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.hc_head\.hc_", "hc_head_"),
        (r"^model\.", ""),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    )
    shipped = {}
    for name, tensor in saved.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        shipped[name] = tensor
    return shipped


def _weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def _write(directory: Path, config_from: Path, tensors: Tensors) -> None:
    directory.mkdir(exist_ok=True)
    _write_config(directory, config_from)
    save_file(tensors, _weights(directory))


def _write_config(directory: Path, config_from: Path) -> None:
    (directory / "config.json").write_text((config_from / "config.json").read_text())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])
